"""The log-decays of the heads, against numbers worked out by hand."""

import pytest
import torch

from whorl.kernels.lightning import slopes


@pytest.mark.parametrize(
    ("layer", "memory"),
    [(0, (1.1, 16, 256)), (40, (2.2, 32, 519)), (70, (9.6, 140, 2247)), (78, (86, 1263, 20_208))],
)
def test_memory_of_minimax_heads_in_tokens(layer, memory):
    """1 / slope of heads 0, 31 and 63 of 64 at four of 80 layers.

    Head 63 of layer 78: 2^8 / (1 - 78/79 + 1e-5) = 256 / 0.01266823 = 20,208.
    """
    found = 1 / slopes(64, layer, 80).double()[[0, 31, 63]]
    for head, expected in zip(found.tolist(), memory, strict=True):
        assert head == pytest.approx(expected, abs=0.05 if expected < 10 else 0.5)


def test_a_power_of_two_is_one_geometric_series():
    """Four heads: 2^(-8/4) = 1/4, then 1/16, 1/64, 1/256, all times 1 + 1e-5 in the first layer."""
    expected = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256]) * 1.00001
    torch.testing.assert_close(slopes(4, 0, 8), expected)


def test_twelve_heads_take_alibis_interleaving():
    """Eight heads have 2^-1 ... 2^-8; the other four take every second value of the series of sixteen."""
    expected = [2.0**-n for n in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    torch.testing.assert_close(slopes(12, 0, 2), torch.tensor(expected) * 1.00001)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 7, 12, 64])
def test_slopes_are_positive_fp32_and_fall_with_depth(num_heads):
    layers = torch.stack([slopes(num_heads, layer, 8) for layer in range(8)])
    assert layers.dtype == torch.float32
    assert layers.shape == (8, num_heads)
    assert (layers > 0).all()
    assert (layers.diff(dim=0) < 0).all()
    # The last layer's factor is 1 - 1 + 1e-5: it forgets, but hardly.
    torch.testing.assert_close(layers[7] / layers[0], torch.full((num_heads,), 1e-5 / 1.00001))


def test_a_model_of_one_layer_has_the_slopes_of_a_first_layer():
    assert torch.equal(slopes(4, 0, 1), slopes(4, 0, 8))


def test_the_slowest_head_of_eight_layers_remembers_1790_tokens():
    """Layer 6 of 8: 2^8 / (1 - 6/7 + 1e-5) = 256 / 0.14286714 = 1,791.9."""
    assert 1 / float(slopes(64, 6, 8)[-1]) == pytest.approx(256 / (1 / 7 + 1e-5))

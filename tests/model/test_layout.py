"""Packed tokens as padded rows and back."""

import pytest
import torch

from whorl.model.layout import Layout, within


def test_pad_and_unpad_by_hand():
    layout = Layout(torch.tensor([0, 2, 3]))
    rows = layout.pad(torch.tensor([5, 6, 7]))
    assert rows.tolist() == [[5, 6], [7, 0]]
    assert layout.unpad(rows).tolist() == [5, 6, 7]
    assert layout.sequence_N.tolist() == [0, 0, 1]
    assert layout.position_N.tolist() == [0, 1, 0]


@pytest.mark.parametrize("lengths", [(3, 3, 3), (1, 5, 2), (4,), (1, 1)])
def test_unpad_inverts_pad_and_passes_the_gradient(lengths):
    layout = Layout(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]))
    x = torch.arange(2.0 * sum(lengths)).view(-1, 2).requires_grad_()
    rows = layout.pad(x)
    assert rows.shape == (len(lengths), max(lengths), 2)
    assert rows.sum() == x.sum(), "padding is zero"
    back = layout.unpad(rows)
    assert torch.equal(back, x)
    weight = torch.arange(1.0, 1 + x.numel()).view_as(x)
    (grad,) = torch.autograd.grad((back * weight).sum(), x)
    assert torch.equal(grad, weight)


def test_rows_of_equal_length_are_a_view():
    layout = Layout(torch.tensor([0, 3, 6]))
    assert layout.rectangular
    x = torch.zeros(6, 2)
    assert layout.pad(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 3, 3, 5]])
def test_an_empty_sequence_is_refused(offsets):
    with pytest.raises(ValueError, match="each with at least one token"):
        Layout(torch.tensor(offsets))


def test_a_window_of_three_shows_the_query_itself_and_two_before():
    assert within(torch.arange(4), 4, 3).int().tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1],
    ]  # fmt: skip
    assert within(torch.tensor([5]), 7, 2).int().tolist() == [[0, 0, 0, 0, 1, 1, 0]]
    assert within(torch.tensor([2]), 4, None).int().tolist() == [[1, 1, 1, 0]]

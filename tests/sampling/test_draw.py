import math

import numpy as np
import pytest
import torch

from whorl.sampling.draw import DrawSettings, Sampling, draw, stream_key, uniforms

# Probabilities 0.5, 0.25, 0.125, 0.125 in an order that is not sorted.
LOGITS = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()


def draw_many(count: int, **settings) -> np.ndarray:
    """Frequencies of the four tokens over `count` evenly spaced uniforms: exact up to 1 / count."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    rows = DrawSettings.of([Sampling(**settings)] * count)
    tokens = draw(LOGITS.expand(count, 4), uniform, rows).tokens_S
    return np.bincount(tokens.numpy(), minlength=4) / count


def test_tokens_come_as_often_as_their_probabilities_say():
    assert draw_many(800).tolist() == [0.125, 0.5, 0.125, 0.25]


def test_temperature_two_takes_the_square_root_of_the_odds():
    odds = np.sqrt([0.125, 0.5, 0.125, 0.25])
    assert draw_many(10_000, temperature=2.0) == pytest.approx(odds / odds.sum(), abs=2e-4)


def test_top_k_two_keeps_the_two_largest_and_renormalises():
    assert draw_many(600, top_k=2) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=2 / 600)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    assert draw_many(600, top_p=0.6) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=2 / 600)
    assert draw_many(600, top_p=0.49) == pytest.approx([0, 1, 0, 0])


def test_min_p_keeps_what_reaches_its_share_of_the_largest():
    assert draw_many(600, min_p=0.45) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=2 / 600)
    assert draw_many(600, min_p=0.2) == pytest.approx([0.125, 0.5, 0.125, 0.25], abs=2 / 600)


def test_every_filter_keeps_at_least_the_most_probable_token():
    assert draw_many(100, top_p=1e-9, min_p=1.0, top_k=1).tolist() == [0, 1, 0, 0]


def test_temperature_zero_takes_the_most_probable_token_and_reports_temperature_one():
    drawn = draw(
        LOGITS[None], torch.tensor([0.99], dtype=torch.float64), DrawSettings.of([Sampling(temperature=0.0)])
    )
    assert drawn.tokens_S.item() == 1
    assert drawn.logp_S.item() == pytest.approx(math.log(0.5))


def test_log_probs_are_over_the_whole_vocabulary_whatever_is_truncated():
    settings = DrawSettings.of([Sampling(temperature=2.0, top_k=1)])
    drawn = draw(LOGITS[None], torch.tensor([0.5], dtype=torch.float64), settings)
    odds = np.sqrt([0.125, 0.5, 0.125, 0.25])
    assert drawn.logp_S.item() == pytest.approx(math.log(odds[1] / odds.sum()), abs=1e-6)
    assert drawn.raw_logp_S.item() == pytest.approx(math.log(0.5), abs=1e-6)


def test_a_row_is_drawn_the_same_beside_any_neighbour():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 30, generator=generator)
    uniform = torch.rand(50, generator=generator, dtype=torch.float64)
    kinds = [Sampling(), Sampling(top_p=0.7), Sampling(temperature=0.0), Sampling(temperature=1.3, min_p=0.1)]
    rows = [kinds[i % 4] for i in range(50)]
    together = draw(logits, uniform, DrawSettings.of(rows))
    for i in range(50):
        alone = draw(logits[i : i + 1], uniform[i : i + 1], DrawSettings.of([rows[i]]))
        assert alone.tokens_S.item() == together.tokens_S[i].item()
        assert alone.logp_S.item() == pytest.approx(together.logp_S[i].item(), abs=1e-6)


def test_a_stream_can_be_entered_anywhere():
    whole = uniforms(stream_key(1, 2, 3), 0, 200)
    for start in (0, 1, 3, 4, 7, 64, 130):
        assert uniforms(stream_key(1, 2, 3), start, 50).tolist() == whole[start : start + 50].tolist()


def test_streams_of_different_addresses_are_unrelated():
    one, other = uniforms(stream_key(0, 1, 12), 0, 4000), uniforms(stream_key(0, 11, 2), 0, 4000)
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(4000)
    assert abs(one.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 4000)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"), ({"max_tokens": 0}, "max_tokens"), ({"stop_strings": ("",)}, "stop string"),
        ({"repetition_probability": 1.0}, "repetition_probability"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(settings, word):
    with pytest.raises(ValueError, match=word):
        Sampling(**settings)

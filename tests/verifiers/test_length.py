import pytest

from whorl.verifiers.length import exact_length, within_length


@pytest.mark.parametrize(
    ("num_tokens", "reward"), [(1000, 1.0), (900, 1 - 100 * 3e-4), (1200, 1 - 200 * 3e-4), (11_000, 1 - 3.0)]
)
def test_exact_length_charges_for_every_token_off_the_target(num_tokens: int, reward: float) -> None:
    score = exact_length(1.0, num_tokens, 1000)
    assert score.reward == pytest.approx(reward)
    assert score.parts["correct"] - score.parts["length_penalty"] == pytest.approx(reward)


def test_within_length_pays_half_at_the_target_and_nothing_for_a_short_wrong_answer() -> None:
    assert within_length(1.0, 1000, 1000).reward == 0.5
    assert within_length(1.0, 0, 1000).reward == pytest.approx(0.5 + 1000 * 3e-4)
    assert within_length(1.0, 1, 100_000).reward == 1.0
    assert within_length(1.0, 100_000, 1000).reward == 0.0
    assert within_length(0.0, 1, 1000).reward == 0.0


def test_a_target_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="target_tokens=0"):
        exact_length(1.0, 5, 0)

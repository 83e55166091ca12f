"""What a judge pays for length, found at equal answers: against least squares with dummy variables."""

import numpy as np
import pytest

from whorl.verifiers.length_bias import Graded, slope_at_equal_answers


def graded(rng: np.random.Generator, paid: float, noise: float = 0.1, num_cells: int = 40) -> list[Graded]:
    """Answers of which longer ones are more often right, with a grade for being right and for length."""
    found = []
    for cell in range(num_cells):
        right = rng.random() < 0.5
        for number in range(int(rng.integers(1, 7))):
            length = int(rng.integers(5, 20)) + 20 * right
            reward = 0.5 * right + paid * length + noise * rng.standard_normal()
            found.append(Graded((cell, right), f"{cell} {number}", length, reward))
    return found


def least_squares(sample: list[Graded]) -> tuple[float, float]:
    """Slope and standard error of reward = a_cell + b length, solved whole."""
    cells = sorted({one.cell for one in sample})
    design = np.array(
        [[one.length, *(one.cell == cell for cell in cells)] for one in sample], dtype=np.float64
    )
    reward = np.array([one.reward for one in sample])
    solution, *_ = np.linalg.lstsq(design, reward, rcond=None)
    residual = reward - design @ solution
    variance = residual @ residual / (len(sample) - len(cells) - 1) * np.linalg.inv(design.T @ design)
    return solution[0], variance[0, 0] ** 0.5


@pytest.mark.parametrize("seed", range(10))
def test_the_slope_is_that_of_least_squares_with_an_intercept_for_each_cell(seed: int) -> None:
    sample = graded(np.random.default_rng(seed), paid=0.01)
    np.testing.assert_allclose(slope_at_equal_answers(sample), least_squares(sample), rtol=1e-9)


def test_that_longer_answers_are_right_more_often_is_not_taken_for_bias() -> None:
    scores, naive = [], []
    for seed in range(40):
        sample = graded(np.random.default_rng(seed), paid=0.0)
        slope = slope_at_equal_answers(sample)
        scores.append(slope.value / slope.standard_error)
        naive.append(np.polyfit([one.length for one in sample], [one.reward for one in sample], 1)[0])
    # Student's t with over 80 degrees of freedom: 3.5 is passed once in 1,400 draws.
    assert np.abs(scores).max() < 3.5 and np.std(scores) == pytest.approx(1.0, abs=0.4)
    # Without the cells every sample looks biased: 1/2 for 20 more.
    assert min(naive) > 0.01


def test_by_hand_and_a_reply_that_is_repeated_counts_once() -> None:
    # Lengths -1, 0, 1 about their mean with rewards 0, 1, 2 / 10, and a cell of one, which says nothing.
    sample = [
        Graded((0,), text, length, reward)
        for text, length, reward in (("a", 1, 0.0), ("b", 2, 0.1), ("c", 3, 0.2))
    ]
    alone = Graded((1,), "d", 90, 1.0)
    assert slope_at_equal_answers([*sample, alone, *sample[:1] * 50]).value == pytest.approx(1 / 10)


def test_where_nothing_can_be_compared_nothing_is_found() -> None:
    for sample in ([], [Graded((0,), "a", 1, 1.0)], [Graded((0,), "a", 3, 1.0), Graded((0,), "b", 3, 0.0)]):
        assert slope_at_equal_answers(sample) == (0.0, float("inf"))

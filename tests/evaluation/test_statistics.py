"""Estimates against numbers worked by hand, and intervals against the share of times they should hold the truth."""

import itertools
import math
from statistics import fmean

import numpy as np
import pytest

from whorl.evaluation import statistics as stats


def test_wilson_at_zero_of_n_is_zero_to_z_squared_over_n_plus_z_squared() -> None:
    z2 = 1.959964**2
    estimate = stats.wilson(0, 20)
    assert (estimate.value, estimate.low) == (0.0, 0.0)
    assert estimate.high == pytest.approx(z2 / (20 + z2), rel=1e-6)


def test_wilson_of_half_is_symmetric_and_matches_the_formula() -> None:
    # p = 1/2, n = 10: centre 1/2, half width z sqrt(1/40 + z²/400) / (1 + z²/10) = 0.2634.
    estimate = stats.wilson(5, 10)
    assert estimate.low == pytest.approx(0.2366, abs=5e-5)
    assert estimate.high == pytest.approx(0.7634, abs=5e-5)
    assert stats.wilson(20, 20).high == 1.0


def test_wilson_covers_95_percent_where_the_normal_interval_does_not() -> None:
    rng = np.random.default_rng(0)
    share, trials = 0.05, 40
    wilson_holds, normal_holds = [], []
    for successes in rng.binomial(trials, share, 2_000):
        estimate = stats.wilson(int(successes), trials)
        wilson_holds.append(estimate.low <= share <= estimate.high)
        half = 1.96 * math.sqrt(estimate.value * (1 - estimate.value) / trials)
        normal_holds.append(abs(estimate.value - share) <= half)
    assert np.mean(wilson_holds) > 0.93
    assert np.mean(normal_holds) < 0.90


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 - 3 / 6),  # C(3,2)/C(4,2)
        (5, 2, 3, 1 - 1 / 10),  # C(3,3)/C(5,3)
        (5, 3, 3, 1.0),  # only two are wrong, so three draws hold a right one
        (5, 0, 5, 0.0),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k_equals_the_binomial_formula(n: int, c: int, k: int, expected: float) -> None:
    assert stats.pass_at_k_of_problem(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_average_over_all_ways_to_draw_k_samples() -> None:
    verdicts = [1, 0, 0, 1, 0, 0, 0]
    draws = list(itertools.combinations(verdicts, 3))
    assert stats.pass_at_k_of_problem(7, 2, 3) == pytest.approx(fmean(any(draw) for draw in draws))


def test_pass_at_k_is_unbiased_and_the_plug_in_estimate_is_not() -> None:
    # A problem solved with probability 0.2, 4 samples: every outcome weighted by its probability.
    p, n, k = 0.2, 4, 2
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    ours = sum(w * stats.pass_at_k_of_problem(n, c, k) for c, w in enumerate(weights))
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
    truth = 1 - (1 - p) ** k
    assert ours == pytest.approx(truth, abs=1e-12)
    assert plug_in < truth - 0.03


def test_pass_at_k_does_not_overflow_for_many_samples() -> None:
    assert stats.pass_at_k_of_problem(100_000, 1, 50_000) == pytest.approx(0.5)


def test_avg_at_k_and_pass_at_k_over_problems() -> None:
    correct = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    # avg: (1/4 + 2/4 + 0) / 3; pass@2: (3/6 + 5/6 + 0) / 3
    assert stats.avg_at_k(correct).value == pytest.approx(1 / 4)
    estimate = stats.pass_at_k(correct, 2)
    assert estimate.value == pytest.approx(4 / 9)
    assert 0 <= estimate.low < 4 / 9 < estimate.high <= 5 / 6
    assert stats.avg_at_k([[2.5], [0.5, 1.5]]).value == pytest.approx(1.75)  # problems weigh the same
    arrays = [np.array(verdicts) >= 1 for verdicts in correct]
    assert stats.pass_at_k(arrays, 2) == estimate


def test_the_bootstrap_resamples_problems_and_not_samples() -> None:
    """20 problems of 50 equal samples carry as much as 20 samples: treating 1,000 as independent is the bug."""
    rng = np.random.default_rng(0)
    holds_by_problem, holds_by_sample = [], []
    for _ in range(200):
        solved = rng.random(20) < 0.5
        correct = [[int(s)] * 50 for s in solved]
        by_problem = stats.avg_at_k(correct)
        holds_by_problem.append(by_problem.low <= 0.5 <= by_problem.high)
        by_sample = stats.wilson(int(solved.sum()) * 50, 1_000)
        holds_by_sample.append(by_sample.low <= 0.5 <= by_sample.high)
    assert np.mean(holds_by_problem) > 0.88
    assert np.mean(holds_by_sample) < 0.45


def test_an_interval_is_the_same_for_the_same_seed_and_moves_with_it() -> None:
    values = list(np.random.default_rng(1).random(30))
    assert stats.bootstrap(values, seed=3) == stats.bootstrap(values, seed=3)
    assert stats.bootstrap(values, seed=3) != stats.bootstrap(values, seed=4)


def test_all_problems_solved_is_not_certainty() -> None:
    estimate = stats.avg_at_k([[1, 1]] * 10)
    assert estimate == stats.wilson(10, 10)
    assert estimate.low == pytest.approx(10 / (10 + 1.959964**2), rel=1e-6)
    assert stats.bootstrap([1.0] * 10).low == 1.0  # what the bootstrap alone would have claimed


def test_the_interquartile_mean_drops_a_quarter_at_either_end() -> None:
    assert stats.interquartile_mean([0, 1, 2, 3, 4, 5, 6, 1_000]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert stats.interquartile_mean([5, 1, 3, 100, 2]) == pytest.approx((2 + 3 + 5) / 3)  # 5 // 4 = 1 cut
    assert stats.interquartile_mean([1, 2, 6]) == pytest.approx(3)
    estimate = stats.bootstrap([0, 1, 2, 3, 4, 5, 6, 1_000], interquartile=True)
    assert estimate.value == pytest.approx(3.5)
    assert estimate.high < 300 < stats.bootstrap([0, 1, 2, 3, 4, 5, 6, 1_000]).high


@pytest.mark.parametrize(
    ("probability", "degrees", "t"),
    [
        (0.975, 1, 12.70620),
        (0.975, 2, 4.302653),
        (0.975, 4, 2.776445),
        (0.95, 10, 1.812461),
        (0.995, 3, 5.840909),
        (0.975, 1_000, 1.962339),
        (0.5, 7, 0.0),
    ],
)
def test_student_quantiles_are_those_of_printed_tables(probability: float, degrees: int, t: float) -> None:
    assert stats.student_quantile(probability, degrees) == pytest.approx(t, rel=1e-6, abs=1e-9)


def test_three_seeds_give_the_interval_worked_by_hand() -> None:
    # 1, 2, 3: mean 2, sample std 1, half width 4.302653 / sqrt(3) = 2.484138
    estimate = stats.over_seeds([1, 2, 3])
    assert estimate.value == 2
    assert estimate.high - estimate.value == pytest.approx(2.484138, rel=1e-6)


def test_with_three_seeds_student_covers_95_percent_and_the_bootstrap_about_two_thirds() -> None:
    rng = np.random.default_rng(0)
    student, percentile = [], []
    for runs in rng.normal(size=(400, 3)).tolist():
        estimate = stats.over_seeds(runs)
        student.append(estimate.low <= 0 <= estimate.high)
        # All 27 resamples of three values: the bootstrap distribution itself, so that the test stays quick.
        means = [fmean(draw) for draw in itertools.product(runs, repeat=3)]
        low, high = np.quantile(means, [0.025, 0.975])
        percentile.append(low <= 0 <= high)
    assert 0.92 < np.mean(student) < 0.98
    assert 0.6 < np.mean(percentile) < 0.75


def test_pairing_finds_a_difference_that_the_scatter_of_seeds_hides() -> None:
    baseline = [0.10, 0.50, 0.90]
    method = [0.13, 0.52, 0.94]  # better by 0.03, 0.02, 0.04: mean 0.03, s = 0.01
    paired = stats.paired_difference(method, baseline)
    assert paired.value == pytest.approx(0.03)
    assert paired.low == pytest.approx(0.03 - 4.302653 * 0.01 / math.sqrt(3), rel=1e-5)
    assert paired.low > 0
    assert stats.over_seeds(baseline).high > stats.over_seeds(method).low  # unpaired, they overlap


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.wilson(3, 2), "got 3 of 2"),
        (lambda: stats.wilson(0, 0), "trials > 0"),
        (lambda: stats.pass_at_k_of_problem(4, 1, 5), "k=5"),
        (lambda: stats.pass_at_k([[0.5, 1.0]], 1), "right or wrong"),
        (lambda: stats.avg_at_k([[1.0], []]), "a problem has no samples"),
        (lambda: stats.bootstrap([]), "at least one"),
        (lambda: stats.bootstrap([float("nan")]), "finite"),
        (lambda: stats.over_seeds([1.0]), "at least two runs"),
        (lambda: stats.paired_difference([1.0, 2.0], [1.0]), "2 values of the method, 1 of the baseline"),
        (lambda: stats.wilson(1, 2, confidence=95), "such as 0.95"),
    ],
)
def test_what_has_no_answer_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

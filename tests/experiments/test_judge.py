"""Verdicts on made-up trials whose truth is known."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.experiments.tiny_recipe import EXPERIMENTS
from whorl.evaluation.statistics import Estimate, bootstrap
from whorl.experiments.judge import Result, compare_pairs, decide, judge_claim, summary_of
from whorl.experiments.plan import Claim, Measure
from whorl.experiments.readings import AtLeast, last

SCRIPTED = EXPERIMENTS[0]
STEPS = SCRIPTED.measure("steps")


def results(method: Sequence[float], baseline: Sequence[float], measure: str = "accuracy") -> list[Result]:
    rows = [("better", method), ("plain", baseline)]
    return [Result(arm, seed, "k", values={measure: v}) for arm, vs in rows for seed, v in enumerate(vs)]


def verdict(claim: Claim, method: Sequence[float], baseline: Sequence[float]) -> str:
    return judge_claim(SCRIPTED, claim, results(method, baseline, claim.measure)).verdict


HIGHER = Claim("c", "", "accuracy", "better", "plain")


def test_a_worked_example_of_three_pairs():
    # Differences 0.1, 0.2, 0.3: mean 0.2, sample std 0.1, t(2) = 4.3027: 0.2 +- 4.3027 * 0.1 / sqrt(3) = 0.2484
    judged = judge_claim(SCRIPTED, HIGHER, results([0.6, 0.8, 1.0], [0.5, 0.6, 0.7]))
    assert judged.ours == pytest.approx((0.2, 0.2 - 0.24842, 0.2 + 0.24842), abs=1e-4)
    assert judged.verdict == "undecided" and judged.num_pairs == 3
    # A fourth and fifth pair of the same mean: s stays 0.1 / sqrt(2), t(4) = 2.7764: half width 0.0878
    judged = judge_claim(SCRIPTED, HIGHER, results([0.6, 0.8, 1.0, 0.8, 0.8], [0.5, 0.6, 0.7, 0.6, 0.6]))
    assert judged.ours == pytest.approx((0.2, 0.2 - 0.0878, 0.2 + 0.0878), abs=1e-4)
    assert judged.verdict == "reproduced"


@pytest.mark.parametrize(
    ("interval", "expects", "margin", "expected"),
    [
        ((0.01, 0.2), "higher", 0.0, "reproduced"),
        ((0.01, 0.2), "higher", 0.1, "reproduced"),
        ((0.01, 0.05), "higher", 0.1, "tied"),  # there, but too small to matter
        ((-0.01, 0.2), "higher", 0.0, "undecided"),
        ((-0.01, 0.2), "higher", 0.1, "undecided"),
        ((-0.09, 0.09), "higher", 0.1, "tied"),  # what would matter is excluded on both sides
        ((-0.09, 0.09), "lower", 0.1, "tied"),
        ((-0.3, 0.09), "higher", 0.1, "undecided"),  # not better by the margin, but perhaps worse by it
        ((-1e-9, 1e-9), "higher", 0.0, "undecided"),  # without a margin every difference matters
        ((-0.2, -0.01), "higher", 0.0, "contradicted"),
        ((-0.05, -0.01), "higher", 0.1, "tied"),
        ((-0.2, -0.01), "lower", 0.0, "reproduced"),
        ((0.01, 0.2), "lower", 0.0, "contradicted"),
        ((-0.04, 0.05), "equal", 0.05, "reproduced"),
        ((-0.04, 0.06), "equal", 0.05, "undecided"),
        ((0.06, 0.2), "equal", 0.05, "contradicted"),
        ((0.01, 0.04), "equal", 0.05, "reproduced"),  # there, and too small to matter
        ((0.0, 0.0), "higher", 0.0, "tied"),
    ],
)
def test_the_rules_of_verdicts(interval, expects, margin, expected):
    low, high = interval
    assert decide(Estimate((low + high) / 2, low, high), expects, margin)[0] == expected


def rates(
    draw, expects: str, margin: float, num_experiments: int = 4000, compare=compare_pairs
) -> dict[str, float]:
    """Shares of verdicts over experiments of five pairs; `draw(rng, shape)` gives the differences."""
    rng = np.random.default_rng(0)
    differences = draw(rng, (num_experiments, 5))
    measure = Measure("m", "", last("m"))
    counts: dict[str, float] = dict.fromkeys(("reproduced", "tied", "undecided", "contradicted"), 0.0)
    for row in differences:
        compared = compare(measure, [(float(d), 0.0) for d in row])
        counts[decide(compared, expects, margin)[0]] += 1 / num_experiments
    return counts


def test_where_nothing_differs_few_claims_are_called_reproduced():
    found = rates(lambda rng, shape: rng.normal(0, 0.05, shape), "higher", 0.0)
    assert found["reproduced"] == pytest.approx(0.025, abs=0.01)
    assert found["contradicted"] == pytest.approx(0.025, abs=0.01)
    assert found["undecided"] == pytest.approx(0.95, abs=0.015) and not found["tied"]
    # With a margin of ten standard deviations of the mean the same seeds exclude what would matter.
    assert rates(lambda rng, shape: rng.normal(0, 0.05, shape), "higher", 0.224)["tied"] > 0.9
    # Accuracies of 64 problems, in steps of 1/64, as a run of our size gives them.
    noise = lambda rng, shape: (rng.binomial(64, 0.8, shape) - rng.binomial(64, 0.8, shape)) / 64  # noqa: E731
    assert rates(noise, "higher", 0.0)["reproduced"] <= 0.04


def test_the_rate_of_false_claims_catches_an_interval_that_is_too_narrow(monkeypatch):
    monkeypatch.setattr("whorl.evaluation.statistics.NUM_RESAMPLES", 300)
    draw = lambda rng, shape: rng.normal(0, 0.05, shape)  # noqa: E731
    resampled = lambda measure, pairs: bootstrap([m - b for m, b in pairs])  # noqa: E731
    found = rates(draw, "higher", 0.0, 1000, resampled)
    assert found["reproduced"] > 0.05


def test_a_lopsided_scatter_of_seeds_is_what_the_interval_is_worst_at():
    # Exponential differences of mean 0: five seeds are few, and Student's level suffers. Said here, not hidden.
    skewed = rates(lambda rng, shape: rng.exponential(1.0, shape) - 1.0, "lower", 0.0)
    assert 0.05 < skewed["reproduced"] < 0.15
    assert rates(lambda rng, shape: rng.exponential(1.0, shape) - 1.0, "higher", 0.0)["reproduced"] < 0.025


def test_a_large_difference_is_found_and_a_claim_of_its_opposite_contradicted():
    draw = lambda rng, shape: rng.normal(0.1, 0.05, shape)  # noqa: E731  (two standard deviations)
    found = rates(draw, "higher", 0.05)
    assert found["reproduced"] > 0.9 and found["contradicted"] < 0.001
    assert rates(draw, "lower", 0.05)["contradicted"] > 0.9


def test_equality_is_seldom_claimed_of_what_differs_by_the_margin():
    at_margin = rates(lambda rng, shape: rng.normal(0.05, 0.02, shape), "equal", 0.05)
    assert at_margin["reproduced"] <= 0.03
    assert rates(lambda rng, shape: rng.normal(0.0, 0.02, shape), "equal", 0.05)["reproduced"] > 0.8
    assert rates(lambda rng, shape: rng.normal(0.15, 0.02, shape), "equal", 0.05)["contradicted"] > 0.9


def test_ratios_are_compared_by_their_logarithms():
    # Half the steps in every pair, up to noise: 50/100, 40/100, 62.5/100 have geometric mean 1/2.
    claim = Claim("half", "2x", "steps", "better", "plain", "lower", 1.1)
    judged = judge_claim(SCRIPTED, claim, results([50.0, 40.0, 62.5], [100.0, 100.0, 100.0], "steps"))
    assert judged.ours is not None and judged.ours.value == pytest.approx(0.5)
    assert judged.ours.value**2 == pytest.approx(judged.ours.low * judged.ours.high)
    assert judged.verdict == "reproduced"
    assert verdict(replace(claim, expects="higher"), [50.0, 40.0, 62.5], [100.0] * 3) == "contradicted"
    assert verdict(claim, [0.0, 40.0], [100.0, 100.0]) == "not testable here"


def test_a_threshold_that_the_baseline_never_reached_speaks_for_the_method_and_not_the_other_way_round():
    claim = Claim("sooner", "", "steps", "better", "plain", "lower", 1.1)
    soon, never = [50.0, 52.0, 54.0], [AtLeast(100), AtLeast(100), AtLeast(100)]
    assert verdict(claim, soon, never) == "reproduced"
    # The method has at least 100 steps: it might have any number more, so it cannot be called sooner or equal.
    assert verdict(claim, never, [200.0, 210.0, 190.0]) == "undecided"
    assert verdict(claim, [200.0, 210.0, 190.0], [100.0, 101.0, 99.0]) == "contradicted"
    assert verdict(claim, never, soon) == "contradicted"
    equal = replace(claim, expects="equal", margin=1.2)
    assert verdict(equal, never, [100.0, 101.0, 99.0]) == "undecided"
    for one in (claim, equal):
        judged = judge_claim(SCRIPTED, one, results(never, never, "steps"))
        assert (judged.verdict, judged.why) == ("undecided", "no run of either arm reached the threshold")
    open_sides = judge_claim(SCRIPTED, claim, results(soon, never, "steps"))
    assert (open_sides.method_open, open_sides.baseline_open) == (False, True)
    assert "no run" not in judge_claim(SCRIPTED, claim, results(soon, never, "steps")).why


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        (HIGHER, "tied"),
        (replace(HIGHER, margin=0.1), "tied"),
        (replace(HIGHER, expects="equal", margin=0.1), "reproduced"),
    ],
)
def test_pairs_that_are_exactly_equal_are_said_to_be(claim, expected):
    same = judge_claim(SCRIPTED, claim, results([0.3, 0.7], [0.3, 0.7]))
    assert (same.verdict, same.why) == (expected, "all pairs are exactly equal")
    nearly = judge_claim(SCRIPTED, claim, results([0.3, 0.7], [0.3, 0.70001]))
    assert nearly.why != same.why


def test_a_trial_that_failed_where_the_other_arm_has_none_leaves_no_verdict_either():
    fine = results([0.9, 0.91, 0.92], [0.5, 0.51, 0.52])
    assert judge_claim(SCRIPTED, HIGHER, fine).verdict == "reproduced"
    for arm in ("better", "plain"):
        judged = judge_claim(SCRIPTED, HIGHER, [*fine, Result(arm, 3, "k", reason="weights not finite")])
        assert (
            judged.verdict == "not testable here"
            and f"{arm} at seed 3 has no accuracy: weights" in judged.why
        )
    unread = Result("plain", 3, "k", unread={"accuracy": "no row has it"})
    assert "no row has it" in judge_claim(SCRIPTED, HIGHER, [*fine, unread]).why
    # A seed that one arm alone has, in order, is no pair and stands in no verdict's way.
    alone = judge_claim(SCRIPTED, HIGHER, [*fine, Result("better", 3, "k", values={"accuracy": 0.0})])
    assert (alone.verdict, alone.num_pairs) == ("reproduced", 3)


def test_a_failed_trial_leaves_no_verdict_and_a_missing_arm_is_said_to_be_missing():
    fine = results([0.9, 0.91, 0.92], [0.5, 0.51, 0.52])
    broken = [*fine[:-1], replace(fine[-1], values={}, reason="weights not finite")]
    judged = judge_claim(SCRIPTED, HIGHER, broken)
    assert judged.verdict == "not testable here" and "plain at seed 2 has no accuracy: weights" in judged.why
    unread = [*fine[:-1], replace(fine[-1], values={}, unread={"accuracy": "no row has it"})]
    assert "no row has it" in judge_claim(SCRIPTED, HIGHER, unread).why
    assert judge_claim(SCRIPTED, HIGHER, fine[:3]).verdict == "not run"
    assert judge_claim(SCRIPTED, HIGHER, [fine[0], fine[3]]).why == "one seed has no interval"
    assert judge_claim(SCRIPTED, SCRIPTED.claims[-1], fine).why == "that model does not fit"


def test_seeds_are_paired_and_not_averaged_first():
    # Each seed has a level of its own, ten times the difference; unpaired, nothing could be seen.
    levels = [0.1, 0.5, 0.9, 0.3, 0.7]
    assert (
        verdict(HIGHER, [level + 0.02 + 0.001 * i for i, level in enumerate(levels)], levels) == "reproduced"
    )
    shuffled = [levels[i] for i in (1, 2, 3, 4, 0)]
    assert verdict(HIGHER, [level + 0.02 for level in levels], shuffled) == "undecided"


def test_the_interquartile_mean_comes_with_ten_seeds():
    mean, quartiles = summary_of([0.0, *[0.5] * 8, 10.0])
    assert mean.value == pytest.approx(1.4) and quartiles is not None and quartiles.value == 0.5
    assert summary_of([0.5] * 9)[1] is None
    alone, none = summary_of([0.5])
    assert alone.value == 0.5 and math.isnan(alone.low) and none is None


def test_a_result_survives_being_written():
    found = Result("a", 1, "k", values={"steps": AtLeast(7), "accuracy": 0.5}, curves={"x": [[0], [1.0]]})
    again = Result.from_dict(found.to_dict())
    assert again == found
    assert isinstance(again.values["steps"], AtLeast) and not isinstance(again.values["accuracy"], AtLeast)

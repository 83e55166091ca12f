"""The report of an experiment: tables that can be checked by hand, and the curves behind the picture."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.experiments.tiny_recipe import BASE, EXPERIMENTS
from whorl.evaluation.statistics import Estimate
from whorl.experiments.curves import COLOURS, banded_arms, draw_curves, mean_curve, styles_of, within_bounds
from whorl.experiments.judge import Result
from whorl.experiments.plan import Arm
from whorl.experiments.readings import AtLeast
from whorl.experiments.report import (
    bands_text,
    cost_line,
    cost_table,
    difference_table,
    estimate_text,
    measure_table,
    number,
    seeds_text,
    sources_text,
    unread_lines,
    what_is_equal,
)

SCRIPTED = EXPERIMENTS[0]


def result(arm: str, seed: int, accuracy: float, steps: float = 2.0, curve: list | None = None) -> Result:
    values = {"accuracy": accuracy, "steps": steps}
    curves = {"eval_accuracy": curve} if curve else {}
    return Result(
        arm, seed, "k", values=values, curves=curves, cost={"generated_tokens": 1000.0, "seconds": 3.0}
    )


RESULTS = [
    result("better", 0, 0.6, 1.0), result("better", 1, 0.8, 1.0), result("better", 2, 1.0, 1.0),
    result("plain", 0, 0.5, 2.0), result("plain", 1, 0.6, AtLeast(4.0)), result("plain", 2, 0.7, 2.0),
]  # fmt: skip


def test_each_arm_has_its_mean_with_an_interval_and_its_difference_in_pairs():
    rows = {line.split("|")[1].strip(): line for line in measure_table(SCRIPTED, RESULTS)}
    # 0.8 +- 4.3027 * 0.2 / sqrt(3) = 0.497
    assert "0.800 [0.303, 1.297]" in rows["better (method)"]
    assert "1 of 3 never reached it and count as the whole budget" in rows["plain (baseline)"]
    assert set(rows) == {
        "arm",
        "---",
        "better (method)",
        "plain (baseline)",
    }  # nothing of arms that were not run
    (_, _, row) = difference_table(SCRIPTED, RESULTS)
    # 0.1, 0.2, 0.3; and ratios 1/2, 1/4, 1/2 with geometric mean 2^(-4/3) = 0.397
    assert "+0.200 [-0.048, 0.448]" in row and "x0.397 [" in row and "or less" in row


def test_the_cost_of_an_arm_is_per_trial_and_in_all():
    assert cost_table(SCRIPTED, RESULTS)[2] == "| better | 1,000 | – | 3.0 | 9 |"
    # New results say what their processes took and what was taught: 60 s and 500 tokens each.
    new = [replace(r, cost={**r.cost, "trial_seconds": 60.0, "taught_tokens": 500.0}) for r in RESULTS]
    assert cost_table(SCRIPTED, new)[2] == "| better | 1,000 | 500 | 3.0 | 180 |"
    starts = {"a": {"seconds": 30.0}, "b": {"seconds": 90.0}}
    assert cost_line(new, starts) == "Trials and starts took 8 minutes of one process."
    failed = Result("stops", 0, "k", reason="it stopped", cost={"trial_seconds": 120.0})
    assert cost_line([*new, failed], {}) == "Trials took 8 minutes of one process."
    assert cost_table(SCRIPTED, [*new, failed]) == cost_table(SCRIPTED, new)
    assert cost_line(RESULTS, {}).endswith("Of 6 of 6 trials steps and evaluations alone were timed.")


def test_a_band_is_over_seeds_at_the_points_that_all_reach():
    own = [
        result("better", 0, 0, curve=[[0, 2, 4], [0.0, 0.2, 0.4]]),
        result("better", 1, 0, curve=[[0, 4], [0.2, 0.6]]),
        result("better", 2, 0, curve=[[0, 2, 4, 6], [0.1, 0.3, 0.5, 0.9]]),
    ]
    x_T, mean_T, low_T, high_T = mean_curve(own, "eval_accuracy")
    assert x_T.tolist() == [0, 2, 4]
    np.testing.assert_allclose(mean_T, [0.1, 0.3, 0.5])
    np.testing.assert_allclose(high_T - mean_T, 4.30265 * 0.1 / np.sqrt(3), rtol=1e-4)
    np.testing.assert_allclose(mean_T - low_T, high_T - mean_T)
    _, mean_T, low_T, _ = mean_curve(own[:1], "eval_accuracy")
    assert (mean_T == low_T).all()


def test_a_band_ends_where_its_metric_does():
    mean, low, high = np.array([0.1, 0.5, 0.95]), np.array([-0.2, 0.3, 0.8]), np.array([0.4, 0.7, 1.1])
    cut = within_bounds("eval_accuracy", mean, low, high)
    assert cut[0].tolist() == [0.0, 0.3, 0.8] and cut[1].tolist() == [0.4, 0.7, 1.0]
    cut = within_bounds("response_tokens", mean, low, high)
    assert cut[0].tolist() == [0.0, 0.3, 0.8] and cut[1].tolist() == high.tolist()
    assert within_bounds("no such metric", mean, low, high)[0].tolist() == low.tolist()
    # What is itself below 0 is not cut off.
    assert within_bounds("response_tokens", mean - 0.2, low, high)[0][0] == pytest.approx(-0.1)


def test_bands_are_of_few_arms_or_of_those_that_claims_name():
    arms = [f"arm_{number}" for number in range(6)]
    assert banded_arms(SCRIPTED, arms[:5]) == set(arms[:5])
    assert banded_arms(SCRIPTED, [*arms, "better", "plain"]) == {"better", "plain"}
    many = replace(SCRIPTED, claims=(), arms=(*(Arm(name, "control") for name in arms), *SCRIPTED.arms))
    assert banded_arms(many, [*arms, "better"]) == set()
    results = [result(arm, 0, 0, curve=[[0], [0.5]]) for arm in [*arms, "better"]]
    assert "hide each other" in bands_text(many, results) and "with its" in bands_text(SCRIPTED, results[:2])


def test_no_two_arms_are_drawn_alike():
    styles = styles_of([f"arm_{number}" for number in range(20)], "arm_3")
    assert len(set(styles.values())) == 20 and styles["arm_3"] == ("black", 0)
    assert len({turn for _, turn in list(styles.values())[:3]}) == 3


def test_curves_that_lie_on_each_other_are_both_seen():
    curve = [[0, 9], [0.2, 0.8]]
    picture = draw_curves(SCRIPTED, [result(arm, 0, 0, curve=curve) for arm in ("better", "plain", "stops")])
    assert picture is not None
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)[:200]  # above the legend
    for colour in ("#000000", *COLOURS[:2]):
        wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(axis=2) < 24).any(axis=0)[200:].sum() > 10, colour


def test_at_equal_tokens_curves_are_drawn_over_tokens():
    one = Result(
        "better",
        0,
        "k",
        curves={"eval_accuracy": [[0, 2], [0.0, 1.0]], "tokens_so_far": [[0, 1, 2], [0, 30, 90]]},
    )
    assert mean_curve([one], "eval_accuracy", by_tokens=True)[0].tolist() == [0, 90]


def test_a_picture_is_drawn_if_there_is_a_curve():
    assert draw_curves(SCRIPTED, RESULTS) is None
    picture = draw_curves(SCRIPTED, [result("better", 0, 0.5, curve=[[0, 1], [0.1, 0.2]])])
    assert picture is not None and picture[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (0.00012, "1.2e-04"),
        (0.0, "0.000"),
        (float("inf"), "∞"),
        (6_906_145_008_517_120.0, "6.91e15"),
        (-1.5e7, "-1.50e7"),
        (9_999_999.0, "9,999,999"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_a_number_that_all_seeds_share_has_no_interval():
    counted = 6_906_145_008_517_120.0
    assert estimate_text(Estimate(counted, counted, counted)) == "6.91e15"
    assert estimate_text(Estimate(0.1, 0.1 - 1e-17, 0.1 + 1e-17)) == "0.100"  # the same up to rounding
    assert estimate_text(Estimate(0.0, 0.0, 0.0)) == "0.000"
    assert estimate_text(Estimate(0.1, 0.0999, 0.1001)) == "0.100 [0.100, 0.100]"


def test_what_has_no_number_is_said_once_for_all_seeds_of_an_arm():
    gives = {name: f"the trial gives no {name!r}; it gives b" for name in ("x", "y")}
    unread = [Result("plain", seed, "k", unread={"steps": "no row has it", **gives}) for seed in range(2)] + [
        Result("better", 0, "k", unread={"steps": "another reason"})
    ]
    assert unread_lines(unread) == [
        "- plain, seeds 0, 1: steps: no row has it",
        "- plain, seeds 0, 1: x, y: the trial gives no such number; it gives b",
        "- better, seed 0: steps: another reason",
    ]


def test_what_arms_share_is_said_as_it_is():
    started = [replace(one, start=f"s{one.seed}") for one in RESULTS]
    assert "the same start weights, problem numbers and" in what_is_equal(SCRIPTED, started)
    assert "equal steps." in what_is_equal(SCRIPTED, started)
    assert "start" not in what_is_equal(SCRIPTED, RESULTS)
    one_of_its_own = [*started[:-1], replace(started[-1], start="other")]
    assert "start" not in what_is_equal(SCRIPTED, one_of_its_own)
    by_tokens = replace(SCRIPTED, budget="generated_tokens", cpu=replace(BASE, num_generated_tokens=1))
    assert "equal generated tokens." in what_is_equal(by_tokens, RESULTS)
    counted = replace(SCRIPTED, scale="operations are counted")
    assert what_is_equal(counted, started) == "A trial: operations are counted."


def test_the_source_is_said_by_arm_where_it_was_not_one():
    one = [replace(result, code="aaa") for result in RESULTS]
    assert sources_text(one) == "aaa"
    assert (
        sources_text([*one[:4], *(replace(r, code="bbb") for r in one[4:])])
        == "aaa (better, plain), bbb (plain)"
    )


def test_seeds_are_paired_where_every_arm_has_them():
    assert seeds_text(RESULTS) == "3 paired seeds."
    assert seeds_text(RESULTS[1:]) == "2 paired seeds; 3 have some of the arms."


def test_every_arm_keeps_its_colour_in_the_picture():
    arms = tuple(Arm(f"arm_{number}", "control") for number in range(7))
    many = replace(SCRIPTED, arms=(*arms, Arm("plain", "baseline")), claims=())
    # Bands that overlap fill the palette with mixtures; one arm is a single point.
    results = [
        result(arm.name, seed, 0, curve=[[0, 9], [0.1 * number, 0.1 * number + 0.3 * seed]])
        for number, arm in enumerate(arms[1:])
        for seed in range(3)
    ] + [result("arm_0", seed, 0, curve=[[0], [0.9]]) for seed in range(3)]
    picture = draw_curves(many, results)
    assert picture is not None
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).reshape(-1, 3).astype(int)
    for colour in COLOURS[:7]:
        wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        near = np.abs(pixels - wanted).max(axis=1) < 16
        assert near.sum() > 10, colour

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from whorl.reporting import glossary
from whorl.reporting.glossary import check_names, describe, render_markdown
from whorl.reporting.metric_table import GROUPS, METRICS, Metric

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
UNIT_OF_SUFFIX = {
    "_frac": "fraction",
    "_seconds": "s",
    "_tokens": "tokens",
    "_nats": "nats",
    "_gib": "GiB",
    "_rollouts": "rollouts",
}


def test_the_page_in_docs_is_current():
    assert PAGE.read_text(encoding="utf-8") == render_markdown(), "run: python -m whorl.reporting.glossary"


def test_the_page_names_every_metric_once():
    named = re.findall(r"^\| `([^`]+)` \|", render_markdown(), flags=re.MULTILINE)
    assert sorted(named) == sorted(metric.name for metric in METRICS)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_row_is_complete_and_its_name_carries_its_unit(metric: Metric):
    assert metric.group in GROUPS
    assert metric.unit
    assert metric.formula
    assert metric.reading
    assert metric.low is None or metric.high is None or metric.low <= metric.high
    for suffix, unit in UNIT_OF_SUFFIX.items():
        if metric.name.endswith(suffix):
            assert metric.unit == unit
    if metric.unit == "fraction" and metric.low is not None:
        assert metric.low >= 0
        assert metric.high <= 1


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_quoted_in_a_row_are_metrics_or_settings(metric: Metric):
    quoted = re.findall(r"`([^`]+)`", metric.formula + metric.reading)
    settings = {"error", "above_max", "below_min"}
    check_names(set(quoted) - settings)


def test_an_undefined_metric_is_refused_and_the_nearest_names_are_offered():
    with pytest.raises(ValueError, match=r"'rewrad' is not defined. Did you mean reward"):
        check_names({"step": 1, "rewrad": 0.5})


def test_a_family_takes_any_text_in_its_place_but_no_further_part():
    assert describe("eval/countdown,num_numbers=4/accuracy").name == "eval/<environment>/accuracy"
    assert describe("reward_part/worked").name == "reward_part/<part>"
    for name in ("eval//accuracy", "eval/a/b/accuracy", "reward_part/", "eval/countdown/charm"):
        with pytest.raises(ValueError, match="is not defined"):
            describe(name)


def test_an_exact_name_wins_over_a_family(monkeypatch):
    exact = dataclasses.replace(describe("reward"), name="reward/countdown", reading="this one")
    monkeypatch.setattr(glossary, "METRICS", (*METRICS, exact))
    glossary._tables.cache_clear()
    describe.cache_clear()
    try:
        assert describe("reward/countdown").reading == "this one"
        assert describe("reward/gcd").name == "reward/<environment>"
    finally:
        glossary._tables.cache_clear()
        describe.cache_clear()


def test_times_speeds_and_memory_are_of_the_machine_and_nothing_else_is():
    """The rest has to be the same in a resumed run."""
    for metric in METRICS:
        by_name = metric.name.endswith(("_seconds", "_per_second", "_gib"))
        assert metric.of_the_machine == by_name, metric.name
    assert describe("step_seconds").of_the_machine
    assert not describe("generated_tokens").of_the_machine


def test_a_healthy_range_holds_its_ends_and_never_nan():
    metric = Metric("x", "1", "f", "r", low=0.1, high=0.9)
    assert metric.is_healthy(0.1)
    assert metric.is_healthy(0.9)
    assert not metric.is_healthy(0.91)
    assert not metric.is_healthy(float("nan"))
    anything = Metric("x", "1", "f", "r")
    assert anything.is_healthy(-1e9)
    assert not anything.is_healthy(float("inf"))
    ranges = [(None, None), (0, None), (None, 2), (0, 2), (0, 0)]
    words = [Metric("x", "1", "f", "r", *ends).healthy_range for ends in ranges]
    assert words == ["finite", "at least 0", "at most 2", "0 to 2", "0"]


def test_what_objectives_and_penalties_report_is_defined():
    from whorl.algorithms import critic, objectives, penalties

    one = torch.tensor([-0.5], dtype=torch.float64)
    reported = {
        **objectives.cispo(one, one, one, ratio_max=5.0)[1],
        **objectives.ppo_clip(one, one, one, ratio_min=0.8, ratio_max=1.2)[1],
        **objectives.sapo(one, one, one, tau_positive=1.0, tau_negative=1.0)[1],
        **penalties.minus_kl_k3(one, one)[1],
        **penalties.entropy_bonus(one)[1],
        **critic.minus_value_error(one, one)[1],
        **critic.minus_clipped_value_error(one, one, one, max_change=0.2)[1],
    }
    assert "ratio_mean" in reported
    check_names(reported)

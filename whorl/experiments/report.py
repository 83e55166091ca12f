"""`report.md` and `curves.png` of an experiment: verdicts, measures, paired differences, curves, cost."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whorl.evaluation.statistics import Estimate
from whorl.experiments.curves import banded_arms, draw_curves
from whorl.experiments.judge import (
    Judged,
    Result,
    compare_pairs,
    judge,
    known_from_below,
    results_of,
    shown,
    summary_of,
)
from whorl.experiments.plan import Arm, Experiment, Measure
from whorl.experiments.readings import AtLeast
from whorl.reporting.run_directory import write_atomically


def write_report(place: Path, experiment: Experiment, results: Sequence[Result]) -> Path:
    """Write the two files into the folder of the results, from what is kept there. Returns the report."""
    config = json.loads((place / "config.json").read_text())
    machine = json.loads((place / "machine.json").read_text())
    drawn = draw_curves(experiment, results)
    if drawn is not None:
        write_atomically(place / "curves.png", drawn)
    text = "\n".join(report_lines(experiment, results, config, machine, has_curves=drawn is not None))
    write_atomically(place / "report.md", text.encode())
    return place / "report.md"


def report_lines(
    experiment: Experiment,
    results: Sequence[Result],
    config: Mapping[str, Any],
    machine: Mapping[str, Any],
    *,
    has_curves: bool,
) -> list[str]:
    lines = [
        f"# {config['recipe']}: {experiment.name}",
        "",
        experiment.question,
        "",
        f"`{config['command']}`. {seeds_text(results)} {what_is_equal(experiment, results)} Intervals are Student's "
        "over seeds, at 95%.",
        "",
        "## Verdicts",
        "",
        *verdict_table(experiment, judge(experiment, results)),
        "",
        "## Measures",
        "",
        *measure_table(experiment, results),
        "",
        f"## Against {experiment.baseline.name}",
        "",
        "Mean over seeds of the arm minus the baseline at the same seed, or of their ratio (marked x).",
        "",
        *difference_table(experiment, results),
        "",
    ]
    if has_curves:
        lines += ["## Curves", "", bands_text(experiment, results), "", "![curves](curves.png)", ""]
    lines += ["## Cost", "", *cost_table(experiment, results), "", cost_line(results, config["starts"]), ""]
    if failed := [result for result in results if result.reason]:
        lines += ["## What failed", ""]
        lines += [f"- {result.arm}, seed {result.seed}: {result.reason}" for result in failed]
        lines.append("")
    if unread := unread_lines(results):
        lines += ["## What has no number", "", *unread, ""]
    if config["starts"]:
        lines += ["## Starts", "", *start_table(config["starts"]), ""]
    lines += ["## Arms", "", *arm_table(experiment), ""]
    told = ", ".join(
        f"{name} {machine[name]}" for name in ("python", "torch", "whorl", "cpu") if machine.get(name)
    )
    lines.append(f"Made with {told}; whorl's source {sources_text(results)}.")
    return [*lines, ""]


def bands_text(experiment: Experiment, results: Sequence[Result]) -> str:
    """What the lines and bands of the picture are."""
    drawn = {result.arm for result in results if result.curves}
    banded = banded_arms(experiment, drawn)
    if banded == drawn:
        return "Mean over seeds, with its 95% interval."
    if not banded:
        return "Mean over seeds; intervals of so many arms would hide each other."
    return "Mean over seeds; with its 95% interval for the arms that claims name."


def seeds_text(results: Sequence[Result]) -> str:
    """How many seeds have a trial of every arm that was run at all, and how many have some."""
    by_arm: dict[str, set[int]] = {}
    for result in results:
        by_arm.setdefault(result.arm, set()).add(result.seed)
    every, paired = set().union(*by_arm.values()), set.intersection(*by_arm.values()) if by_arm else set()
    text = f"{len(paired)} paired seed{'s' * (len(paired) != 1)}"
    return f"{text}; {len(every)} have some of the arms." if len(every) > len(paired) else f"{text}."


def sources_text(results: Sequence[Result]) -> str:
    """The hashes of whorl's source that trials were done with; by arm if there are several."""
    arms: dict[str, dict[str, None]] = {}
    for result in results:
        if result.code:
            arms.setdefault(result.code, {})[result.arm] = None
    if len(arms) == 1:
        return next(iter(arms))
    return ", ".join(f"{code} ({', '.join(own)})" for code, own in arms.items())


def what_is_equal(experiment: Experiment, results: Sequence[Result]) -> str:
    """What the arms of a seed share; where the experiment says what its trials are, that."""
    if experiment.scale:
        return f"A trial: {experiment.scale}."
    starts: dict[int, set[str]] = {}
    for result in results:
        starts.setdefault(result.seed, set()).add(result.start)
    same_start = bool(starts) and all(len(own) == 1 and "" not in own for own in starts.values())
    shared = "start weights, problem numbers" if same_start else "problem numbers"
    spent = "generated tokens" if experiment.budget == "generated_tokens" else "steps"
    return f"Within a seed all arms have the same {shared} and sampling counters, and those trained equal {spent}."


def unread_lines(results: Sequence[Result]) -> list[str]:
    """Which measures could not be read, by arm and reason."""
    seeds: dict[tuple[str, str, str], list[int]] = {}
    for result in results:
        for name, why in result.unread.items():
            reason = why.replace(
                f"no {name!r}", "no such number"
            )  # else each measure has a reason of its own
            seeds.setdefault((result.arm, name, reason), []).append(result.seed)
    names: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for (arm, name, reason), own in seeds.items():
        names.setdefault((arm, reason, tuple(own)), []).append(name)
    return [
        f"- {arm}, seed{'s' * (len(own) > 1)} {', '.join(map(str, own))}: {', '.join(those)}: {reason}"
        for (arm, reason, own), those in names.items()
    ]


def verdict_table(experiment: Experiment, judged: Sequence[Judged]) -> list[str]:
    rows = []
    for one in judged:
        claim = one.claim
        margin = "" if claim.margin is None else f", margin {claim.margin:g}"
        expected = f"{claim.measure} of {claim.method} {claim.expects} than {claim.baseline}{margin}"
        if claim.expects == "equal":
            expected = f"{claim.measure} of {claim.method} equal to {claim.baseline}{margin}"
        expected = "–" if claim.untestable else expected
        rows.append(
            (
                claim.text,
                claim.theirs,
                expected,
                found_text(experiment, one) or "–",
                f"**{one.verdict}**: {one.why}",
            )
        )
    return table(("claim", "theirs", "expected here", "ours", "verdict"), rows)


def measure_table(experiment: Experiment, results: Sequence[Result]) -> list[str]:
    """Arm x measure: mean with interval; from ten seeds on the interquartile mean with its own below it."""
    rows = []
    for arm in experiment.arms:
        own = results_of(results, arm.name)
        if own:
            rows.append(
                (f"{arm.name} ({arm.role})", *(_cell(measure, own) for measure in experiment.measures))
            )
    heads = []
    for measure in experiment.measures:
        unit = f" [{measure.unit}]" if measure.unit else ""
        heads.append(f"{measure.text}{unit} {'↑' if measure.higher_is_better else '↓'}")
    return table(("arm", *heads), rows)


def _cell(measure: Measure, own: Mapping[int, Result]) -> str:
    values = [own[seed].values[measure.name] for seed in sorted(own) if measure.name in own[seed].values]
    if not values:
        return "–"
    mean, quartiles = summary_of(values)
    text = estimate_text(mean)
    if quartiles is not None:
        text += f"; IQM {estimate_text(quartiles)}"
    below = sum(isinstance(value, AtLeast) for value in values)
    if below:
        text += f"; {below} of {len(values)} never reached it and count as the whole budget"
    return text + (f"; {len(values)} of {len(own)} seeds" if len(values) < len(own) else "")


def difference_table(experiment: Experiment, results: Sequence[Result]) -> list[str]:
    baseline = results_of(results, experiment.baseline.name)
    rows = []
    for arm in experiment.arms:
        own = results_of(results, arm.name)
        if own and arm.name != experiment.baseline.name:
            cells = (_difference_cell(measure, own, baseline) for measure in experiment.measures)
            rows.append((arm.name, *cells))
    return table(("arm", *(measure.name for measure in experiment.measures)), rows)


def _difference_cell(measure: Measure, own: Mapping[int, Result], baseline: Mapping[int, Result]) -> str:
    seeds = [
        seed for seed in sorted(own.keys() & baseline.keys())
        if measure.name in own[seed].values and measure.name in baseline[seed].values
    ]  # fmt: skip
    pairs = [(own[seed].values[measure.name], baseline[seed].values[measure.name]) for seed in seeds]
    if len(pairs) < 2:
        return "–"
    try:
        compared = shown(measure, compare_pairs(measure, pairs))
    except ValueError:
        return "–"
    return comparison_text(measure, compared, *known_from_below(pairs))


def cost_table(experiment: Experiment, results: Sequence[Result]) -> list[str]:
    rows = []
    for arm in experiment.arms:
        done = [result.cost for result in results_of(results, arm.name).values() if "seconds" in result.cost]
        if done:
            tokens = [cost["generated_tokens"] for cost in done]
            taught = [cost.get("taught_tokens", 0.0) for cost in done]
            seconds, spent = [cost["seconds"] for cost in done], [_spent(cost) for cost in done]
            rows.append(
                (arm.name, f"{np.mean(tokens):,.0f}", f"{np.mean(taught):,.0f}" if any(taught) else "–",
                 f"{np.mean(seconds):,.1f}", f"{sum(spent):,.0f}")
            )  # fmt: skip
    heads = (
        "arm",
        "generated tokens a trial",
        "taught tokens",
        "seconds of steps and evaluations",
        "seconds in all",
    )
    return table(heads, rows)


def _spent(cost: Mapping[str, float]) -> float:
    return cost.get("trial_seconds", cost.get("seconds", 0.0))


def cost_line(results: Sequence[Result], starts: Mapping[str, Mapping[str, Any]]) -> str:
    """What all trials, failed ones included, and all starts took."""
    minutes = (
        sum(_spent(one.cost) for one in results) + sum(start["seconds"] for start in starts.values())
    ) / 60
    line = f"Trials{' and starts' * bool(starts)} took {minutes:,.0f} minutes of one process."
    if older := sum("trial_seconds" not in one.cost for one in results):
        line += f" Of {older} of {len(results)} trials steps and evaluations alone were timed."
    return line


def start_table(starts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [
        (str(start["seed"]), f"{start['accuracy']:.3f} of {start['wanted']:.2f}", str(start["updates"]),
         f"{start['seconds']:,.0f}", start["reason"] or "passed", f"`{key}`")
        for key, start in sorted(starts.items(), key=lambda item: item[1]["seed"])
    ]  # fmt: skip
    return table(("seed", "accuracy of its gate", "updates", "seconds", "", "key"), rows)


def arm_table(experiment: Experiment) -> list[str]:
    def said(arm: Arm) -> str:
        return (
            ", ".join(f"`{name}={value}`" for name, value in arm.changes.items())
            or "the settings as they are"
        )

    return table(("arm", "role", "changes", ""), [(a.name, a.role, said(a), a.note) for a in experiment.arms])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    ]


def number(value: float) -> str:
    if not math.isfinite(value):
        return "∞" if value == math.inf else "-∞" if value == -math.inf else "–"
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    if abs(value) >= 1e7:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def estimate_text(estimate: Estimate) -> str:
    """`0.962 [0.931, 0.993]`; a single seed has no interval, and an interval without width is not said."""
    if math.isnan(estimate.low) or estimate.high - estimate.low <= 1e-9 * abs(estimate.value):
        return number(estimate.value)
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def comparison_text(
    measure: Measure, compared: Estimate, method_open: bool = False, baseline_open: bool = False
) -> str:
    """`+0.014 [-0.004, 0.032]`, or `x0.52 [0.31, 0.87]` for a ratio; "or less" where the baseline is known from below
    only, "or more" where the method is."""
    sign = "x" if measure.compare == "ratio" else "+" if compared.value > 0 else ""
    note = {(True, False): " or more", (False, True): " or less", (True, True): " (open)"}
    return sign + estimate_text(compared) + note.get((method_open, baseline_open), "")


def found_text(experiment: Experiment, one: Judged) -> str:
    """The comparison that a verdict rests on, with its number of pairs; nothing if there is none."""
    if one.ours is None:
        return ""
    measure = experiment.measure(one.claim.measure)
    return f"{comparison_text(measure, one.ours, one.method_open, one.baseline_open)}, {one.num_pairs} pairs"

"""From the numbers of finished trials to verdicts, by rules that are fixed before a trial is run.

Pairs share their seed. With the difference d = method - baseline of each pair (log(method / baseline) where a measure
compares by ratio), Student's 95% interval of its mean, and m the claim's margin:

    expects      reproduced                        contradicted               tied                       undecided
    higher       low > 0 and high >= m             high < 0 and low <= -m     -m < low and high < m      else
    lower        the same with the signs turned
    equal        -m <= low and high <= m           low > m or high < -m       never                      else

so a tie is a finding: a difference that would matter is excluded, though a smaller one may be there. A claim without a
margin (m = 0) ties only where all pairs are exactly equal. Undecided says of these seeds that they cannot tell. If
there is no difference in truth a claim of "higher" is called reproduced in at most 2.5 of 100 experiments and
contradicted in as many. Nothing corrects for the number of claims of a paper.

A trial that failed is no pair: if either arm has one at any seed there is no verdict, since seeds that fail are not a
random choice of seeds. A run that never reached a threshold (`AtLeast`) counts with its whole budget, so the interval
is that of steps capped at the budget. It is taken as open on the side on which the true value lies.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from whorl.evaluation.statistics import Estimate, bootstrap, over_seeds, paired_difference
from whorl.experiments.plan import Claim, Experiment, Measure, Verdict, log_margin
from whorl.experiments.readings import AtLeast

MANY_SEEDS = 10
"""From so many seeds on an interquartile mean with its bootstrap interval is given beside Student's."""


@dataclass(frozen=True)
class Result:
    """One finished or failed trial, as it is kept.

    Attributes:
        key: hash of everything that decided it: settings, start, the function that carried it out.
        reason: why it failed; empty if it finished.
        again: whether the next comparison tries it again: its process ended without a result.
        values: its measures by name.
        unread: of measures that could not be read, why.
        curves: metrics as [steps, values].
        cost: `generated_tokens` and `seconds` of training and evaluation; `trial_seconds`, all that its processes took,
            and `taught_tokens` of supervised learning, which results of older versions have not.
        code: hash of whorl's source when it was done.
    """

    arm: str
    seed: int
    key: str
    reason: str = ""
    again: bool = False
    values: Mapping[str, float] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, list] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    start: str = ""
    code: str = ""
    date: str = ""

    def to_dict(self) -> dict[str, Any]:
        at_least = sorted(name for name, value in self.values.items() if isinstance(value, AtLeast))
        return {**vars(self), "at_least": at_least}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Result":
        known = {**content, "values": dict(content["values"])}
        for name in known.pop("at_least"):
            known["values"][name] = AtLeast(known["values"][name])
        return cls(**known)


class Judged(NamedTuple):
    """A claim with its verdict; `ours` is the difference or ratio that it rests on, if there is one.

    `method_open`, `baseline_open`: some of the arm's values are only known from below.
    """

    claim: Claim
    verdict: Verdict
    ours: Estimate | None
    num_pairs: int
    why: str
    method_open: bool = False
    baseline_open: bool = False


def judge(experiment: Experiment, results: Sequence[Result]) -> list[Judged]:
    """A verdict on each claim."""
    return [judge_claim(experiment, claim, results) for claim in experiment.claims]


def judge_claim(experiment: Experiment, claim: Claim, results: Sequence[Result]) -> Judged:
    if claim.untestable:
        return Judged(claim, "not testable here", None, 0, claim.untestable)
    measure = experiment.measure(claim.measure)
    sides = [results_of(results, name) for name in (claim.method, claim.baseline)]
    seeds = paired_seeds(*sides)
    if not all(sides):
        return Judged(claim, "not run", None, 0, "no seed has both arms")
    # Also where the other arm has no trial: a pair that would be left out for a failure is no random choice.
    for result in (
        side[seed] for seed in sorted(sides[0].keys() | sides[1].keys()) for side in sides if seed in side
    ):
        problem = result.reason or result.unread.get(measure.name, "")
        if problem or measure.name not in result.values:
            why = f"{result.arm} at seed {result.seed} has no {measure.name}: {problem or 'it was not measured'}"
            return Judged(claim, "not testable here", None, 0, why)
    if not seeds:
        return Judged(claim, "not run", None, 0, "no seed has both arms")
    if len(seeds) == 1:
        return Judged(claim, "not testable here", None, 1, "one seed has no interval")
    pairs = [(sides[0][seed].values[measure.name], sides[1][seed].values[measure.name]) for seed in seeds]
    try:
        compared = compare_pairs(measure, pairs)
    except ValueError as error:
        return Judged(claim, "not testable here", None, len(seeds), str(error))
    is_open = known_from_below(pairs)
    verdict, why = decide(compared, claim.expects, log_margin(claim, measure), *is_open)
    if all(isinstance(value, AtLeast) for pair in pairs for value in pair):
        why = "no run of either arm reached the threshold"
    return Judged(claim, verdict, shown(measure, compared), len(seeds), why, *is_open)


def paired_seeds(first: Mapping[int, Result], second: Mapping[int, Result]) -> list[int]:
    """Seeds at which both arms have a trial."""
    return sorted(first.keys() & second.keys())


def results_of(results: Iterable[Result], arm: str) -> dict[int, Result]:
    """The arm's results by seed."""
    return {result.seed: result for result in results if result.arm == arm}


def compare_pairs(measure: Measure, pairs: Sequence[tuple[float, float]]) -> Estimate:
    """Mean difference with Student's interval; of logarithms where the measure compares by ratio."""
    method, baseline = zip(*pairs, strict=True)
    if measure.compare == "difference":
        return paired_difference(method, baseline)
    lowest = min(*method, *baseline)
    if not lowest > 0:
        raise ValueError(f"{measure.name} compares by ratio, and one of its values is {lowest:g}")
    return paired_difference([math.log(m) for m in method], [math.log(b) for b in baseline])


def shown(measure: Measure, compared: Estimate) -> Estimate:
    """The comparison as a reader wants it: a ratio and not its logarithm."""
    if measure.compare == "difference":
        return compared
    return Estimate(*(math.exp(min(end, 700.0)) for end in compared))


def known_from_below(pairs: Sequence[tuple[float, float]]) -> tuple[bool, bool]:
    """Whether any value of the method, and any of the baseline, is only known from below."""
    return any(isinstance(m, AtLeast) for m, _ in pairs), any(isinstance(b, AtLeast) for _, b in pairs)


def decide(
    compared: Estimate,
    expects: str,
    margin: float = 0.0,
    method_open: bool = False,
    baseline_open: bool = False,
) -> tuple[Verdict, str]:
    """The verdict on a comparison, and why.

    `method_open`: the method's values may be larger than stated, and with them the difference; `baseline_open`: the
    baseline's, so that the difference may be smaller.
    """
    low, high = compared.low, compared.high
    if low == high == 0 and not (method_open or baseline_open):
        return "reproduced" if expects == "equal" else "tied", "all pairs are exactly equal"
    # The interval is that of values capped at the budget; beyond an open end they may be anything.
    low, high = (-math.inf if baseline_open else low), (math.inf if method_open else high)
    if expects == "equal":
        if -margin <= low and high <= margin:
            return "reproduced", "the interval lies within the margin"
        if low > margin or high < -margin:
            return "contradicted", "the interval lies outside the margin"
        return "undecided", "the interval reaches across the margin: these seeds cannot tell"
    if expects == "lower":
        low, high = -high, -low
    if low > 0 and high >= margin:
        return "reproduced", "the whole interval is on the claim's side"
    if high < 0 and low <= -margin:
        return "contradicted", "the whole interval is on the other side"
    if low > -margin and high < margin:
        return "tied", "a difference that would matter is excluded"
    return "undecided", "these seeds cannot tell"


def summary_of(values: Sequence[float]) -> tuple[Estimate, Estimate | None]:
    """Mean with Student's interval, and from `MANY_SEEDS` on the interquartile mean with its own.

    A single seed has a value and no interval: its ends are NaN.
    """
    if len(values) == 1:
        return Estimate(float(values[0]), math.nan, math.nan), None
    return over_seeds(values), bootstrap(values, interquartile=True) if len(values) >= MANY_SEEDS else None

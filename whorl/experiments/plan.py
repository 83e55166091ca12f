"""The nouns of a comparison. A recipe module lists its `EXPERIMENTS`; `whorl compare` runs them.

    Arm          settings of one method, baseline or control, as changes to the experiment's own
    Measure      one number per trial, and how it is read
    Claim        what the paper says of two arms, and which difference would matter
    Experiment   the question, the arms, the measures and the claims

A trial is one arm at one seed. The trials of one seed are paired: they draw the same problems in the same order,
with the same sampling counters, from the same start weights.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, cast

from whorl.experiments.readings import Reading
from whorl.experiments.trials import Outcome, Trial, train_run
from whorl.settings import Settings

Role = Literal["method", "baseline", "control", "start"]
Budget = Literal["cpu", "gpu"]
Verdict = Literal["reproduced", "tied", "undecided", "contradicted", "not testable here", "not run"]


@dataclass(frozen=True)
class Arm:
    """One way of doing it.

    `changes` are settings by dotted name: `{"algorithm": "GRPO", "optimizer.eps": 1e-8}`. A "method" is what the
    paper proposes, a "baseline" what it is compared with, a "control" takes one part of it away, and a "start" is
    not trained at all.
    """

    name: str
    role: Role
    changes: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Measure:
    """One number of each finished trial.

    Attributes:
        text: what it is, in a phrase.
        of: how it is read (`readings.py`), or any function of an `Outcome`.
        unit: of the number; "fraction", "steps", "nats".
        compare: arms are compared by difference, or by ratio (numbers above 0: steps, tokens, norms).
    """

    name: str
    text: str
    of: Reading | Callable[[Outcome], float]
    higher_is_better: bool = True
    unit: str = ""
    compare: Literal["difference", "ratio"] = "difference"


@dataclass(frozen=True)
class Claim:
    """What the paper says of two arms.

    Attributes:
        text: the claim, in a sentence.
        theirs: the paper's figure as printed, with its place.
        measure: name of the measure here that it is judged by.
        method, baseline: names of arms; the comparison is method minus baseline, or method / baseline.
        expects: what the claim says of the method against the baseline.
        margin: the smallest difference that would matter; a factor above 1 where the measure compares by ratio.
            "equal" needs one: nothing can be shown to be exactly equal.
        untestable: why this cannot be judged at our scale, if it cannot; then no arm is needed.
    """

    text: str
    theirs: str
    measure: str = ""
    method: str = ""
    baseline: str = ""
    expects: Literal["higher", "lower", "equal"] = "higher"
    margin: float | None = None
    untestable: str = ""


@dataclass(frozen=True)
class Experiment:
    """Arms over paired seeds, and what is asked of them.

    Attributes:
        name: of the results' folder: letters, digits, `_`.
        cpu, gpu: settings of the arms before their changes, at the two budgets; None: not at this one.
        budget: what all arms have the same of. "generated_tokens" needs `num_generated_tokens` in the settings.
        start, gpu_start: changes to an arm's settings for the making of its shared start, if it has a cold start: what
            the start is taught on need not be what the arms are trained on. gpu_start None: the same at both budgets.
        trial: what one arm at one seed does; by default it trains a run.
        curves: metrics of rows that are kept of every trial and drawn.
        rows_by: what the `step` of a row counts, if not steps of training.
        scale: what a trial is, in a phrase, where its settings' steps and rollouts do not say it: nothing is trained,
            or not by steps.
    """

    name: str
    question: str
    cpu: Settings | None
    arms: tuple[Arm, ...]
    measures: tuple[Measure, ...]
    claims: tuple[Claim, ...]
    gpu: Settings | None = None
    budget: Literal["steps", "generated_tokens"] = "steps"
    num_seeds: int = 5
    start: Mapping[str, Any] = field(default_factory=dict)
    gpu_start: Mapping[str, Any] | None = None
    trial: Callable[[Trial], Outcome] = train_run
    curves: tuple[str, ...] = ("eval_accuracy", "accuracy", "entropy_nats", "response_tokens")
    rows_by: str = "step"
    scale: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.name):
            raise ValueError(
                f"an experiment is named by letters, digits and '_', as its folder is; got {self.name!r}"
            )
        for what, names in (
            ("arm", [a.name for a in self.arms]),
            ("measure", [m.name for m in self.measures]),
        ):
            for name in {name for name in names if names.count(name) > 1}:
                raise ValueError(f"experiment {self.name} has two {what}s called {name!r}")
        for claim in self.claims:
            self._check_claim(claim)
        if self.cpu is None and self.gpu is None:
            raise ValueError(f"experiment {self.name} has settings for no budget; give it cpu or gpu")
        for budget, base in self.budgets.items():
            for arm in self.arms:
                changed(changed(base, arm.changes), self.start_changes(budget))
            if self.budget == "generated_tokens" and not base.num_generated_tokens:
                raise ValueError(
                    f"experiment {self.name} compares at equal generated tokens, but its settings do not say how "
                    "many; set num_generated_tokens"
                )

    def _check_claim(self, claim: Claim) -> None:
        if claim.untestable:
            return
        for name in (claim.method, claim.baseline):
            self.arm(name)
        measure = self.measure(claim.measure)
        if claim.expects == "equal" and claim.margin is None:
            raise ValueError(f"the claim {claim.text!r} expects 'equal': say within which margin")
        lowest = 1.0 if measure.compare == "ratio" else 0.0
        if claim.margin is not None and claim.margin <= lowest:
            raise ValueError(
                f"the margin of {claim.text!r} must be above {lowest:g}, as {measure.name} compares by "
                f"{measure.compare}; got {claim.margin:g}"
            )

    def arm(self, name: str) -> Arm:
        """The arm of this name; ValueError that names the nearest."""
        return named(name, self.arms, f"arm of experiment {self.name}")

    def measure(self, name: str) -> Measure:
        return named(name, self.measures, f"measure of experiment {self.name}")

    @property
    def baseline(self) -> Arm:
        """The arm with which the others are compared in the report: the first baseline, or the first arm."""
        return next((arm for arm in self.arms if arm.role == "baseline"), self.arms[0])

    @property
    def budgets(self) -> dict[Budget, Settings]:
        """The budgets at which it can be run, and the settings there."""
        both: dict[Budget, Settings | None] = {"cpu": self.cpu, "gpu": self.gpu}
        return {budget: settings for budget, settings in both.items() if settings is not None}

    def start_changes(self, budget: Budget) -> Mapping[str, Any]:
        """Changes for the making of a start."""
        return self.start if budget == "cpu" or self.gpu_start is None else self.gpu_start

    def settings(self, budget: Budget, arm: Arm, seed: int) -> Settings:
        """Settings of the arm at one seed, before it is given its start."""
        base = self.budgets.get(budget)
        if base is None:
            hint = "leave out --budget gpu" if budget == "gpu" else "it needs --budget gpu"
            raise ValueError(f"experiment {self.name} has no settings for a {budget}; {hint}")
        # Said and not left to what the machine has: a comparison must not change its device with its seed.
        return changed(base, {**arm.changes, "seed": seed, "device": "cpu" if budget == "cpu" else "cuda"})


Named = TypeVar("Named", Arm, Measure, Experiment)


def named(name: str, among: Iterable[Named], what: str) -> Named:
    """The one of this name; ValueError that says which there are, and which is nearest."""
    known = {one.name: one for one in among}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown {what}: {name!r}; {hint}There are {', '.join(known) or 'none'}")
    return known[name]


Changed = TypeVar("Changed")


def changed(settings: Changed, changes: Mapping[str, Any]) -> Changed:
    """Settings with others by dotted name: `{"optimizer.eps": 1e-8}`. ValueError for a name that they have not."""
    direct: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        head, dot, rest = name.partition(".")
        known = [f.name for f in fields(cast(Any, settings))]
        if head not in known or (dot and not is_dataclass(getattr(settings, head))):
            near = difflib.get_close_matches(head, known, n=1)
            hint = f"; did you mean {near[0]}?" if near and near[0] != head else ""
            raise ValueError(f"{type(settings).__name__} has no setting {name!r}{hint}")
        if dot:
            nested.setdefault(head, {})[rest] = value
        else:
            direct[name] = value
    for head, inner in nested.items():
        direct[head] = changed(direct.get(head, getattr(settings, head)), inner)
    return replace(cast(Any, settings), **direct)


def log_margin(claim: Claim, measure: Measure) -> float:
    """The claim's margin on the scale on which its measure is compared (0: every difference matters)."""
    if claim.margin is None:
        return 0.0
    return math.log(claim.margin) if measure.compare == "ratio" else claim.margin

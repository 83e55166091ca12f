"""`whorl diff`: exactly what two recipes, or two arms, differ by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import rich.markup
from rich.table import Table

from whorl.algorithms.algorithm import Algorithm, name_of, settings_of
from whorl.experiments.plan import Arm, Budget, Experiment
from whorl.experiments.trials import train_run
from whorl.reporting.report import flatten
from whorl.settings import AnySettings, Settings


@dataclass(frozen=True)
class Side:
    """One side of a comparison: settings, and the arm of an experiment that they are of, if they are one's."""

    settings: AnySettings
    arm: Arm | None = None
    experiment: Experiment | None = None
    budget: Budget = "cpu"

    @property
    def surroundings(self) -> dict[str, str]:
        """What is done with the settings: the arm's name and role, its note, changes for its start, its trial."""
        if self.arm is None or self.experiment is None:
            return {}
        found = {"arm": self.arm.name, "role": self.arm.role, "note": self.arm.note or "-"}
        start = self.experiment.start_changes(self.budget)
        found |= {f"start: {name}": str(value) for name, value in start.items()}
        trial = self.experiment.trial
        if trial is not train_run:
            found["trial"] = f"{trial.__module__}.{trial.__qualname__}"
        return found


class Difference(NamedTuple):
    """A setting, or a part of the algorithm, that is not the same. `-` stands where one has no such thing."""

    name: str
    first: str
    second: str


def differences(first: AnySettings, second: AnySettings) -> list[Difference]:
    """Every setting that differs, nested ones by dotted name, then every part of the algorithms that does."""
    found = _differing(dict(flatten(first.to_dict())), dict(flatten(second.to_dict())))
    if isinstance(first, Settings) and isinstance(second, Settings):
        rows = (first.resolve_algorithm(), second.resolve_algorithm())
        found += _differing(*(parts_of(row) for row in rows))
    return found


def surroundings(first: Side, second: Side) -> list[Difference]:
    """What differs in what is done with the settings. Two arms of one experiment differ in their names at least."""
    return _differing(first.surroundings, second.surroundings)


def made_of_the_arm(first: Side, second: Side) -> str:
    """The sentence on two arms of one experiment that have the same settings."""
    assert first.arm is not None and second.arm is not None
    notes = (f"{arm.name}: {arm.note or f'a {arm.role}'}" for arm in (first.arm, second.arm))
    return f"the same settings; they differ by what the trial makes of the arm: {' | '.join(notes)}"


def parts_of(algorithm: Algorithm) -> dict[str, str]:
    """An algorithm as named parts: its functions with the settings that are bound to them."""
    parts = {
        "credit": written(algorithm.credit),
        "objective": written(algorithm.objective),
        "average": written(algorithm.average),
        "penalty": "-" if algorithm.penalty is None else written(algorithm.penalty),
        "correction": "-" if algorithm.correction is None else written(algorithm.correction),
        "shaping": ", ".join(map(written, algorithm.shaping)) or "-",
        "roles": ", ".join(algorithm.roles or ("all",)),
        "dynamic sampling": str(algorithm.dynamic_sampling),
    }
    for term in algorithm.extras:
        parts[f"term {term.name}"] = (
            f"{term.coefficient:g} x {written(term.objective)}, {written(term.average)}"
        )
    return {f"algorithm: {name}": text for name, text in parts.items()}


def written(function: Any) -> str:
    """`ppo_clip(ratio_min=0.8, ratio_max=1.2)`."""
    settings = ", ".join(f"{name}={value!r}" for name, value in settings_of(function).items())
    return f"{name_of(function)}({settings})" if settings else name_of(function)


def _differing(first: dict[str, str], second: dict[str, str]) -> list[Difference]:
    names = dict.fromkeys((*first, *second))
    pairs = [Difference(name, first.get(name, "-"), second.get(name, "-")) for name in names]
    return [pair for pair in pairs if pair.first != pair.second]


def table_of(rows: Sequence[Difference], first: str, second: str) -> Table:
    """The differences for a terminal."""
    table = Table(title=f"{len(rows)} difference{'s' * (len(rows) != 1)}", title_justify="left")
    for heading in ("", first, second):
        table.add_column(rich.markup.escape(heading), overflow="fold")
    for row in rows:
        table.add_row(*(rich.markup.escape(cell) for cell in row))
    return table

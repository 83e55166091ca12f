"""Questions about the history of a run, answered yes or no: move to the next stage, end the cold start, stop.

A history maps the name of a metric to its values so far, oldest first. A gate is a pure function of it, and a
gate on a metric that has too few values yet, or that is not a number, is closed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from whorl.data import Metrics

History = Mapping[str, Sequence[float]]
Gate = Callable[[History], bool]

KEPT_VALUES = 1_000
"""How many values of each metric `record` keeps."""


def record(history: dict[str, list[float]], metrics: Metrics) -> None:
    """Append one value to each of these metrics."""
    for name, value in metrics.items():
        values = history.setdefault(name, [])
        values.append(float(value))
        del values[:-KEPT_VALUES]


@dataclass(frozen=True)
class Above:
    """The metric was at least `bound` in each of the last `times` values: `Above("accuracy", 0.45, times=3)`."""

    metric: str
    bound: float
    times: int = 1

    def __post_init__(self) -> None:
        _check_times(self.times)

    def __call__(self, history: History) -> bool:
        last = history.get(self.metric, ())[-self.times :]
        return len(last) == self.times and all(value >= self.bound for value in last)


@dataclass(frozen=True)
class Below:
    """The metric was at most `bound` in each of the last `times` values."""

    metric: str
    bound: float
    times: int = 1

    def __post_init__(self) -> None:
        _check_times(self.times)

    def __call__(self, history: History) -> bool:
        last = history.get(self.metric, ())[-self.times :]
        return len(last) == self.times and all(value <= self.bound for value in last)


@dataclass(frozen=True)
class NearLimit:
    """The metric reached `frac` of a limit: the 99th percentile of length has filled the window.

    With `Plateau` on the perplexity of generations this is when MiniMax-M1 lengthens its output window
    (arXiv:2506.13585 Sec. 5).
    """

    metric: str
    limit: float
    frac: float = 0.95
    times: int = 1

    def __post_init__(self) -> None:
        _check_times(self.times)

    def __call__(self, history: History) -> bool:
        return Above(self.metric, self.frac * self.limit, self.times)(history)


@dataclass(frozen=True)
class Plateau:
    """The mean of the last `window` values is within `tolerance` of the mean of the `window` before."""

    metric: str
    window: int
    tolerance: float

    def __post_init__(self) -> None:
        _check_times(self.window)

    def __call__(self, history: History) -> bool:
        last = history.get(self.metric, ())[-2 * self.window :]
        if len(last) < 2 * self.window:
            return False
        return abs(fmean(last[self.window :]) - fmean(last[: self.window])) <= self.tolerance


@dataclass(frozen=True)
class NoBest:
    """The last `patience` values brought no new best (highest): early stopping."""

    metric: str
    patience: int

    def __post_init__(self) -> None:
        _check_times(self.patience)

    def __call__(self, history: History) -> bool:
        values = history.get(self.metric, ())
        earlier = values[: -self.patience]
        return bool(earlier) and max(values[-self.patience :]) <= max(earlier)


@dataclass(frozen=True)
class After:
    """The metric has been recorded `count` times."""

    metric: str
    count: int

    def __post_init__(self) -> None:
        _check_times(self.count)

    def __call__(self, history: History) -> bool:
        return len(history.get(self.metric, ())) >= self.count


@dataclass(frozen=True)
class AllOf:
    """Every one of the gates is open."""

    gates: tuple[Gate, ...]

    def __call__(self, history: History) -> bool:
        return all(gate(history) for gate in self.gates)


@dataclass(frozen=True)
class AnyOf:
    """At least one of the gates is open."""

    gates: tuple[Gate, ...]

    def __call__(self, history: History) -> bool:
        return any(gate(history) for gate in self.gates)


def _check_times(times: int) -> None:
    if times < 1:
        raise ValueError(f"a gate looks at one value or more; got {times}")

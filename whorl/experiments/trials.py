"""One arm at one seed: what the function that carries it out is given, and what it leaves behind."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whorl.evaluation.evaluate import evaluate_on
from whorl.faults import Stop
from whorl.loop import begin, train
from whorl.reporting.console import Advance, Silent
from whorl.reporting.run_directory import is_run
from whorl.run import Run, open_run, start_run
from whorl.settings import Settings

Tell = Callable[[int, int, str], None]
"""`tell(done, total, note)`: how far a trial is, for whoever watches."""


@dataclass(frozen=True)
class Trial:
    """What a trial is given.

    Attributes:
        arm: name of the arm.
        role: the arm's role; an arm "start" is not trained.
        settings: the arm's, with the trial's seed, on one core, and with the shared start as their model.
        folder: a folder of its own. It is still there, as it was, when a killed trial is done again.
        tell: says how far the trial is.
    """

    arm: str
    role: str
    settings: Settings
    folder: Path
    tell: Tell = lambda done, total, note: None


@dataclass(frozen=True)
class Outcome:
    """What a finished trial leaves behind, for measures to read.

    Attributes:
        rows: metrics by `step`, in order: the curves.
        values: numbers of the whole trial.
        run: its run directory, if it was a run. Its newest checkpoint is the end of training.
    """

    rows: Sequence[Mapping[str, Any]] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    run: Path | None = None
    _evaluated: dict[tuple, Mapping[str, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def evaluate(
        self, environment: str | None, split: str, problems: int, samples: int
    ) -> Mapping[str, float]:
        """`eval_...` metrics of the trained policy on another task (None: its own) or with more samples.

        Done once however many measures read it. ValueError if the trial was not a run.
        """
        key = (environment, split, problems, samples)
        if key not in self._evaluated:
            if self.run is None:
                raise ValueError("this trial left no run, so there is no policy to evaluate")
            run = open_run(self.run, read_only=True).with_environment(environment)
            chosen = run.held_out(split, problems)
            found, _ = evaluate_on(run.player, chosen, samples, run.settings.sampling, run.progress)
            self._evaluated[key] = found
        return self._evaluated[key]


def train_run(trial: Trial) -> Outcome:
    """The trial that most experiments want: a run of its settings, begun or gone on with."""
    return carry_on(trial, begin_or_go_on(trial))


def carry_on(trial: Trial, run: Run, after_step: Callable[[Run], None] = lambda run: None) -> Outcome:
    """Train the trial's run to its end; `after_step` is called with it after every step.

    `Stop` if it ended before its last step: a comparison at equal budget has no use for a shorter curve.
    """
    if trial.role == "start":
        if not run.warm:
            run.player.start()
            begin(run)
    elif reason := train(run, after_step):
        raise Stop(reason)
    return Outcome(run.directory.history(), run=run.directory.path)


def begin_or_go_on(trial: Trial) -> Run:
    """The trial's run, in the folder `run` of its own: a new one, or the one that was killed, where it was."""
    path, watched = trial.folder / "run", Watched(trial.tell, trial.settings.num_steps)
    if is_run(path):
        return open_run(path, watched)
    return start_run(trial.arm, trial.settings, path, watched)


class Watched(Silent):
    """Progress of a run, told as that of whatever it is done for."""

    def __init__(self, tell: Tell, total: int):
        self._tell, self._total = tell, total

    def log(self, metrics: Mapping[str, float | None]) -> None:
        accuracy = metrics.get("eval_accuracy")
        self._tell(int(metrics["step"] or 0), self._total, "" if accuracy is None else f"{accuracy:.3f}")

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Advance]:
        done = 0

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done
            done += count
            if name == "cold start":
                self._tell(done, self._total, note)

        yield advance


def curves_of(rows: Sequence[Mapping[str, Any]], names: Sequence[str], most: int = 60) -> dict[str, list]:
    """The named metrics as `[steps, values]`, thinned to at most about `most` points; first and last are kept."""
    curves = {}
    for name in names:
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
        if points:
            stride = -(-len(points) // most)
            kept = [p for i, p in enumerate(points) if i % stride == 0 or i == len(points) - 1]
            curves[name] = [[step for step, _ in kept], [float(f"{value:.5g}") for _, value in kept]]
    return curves

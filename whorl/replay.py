"""One recorded step, learned from again: for debugging, and as a proof that the records are complete.

From the newest checkpoint before the step, training goes on over the recorded rollouts of the steps in between, up to
the step itself; nothing is sampled and nothing in the run directory changes. On the same machine, with the same number
of cores and the same versions, every metric of the learner is then the recorded one to the bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from whorl.data import Batch, Metrics
from whorl.faults import Stop
from whorl.learning import checkpoint
from whorl.reporting.console import Progress
from whorl.reporting.glossary import describe
from whorl.reporting.rollout_table import StoredRollout, groups_of
from whorl.reporting.run_directory import RunDirectory, describe_machine
from whorl.run import Run, num_cores, open_run
from whorl.updates import learn, make_batch

LEARNER_GROUPS = ("policy", "gradient", "sampler", "experts", "critic")
"""Groups of the metric table that the learner fills: what a replay has to give again."""

NOT_LEARNED = ("probe_gap_nats",)
"""Of these groups, what the loop fills when it delivers weights to the sampler."""


@dataclass(frozen=True)
class Compared:
    """A number of a step: as recorded and as replayed, None where it is missing."""

    step: int
    name: str
    recorded: float | None
    replayed: float | None

    @property
    def is_equal(self) -> bool:
        """To the bit; NaN is NaN."""
        if self.recorded is None or self.replayed is None:
            return False
        both_nan = math.isnan(self.recorded) and math.isnan(self.replayed)
        return both_nan or self.recorded == self.replayed


@dataclass(frozen=True)
class Replay:
    """What came of a replay: the numbers of every step from `start` (a checkpoint) to `step`.

    `stopped` is the reason why training stopped in the last one of them, `differs` what differs between the machine
    of the run and this one.
    """

    run: Path
    step: int
    start: int
    numbers: tuple[Compared, ...]
    stopped: str | None
    differs: str

    @property
    def is_equal(self) -> bool:
        return self.stopped is None and all(number.is_equal for number in self.numbers)


def replayable_steps(directory: RunDirectory) -> list[int]:
    """Steps with a checkpoint before them from which every step up to them has its rollouts."""
    recorded, steps = set(directory.rollout_steps()), []
    for start in directory.checkpoint_steps():
        step = start + 1
        while step in recorded:
            steps.append(step)
            step += 1
    return sorted(set(steps))


def replay(path: Path | str, step: int | None, progress: Progress | None = None) -> Replay:
    """Replay one step of the run at `path`. ValueError if it cannot be, or if `step` is None: it says which can."""
    directory = RunDirectory.open(path)
    possible = replayable_steps(directory)
    if step not in possible:
        raise ValueError(_which(directory, step, possible))
    start = max(saved for saved in directory.checkpoint_steps() if saved < step)
    run = open_run(path, progress, step=start, read_only=True)
    recorded = {row["step"]: row for row in directory.history()}
    numbers: list[Compared] = []
    stopped = None
    for number in range(start + 1, step + 1):
        try:
            metrics = _learn_again(run, directory.read_rollouts(number))
        except Stop as stop:
            metrics, stopped = {}, str(stop)
        row = recorded.get(number, {})
        names = {name for name in row if describe(name).group in LEARNER_GROUPS} | set(metrics)
        names -= set(NOT_LEARNED)
        numbers += [Compared(number, name, row.get(name), metrics.get(name)) for name in _in_order(names)]
        if stopped is not None:
            break
        run.step = number
        if number in directory.checkpoint_steps():
            numbers.append(_weights(run, directory.checkpoint(number)))
    return Replay(directory.path, step, start, tuple(numbers), stopped, _differences(directory, run))


def table_of(result: Replay) -> Table:
    """Every number of the step: recorded, replayed, equal or not."""
    table = Table(title=f"{result.run}, step {result.step}", title_justify="left")
    for heading in ("metric", "recorded", "replayed", ""):
        table.add_column(heading, overflow="fold")
    for number in result.numbers:
        if number.step == result.step:
            values = ("-" if value is None else repr(value) for value in (number.recorded, number.replayed))
            table.add_row(number.name, *values, "equal" if number.is_equal else "DIFFERENT")
    return table


def verdict(result: Replay) -> str:
    """One sentence: equal, or where the first difference is."""
    begun = f"step {result.step}, replayed from the checkpoint of step {result.start}"
    if result.is_equal:
        return f"{begun}: every number of the learner is equal to the bit"
    first = next((number for number in result.numbers if not number.is_equal), None)
    if result.stopped is not None and (first is None or first.replayed is None):
        did = "as the run did" if first is None else f"in step {first.step}, which the run finished"
        return f"{begun}: training stopped {did}: {result.stopped}"
    assert first is not None, "a replay that is not equal has a difference"
    if not any(number.recorded is not None for number in result.numbers if number.step == first.step):
        return f"{begun}: step {first.step} was not logged, so there is nothing to compare with"
    return (
        f"{begun}: the first difference is {first.name} of step {first.step}, recorded {first.recorded!r}, replayed "
        f"{first.replayed!r}{result.differs}"
    )


def _learn_again(run: Run, stored: list[StoredRollout]) -> Metrics:
    """What the loop does with the rollouts of a step. What only sampling can provide was recorded."""
    judged = [one for one in stored if one.rollout.reward is not None]
    provided: dict[str, Callable[[Batch], Tensor]] = {}
    if judged and judged[0].greedy_reward is not None:
        rewards = torch.tensor([one.greedy_reward for one in judged], dtype=torch.float64)
        provided["reward_greedy_S"] = lambda batch: rewards
    return learn(run, make_batch(run, groups_of(stored), provided))


def _weights(run: Run, path: Path) -> Compared:
    """Number of weights and moments that are those of the checkpoint, beside the number of all."""
    recorded, _ = checkpoint.load(path)
    here, _ = run.learner.state_dict()
    same = sum(name in here and torch.equal(here[name].cpu(), tensor) for name, tensor in recorded.items())
    return Compared(run.step, "tensors of the checkpoint", float(len(recorded)), float(same))


def _in_order(names: set[str]) -> list[str]:
    """The loss and the norm of its gradient first, then by name."""
    first = ("loss", "grad_norm")
    return [name for name in first if name in names] + sorted(names - set(first))


def _which(directory: RunDirectory, step: int | None, possible: list[int]) -> str:
    """Why this step cannot be replayed, which ones can, and what would record more."""
    asked = "which step? " if step is None else f"step {step} of {directory.path} cannot be replayed: "
    if step is not None:
        before = [saved for saved in directory.checkpoint_steps() if saved < step]
        kept = set(directory.rollout_steps())
        lost = [number for number in range(max(before, default=step - 1) + 1, step + 1) if number not in kept]
        asked += (
            "there is no checkpoint before it. "
            if not before
            else f"the rollouts of step {lost[0]} are gone. "
        )
    can = f"It can be done for {_spans(possible)}" if possible else "It can be done for no step of this run"
    return (
        f"{asked}{can}. A step needs the rollouts of all steps since a checkpoint before it; keep_checkpoints, "
        "checkpoint_every_steps and rollouts_every_steps decide how far back they are kept"
    )


def _spans(steps: list[int]) -> str:
    """1 to 3, 7, 9 to 10."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    return "step " + ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in spans)


def _differences(directory: RunDirectory, run: Run) -> str:
    """What differs between the machine on which the run was made and this one, for the end of a sentence."""
    then, now = directory.machine, describe_machine()
    names = ("torch", "whorl", "numpy", "cpu", "cores", "gpus", "system")
    changed = [name for name in names if then.get(name) != now.get(name)]
    changes = "; ".join(f"{name} {then.get(name)} then, {now.get(name)} now" for name in changed)
    said = f" (made with {changes})" if changes else ""
    return f"{said}. The same bits need the same machine, versions and number of cores (here {num_cores(run.settings)})"

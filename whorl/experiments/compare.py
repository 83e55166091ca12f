"""`whorl compare`: arms x seeds in processes, each trial once, and what came of it kept.

    OUT/RECIPE/EXPERIMENT/      config.json, machine.json, trials.json, report.md, curves.png: small, for the repository
    OUT/.starts/KEY/            start weights, by what they were made of
    OUT/.work/RECIPE/EXPERIMENT/ARM-SEED-KEY/    run directory, log and result of each trial

A trial is known by a hash of its settings, its start and the function that carried it out. One that is finished is
not done again; only measures that are new by name are read from what it left. One that was killed, or whose process
was, goes on from its newest checkpoint. A trial whose process ended with an error of the code is tried again by the
next command; one that stopped for a reason of its own (nothing left to learn from, weights not finite) has failed,
and that is its result.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

import whorl
from whorl.experiments.judge import Result
from whorl.experiments.plan import Arm, Budget, Experiment
from whorl.experiments.starts import (
    content_key,
    contents_of,
    identity_of,
    read_start,
    start_key,
    start_settings,
)
from whorl.reporting.run_directory import describe_machine, write_atomically
from whorl.reporting.run_lock import lock

POLL_SECONDS = 0.2


@dataclass
class Task:
    """A start or a trial that is to be done: where, and how far it is."""

    kind: Literal["start", "trial"]
    arm: str
    seed: int
    folder: Path
    key: str
    start: Path | None = None
    state: str = "waiting"
    """waiting, running, finished, failed, broken (its process ended without a result)"""
    note: str = ""
    gpu: str | None = None
    """As CUDA_VISIBLE_DEVICES names it; None: its process sees what this one sees."""
    process: subprocess.Popen | None = field(default=None, repr=False)
    log: Path = field(init=False)
    """What its process said; that of its start's, where that is what broke."""

    def __post_init__(self) -> None:
        self.log = self.folder / "log.txt"

    @property
    def progress(self) -> tuple[int, int, str]:
        """Done, of how many, and a note; zeros before it has said anything."""
        try:
            done, total, note = json.loads((self.folder / "progress.json").read_text())
        except (OSError, ValueError):
            return 0, 0, ""
        return done, total, note


@dataclass(frozen=True)
class Comparison:
    """One experiment at one budget, and where its results belong."""

    module: str
    recipe: str
    experiment: Experiment
    seeds: tuple[int, ...]
    budget: Budget
    out: Path
    arms: tuple[Arm, ...]
    command: str = ""
    """That makes all arms at the experiment's number of seeds; where there are more or fewer, that is added."""

    @property
    def place(self) -> Path:
        """Where the results are: the small ones that are kept."""
        return place_of(self.out, self.recipe, self.experiment, self.budget)

    @property
    def working(self) -> Path:
        """Where its trials are carried out."""
        return self.out / ".work" / self.place.relative_to(self.out)

    def trials(self) -> list[Task]:
        """All trials, those of a seed beside each other, so that an unfinished comparison has whole pairs."""
        return [self._trial(arm, seed) for seed in self.seeds for arm in self.arms]

    def _trial(self, arm: Arm, seed: int) -> Task:
        settings = self.experiment.settings(self.budget, arm, seed)
        made_of = start_settings(self.experiment, self.budget, arm, seed)
        start = None if made_of is None else self.out / ".starts" / start_key(made_of)
        carried_out_by = self.experiment.trial
        key = content_key(
            {
                "settings": identity_of(settings),
                "role": arm.role,
                "start": start.name if start else "",
                "trial": f"{carried_out_by.__module__}.{carried_out_by.__qualname__}",
                "contents": contents_of(settings),
            }
        )
        name = f"{arm.name}-{seed}-{key[:8]}".replace("/", "_").replace(" ", "_")
        return Task("trial", arm.name, seed, self.working / name, key, start)


def place_of(out: Path, recipe: str, experiment: Experiment, budget: Budget) -> Path:
    """The folder of an experiment's results; those of a GPU are others and have one of their own."""
    return out / recipe / (experiment.name if budget == "cpu" else f"{experiment.name}-gpu")


Show = Callable[[Sequence[Task]], None]


def run_comparison(comparison: Comparison, jobs: int, show: Show, *, fresh: bool = False) -> list[Result]:
    """Do what is left to do of a comparison, and keep it. Returns all results that belong to it by now.

    `show` is called with all tasks whenever something may have changed. KeyboardInterrupt ends the processes; the same
    command then goes on. ValueError if another process is at work on the same comparison.
    """
    trials = comparison.trials()
    for folder in (comparison.place, comparison.working):
        folder.mkdir(parents=True, exist_ok=True)
    held = lock(comparison.working)
    done = _done_before(comparison, trials, fresh=fresh)
    starts = _starts_of(trials)
    _write_description(comparison, done.values())
    write_results(comparison.place, comparison.experiment, done.values())

    def keep(task: Task) -> None:
        """A result that its process left, or why there is none."""
        at = (task.arm, task.seed)
        if task.state == "broken":
            done[at] = Result(*at, task.key, task.note, again=True)
        elif task.state == "failed" and not (task.folder / "result.json").is_file():
            done[at] = Result(*at, task.key, task.note, start=task.start.name if task.start else "")
        else:
            done[at] = read_result(task.folder)
        write_results(comparison.place, comparison.experiment, done.values())
        _write_description(comparison, done.values())
        if task.process is not None:
            write_json(comparison.place / "machine.json", describe_machine() | {"code": code_digest()})

    _carry_out(comparison, starts, trials, jobs, show, keep)
    del held  # until here nobody else may work on it
    return list(done.values())


def _done_before(
    comparison: Comparison, trials: Sequence[Task], *, fresh: bool
) -> dict[tuple[str, int], Result]:
    """Results that count, by arm and seed; their trials are marked. If `fresh`, none of these trials, nor of failed
    starts.
    """
    asked = {(task.arm, task.seed) for task in trials}
    kept = current(comparison, read_results(comparison.place))
    done = {(r.arm, r.seed): r for r in kept if not r.again and not (fresh and (r.arm, r.seed) in asked)}
    measures = {measure.name for measure in comparison.experiment.measures}
    for task in trials:
        at = (task.arm, task.seed)
        if fresh:
            shutil.rmtree(task.folder, ignore_errors=True)
            if task.start and (start := read_start(task.start / "start")) and start.reason:
                shutil.rmtree(task.start)
        if at not in done and (task.folder / "result.json").is_file():
            # The process that waited for it was killed before it could keep it.
            done[at] = read_result(task.folder)
        if (result := done.get(at)) and (result.reason or measures <= {*result.values, *result.unread}):
            task.state, task.note = ("failed", result.reason) if result.reason else ("finished", "kept")
    return done


def _starts_of(trials: Sequence[Task]) -> list[Task]:
    """The starts that waiting trials need and that are not there yet."""
    needed = {task.start: task for task in trials if task.start is not None and task.state == "waiting"}
    return [
        Task("start", task.arm, task.seed, folder, folder.name)
        for folder, task in needed.items()
        if read_start(folder / "start") is None
    ]


def _carry_out(
    comparison: Comparison,
    starts: Sequence[Task],
    trials: Sequence[Task],
    jobs: int,
    show: Show,
    keep: Callable[[Task], None],
) -> None:
    """Give every start and every waiting trial a process, `jobs` at once, shared out evenly among the GPUs where there
    are several. A trial waits for its start and no other; `keep` is called for each when it has ended.
    """
    making, everything = {start.folder: start for start in starts}, [*starts, *trials]
    waiting, running = [*starts, *(task for task in trials if task.state == "waiting")], []
    gpus = visible_gpus() if comparison.budget == "gpu" else []
    try:
        while waiting or running:
            for task in [task for task in waiting if not _is_open(making, task.start)]:
                if len(running) == jobs:
                    break
                waiting.remove(task)
                _look_at_start(task, making)
                if task.state != "waiting":
                    keep(task)
                    continue
                if gpus:
                    task.gpu = min(gpus, key=[task.gpu for task in running].count)
                running.append(_begin(comparison, task))
            time.sleep(POLL_SECONDS)
            for task in [task for task in running if task.process and task.process.poll() is not None]:
                running.remove(task)
                _conclude(task)
                if task.kind == "trial":
                    keep(task)
            show(everything)
    finally:
        for task in running:
            assert task.process is not None and task.process.stdin is not None
            task.process.kill()
            task.process.wait()
            task.process.stdin.close()
    show(everything)


def _is_open(making: Mapping[Path, Task], start: Path | None) -> bool:
    """Whether this start is still being made, or will be."""
    return start is not None and start in making and making[start].state in ("waiting", "running")


def _look_at_start(task: Task, making: Mapping[Path, Task]) -> None:
    """A trial whose start cannot be used does not wait any more, and says why. (A start has none.)"""
    if task.start is None:
        return
    found = read_start(task.start / "start")
    if found is None:
        made = making.get(task.start)
        why = made.note if made else "its process ended without a result"
        task.state, task.note, task.log = "broken", f"its start: {why}", task.start / "log.txt"
    elif found.reason:
        task.state, task.note = "failed", f"its start did not pass its gate: {found.reason}"


def _begin(comparison: Comparison, task: Task) -> Task:
    """Start the task's process. It has one thread, and ends when this one does."""
    task.folder.mkdir(parents=True, exist_ok=True)
    (task.folder / "progress.json").unlink(missing_ok=True)
    what = {
        "kind": task.kind, "module": comparison.module, "experiment": comparison.experiment.name,
        "budget": comparison.budget, "arm": task.arm, "seed": task.seed, "key": task.key,
        "start": str(task.start / "start") if task.start else None,
    }  # fmt: skip
    write_atomically(task.folder / "task.json", json.dumps(what).encode())
    task.process = start_process(task.folder, task.gpu)
    task.state = "running"
    return task


def visible_gpus() -> list[str]:
    """The GPUs that torch can use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def start_process(folder: Path, gpu: str | None = None) -> subprocess.Popen:
    """A process of its own for the task in this folder, deaf to the terminal's Ctrl-C; what it says goes into a log."""
    seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "whorl.experiments.worker", str(folder)],
            stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, **seen, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip


def _conclude(task: Task) -> None:
    """What became of a task whose process has ended."""
    assert task.process is not None and task.process.stdin is not None
    task.process.stdin.close()
    status = task.process.returncode
    if task.kind == "start" and status == 0 and (start := read_start(task.folder / "start")):
        task.state, task.note = (
            ("failed", start.reason) if start.reason else ("finished", f"{start.accuracy:.3f}")
        )
    elif task.kind == "trial" and status == 0 and (result := read_result(task.folder)):
        task.state, task.note = ("failed", result.reason) if result.reason else ("finished", task.progress[2])
    elif status < 0:
        task.state, task.note = "broken", f"its process was ended by {signal.Signals(-status).name}"
    else:
        lines = task.log.read_text(errors="replace").strip().splitlines() or ["nothing was said"]
        task.state, task.note = "broken", lines[-1]


def read_result(folder: Path) -> Result:
    return Result.from_dict(json.loads((folder / "result.json").read_text()))


def read_results(place: Path) -> list[Result]:
    """The results that are kept in a folder; none if there are none."""
    file = place / "trials.json"
    if not file.is_file():
        return []
    try:
        return [Result.from_dict(row) for row in json.loads(file.read_text())]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is damaged ({error}). Restore it, or delete it: trials whose folders are still there are then "
            "kept again, the others done again"
        ) from error


def write_results(place: Path, experiment: Experiment, results: Sequence[Result] | Any) -> None:
    """Keep results, one line each, in the order of arms and seeds."""
    order = {arm.name: number for number, arm in enumerate(experiment.arms)}
    ordered = sorted(results, key=lambda result: (order[result.arm], result.seed))
    lines = ",\n".join(json.dumps(result.to_dict(), separators=(",", ":")) for result in ordered)
    write_atomically(place / "trials.json", f"[\n{lines}\n]\n".encode())


def current(comparison: Comparison, results: Sequence[Result]) -> list[Result]:
    """Those of the results that the experiment, as it is now, would come to: the others are of other settings."""
    everything = replace(
        comparison, arms=comparison.experiment.arms, seeds=tuple(sorted({r.seed for r in results}))
    )
    keys = {(task.arm, task.seed): task.key for task in everything.trials()}
    return [result for result in results if keys.get((result.arm, result.seed)) == result.key]


def code_digest() -> str:
    """Twelve digits that stand for whorl's source, so that results say which code they are of."""
    root, digest = Path(whorl.__file__).parent, hashlib.sha256()
    for file in sorted(root.glob("**/*.py")):
        digest.update(str(file.relative_to(root)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _write_description(comparison: Comparison, results: Iterable[Result]) -> None:
    """config.json: the settings, the seeds of what is kept, and the command that makes all of it."""
    experiment = comparison.experiment
    kept = sorted({result.seed for result in results})
    num_seeds = max(len(comparison.seeds), *(seed + 1 for seed in kept), 0)
    base = experiment.settings(comparison.budget, Arm("", "start"), 0).to_dict()
    del base["seed"]
    config = {
        "recipe": comparison.recipe,
        "experiment": experiment.name,
        "question": experiment.question,
        "command": comparison.command
        + (f" --seeds {num_seeds}" if num_seeds != experiment.num_seeds else ""),
        "scale": comparison.budget,
        "budget": experiment.budget,
        "settings": base,
        "start": dict(experiment.start_changes(comparison.budget)),
        "arms": {arm.name: {"role": arm.role, "changes": dict(arm.changes)} for arm in experiment.arms},
        "seeds": kept,
        "starts": starts_of(comparison),
    }
    write_json(comparison.place / "config.json", config)
    if not (comparison.place / "machine.json").is_file():
        write_json(comparison.place / "machine.json", describe_machine() | {"code": code_digest()})


def write_json(file: Path, content: Any) -> None:
    write_atomically(file, (json.dumps(content, indent=1, default=str, ensure_ascii=False) + "\n").encode())


def starts_of(comparison: Comparison) -> dict[str, Any]:
    """What became of the starts of the comparison's seeds, by key; those of other machines as they were noted."""
    file = comparison.place / "config.json"
    noted = json.loads(file.read_text())["starts"] if file.is_file() else {}
    folders = {task.start: task.seed for task in comparison.trials() if task.start is not None}
    for folder, seed in folders.items():
        if (start := read_start(folder / "start")) is not None:
            noted[folder.name] = {"seed": seed, **vars(start)}
    return noted

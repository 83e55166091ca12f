"""One process that makes one start, or carries out one trial: `python -m whorl.experiments.worker FOLDER`.

The folder holds `task.json`, written by who started the process. What comes of a trial is put beside it as
`result.json`; how far it is, in `progress.json`. The process ends when its standard input does, which is when whoever
started it is gone, however that went.
"""

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from whorl.experiments.compare import code_digest
from whorl.experiments.judge import Result
from whorl.experiments.plan import Experiment, changed, named
from whorl.experiments.starts import from_start, make_start, read_start, start_settings
from whorl.experiments.trials import Outcome, Trial, curves_of
from whorl.faults import Stop
from whorl.reporting.run_directory import RunDirectory, write_atomically
from whorl.reporting.run_lock import RunLock, lock
from whorl.run import use_own_threads
from whorl.settings import Settings


def experiments_of(module: str) -> tuple[Experiment, ...]:
    """The experiments that a recipe module lists."""
    return getattr(importlib.import_module(module), "EXPERIMENTS", ())


def put(file: Path, content: Any) -> None:
    """Write what is told often: whole or not at all, and without waiting for the disk."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, file)


class Clock:
    """Seconds of a task's processes, those of earlier ones that were killed included, as far as they were noted."""

    def __init__(self, file: Path):
        self._file, self._started = file, time.monotonic()
        self._before = float(json.loads(file.read_text())) if file.is_file() else 0.0

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def note(self) -> None:
        """Keep what it is by now for the next process."""
        put(self._file, round(self.seconds, 1))


def work(folder: Path) -> None:
    """Do the task of a folder; a trial that ends with `Stop` has failed, which is a result like others."""
    task = json.loads((folder / "task.json").read_text())
    experiment = named(task["experiment"], experiments_of(task["module"]), "experiment")
    arm = experiment.arm(task["arm"])
    last_told, clock = 0.0, Clock(folder / "seconds.json")

    def tell(done: int, total: int, note: str) -> None:
        nonlocal last_told
        if done < total and time.monotonic() - last_told < 0.5:
            return
        last_told = time.monotonic()
        put(folder / "progress.json", [done, total, note])
        clock.note()

    if task["kind"] == "start":
        settings = start_settings(experiment, task["budget"], arm, task["seed"])
        assert settings is not None, f"{arm.name} has no cold start, so no start is made for it"
        use_own_threads(settings)
        held = _wait_for(folder)
        make_start(settings, folder / "start", tell)
        del held
        return
    settings = experiment.settings(task["budget"], arm, task["seed"])
    settings = trial_settings(settings, Path(task["start"]) if task["start"] else None)
    use_own_threads(settings)
    trial = Trial(arm.name, arm.role, settings, folder, tell)
    known = {"arm": arm.name, "seed": task["seed"], "key": task["key"], "code": code_digest()}
    known |= {"start": Path(task["start"]).parent.name if task["start"] else ""}
    known |= {"date": datetime.now(UTC).strftime("%Y-%m-%d")}
    try:
        outcome = experiment.trial(trial)
        result = Result(**known, **_measured(experiment, outcome, clock.seconds))
    except Stop as stop:
        result = Result(**known, reason=str(stop))
    result = replace(result, cost={**result.cost, "trial_seconds": round(clock.seconds, 1)})
    write_atomically(folder / "result.json", json.dumps(result.to_dict()).encode())


def _wait_for(folder: Path) -> RunLock:
    """The right to make the start in this folder, which another comparison may just be doing."""
    while True:
        try:
            return lock(folder)
        except ValueError:
            time.sleep(1)


def trial_settings(settings: Settings, start: Path | None) -> Settings:
    """The arm's settings as its run has them: one process, from the start, with little left on the disk."""
    if start is not None:
        found = read_start(start)
        assert found is not None and not found.reason, f"the start in {start} cannot be used"
        settings = from_start(settings, start)
    return changed(settings, {"cores": 1, "tracker": "none", "keep_checkpoints": 1})


def _measured(experiment: Experiment, outcome: Outcome, seconds: float) -> Mapping[str, Any]:
    """What is kept of an outcome: measures, curves and cost."""
    values, unread = {}, {}
    for measure in experiment.measures:
        try:
            values[measure.name] = measure.of(outcome)
        except ValueError as error:
            unread[measure.name] = str(error)
    tokens = sum(row.get("generated_tokens") or 0.0 for row in outcome.rows)
    spent = sum((row.get("step_seconds") or 0.0) + (row.get("eval_seconds") or 0.0) for row in outcome.rows)
    cost = {"generated_tokens": tokens, "seconds": round(spent or seconds, 1)}
    taught = RunDirectory.open(outcome.run).supervised_history() if outcome.run else []
    if taught:
        cost["taught_tokens"] = float(taught[-1].get("supervised_tokens", 0))
    spent_so_far, rows = 0.0, []
    for row in outcome.rows:
        spent_so_far += row.get("generated_tokens") or 0.0
        rows.append({**row, "tokens_so_far": spent_so_far})
    names = (*experiment.curves, *(("tokens_so_far",) if experiment.budget == "generated_tokens" else ()))
    return {"values": values, "unread": unread, "curves": curves_of(rows, names), "cost": cost}


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1024):  # not through sys.stdin, whose lock Python wants when it ends
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(Path(sys.argv[1]))

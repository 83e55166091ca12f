"""A comparison as it goes on: a table of arms and seeds on a terminal, a line per finished trial elsewhere."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import rich.console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from whorl.experiments.compare import Task
from whorl.reporting.console import duration, visible

STYLES = {"waiting": "dim", "running": "cyan", "finished": "green", "failed": "red", "broken": "red"}


class Board:
    """Shows tasks; call it with all of them whenever something may have changed. A context manager."""

    def __init__(self, console: rich.console.Console | None = None):
        self._console = console or rich.console.Console()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self.tasks: Sequence[Task] = ()
        """What was last shown."""
        self._said: set[tuple[str, str, int, str]] = set()
        self._started = time.monotonic()

    def __enter__(self) -> "Board":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        if self._live is not None:
            self._live.update(table_of(tasks, time.monotonic() - self._started), refresh=True)
            return
        for task in tasks:
            said = (task.kind, task.arm, task.seed, task.state)
            if said not in self._said and task.state not in ("waiting", "running"):
                passed = duration(time.monotonic() - self._started)
                num_done = sum(one.state not in ("waiting", "running") for one in tasks)
                what = (
                    f"start of seed {task.seed}" if task.kind == "start" else f"{task.arm}, seed {task.seed}"
                )
                line = f"[{num_done}/{len(tasks)}, {passed}] {what}: {task.state} {task.note}".rstrip()
                print(visible(line), flush=True)
                self._said.add(said)


def table_of(tasks: Sequence[Task], seconds: float) -> Table:
    """Arms down, seeds across; in each cell how far the trial is, or its start."""
    starts = {task.folder: task for task in tasks if task.kind == "start"}
    trials = {(task.arm, task.seed): task for task in tasks if task.kind == "trial"}
    table = Table(title=f"trials, {duration(seconds)}", title_justify="left")
    table.add_column("arm")
    seeds = sorted({seed for _, seed in trials})
    for seed in seeds:
        table.add_column(f"seed {seed}", no_wrap=True)
    for arm in dict.fromkeys(arm for arm, _ in trials):
        table.add_row(arm, *(_cell(trials.get((arm, seed)), starts) for seed in seeds))
    return table


def _cell(task: Task | None, starts: Mapping[Path, Task]) -> Text:
    if task is None:
        return Text("")
    start = starts.get(task.start) if task.start else None
    if task.state == "waiting" and start is not None and start.state == "running":
        return Text(visible(f"start {_progress(start)}")[:40], style=STYLES["running"])
    text = _progress(task) if task.state == "running" else f"{task.state} {task.note}".rstrip()
    return Text(visible(text)[:40], style=STYLES[task.state])


def _progress(task: Task) -> str:
    done, total, note = task.progress
    return f"{done}/{total} {note}".rstrip() if total else "starting"

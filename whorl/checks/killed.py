"""A process with a `whorl` command that ends itself with SIGKILL at a chosen moment: what `whorl check resume` starts.

The moment is a call of one of our functions (or of the system's, where a file gets its name). The function is
replaced in that process before the command runs, so the program itself knows nothing of being tested. SIGKILL
leaves no time for anything: no handler, no `finally`, no buffer that is written out.
"""

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Moment:
    """A moment in the life of a process of a run."""

    name: str
    """What goes on then: a part of the run, and after a colon where in it."""
    place: str
    """The function that is called, as `module:name` or `module:Class.name`."""
    call: int = 1
    """Which of its calls since the process started (since the phase began, if there is one)."""
    after: bool = False
    """Whether the call is over, or (False) about to begin. Half-done calls are in `HALVES`."""
    phase: str = ""
    """The phase, as the progress bar names it, in which the call happens."""
    entry: int = 1
    """Which phase of that name since the process started."""


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlives no SIGKILL")


def half_a_row(log: Any, metrics: Any) -> NoReturn:
    """In place of `RowLog.append`: the power fails in the middle of the line."""
    import json

    line = json.dumps({name: str(value) for name, value in metrics.items()})
    with log.file.open("a") as stream:
        stream.write(line[: len(line) // 2])
    die()


def half_the_tensors(path: Path, tensors: Any) -> NoReturn:
    """In place of the function that writes a checkpoint's tensors."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    os.truncate(path, path.stat().st_size // 2)
    die()


def half_of_a_folder(path: Path, *more: object) -> NoReturn:
    """In place of `shutil.rmtree`: one of the files is gone when the process is."""
    next(file for file in Path(path).iterdir()).unlink()
    die()


HALVES: dict[str, Callable[..., NoReturn]] = {
    "whorl.reporting.run_directory:RowLog.append": half_a_row,
    "whorl.learning.checkpoint:_write_tensors": half_the_tensors,
    "shutil:rmtree": half_of_a_folder,
}
"""What is called in place of a function so that it is never finished."""


IMPORTS = (
    "torch._dynamo",  # by torch.optim
    "tyro",
    "whorl.loop",
    "whorl.environments.data_files",
    "whorl.environments.guess_number",
    "whorl.recipes.quickstart",
    "whorl.reporting.report",
    "whorl.summary",
)
"""What the commands import. It takes longer than such a small run, so a server does it once for all processes."""


def start(words: Sequence[str], log: Path, moment: Moment | None = None, prelude: str = "") -> BaseProcess:
    """A process with a `whorl` command that says to the file `log` what it would say on a terminal.

    It has a session and a process group of its own. It ends at the moment, if one is given, and begins with
    the Python text `prelude`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTS))
    process = context.Process(target=_main, args=(tuple(words), log, moment, prelude), daemon=True)
    process.start()
    return process


def _main(words: tuple[str, ...], log: Path, moment: Moment | None, prelude: str) -> NoReturn:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from whorl import cli
    from whorl.reporting import report

    # To draw the curves of so small a run takes longer than the run. The page is written without them.
    report._figures = lambda *curves: []
    exec(prelude, {})
    if moment is not None:
        arm(moment)
    sys.exit(cli.main(words))


def arm(moment: Moment) -> None:
    """Replace the function of the moment by one that does not survive it."""
    module, _, name = moment.place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    usual = getattr(owner, name)
    place = _Place(moment)
    half = HALVES.get(moment.place)

    def fatal(*arguments: Any, **named: Any) -> Any:
        here = place.reached()
        if here and half is not None:
            half(*arguments, **named)
        if here and not moment.after:
            die()
        result = usual(*arguments, **named)
        if here:
            die()
        return result

    setattr(owner, name, fatal)


class _Place:
    """Counts calls, within the right phase if the moment names one."""

    def __init__(self, moment: Moment) -> None:
        from whorl.reporting.console import Console

        self.moment = moment
        self.calls = self.entries = 0
        self.inside = not moment.phase
        usual = Console.phase

        @contextmanager
        def phase(console: Console, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
            self.entries += name == moment.phase
            with usual(console, name, total) as advance:
                if name == moment.phase:
                    self.inside = self.entries == moment.entry
                yield advance
            self.inside = self.inside and not moment.phase

        Console.phase = phase  # type: ignore[method-assign]

    def reached(self) -> bool:
        self.calls += self.inside
        return self.inside and self.calls == self.moment.call

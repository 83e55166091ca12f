"""The run directory: everything a run leaves behind, and the interface between the tools.

    config.json         the run's settings; its presence makes a directory a run directory
    environment.json    versions of Python and libraries, kind of machine (no host or user name)
    metrics.jsonl       one JSON object per step, in the order of steps
    supervised.jsonl    the same for updates of the supervised start, if there is one
    rollouts/step_000012.parquet    what was sampled in step 12 (columns: `rollout_table.py`)
    checkpoints/step_000012/        weights and state (written by `whorl.learning`)
    stopped.json        why the run ended before its last step, if it did
    report.html         the page that `whorl report` makes

Files other than the two logs are written under a temporary name, fsynced and renamed, so that a name never
stands for half a file. A log is appended to, one line and one fsync per row: a process killed while writing
leaves at most half a line at the end, which reading ignores and the next append cuts off.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from whorl.data import Group
from whorl.reporting.glossary import check_names
from whorl.reporting.rollout_table import StoredRollout, from_table, to_table

RECORDED_PACKAGES = ("whorl", "torch", "numpy", "safetensors", "tokenizers", "triton", "transformers")


class RunDirectory:
    """One run on disk. Make one with `create` or `open`.

    Attributes:
        path: the directory.
        config: what config.json holds.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self._metrics = RowLog(path / "metrics.jsonl", "step")
        self._supervised = RowLog(path / "supervised.jsonl", "update")

    @classmethod
    def create(
        cls, config: Mapping[str, Any], path: Path | str | None = None, root: Path | str = "runs"
    ) -> "RunDirectory":
        """A new run directory at `path`, or at the first free `root/<config["recipe"]>-<n>`.

        Raises ValueError if `path` holds anything already, or if `config` cannot be written as JSON.
        """
        text = _config_text(config)
        directory = _next_free(Path(root), config) if path is None else Path(path)
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            what = "already holds a run; `whorl resume` continues it" if is_run(directory) else "is not empty"
            raise ValueError(f"{directory} {what}. Give the path of a new directory")
        with _explained(directory):
            (directory / "rollouts").mkdir(parents=True, exist_ok=True)
            (directory / "checkpoints").mkdir(exist_ok=True)
        write_atomically(directory / "environment.json", _json_bytes(describe_machine()))
        # Last, because it is what makes the directory a run.
        write_atomically(directory / "config.json", text)
        return cls(directory, json.loads(text))

    @classmethod
    def open(cls, path: Path | str) -> "RunDirectory":
        """The existing run directory at `path` (ValueError if it is not one). Writes nothing."""
        directory = Path(path)
        if not directory.is_dir():
            raise ValueError(f"there is no run directory at {directory}")
        if not is_run(directory):
            raise ValueError(f"{directory} is not a run directory: it has no config.json")
        try:
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{directory / 'config.json'} is not valid JSON: {error}") from error
        return cls(directory, config)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def machine(self) -> dict[str, Any]:
        """What environment.json recorded when the run was created."""
        file = self.path / "environment.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append the row of one step. `metrics["step"]` must be above every step logged before."""
        self._metrics.append(metrics)

    def log_supervised(self, metrics: Mapping[str, Any]) -> None:
        """Append the row of one update of the supervised start, numbered by `metrics["update"]`."""
        self._supervised.append(metrics)

    def history(self) -> list[dict[str, Any]]:
        """The logged rows, in order. Safe to call while the run goes on."""
        return self._metrics.rows()

    def supervised_history(self) -> list[dict[str, Any]]:
        return self._supervised.rows()

    def stopped_early(self, reason: str) -> None:
        """Record why the run ended before its last step."""
        write_atomically(self.path / "stopped.json", _json_bytes({"reason": reason}))

    @property
    def stop_reason(self) -> str | None:
        """Why the run ended before its last step; None if it did not, or has gone on since."""
        file = self.path / "stopped.json"
        return json.loads(file.read_text(encoding="utf-8"))["reason"] if file.exists() else None

    def truncate_after(self, step: int) -> None:
        """Forget everything logged or sampled after `step`, so that a resumed run can do it again."""
        (self.path / "stopped.json").unlink(missing_ok=True)
        self._metrics.truncate_after(step)
        for later in self.rollout_steps():
            if later > step:
                self.rollout_file(later).unlink()

    def truncate_supervised_after(self, update: int) -> None:
        self._supervised.truncate_after(update)

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step belongs. The directory is made by who writes it."""
        return self.path / "checkpoints" / f"step_{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        return _steps_in(self.path / "checkpoints", r"step_(\d+)")

    def write_rollouts(
        self,
        step: int,
        groups: Sequence[Group],
        advantages: Sequence[Any] | None = None,
        token_text: Callable[[int], str] | None = None,
        greedy_rewards: Sequence[float] | None = None,
    ) -> Path:
        """Record what was sampled in a step.

        Args:
            advantages: one array per judged rollout, in the order of `whorl.data.pack`
                (`batch.unpack("advantage_N")`); None if no credit was given.
            token_text: text of a token id. With it the report can shade single tokens.
            greedy_rewards: one for each judged rollout, where the algorithm compares with a greedy one.
        """
        buffer = pa.BufferOutputStream()
        pq.write_table(to_table(groups, advantages, token_text, greedy_rewards), buffer, compression="zstd")
        write_atomically(self.rollout_file(step), memoryview(buffer.getvalue()))
        return self.rollout_file(step)

    def read_rollouts(self, step: int) -> list[StoredRollout]:
        """The rollouts of a step, as they were written."""
        file = self.rollout_file(step)
        if not file.exists():
            steps = self.rollout_steps()
            have = f"rollouts of steps {steps[0]} to {steps[-1]}" if steps else "no rollouts"
            raise ValueError(f"{self.path} has no rollouts of step {step}; it has {have}")
        return from_table(pq.read_table(file))

    def rollout_steps(self) -> list[int]:
        """Steps whose rollouts are recorded, in order."""
        return _steps_in(self.path / "rollouts", r"step_(\d+)\.parquet")

    def rollout_file(self, step: int) -> Path:
        """Where the rollouts of a step belong."""
        return self.path / "rollouts" / f"step_{step:06d}.parquet"


class RowLog:
    """Rows of metrics in a file of JSON lines, numbered by the column `key` in rising order.

    NaN and infinities are written as Python writes them (`NaN`, `Infinity`), because a diverging run must
    be able to say so; strict JSON parsers in other languages may object.
    """

    def __init__(self, file: Path, key: str) -> None:
        self.file = file
        self.key = key
        self._last: int | None = None
        self._checked = False

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Write one row through to the disk. Values are None, numbers, numpy scalars or 0-dim tensors."""
        check_names(metrics)
        row = {name: _number(name, value) for name, value in metrics.items()}
        number = row.get(self.key)
        if not isinstance(number, int):
            raise ValueError(f"a row of {self.file.name} needs an integer {self.key!r}; got {number!r}")
        if not self._checked:
            self._cut_half_line()
        if self._last is not None and number <= self._last:
            raise ValueError(
                f"{self.key} {number} cannot be logged: {self.file} already reaches {self.key} {self._last}. "
                f"To do it again, drop the later rows first (truncate_after({number - 1}))"
            )
        line = (json.dumps(row) + "\n").encode()
        # Unbuffered: a buffer would try to write the rest of a failed line again when it is closed.
        with _explained(self.file), self.file.open("ab", buffering=0) as stream:
            start = stream.tell()
            try:
                while line:
                    line = line[stream.write(line) :]
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(start)
                raise
        self._last = number

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows. A half-written last line is left out; anything else unreadable is a ValueError."""
        if not self.file.exists():
            return []
        rows = []
        *lines, _half = self.file.read_bytes().split(b"\n")
        for index, line in enumerate(lines):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or self.key not in row:
                raise ValueError(
                    f"line {index + 1} of {self.file} is not a row of metrics: {line[:60]!r}. "
                    "Something else wrote to the file; delete the line to go on"
                )
            rows.append(row)
        return rows

    def truncate_after(self, number: int) -> None:
        """Keep the rows up to `number`, by one atomic replacement of the file."""
        rows = [row for row in self.rows() if row[self.key] <= number]
        if self.file.exists():
            write_atomically(self.file, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._last = rows[-1][self.key] if rows else None
        self._checked = True

    def _cut_half_line(self) -> None:
        rows = self.rows()
        self._last = rows[-1][self.key] if rows else None
        if self.file.exists():
            content = self.file.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self.file, content.rfind(b"\n") + 1)
        self._checked = True


def is_run(directory: Path) -> bool:
    """Whether there is a run in the directory."""
    return (directory / "config.json").is_file()


def write_atomically(file: Path, content: bytes | memoryview) -> None:
    """Put `content` under the name `file`: the name stands for the old content or the new, never for half.

    A process killed in between leaves `<name>.tmp` behind, which the next write of the file replaces.
    """
    temporary = file.with_name(file.name + ".tmp")
    with _explained(file):
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        except OSError:
            # Half a file on a full disk helps nobody and keeps the disk full.
            temporary.unlink(missing_ok=True)
            raise
        # The rename itself is on the disk only when its directory is.
        handle = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def describe_machine() -> dict[str, Any]:
    """Versions and kind of machine. Nothing that names the machine, its user or its network."""
    import torch

    versions = {}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        **versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Say of an OSError which file of the run could not be written, and what to do."""
    try:
        yield
    except OSError as error:
        free = "unknown"
        with contextlib.suppress(OSError):
            parent = next(p for p in (file, *file.parents) if p.exists())
            free = f"{shutil.disk_usage(parent).free / 2**30:.2f} GiB"
        raise OSError(
            error.errno,
            f"could not write to the run directory ({error.strerror or error}; free space: {free}). "
            "Make room or check permissions, then continue with `whorl resume`",
            str(file),
        ) from error


def _number(name: str, value: Any) -> int | float | None:
    """`value` as a plain Python number; one-element tensors and numpy scalars are read."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    raise ValueError(f"metric {name!r} must be a number; got {type(value).__name__} {value!r:.60}")


def _json_bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _config_text(config: Mapping[str, Any]) -> bytes:
    for name, value in config.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"setting {name!r} cannot be written to config.json: {error}") from error
    return _json_bytes(dict(config))


def _next_free(root: Path, config: Mapping[str, Any]) -> Path:
    """Make and return the first `root/<recipe>-<n>` that does not exist."""
    recipe = config.get("recipe")
    if not isinstance(recipe, str) or not re.fullmatch(r"\w[\w.+-]*", recipe):
        raise ValueError(
            "a run directory without a path is named after config['recipe'], which must be a plain name; "
            f"got {recipe!r}"
        )
    with _explained(root):
        root.mkdir(parents=True, exist_ok=True)
        for number in range(1, sys.maxsize):
            with contextlib.suppress(FileExistsError):
                (root / f"{recipe}-{number}").mkdir()
                return root / f"{recipe}-{number}"
    raise AssertionError("unreachable: some number is free")


def _steps_in(directory: Path, pattern: str) -> list[int]:
    if not directory.is_dir():
        return []
    matches = (re.fullmatch(pattern, entry.name) for entry in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

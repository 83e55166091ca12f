"""The run directory: everything a run leaves behind, and the interface between the tools.

    config.json         the run's settings; its presence makes a directory a run directory
    tokenizer.json      the policy's tokenizer
    environment.json    versions of Python and libraries, kind of machine (no host or user name)
    metrics.jsonl       one JSON object per step, in the order of steps
    supervised.jsonl    the same for updates of the supervised start, if there is one
    rollouts/step_000012.parquet    what was sampled in step 12 (columns: `rollout_table.py`)
    evaluations/step_000010.parquet    held-out rollouts of the evaluation after step 10, in the same columns
    checkpoints/step_000012/        weights and state (written by `whorl.learning`)
    tokenizer.json      text to ids, with tokenizer_config.json and chat_template.jinja beside it
    stopped.json        why the run ended before its last step, if it did
    report.html         the page that `whorl report` makes
    lock                held by the process that writes the directory (`run_lock.py`)

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
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from whorl.data import Group
from whorl.reporting.glossary import check_names
from whorl.reporting.rollout_table import StoredRollout, from_table, to_table
from whorl.reporting.run_lock import RunLock, lock

FOLDERS = ("rollouts", "evaluations", "checkpoints")
PARQUET = r"step_(\d+)\.parquet"
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
        self._lock: RunLock | None = None

    @classmethod
    def create(
        cls,
        config: Mapping[str, Any],
        path: Path | str | None = None,
        root: Path | str = "runs",
        files: Mapping[str, bytes] | None = None,
    ) -> "RunDirectory":
        """A new run directory at `path`, or at the first free `root/<config["recipe"]>-<n>`, locked.

        `files` are written beside config.json. ValueError if `path` holds anything already, but for what is left
        of a run that was killed while it was created, or if `config` cannot be written as JSON.
        """
        text = _config_text(config)
        content = {"environment.json": _json_bytes(describe_machine()), **(files or {})}
        directory = _next_free(Path(root), config) if path is None else Path(path)
        if directory.exists() and not _may_be_created(directory, content.keys()):
            what = "already holds a run; `whorl resume` continues it" if is_run(directory) else "is not empty"
            raise ValueError(f"{directory} {what}. Give the path of a new directory")
        with _explained(directory):
            for folder in FOLDERS:
                (directory / folder).mkdir(parents=True, exist_ok=True)
            locked = lock(directory)
        for name, data in content.items():
            write_atomically(directory / name, data)
        # Last, because it is what makes the directory a run.
        write_atomically(directory / "config.json", text)
        made = cls(directory, json.loads(text))
        made._lock = locked
        return made

    @classmethod
    def open(cls, path: Path | str) -> "RunDirectory":
        """The existing run directory at `path` (ValueError if it is not one). Writes nothing."""
        directory = Path(path)
        if not directory.is_dir():
            raise ValueError(f"there is no run directory at {directory}")
        if not is_run(directory):
            raise ValueError(
                f"{directory} is not a run directory: it has no config.json. A run killed before it had one "
                "is started again by the same `whorl train`"
            )
        try:
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{directory / 'config.json'} is not valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{directory / 'config.json'} holds a {type(config).__name__}, not settings")
        return cls(directory, config)

    def lock(self) -> None:
        """Keep other processes from writing here; ValueError if one already does."""
        with _explained(self.path):
            self._lock = lock(self.path)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def machine(self) -> dict[str, Any]:
        """What environment.json recorded when the run was created; nothing if it cannot be read."""
        return _note(self.path / "environment.json")

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
        return _note(self.path / "stopped.json").get("reason")

    def truncate_after(self, step: int) -> None:
        """Forget everything logged or sampled after `step`, and files half written, to do it again."""
        (self.path / "stopped.json").unlink(missing_ok=True)
        self._metrics.truncate_after(step)
        for folder in ("rollouts", "evaluations"):
            for later in _steps_in(self.path / folder, PARQUET):
                if later > step:
                    self._parquet(folder, later).unlink()
        for pattern in ("*.tmp", "rollouts/*.tmp", "evaluations/*.tmp"):
            for half in self.path.glob(pattern):
                half.unlink()

    def truncate_supervised_after(self, update: int) -> None:
        self._supervised.truncate_after(update)

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step belongs. The directory is made by who writes it."""
        return self.path / "checkpoints" / f"step_{step:06d}"

    def existing_checkpoint(self, step: int) -> Path:
        """The checkpoint of a step; ValueError that names those there are if there is none."""
        if step not in self.checkpoint_steps():
            steps = ", ".join(map(str, self.checkpoint_steps())) or "none"
            raise ValueError(f"{self.path} has no checkpoint of step {step}; it has {steps}")
        return self.checkpoint(step)

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
        table = to_table(groups, advantages, token_text, greedy_rewards)
        return self._write_table("rollouts", step, table)

    def write_evaluation(self, step: int, groups: Sequence[Group]) -> Path:
        """Record the held-out rollouts of the evaluation after a step."""
        return self._write_table("evaluations", step, to_table(groups))

    def read_rollouts(self, step: int) -> list[StoredRollout]:
        """The rollouts of a step, as they were written. ValueError if there are none, or if they are damaged."""
        return self._read_table("rollouts", step)

    def read_evaluation(self, step: int) -> list[StoredRollout]:
        """The held-out rollouts of the evaluation after a step; errors as for `read_rollouts`."""
        return self._read_table("evaluations", step)

    def rollout_steps(self) -> list[int]:
        """Steps whose rollouts are recorded, in order."""
        return _steps_in(self.path / "rollouts", PARQUET)

    def rollout_file(self, step: int) -> Path:
        """Where the rollouts of a step belong."""
        return self._parquet("rollouts", step)

    def delete_rollouts(self, step: int) -> None:
        """Forget what was sampled in a step, for good."""
        self.rollout_file(step).unlink()

    def _write_table(self, folder: str, step: int, table: pa.Table) -> Path:
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        file = self._parquet(folder, step)
        with _explained(file):
            file.parent.mkdir(exist_ok=True)  # an older run has no evaluations
        write_atomically(file, memoryview(buffer.getvalue()))
        return file

    def _read_table(self, folder: str, step: int) -> list[StoredRollout]:
        file = self._parquet(folder, step)
        if not file.exists():
            steps = _steps_in(self.path / folder, PARQUET)
            have = f"{folder} of steps {steps[0]} to {steps[-1]}" if steps else f"no {folder}"
            raise ValueError(f"{self.path} has no {folder} of step {step}; it has {have}")
        try:
            return from_table(pq.read_table(file))
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error

    def _parquet(self, folder: str, step: int) -> Path:
        return self.path / folder / f"step_{step:06d}.parquet"


class Onlooker(RunDirectory):
    """The run directory as the ranks above 0 have it: they read what rank 0 writes, and write nothing."""

    def lock(self) -> None:
        pass

    def log(self, metrics: Mapping[str, Any]) -> None:
        pass

    def log_supervised(self, metrics: Mapping[str, Any]) -> None:
        pass

    def stopped_early(self, reason: str) -> None:
        pass

    def truncate_after(self, step: int) -> None:
        pass

    def truncate_supervised_after(self, update: int) -> None:
        pass

    def delete_rollouts(self, step: int) -> None:
        pass

    def _write_table(self, folder: str, step: int, table: pa.Table) -> Path:
        return self._parquet(folder, step)


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


def _may_be_created(directory: Path, names: Iterable[str]) -> bool:
    """Whether there is nothing in the directory but what a run killed in `create` leaves, which is not yet a run."""
    if not directory.is_dir():
        return False
    left_over = {*FOLDERS, *names, "lock", "config.json"}
    return not is_run(directory) and all(
        entry.name.removesuffix(".tmp") in left_over and not (entry.is_dir() and any(entry.iterdir()))
        for entry in directory.iterdir()
    )


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
    """Say of an OSError which file could not be written, and what to do."""
    try:
        yield
    except OSError as error:
        free = "unknown"
        with contextlib.suppress(OSError):
            parent = next(p for p in (file, *file.parents) if p.exists())
            free = f"{shutil.disk_usage(parent).free / 2**30:.2f} GiB"
        # The results of a comparison have a config.json too, but not a run's folders.
        of_run = any(is_run(place) and (place / FOLDERS[0]).is_dir() for place in (file, *file.parents))
        place = "to the run directory" if of_run else f"in {file.parent}"
        then = "continue with `whorl resume`" if of_run else "give the same command again"
        raise OSError(
            error.errno,
            f"could not write {place} ({error.strerror or error}; free space: {free}). "
            f"Make room or check permissions, then {then}",
            str(file),
        ) from error


def _number(name: str, value: Any) -> int | float | None:
    """`value` as a plain Python number; one-element tensors and numpy scalars are read."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    raise ValueError(f"metric {name!r} must be a number; got {type(value).__name__} {value!r:.60}")


def _note(file: Path) -> dict[str, Any]:
    """What a small JSON file says that the run can do without: nothing if it is missing, nor, with a warning, if it
    is damaged."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        warnings.warn(f"{file} cannot be read and is passed over: {error}", stacklevel=3)
        return {}
    return content if isinstance(content, dict) else {}


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

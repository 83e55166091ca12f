"""A pool of worker processes that can be killed: where functions run that touch model text and might hang.

A computer-algebra judge can loop forever, eat all memory or evaluate what it was given. Python cannot stop a
thread, and an alarm signal works in the main thread only, so the work is done elsewhere: a worker is started
once (never forked, so torch's threads do not matter), confined (`confine.py`), given its calls one at a time,
and killed and replaced when one overruns its deadline.

A pool is safe to call from many threads. Its workers end with the run, idle or busy: at its exit, when their
lifeline (a pipe that nothing is written to) ends with the process that holds the other side, or where pipes send
no signals at the end of file on their request pipe or by their own alarm.
"""

import atexit
import json
import os
import pickle
import secrets
import select
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

_HERE = Path(__file__).parent
_START_SECONDS = 120.0
"""Time for the imports of a worker. They take about a second; a busy machine may take many."""
_MAX_REPLY_BYTES = 1 << 20

SYSTEM_PATHS = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/urandom", "/dev/null")
"""What a confined Python needs to read besides its own installation: shared libraries."""


@dataclass(frozen=True)
class Failure:
    """A call without a result: it overran its deadline, its worker died, or the function raised."""

    kind: Literal["timed out", "worker died", "raised"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


def environment_of_children() -> dict[str, str]:
    """All that a child gets to know of our environment: no key, no token, no path of the user."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **threads}


def python_paths() -> list[str]:
    """Directories of this Python's standard library and executable, in and outside a virtual environment."""
    paths = [sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.path.realpath(sys.executable))]
    return sorted({*paths, *sysconfig.get_paths().values()})


class _Worker:
    """One process. Not thread-safe: the pool lends it to one caller at a time."""

    def __init__(self, file: Path, function: str, memory_mib: int) -> None:
        path = [os.path.abspath(entry) for entry in sys.path if entry]
        lifeline, ours = os.pipe()
        self.lifeline = os.fdopen(ours, "wb", buffering=0)
        settings = {
            "lifeline": lifeline,
            "path": path,
            "file": str(file),
            "function": function,
            "confine": str(_HERE / "confine.py"),
            "limits": {
                "memory_mib": memory_mib,
                "file_mib": 0,
                "readable": [*python_paths(), *path, str(file.parent), *SYSTEM_PATHS],
            },
        }
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-s", "-P", "-B", str(_HERE / "worker.py"), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=environment_of_children(),
                start_new_session=True,  # Ctrl-C is for the run to handle, not for a judge in mid-verdict
                pass_fds=(lifeline,),
            )
        except BaseException:
            self.lifeline.close()
            raise
        finally:
            os.close(lifeline)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.requests, False)
        self.ready = False

    def call(self, arguments: tuple, deadline_seconds: float) -> Any | Failure:
        if not self.ready:
            started = self._receive("ready", time.monotonic() + _START_SECONDS)
            if isinstance(started, Failure):
                return Failure("worker died", f"it did not start ({started})")
            self.ready = True
        deadline = time.monotonic() + deadline_seconds
        # Unforeseeable, so that code which took hold of the worker cannot lay out answers in advance.
        call = secrets.token_hex(8)
        request = pickle.dumps((call, arguments, deadline_seconds))
        if failure := self._send(len(request).to_bytes(8, "little") + request, deadline):
            return failure
        return self._receive(call, deadline)

    def _send(self, data: bytes, deadline: float) -> Failure | None:
        view = memoryview(data)
        poll = select.poll()
        poll.register(self.requests, select.POLLOUT)
        while view:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return Failure("timed out")
            try:
                view = view[os.write(self.requests, view) :]
            except OSError:
                return Failure("worker died")
        return None

    def _receive(self, call: str, deadline: float) -> Any | Failure:
        poll = select.poll()
        poll.register(self.replies, select.POLLIN)
        data, wanted = b"", 8
        while len(data) < wanted:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return Failure("timed out")
            piece = os.read(self.replies, wanted - len(data))
            if not piece:
                return Failure("worker died", self._how_it_died())
            data += piece
            if len(data) == wanted == 8:
                wanted += int.from_bytes(data, "little")
                if wanted > _MAX_REPLY_BYTES:
                    return Failure("worker died", "it answered more than 1 MiB")
        try:
            fields = json.loads(data[8:])
            if fields["call"] != call:
                return Failure("worker died", "its answers are out of step")
            return Failure("raised", str(fields["error"])) if "error" in fields else fields["value"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return Failure("worker died", "it answered nonsense")

    def _how_it_died(self) -> str:
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.lifeline):
            if pipe:
                pipe.close()


class Pool:
    """Workers that call one function of one file, `num_workers` at most at the same time.

    The file is loaded by its path and should import only what the function needs: it is the start-up time.
    Arguments must be picklable and results JSON. The function should refuse text that would run as code
    before anything evaluates it: confinement keeps such code from harming the machine, but a worker that
    has run it could lie about the answers that come after.
    """

    def __init__(
        self, file: Path, function: str, *, num_workers: int | None = None, memory_mib: int = 2048
    ) -> None:
        self._make = lambda: _Worker(file, function, memory_mib)
        self._slots = threading.BoundedSemaphore(num_workers or min(4, os.cpu_count() or 1))
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = False
        atexit.register(self.close)

    def call(self, *arguments: object, deadline_seconds: float) -> Any | Failure:
        """The function's result, or why there is none. The deadline runs from when a worker is free."""
        with self._slots:
            with self._lock:
                if self._closed:
                    raise ValueError("the pool is closed; make a new one")
                worker = self._idle.pop() if self._idle else None
                if worker is None or worker.process.poll() is not None:
                    if worker is not None:
                        self._discard(worker)
                    worker = self._make()
                    self._all.add(worker)
            healthy = False
            try:
                result = worker.call(arguments, deadline_seconds)
                healthy = not isinstance(result, Failure) or result.kind == "raised"
                return result
            finally:  # also on KeyboardInterrupt: an answer that nobody waits for must not meet the next call
                with self._lock:
                    if healthy and not self._closed:
                        self._idle.append(worker)
                    else:
                        self._discard(worker)

    def _discard(self, worker: _Worker) -> None:
        self._all.discard(worker)
        worker.kill()

    @property
    def process_ids(self) -> Sequence[int]:
        """Of the workers that are alive."""
        with self._lock:
            return [worker.process.pid for worker in self._all]

    def close(self) -> None:
        """Kill all workers. Calls in progress come back as failures."""
        atexit.unregister(self.close)
        with self._lock:
            self._closed = True
            busy = self._all - set(self._idle)
            for worker in self._idle:
                self._discard(worker)
            self._idle.clear()
            for worker in busy:  # its caller reaps it
                worker.process.kill()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

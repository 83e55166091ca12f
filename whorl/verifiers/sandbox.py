"""The sandbox: a fresh Python for each run of a program, which can do no harm and is gone when it is over.

It has an empty environment, a private temporary directory and a limit on every resource, is confined as
`confine.py` describes, and runs in namespaces of its own where bubblewrap works (`bubblewrap.py`). At its
deadline, or when it breaks a limit that only we can watch, all of it is killed. `protections` tries the forbidden
things on this machine and tells which are refused; `statement` says it in words.

Programs have the standard library and nothing else.
"""

import contextlib
import fcntl
import functools
import itertools
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from whorl.verifiers import bubblewrap
from whorl.verifiers.pool import SYSTEM_PATHS, environment_of_children

_HERE = Path(__file__).parent
_PREFIX = "whorl-program-"
_WATCH_SECONDS = 0.05
"""How often a running program is looked at, for what no limit of the kernel counts."""


@dataclass(frozen=True)
class Limits:
    """What one run of a program may use."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 5
    memory_mib: int = 512
    file_mib: int = 8
    """Size of one file it writes."""
    directory_mib: int = 32
    """Size of all its files together."""
    num_files: int = 1000
    num_tasks: int = 64
    """Its threads, and its processes if it managed to start any."""
    output_kib: int = 256
    """Of output and of error output; a program that writes more is killed."""


@dataclass(frozen=True)
class Run:
    """How a run ended: `ended` is "exit 0", "exit 1", "signal 9", "timed out", "out of CPU time",
    "too much output", "too many files", "too large files" or "too many threads"."""

    stdout: str
    stderr: str
    ended: str

    @property
    def succeeded(self) -> bool:
        return self.ended == "exit 0"


def run_program(source: str, stdin: str = "", limits: Limits | None = None) -> Run:
    """Run Python source in the sandbox and wait for its end."""
    with Sandbox(["program.py"], source, limits=limits or Limits()) as sandbox:
        return sandbox.communicate(stdin.encode(errors="surrogatepass"))


class Sandbox:
    """One confined Python with `arguments`, from its start to its end; `source` is program.py in its directory.

    OSError if the machine has no process, descriptor or disk space left for it.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        source: str = "",
        *,
        limits: Limits,
        pass_fds: Sequence[int] = (),
        silent: bool = False,
    ) -> None:
        self.limits = limits
        self._arguments, self._source = arguments, source.encode(errors="surrogatepass")
        self._pass_fds, self._pipe = pass_fds, subprocess.DEVNULL if silent else subprocess.PIPE
        self._wrapped = False
        self._directory = ""
        """The program's directory as we see it; not known yet if empty."""
        self._info = -1
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> "Sandbox":
        wrapper = backend().wrapper
        try:
            self.process = self._start_alone() if wrapper is None else self._start_wrapped(wrapper)
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._cleanup.close()

    def _start_alone(self) -> subprocess.Popen[bytes]:
        _remove_abandoned()
        self._directory = tempfile.mkdtemp(prefix=_PREFIX)
        self._cleanup.callback(_remove, self._directory)
        lock = os.open(self._directory, os.O_RDONLY)
        self._cleanup.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends, however it does
        Path(self._directory, "program.py").write_bytes(self._source)
        return self._popen([], self._directory, {}, cwd=self._directory)

    def _start_wrapped(self, wrapper: bubblewrap.Bubblewrap) -> subprocess.Popen[bytes]:
        self._wrapped = True
        source = os.memfd_create("program")
        self._cleanup.callback(os.close, source)
        os.write(source, self._source)
        os.lseek(source, 0, os.SEEK_SET)
        self._info, info = os.pipe()
        self._cleanup.callback(os.close, self._info)
        os.set_blocking(self._info, False)
        try:
            readable = [*self._readable(), str(_HERE / "confine.py")]
            words = wrapper.command(readable, self.limits.directory_mib, {"program.py": source}, info)
            more = {"num_tasks": self.limits.num_tasks, "user": wrapper.user}
            return self._popen(words, bubblewrap.DIRECTORY, more, cwd="/", pass_fds=(source, info))
        finally:
            os.close(info)

    def _popen(
        self, words: list[str], place: str, more: dict, *, cwd: str, pass_fds: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        """Start Python, confined to `place`; the confinement gets `more` settings, and `words` go before all."""
        settings = {
            "memory_mib": self.limits.memory_mib,
            "file_mib": self.limits.file_mib,
            "cpu_seconds": self.limits.cpu_seconds,
            "readable": self._readable(),
            "writable": [place],
            **more,
        }
        python = [_python(), "-S", "-s", "-P", "-B"]
        return subprocess.Popen(
            [*words, *python, str(_HERE / "confine.py"), json.dumps(settings), *python, *self._arguments],
            stdin=self._pipe,
            stdout=self._pipe,
            stderr=self._pipe,
            cwd=cwd,
            env={**environment_of_children(), "HOME": place, "TMPDIR": place, "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
            pass_fds=(*self._pass_fds, *pass_fds),
        )

    def _readable(self) -> list[str]:
        return [*readable_paths(), *(a for a in self._arguments if os.path.isabs(a))]

    def communicate(self, stdin: bytes, companion: "Sandbox | None" = None) -> Run:
        """Feed the input and collect the output until the process ends or breaks a limit; then it is dead.

        A limit that the `companion` breaks ends both: they work on the same task.
        """
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        collected = {pipe.fileno(): bytearray() for pipe in (process.stdout, process.stderr)}
        ended, deadline, view = "", time.monotonic() + self.limits.wall_seconds, memoryview(stdin)
        with selectors.DefaultSelector() as selector:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE)
            for pipe in (process.stdout, process.stderr):
                selector.register(pipe, selectors.EVENT_READ)
            open_outputs, looked = 2, time.monotonic()
            while not ended and (
                open_outputs or not self._has_ended()
            ):  # it may close its outputs and run on
                for key, _ in selector.select(_WATCH_SECONDS if open_outputs else 0.002):
                    if key.fileobj is process.stdin:
                        try:
                            view = view[os.write(key.fd, view) :] if view else view
                        except BrokenPipeError:
                            view = view[:0]  # it does not want the rest
                        if not view:
                            selector.unregister(process.stdin)
                            process.stdin.close()
                        continue
                    data = os.read(key.fd, 1 << 16)
                    collected[key.fd] += data
                    if not data:
                        selector.unregister(key.fileobj)
                        open_outputs -= 1
                    elif len(collected[key.fd]) > self.limits.output_kib << 10:
                        ended = "too much output"
                if not ended and time.monotonic() - looked > _WATCH_SECONDS:
                    ended = self.broken_limit() or (companion.broken_limit() if companion else "")
                    looked = time.monotonic()
                if not ended and time.monotonic() > deadline:
                    ended = "timed out"
        output, errors = (bytes(data).decode(errors="replace") for data in collected.values())
        return Run(output, errors, ended or self.broken_limit(files_only=True) or self._ending(self.kill()))

    def broken_limit(self, *, files_only: bool = False) -> str:
        """Which limit the program has broken of those that only we can watch; empty if none."""
        with contextlib.suppress(OSError, ValueError):  # it is over, or this system does not let us look
            tasks = f"/proc/{self.process.pid}/task"
            if (
                not files_only
                and not self._wrapped  # in a namespace of its own the kernel counts them
                and os.stat(tasks).st_nlink - 2 > self.limits.num_tasks
            ):
                return "too many threads"
            if self._wrapped and not self._directory:
                self._directory = (
                    f"/proc/{json.loads(os.read(self._info, 4096))['child-pid']}/root{bubblewrap.DIRECTORY}"
                )
            if self._wrapped:
                inside = os.statvfs(self._directory)
                return "too many files" if inside.f_files - inside.f_ffree > self.limits.num_files else ""
            num_files, num_bytes = _usage(self._directory, self.limits.num_files)
            if num_files > self.limits.num_files:
                return "too many files"
            if num_bytes > self.limits.directory_mib << 20:
                return "too large files"
        return ""

    def _has_ended(self) -> bool:
        """Whether the process has ended. It is left to be reaped, so that its group is still its own."""
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            return self.process.poll() is not None
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def _ending(self, code: int) -> str:
        if self._wrapped and code > 128:  # as a shell reports a signal
            code = 128 - code
        if code >= 0:
            return f"exit {code}"
        return "out of CPU time" if code == -signal.SIGXCPU else f"signal {-code}"

    def kill(self) -> int:
        """Kill all processes of the sandbox and return the exit code of the first."""
        if self.process.returncode is None:
            # Not reaped yet, so the number is still its own. Its children die with a namespace, or are in its group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def _usage(directory: str, max_files: int) -> tuple[int, int]:
    """Number and bytes of the files below a directory, counted until there are more than `max_files`."""
    num_files = num_bytes = 0
    waiting = [directory]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    num_files += 1
                    if num_files > max_files:
                        return num_files, num_bytes
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        num_bytes += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            continue  # removed meanwhile
        except OSError:  # nested so deep that it has no path, or unreadable: as good a place to hide as any
            return max_files + 1, num_bytes
    return num_files, num_bytes


def _remove(directory: str) -> None:
    """Remove a directory however deep it is and whatever its modes are: folders are moved up, then emptied."""
    folders, prefix = [directory], f"{directory}/{secrets.token_hex(8)}-"
    names = map(str, itertools.count())
    while folders:
        folder = folders.pop()
        with contextlib.suppress(OSError):
            os.chmod(folder, 0o700)
            for entry in list(os.scandir(folder)):
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, 0o700)
                    folders.append(prefix + next(names))
                    os.rename(entry.path, folders[-1])
                else:
                    os.unlink(entry.path)
            if folder != directory:
                os.rmdir(folder)
    with contextlib.suppress(OSError):
        os.rmdir(directory)


@functools.cache
def _remove_abandoned() -> None:
    """Remove the directories of runs that were killed: ours, a minute old or more, and locked by nobody."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                found = os.fstat(lock)
                if found.st_uid == os.geteuid() and time.time() - found.st_mtime > 60:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(str(path))
            finally:
                os.close(lock)


def _python() -> str:
    """The interpreter without a virtual environment around it: programs have the standard library only."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


@functools.cache
def readable_paths() -> tuple[str, ...]:
    """What a program may read besides its own directory: Python's standard library, and the system's libraries."""
    paths = sysconfig.get_paths(vars={"base": sys.base_prefix, "platbase": sys.base_exec_prefix})
    own = {sys.base_prefix, sys.base_exec_prefix, os.path.dirname(_python())}
    return (*sorted({*own, paths["stdlib"], paths["platstdlib"]}), *SYSTEM_PATHS)


class Backend(NamedTuple):
    """What keeps programs in: bubblewrap around `confine.py`, or that alone and why."""

    wrapper: bubblewrap.Bubblewrap | None
    why_alone: str


@functools.cache
def backend() -> Backend:
    """The best that works on this machine; found out once."""
    return Backend(*bubblewrap.find(_python(), readable_paths()))


_PROBE = """
import json, os, socket, sys, threading, time
def refused(action):
    try:
        action()
    except (OSError, MemoryError, RuntimeError):
        return True
    return False
secret, ours = sys.stdin.readline().split()
def fork():
    if os.fork() == 0:
        os._exit(0)
def threads():
    threading.stack_size(1 << 16)
    for i in range(200):
        threading.Thread(target=time.sleep, args=(2,), daemon=True).start()
    time.sleep(0.5)
print(json.dumps({
    "reading files outside": refused(lambda: open(secret).read()),
    "writing files outside": refused(lambda: open(secret, "a").write("was here")),
    "changing modes outside": refused(lambda: os.chmod(secret, 0o600)),
    "reading other processes": refused(lambda: open(f"/proc/{ours}/environ", "rb").read()),
    "signalling other processes": refused(lambda: os.kill(int(ours), 0)) and refused(lambda: os.kill(os.getppid(), 0)),
    "starting processes": refused(fork),
    "opening sockets": refused(socket.socket),
    "exceeding the memory": refused(lambda: bytes(1 << 32)),
}), flush=True)
threads()
print("more threads")
"""


@functools.cache
def protections() -> Mapping[str, bool]:
    """What a program might try, and whether it is refused on this machine: found out by trying it, once.

    OSError if the sandbox does not start at all.
    """
    with tempfile.NamedTemporaryFile() as secret:
        secret.write(b"a secret")
        secret.flush()
        run = run_program(_PROBE, f"{secret.name} {os.getpid()}\n", Limits(wall_seconds=60.0))
        # A file of that name in a directory of its own is not ours.
        untouched = Path(secret.name).read_bytes() == b"a secret"
    found, _, more = run.stdout.partition("\n")
    if not found:
        raise OSError(f"the sandbox does not start on this machine: {run.ended}; {run.stderr[-500:]}")
    own = {"writing files outside": untouched, "starting hundreds of threads": not more}
    return json.loads(found) | own


def statement() -> str:
    """In two or three sentences: what programs of the model run in here, and what that does not keep them from."""
    wrapper, why = backend()
    if wrapper is not None:
        kind = "in namespaces of their own (bubblewrap: users, processes, network, mounts), confined within"
    else:
        kind = f"confined, but in no namespaces of their own ({why})"
    open_ends = [action for action, refused in protections().items() if not refused]
    told = (
        f"Programs of the model run {kind} by resource limits, Landlock and seccomp as this system has them."
    )
    told += (
        f" NOT refused here: {', '.join(open_ends)}."
        if open_ends
        else " Every forbidden thing tried was refused."
    )
    told += " Not protected: what every user may read of this system's own files, and flaws of the kernel"
    if wrapper is None:
        told += "; number and size of files are limited by looking every 0.05 seconds"
    return told + "."

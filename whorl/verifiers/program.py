"""Programs: run what a model wrote, against tests, where it can do no harm and cannot forge the verdict.

**Harm.** Each run is a fresh Python in a private, temporary directory, with an empty environment, confined as
`confine.py` describes, with a limit on every resource, and killed as a whole at its deadline. `protections`
tries the forbidden things on this machine and tells which are refused.

**Forgery.** A program is never told what is expected of it. `Example` compares its output, in our process,
with the expected one. `Assertion` runs the test in a process of its own, which calls the program's functions by
messages and gets plain data back; so an `__eq__` that is always true, a patched `assert`, `sys.exit(0)` or a
printed "passed" gain nothing.

A program that fails, hangs, or exceeds a limit earns 0: that is a verdict on it. None is for tests that are
broken and for sandboxes that do not start. Programs have the standard library and nothing else. What is not
limited: the number of files in the temporary directory, within the run's few seconds.
"""

import contextlib
import functools
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from whorl.data import Score
from whorl.verifiers.pool import SYSTEM_PATHS, environment_of_children, python_paths

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Limits:
    """What one run of a program may use."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 5
    memory_mib: int = 512
    file_mib: int = 8
    """Size of one file it writes."""
    output_kib: int = 256
    """Of output and of error output; a program that writes more is killed."""


@dataclass(frozen=True)
class Example:
    """The program reads `stdin` and must write `stdout`; white space at the ends of lines does not count."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class Assertion:
    """A snippet about the program's functions and classes, such as `assert add(1, 2) == 3`.

    Arguments and results are plain data (numbers, text, lists, tuples, sets, dicts, None); an object of the
    program's own stays with the program; the snippet can call it, read its attributes and iterate over it.
    """

    code: str


@dataclass(frozen=True)
class Run:
    """How a run ended: `ended` is "exit 0", "exit 1", "signal 9", "timed out",
    "out of CPU time" or "too much output"."""

    stdout: str
    stderr: str
    ended: str

    @property
    def succeeded(self) -> bool:
        return self.ended == "exit 0"


def verify_program(source: str, tests: Sequence[Example | Assertion], limits: Limits | None = None) -> Score:
    """1 if the program passes every test, else 0; part `passed_frac`. `why` names the first that failed."""
    if not tests:
        raise ValueError("a program needs at least one test to be judged by; got none")
    _warn_of_missing_protections()
    limits = limits or Limits()
    failures = []
    for number, test in enumerate(tests, 1):
        check = _check_example if isinstance(test, Example) else _check_assertion
        try:
            failure = check(source, test, limits)
        except _BrokenTest as error:
            return Score(None, why=f"test {number} cannot judge: {error}")
        except OSError as error:  # out of processes, descriptors or disk: ours, not the program's
            return Score(None, why=f"no sandbox for test {number}: {error}")
        if failure:
            failures.append(f"test {number}: {failure}")
    passed = len(tests) - len(failures)
    return Score(
        float(not failures),
        {"passed_frac": passed / len(tests)},
        failures[0] if failures else f"all {passed} tests passed",
    )


def extract_code(reply: str) -> str | None:
    """The last complete ```python (or plain ```) block of a reply; None if it has none."""
    blocks = re.findall(r"^```(?:python|py)?[ \t]*\n(.*?)^```", reply, re.DOTALL | re.MULTILINE)
    return blocks[-1] if blocks else None


def run_program(source: str, stdin: str = "", limits: Limits | None = None) -> Run:
    """Run Python source in the sandbox and wait for its end."""
    with _Sandbox(limits or Limits()) as sandbox:
        sandbox.directory.joinpath("program.py").write_text(source, encoding="utf-8", errors="surrogatepass")
        process = sandbox.start("program.py")
        return _communicate(process, stdin.encode(errors="surrogatepass"), sandbox.limits)


class _BrokenTest(Exception):
    """The test or the sandbox failed, not the program."""


def _check_example(source: str, test: Example | Assertion, limits: Limits) -> str:
    assert isinstance(test, Example)
    run = run_program(source, test.stdin, limits)
    if not run.succeeded:
        return _how_it_failed(run)
    got, wanted = _lines(run.stdout), _lines(test.stdout)
    return "" if got == wanted else f"expected {_short(test.stdout)}, got {_short(run.stdout)}"


def _check_assertion(source: str, test: Example | Assertion, limits: Limits) -> str:
    """Run the snippet against the program, each in its own sandbox, joined by two pipes."""
    assert isinstance(test, Assertion)
    to_program, from_tester = os.pipe()
    to_tester, from_program = os.pipe()
    ours = [to_program, from_tester, to_tester, from_program]
    program: subprocess.Popen[bytes] | None = None
    try:
        with _Sandbox(limits) as sandbox, _Sandbox(replace(limits, file_mib=0)) as bench:
            sandbox.directory.joinpath("program.py").write_text(source, "utf-8", "surrogatepass")
            talk = str(_HERE / "program_talk.py")
            pipes = (to_program, from_program)
            program = sandbox.start(talk, "serve", *map(str, pipes), pass_fds=pipes, silent=True)
            pipes = (to_tester, from_tester)
            tester = bench.start(talk, "test", *map(str, pipes), pass_fds=pipes)
            while ours:  # else neither side would see the other's end
                os.close(ours.pop())
            run = _communicate(tester, test.code.encode(), limits)
            if run.ended == "timed out":
                return "timed out"
            verdict, _, why = run.stdout.rpartition("\x1e")[2].partition("\x1f")
            if verdict == "passed":
                return ""
            if verdict == "failed":
                return why[:300]
            raise _BrokenTest(why[:300] or f"{run.ended} {run.stderr[-200:]}".strip())
    finally:
        while ours:
            os.close(ours.pop())
        if program is not None:
            _kill(program)


class _Sandbox:
    """A private directory and the means to start confined Pythons in it; the directory goes at the end."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def __enter__(self) -> "_Sandbox":
        self._temporary = tempfile.TemporaryDirectory(prefix="whorl-program-", ignore_cleanup_errors=True)
        self.directory = Path(self._temporary.name)
        return self

    def __exit__(self, *error: object) -> None:
        self._temporary.cleanup()

    def start(
        self, *arguments: str, pass_fds: Sequence[int] = (), silent: bool = False
    ) -> subprocess.Popen[bytes]:
        place = str(self.directory)
        settings = {
            "memory_mib": self.limits.memory_mib,
            "file_mib": self.limits.file_mib,
            "cpu_seconds": self.limits.cpu_seconds,
            "readable": [*python_paths(), *SYSTEM_PATHS, *(a for a in arguments if os.path.isabs(a))],
            "writable": [place],
        }
        python = [sys.executable, "-S", "-s", "-P", "-B"]
        pipe = subprocess.DEVNULL if silent else subprocess.PIPE
        return subprocess.Popen(
            [*python, str(_HERE / "confine.py"), json.dumps(settings), *python, *arguments],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            cwd=place,
            env={**environment_of_children(), "HOME": place, "TMPDIR": place, "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
            pass_fds=pass_fds,
        )


def _communicate(process: subprocess.Popen[bytes], stdin: bytes, limits: Limits) -> Run:
    """Feed the input and collect the output until the process ends or breaks a limit; then it is dead."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    collected: dict[int, bytearray] = {}
    ended, deadline, view = "", time.monotonic() + limits.wall_seconds, memoryview(stdin)
    with selectors.DefaultSelector() as selector, process.stdin, process.stdout, process.stderr:
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        for pipe in (process.stdout, process.stderr):
            collected[pipe.fileno()] = bytearray()
            selector.register(pipe, selectors.EVENT_READ)
        while collected.keys() & {key.fd for key in selector.get_map().values()} and not ended:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                ended = "timed out"
            for key, _ in ready:
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
                elif len(collected[key.fd]) > limits.output_kib << 10:
                    ended = "too much output"
        output, errors = (
            collected[pipe.fileno()].decode(errors="replace") for pipe in (process.stdout, process.stderr)
        )
        if not ended and not _has_ended(process, deadline):  # it may close its outputs and run on
            ended = "timed out"
        code = _kill(process)
    if not ended:
        ended = (
            f"exit {code}"
            if code >= 0
            else "out of CPU time"
            if code == -signal.SIGXCPU
            else f"signal {-code}"
        )
    return Run(output, errors, ended)


def _has_ended(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Wait until the process has ended, but leave it to be reaped, so that its group is still its own."""
    while True:
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            ended = process.poll() is not None
        else:
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
        if ended:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)


def _kill(process: subprocess.Popen[bytes]) -> int:
    """Kill the whole process group of a process that has not been reaped, then reap it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


_PROBE = """
import json, os, socket, sys
def refused(action):
    try:
        action()
    except (OSError, MemoryError):
        return True
    return False
secret = sys.stdin.readline().strip()
def fork():
    if os.fork() == 0:
        os._exit(0)
print(json.dumps({
    "reading files outside": refused(lambda: open(secret).read()),
    "writing files outside": refused(lambda: open(secret, "a")),
    "changing modes outside": refused(lambda: os.chmod(secret, 0o600)),
    "reading other processes": refused(lambda: open(f"/proc/{os.getppid()}/environ", "rb").read()),
    "signalling other processes": refused(lambda: os.kill(os.getppid(), 0)),
    "starting processes": refused(fork),
    "opening sockets": refused(socket.socket),
    "exceeding the memory": refused(lambda: bytearray(1 << 32)),
}))
"""


@functools.cache
def protections() -> Mapping[str, bool]:
    """What a program might try, and whether it is refused on this machine: found out by trying it, once."""
    with tempfile.NamedTemporaryFile() as secret:
        run = run_program(_PROBE, secret.name + "\n", Limits(wall_seconds=60.0))
    if not run.succeeded:
        raise RuntimeError(f"the sandbox does not start on this machine: {run.ended}; {run.stderr[-500:]}")
    return json.loads(run.stdout)


@functools.cache
def _warn_of_missing_protections() -> None:
    if open_ends := [action for action, refused in protections().items() if not refused]:
        warnings.warn(
            f"programs of the model are run, and this system does not keep them from {', '.join(open_ends)}; "
            "use a Linux with Landlock and seccomp, or a container that holds nothing of value",
            stacklevel=3,
        )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _how_it_failed(run: Run) -> str:
    last = run.stderr.strip().rpartition("\n")[2][:150]
    return f"{run.ended}: {last}" if last and run.ended.startswith("exit") else run.ended


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")

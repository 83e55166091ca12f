"""Programs: run what a model wrote, against tests, where it can do no harm and cannot forge the verdict.

**Harm.** Each run is in a sandbox of its own (`sandbox.py`), killed as a whole when it is over.

**Forgery.** A program is never told what is expected of it. `Example` compares its output, in our process,
with the expected one. `Assertion` runs the test in a process of its own, which calls the program's functions by
messages and gets plain data back; so an `__eq__` that is always true, a patched `assert`, `sys.exit(0)` or a
printed "passed" gain nothing.

A program that fails, hangs, or exceeds a limit earns 0: that is a verdict on it. None is for tests that are
broken and for sandboxes that do not start.
"""

import functools
import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from whorl.data import Score
from whorl.verifiers.program_talk import VERDICT
from whorl.verifiers.sandbox import Limits, Sandbox, protections, run_program

_HERE = Path(__file__).parent


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


def verify_program(source: str, tests: Sequence[Example | Assertion], limits: Limits | None = None) -> Score:
    """1 if the program passes every test, else 0; part `passed_frac`. `why` names the first that failed.

    A program that has to be stopped in one test is not tried in those after it: it would cost its limit each time.
    """
    if not tests:
        raise ValueError("a program needs at least one test to be judged by; got none")
    _warn_of_missing_protections()
    limits = limits or Limits()
    num_passed, why = 0, ""
    for number, test in enumerate(tests, 1):
        check = _check_example if isinstance(test, Example) else _check_assertion
        try:
            failure = check(source, test, limits)
        except _Stopped as stopped:
            why = why or f"test {number}: {stopped}"
            break
        except _BrokenTest as error:
            return Score(None, why=f"test {number} cannot judge: {error}")
        except OSError as error:  # out of processes, descriptors or disk: ours, not the program's
            return Score(None, why=f"no sandbox for test {number}: {error}")
        num_passed += not failure
        why = why or (failure and f"test {number}: {failure}")
    parts = {"passed_frac": num_passed / len(tests)}
    return Score(float(num_passed == len(tests)), parts, why or f"all {num_passed} tests passed")


def extract_code(reply: str) -> str | None:
    """The last complete ```python (or plain ```) block of a reply; None if it has none."""
    blocks = re.findall(r"^```(?:python|py)?[ \t]*\n(.*?)^```", reply, re.DOTALL | re.MULTILINE)
    return blocks[-1] if blocks else None


class _BrokenTest(Exception):
    """The test or the sandbox failed, not the program."""


class _Stopped(Exception):
    """The program was stopped at a limit, or by a signal."""


def _check_example(source: str, test: Example | Assertion, limits: Limits) -> str:
    assert isinstance(test, Example)
    run = run_program(source, test.stdin, limits)
    if not run.ended.startswith("exit"):
        raise _Stopped(run.ended)
    if not run.succeeded:
        last = run.stderr.strip().rpartition("\n")[2][:150]
        return f"{run.ended}: {last}" if last else run.ended
    got, wanted = _lines(run.stdout), _lines(test.stdout)
    return "" if got == wanted else f"expected {_short(test.stdout)}, got {_short(run.stdout)}"


def _check_assertion(source: str, test: Example | Assertion, limits: Limits) -> str:
    """Run the snippet against the program, each in its own sandbox, joined by two pipes."""
    assert isinstance(test, Assertion)
    to_program, from_tester = os.pipe()
    to_tester, from_program = os.pipe()
    ours = [to_program, from_tester, to_tester, from_program]
    talk = str(_HERE / "program_talk.py")
    calls, asks = (to_program, from_program), (to_tester, from_tester)
    program = Sandbox([talk, "serve", *map(str, calls)], source, limits=limits, pass_fds=calls, silent=True)
    tester = Sandbox([talk, "test", *map(str, asks)], limits=replace(limits, file_mib=0), pass_fds=asks)
    try:
        with program, tester:
            while ours:  # else neither side would see the other's end
                os.close(ours.pop())
            run = tester.communicate(test.code.encode(), program)
    finally:
        while ours:
            os.close(ours.pop())
    if not run.ended.startswith("exit"):  # the test as such is small: what it chokes on came from the program
        raise _Stopped(run.ended)
    if not run.succeeded or VERDICT not in run.stdout:
        raise _BrokenTest(f"{run.ended} {run.stderr[-200:]}".strip())
    verdict, why = json.loads(run.stdout.rpartition(VERDICT)[2])
    if verdict == "broken":
        raise _BrokenTest(why[:300])
    return "" if verdict == "passed" else why[:300]


@functools.cache
def _warn_of_missing_protections() -> None:
    if open_ends := [action for action, refused in protections().items() if not refused]:
        warnings.warn(
            f"programs of the model are run, and this system does not keep them from {', '.join(open_ends)}; "
            "install bubblewrap, use a Linux with Landlock and seccomp, or a container that holds nothing of value",
            stacklevel=3,
        )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")

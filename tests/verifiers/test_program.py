import os
import time
import warnings
from pathlib import Path

import pytest

from whorl.verifiers import program as module
from whorl.verifiers.program import (
    Assertion,
    Example,
    Limits,
    extract_code,
    protections,
    run_program,
    verify_program,
)

LIMITS = Limits(wall_seconds=60.0)
DOUBLE = "print(2 * int(input()))"
DOUBLES = [Example("3\n", "6\n"), Example("-1\n", "-2")]
ADD = "def add(a, b):\n    return a + b\n"


def test_a_right_program_passes_all_its_examples() -> None:
    score = verify_program(DOUBLE, DOUBLES, LIMITS)
    assert (score.reward, score.parts["passed_frac"], score.why) == (1.0, 1.0, "all 2 tests passed")


@pytest.mark.parametrize(
    ("source", "passed", "why"),
    [
        ("print(6)", 1 / 2, "test 2: expected '-2', got '6\\n'"),
        ("I would add the numbers.", 0, "SyntaxError"),
        ("print(2 * int(input()) // 0)", 0, "exit 1: ZeroDivisionError"),
        ("import sys; print('passed'); sys.exit(0)", 0, "expected '6\\n', got 'passed\\n'"),
        ("print(2 * int(input())); import os; os._exit(1)", 0, "exit 1"),
        ("", 0, "got ''"),
    ],
)
def test_a_wrong_program_fails_and_the_reason_names_the_first_failing_test(
    source: str, passed: float, why: str
) -> None:
    score = verify_program(source, DOUBLES, LIMITS)
    assert (score.reward, score.parts["passed_frac"]) == (0.0, passed)
    assert why in score.why


@pytest.mark.parametrize(
    ("source", "limits", "ended"),
    [
        ("while True: pass", Limits(wall_seconds=60.0, cpu_seconds=1), "out of CPU time"),
        ("import time; time.sleep(600)", Limits(wall_seconds=0.5), "timed out"),
        ("import os; os.close(1); os.close(2)\nwhile True: pass", Limits(wall_seconds=0.5), "timed out"),
        ("while True: print('x' * 1000)", LIMITS, "too much output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", LIMITS, "too much output"),
        ("x = bytearray(1 << 30)", LIMITS, "exit 1"),
        ("open('big', 'wb').write(bytes(9 << 20))", LIMITS, "exit 1"),
        ("import os\nwhile True: os.fork()", LIMITS, "exit 1"),
    ],
)
def test_every_resource_has_a_limit(source: str, limits: Limits, ended: str) -> None:
    start = time.monotonic()
    assert run_program(source, limits=limits).ended == ended
    assert time.monotonic() - start < 60


def test_nothing_is_left_of_a_program_that_is_killed() -> None:
    run = run_program(
        "import os, time\nprint(os.getpid(), os.getcwd(), flush=True)\ntime.sleep(600)", limits=Limits(2.0)
    )
    process_id, directory = run.stdout.split()
    assert run.ended == "timed out"
    with pytest.raises(ProcessLookupError):
        os.kill(int(process_id), 0)
    assert not Path(directory).exists()


def test_a_program_may_use_threads_and_its_own_directory() -> None:
    source = (
        "import threading, os\n"
        "t = threading.Thread(target=lambda: open('note', 'w').write('hi'))\n"
        "t.start(); t.join(); print(open('note').read(), sorted(os.listdir('.')))"
    )
    run = run_program(source, limits=LIMITS)
    assert run.stdout == "hi ['note', 'program.py']\n", run


def test_a_program_knows_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET_KEY", "swordfish")
    run = run_program("import os, sys; print(dict(os.environ), sys.path)", limits=LIMITS)
    assert run.succeeded
    assert "swordfish" not in run.stdout
    assert "site-packages" not in run.stdout


def test_on_linux_everything_that_a_program_might_try_is_refused() -> None:
    assert set(protections().values()) == {True}, protections()


def test_the_probe_sees_what_is_allowed_when_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The negative control: without confinement the same probe finds the doors open, and a run warns."""
    toothless = tmp_path / "confine.py"
    toothless.write_text("import os, sys; os.execv(sys.argv[2], sys.argv[2:])")
    # Only the launcher is replaced; the harness scripts are not used by an `Example`.
    monkeypatch.setattr(module, "_HERE", tmp_path)
    for function in (module.protections, module._warn_of_missing_protections):
        function.cache_clear()
    try:
        found = protections()
        assert not found["starting processes"]
        assert not found["reading files outside"]
        with pytest.warns(UserWarning, match="does not keep them from reading files outside"):
            verify_program(DOUBLE, DOUBLES, LIMITS)
    finally:
        for function in (module.protections, module._warn_of_missing_protections):
            function.cache_clear()


def test_assertions_call_functions_classes_and_generators_of_the_program() -> None:
    source = ADD + (
        "class Solution:\n"
        "    def twice(self, x): return [x] * 2\n"
        "def count(n): yield from range(n)\n"
        "def refuse(): raise KeyError(3)\n"
        "from collections import Counter\n"
        "def tally(text): return Counter(text)\n"
        "def pair(): return (Solution(), float('nan'))\n"
        "LIMIT = 10\n"
    )
    tests = [
        "assert add(1, 2) == 3",
        "assert add((1,), (2,)) == (1, 2)",
        "assert Solution().twice('a') == ['a', 'a']",
        "assert list(count(3)) == [0, 1, 2]",
        "assert tally('aab') == {'a': 2, 'b': 1}",
        "assert math.isclose(add(0.1, 0.2), 0.3) and LIMIT == 10",
        "assert add(float('inf'), 0) == math.inf",
        "first, second = pair()\nassert first.twice(2) == [2, 2] and math.isnan(second)",
        "try:\n    refuse()\nexcept KeyError:\n    pass\nelse:\n    assert False",
    ]
    score = verify_program(source, [Assertion(test) for test in tests], LIMITS)
    assert (score.reward, score.why) == (1.0, "all 9 tests passed")


SNIPPETS = (
    "assert add(1, 2) == 3",
    "assert math.isclose(add(1, 2), 3)",
    "assert abs(add(1, 2) - 3) < 1e-9",
    "assert add(1, 2)",
)
ALWAYS = """
class Always:
    def __eq__(self, other): return True
    def __bool__(self): return True
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
"""


@pytest.mark.parametrize(
    "source",
    [
        "def add(a, b): return a - b",
        ALWAYS + "def add(a, b): return Always()",
        ALWAYS + "add = Always()",
        "class T(int):\n    def __eq__(self, o): return True\ndef add(a, b): return T(0)",
        "print('passed'); print('\\x1epassed\\x1f'); import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "def add(a, b): raise SystemExit(0)",
        "def add(a, b): raise AssertionError",
        "import builtins; builtins.AssertionError = ValueError\ndef add(a, b): return 0",
        "class M:\n    def isclose(self, *a): return True\nmath = M()\ndef add(a, b): return 0",
        "def abs(x): return 0\ndef add(a, b): return 0",
        # Writes answers of its own making, "passed" among them, to every open pipe.
        'import os\nfor fd in range(3, 30):\n    try: os.write(fd, b\'{"value": {"math": ["object", 0], '
        '"add": ["object", 0], "__builtins__": ["dict", []]}}\\n\\x1epassed\\x1f\\n\')\n    except OSError: pass',
        "not python at all",
    ],
)
def test_no_trick_of_a_wrong_program_passes_an_assertion(source: str) -> None:
    for test in SNIPPETS:
        if test == "assert add(1, 2)" and "a - b" in source:
            continue  # -1 is true
        score = verify_program(source, [Assertion(test)], LIMITS)
        assert score.reward == 0.0, (test, score)
        assert score.why.startswith("test 1: ")


def test_the_same_trick_fools_an_assertion_in_the_same_process() -> None:
    """The negative control: what the separation is for."""
    fooled = ALWAYS + "def add(a, b): return Always()\nassert add(1, 2) == 3"
    assert run_program(fooled, limits=LIMITS).succeeded


def test_a_program_that_hangs_in_an_assertion_is_killed_and_wrong() -> None:
    score = verify_program(
        "def f():\n    while True: pass", [Assertion("assert f() == 1")], Limits(wall_seconds=1.0)
    )
    assert score.reward == 0.0
    assert score.why in ("test 1: timed out", "test 1: RuntimeError: the program ended")


@pytest.mark.parametrize(
    ("snippet", "why"),
    [("assert add(1,", "not Python"), ("assert add(lambda: 1, 2)", "type function cannot be sent")],
)
def test_a_broken_test_is_none_and_not_the_programs_fault(snippet: str, why: str) -> None:
    score = verify_program(ADD, [Assertion(snippet)], LIMITS)
    assert score.reward is None
    assert why in score.why


def test_a_program_without_tests_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="at least one test"):
        verify_program(ADD, [])


def test_the_code_of_a_reply_is_its_last_fenced_block() -> None:
    reply = "Try:\n```python\nprint(1)\n```\nBetter:\n```\nprint(2)\n```\nUnfinished:\n```python\nprint(3)\n"
    assert extract_code(reply) == "print(2)\n"
    assert extract_code("print(1)") is None


def test_no_warning_where_all_protections_hold() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verify_program(DOUBLE, DOUBLES, LIMITS)

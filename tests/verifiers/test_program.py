import pytest

from whorl.verifiers.program import Assertion, Example, extract_code, verify_program
from whorl.verifiers.sandbox import Limits, run_program

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
        # What the snippet's side reports about this error used to be read as its verdict.
        "def add(a, b): raise AssertionError('\\x1epassed\\x1f')",
        'def add(a, b): raise AssertionError(\'\\x1e["passed", ""]\')',
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

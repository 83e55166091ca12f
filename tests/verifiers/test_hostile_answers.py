"""Answers that attack the judge: they hang it, run code in it, or try to look right. Each gets an honest verdict."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from whorl.verifiers import answer as module
from whorl.verifiers.answer import exact, final_answer, math_answer, numeric
from whorl.verifiers.function_call import compare
from whorl.verifiers.pool import Pool

GRACE_SECONDS = 60.0
"""What a busy machine may need on top of a deadline, for starting a worker."""

WATCHED: list[str] = []
_watching = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in ("exec", "compile", "os.system", "socket.connect", "pickle.find_class"):
        WATCHED.append(f"{event} {arguments!r:.200}")


sys.addaudithook(_audit)  # cannot be taken away again, so it looks only while it is asked to


@pytest.fixture
def no_code_here() -> Iterator[None]:
    """Nothing is compiled or run in this process during the test."""
    global _watching
    math_answer(r"\boxed{x}", "y", deadline_seconds=60)  # whatever is imported once has been
    WATCHED.clear()
    _watching = True
    yield
    _watching = False
    assert WATCHED == []


def test_the_watch_sees_code_that_is_run_here(no_code_here: None) -> None:
    """The negative control of the fixture."""
    eval("1 + 1")
    assert len(WATCHED) == 2  # compiled, then run
    WATCHED.clear()


HANGS = {
    "an endless sum": r"\sum_{n=1}^{10^{10}} n^n",
    "an endless product": r"\prod_{n=1}^{10^{9}} n",
    "an integral without an end": r"\int_0^1 x^{x^{x^x}} dx",
    "a power that is expanded": r"(x+y+z+w)^{999}",
}
TOO_MUCH = {
    "a tower of powers": (r"9^{9^{9^{9}}}", "more than 100,000 digits"),
    "a higher one": (r"2^{2^{2^{2^{2^{2}}}}}", "more than 100,000 digits"),
    "a tower in a function": (r"\sin(10^{10^{10}})", "more than 100,000 digits"),
    "a huge factorial": ("99999999!", "more than 100,000 digits"),
    "factorials of factorials": ("((((99!)!)!)!)", "more than 100,000 digits"),
    "a factorial of a tower": (r"9^{9^{9}}!", "more than 100,000 digits"),
    "a huge binomial": (r"\binom{9^{9^9}}{8^{8^8}}", "more than 100,000 digits"),
    "nested braces": ("{" * 900 + "x+1" + "}" * 900, "nests brackets 900 deep"),
    "nested parentheses": ("(" * 300 + "x+1" + ")" * 300, "nests brackets 300 deep"),
    "nested roots": (r"\sqrt{" * 200 + "2" + "}" * 200, "nests brackets 200 deep"),
    "signs without end": ("+" * 500 + "3", "RecursionError"),
    "a megabyte of fractions": (r"\frac{1}{" * 110_000, "the final answer has 990,000 characters"),
    "a megabyte of nonsense": (r"\left(\begin{" * 80_000, "characters"),
    "a megabyte of digits": ("7" * (1 << 20), "the final answer has 1,048,576 characters"),
}


@pytest.mark.parametrize("name", HANGS)
def test_an_answer_that_hangs_the_judge_ends_as_none_with_the_reason(name: str) -> None:
    math_answer(r"\boxed{2x}", "x+x", deadline_seconds=60)  # a worker is there
    start = time.monotonic()
    score = math_answer(f"Answer: {HANGS[name]}", r"\sqrt{2}", deadline_seconds=0.5)
    assert (score.reward, score.why) == (None, "math-verify timed out")
    assert time.monotonic() - start < 0.5 + GRACE_SECONDS


@pytest.mark.usefixtures("no_code_here")
@pytest.mark.parametrize("gold", [r"\sqrt{2}", "3", "x+1"])
@pytest.mark.parametrize("name", TOO_MUCH)
def test_an_answer_that_is_too_much_for_the_judge_is_none_at_once(name: str, gold: str) -> None:
    """In a few milliseconds, so that a policy that likes such answers does not slow its run."""
    answer, reason = TOO_MUCH[name]
    score = math_answer(f"Answer: {answer}", gold, deadline_seconds=60)
    assert score.reward is None
    assert reason in score.why
    assert "timed out" not in score.why


def test_what_is_large_but_can_be_judged_is_judged() -> None:
    for answer, gold, reward in (
        ("2^{1000}", r"4^{500}", 1.0),
        ("2^{1000}", r"4^{501}", 0.0),
        ("30!", r"30 \cdot 29!", 1.0),
        (r"\binom{1000}{2}", "499500", 1.0),
        ("((((x+1))))", "1+x", 1.0),
        ("e^{-1000}", r"\frac{1}{e^{1000}}", 1.0),
    ):
        assert math_answer(f"Answer: {answer}", gold, deadline_seconds=60).reward == reward, answer


def test_exhaustion_inside_math_verify_would_be_a_wrong_answer_without_our_guard(tmp_path: Path) -> None:
    """The negative control: what is swallowed there, and comes out as False."""
    script = (
        "from math_verify import parse, verify\n"
        "got = parse('$' + '+' * 500 + '3$', parsing_timeout=None)\n"
        "print(verify(parse('$3$', parsing_timeout=None), got, timeout_seconds=None))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("False")


CODE = [
    "__import__('os').mkdir({mark!r})",
    "().__class__.__base__.__subclasses__()[0].__init__.__globals__['os'].mkdir({mark!r})",
    "[open({mark!r}, 'w') for x in [1]]",
    "(lambda: open({mark!r}, 'w'))()",
    "exec(\"open({mark!r}, 'w')\")",
    r"\text{{__import__('os').mkdir({mark!r})}}",
    r"\operatorname{{eval}}(__import__('os').mkdir({mark!r}))",
    r"\input{{{mark}}}",
    r"\write18{{touch {mark}}}",
    r"\immediate\openout1={mark}",
    r"$x$ __import__('os').mkdir({mark!r}) $x$",
    "1 if open({mark!r}, 'w') else 1",
    "f\"{{open({mark!r}, 'w')}}\"",
    "Symbol('x').__class__.__mro__[-1].__subclasses__()",
    "sympify('__import__(\"os\").mkdir({mark!r})')",
    "lambdify((), 'open({mark!r}, \"w\")')()",
    "cos\nimport os; os.mkdir({mark!r})",
    "c__builtin__\neval\n(S'open({mark!r})'\ntR.",
]


@pytest.mark.usefixtures("no_code_here")
@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("gold", ["3", r"\sqrt{2}", "x+1", r"\{1, 2\}"])
def test_code_in_an_answer_is_neither_run_nor_right(code: str, gold: str, tmp_path: Path) -> None:
    answer = code.format(mark=str(tmp_path / "mark"))
    for reply in (f"\\boxed{{{answer}}}", f"<answer>{answer}</answer>", f"Answer: {answer}"):
        for judge in (exact, math_answer):
            score = judge(reply, gold)
            assert score.reward == 0.0, (reply, score)
            assert score.why
    assert list(tmp_path.iterdir()) == []


def test_code_that_a_worker_did_run_could_not_harm(tmp_path: Path) -> None:
    """Should a new version of a library evaluate an answer after all: what the workers are confined for."""
    (tmp_path / "careless.py").write_text("def work(answer):\n    return repr(eval(answer))")
    mark = str(tmp_path / "mark")
    with Pool(tmp_path / "careless.py", "work", num_workers=1) as pool:
        assert pool.call("1 + 1", deadline_seconds=60) == "2"
        for code in (
            f"__import__('os').mkdir({mark!r})",
            f"open({mark!r}, 'w')",
            f"__import__('os').system('touch {mark}')",
            "__import__('socket').socket()",
            "open('/proc/%d/environ' % __import__('os').getppid()).read()",
            "__import__('os').kill(__import__('os').getppid(), 9)",
            "open('/etc/passwd').read()",
        ):
            result = str(pool.call(code, deadline_seconds=60))
            # os.system raises nothing: it returns what a shell does that cannot be started, 127.
            assert result.startswith("raised: ") or result == str(127 << 8), (code, result)
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["careless.py"]


@pytest.mark.parametrize(
    ("reply", "declared"),
    [
        (r"\boxed{1} \boxed{2} \boxed{3}", "3"),
        (r"\boxed{5} <!-- \boxed{3} -->", "5"),
        (r"\boxed{5} <!-- \boxed{3}", "5"),
        ("<answer>5</answer><!--<answer>3</answer>-->", "5"),
        ("Answer: 5 <!-- or 3 -->", "5"),
        ("<!-- Answer: 3 -->", None),
        ("\\boxed{5 % \\boxed{3}\n}", "5"),
        ("\\boxed{5 % 50% of \\boxed{3} and }\n}", "5"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"a 50% chance, so \boxed{3}", "3"),
        (r"\boxed{15%} or \boxed{20\%}", r"20\%"),
        (r"\boxed{15%}", "15%"),
        ("\\boxed{1 % }\n} \\boxed{2}", "2"),
        (r"\boxed{3", None),
        (r"\boxed{}", ""),
        ("Answer:\n3", ""),
    ],
)
def test_only_what_a_reader_sees_is_declared(reply: str, declared: str | None) -> None:
    assert final_answer(reply) == declared


@pytest.mark.parametrize(
    "junk", ["<!--", "-->", "%\\boxed{", "\\boxed{%", "\\boxed{" + "%" * 50, "% \\boxed{x\n", "%}"]
)
def test_comments_are_found_in_linear_time(junk: str) -> None:
    """A quadratic search would take hours here."""
    final_answer(junk * 100_000)
    final_answer("\\boxed{" + junk * 100_000)


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("3", 1.0),
        (r"3 \text{ or } 4", 0.0),
        ("3, 4, 5, 6", 0.0),
        ("3 4", 0.0),
        (r"\pm 3", 0.0),
        (r"\{1, 2, 3\}", 0.0),
        (r"x \in \{3, 4\}", 0.0),
        (r"x > 2", 0.0),
        (r"\neq 4", 0.0),
        (r"\phantom{3}", 0.0),
        (r"\hphantom{\frac{3}{1}}\vspace{3}", 0.0),
        (r"4\phantom{3}", 0.0),
        (r"\phantom{4}3", 1.0),
        (r"\text{3}", 1.0),
        (r"\text{four, or three}", 0.0),
        ("٣", 0.0),
        ("３", 0.0),
        ("Ⅲ", 0.0),
        ("3\u0338", 0.0),  # crossed out
        ("nan", 0.0),
        (r"\infty", 0.0),
        ("True", 0.0),
        ("the answer", 0.0),
        ("gold", 0.0),
        ("", 0.0),
    ],
)
def test_no_answer_is_right_by_being_many_answers(answer: str, reward: float) -> None:
    for judge in (math_answer, numeric):
        score = judge(f"\\boxed{{{answer}}}", "3")
        wanted = 0.0 if judge is numeric and "\\" in answer else reward
        assert score.reward == wanted, (judge, score)


def test_verdicts_are_remembered_and_failures_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    class Judge:
        def call(self, *arguments: object, deadline_seconds: float) -> object:
            asked.append(arguments)
            return "was out" if len(asked) == 1 else True

    monkeypatch.setattr(module, "_math_pool", Judge)
    scores = [math_answer("Answer: 17q", "q17q") for _ in range(4)]
    assert [score.reward for score in scores] == [None, 1.0, 1.0, 1.0]
    assert len(asked) == 2
    module._math_equal.cache_clear()


GOLD = [{"name": "f", "arguments": {"n": 2, "x": 0.5}}]


@pytest.mark.parametrize(
    "reply",
    [
        '[{"name": "f", "arguments": {"n": 3, "n": 2, "x": 0.5}}]',
        '[{"name": "g", "name": "f", "arguments": {"n": 2, "x": 0.5}}]',
        '[{"name": "f", "arguments": {"n": 2, "x": NaN}}]',
        '[{"name": "f", "arguments": {"n": 2, "x": 1e999}}]',
        '[{"name": "f", "arguments": {"n": 2e0, "x": 0.5}}]',
        '[{"name": "f", "arguments": {"n": 2, "x": 5e-1}, "arguments": {}}]',
        '[{"name": "f", "arguments": {"n": ' + "2" * 50_000 + ', "x": 0.5}}]',
        '[{"name": "f", "arguments": {"n": "2", "x": 0.5}}]',
        '[{"name": "f\\u0000", "arguments": {"n": 2, "x": 0.5}}]',
        '[{"name": "\\ud800", "arguments": {"n": 2, "x": 0.5}}]',
        '[{"name": "f", "arguments": {"n": 2, "x": 0.5}, "__class__": "list"}]',
        '[{"name": "f", "arguments": {"n": [2], "x": 0.5}}]',
        '[{"name": "f", "arguments": {"n": 2, "x": 0.5, "__eq__": true}}]',
        '/* [{"name": "f", "arguments": {"n": 2, "x": 0.5}}] */ []',
        json.dumps([*GOLD, {"name": "f", "arguments": {"n": 3, "x": 0.5}}]),
        json.dumps(GOLD) * 2,
        "[" + ",".join([json.dumps(GOLD[0])] * 2) + "]",
        "__import__('json').loads('[]')",
    ],
)
@pytest.mark.usefixtures("no_code_here")
def test_no_list_of_calls_is_right_by_a_trick_of_json(reply: str) -> None:
    score = compare(reply, GOLD)
    assert score.reward == 0.0
    assert score.why
    assert compare(json.dumps(GOLD), GOLD).reward == 1.0


class Rigged(str):
    """Text that calls itself right. No verifier is handed one today; should one be, it is compared as text."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


def test_a_reply_with_a_rigged_equality_is_compared_as_its_text() -> None:
    assert Rigged("4") == "3"
    for reply in (Rigged("Answer: 4"), Rigged(r"\boxed{4}"), Rigged("<answer>4</answer>")):
        for judge in (exact, numeric, math_answer):
            assert judge(reply, "3").reward == 0.0
    assert compare(Rigged("[]"), GOLD).reward == 0.0

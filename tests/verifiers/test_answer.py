import sys
import threading
from fractions import Fraction

import pytest

from whorl.verifiers import answer as module
from whorl.verifiers.answer import (
    after_answer,
    after_hashes,
    boxed,
    exact,
    final_answer,
    math_answer,
    number,
    numeric,
    tagged,
)
from whorl.verifiers.pool import Failure


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (r"so \boxed{42}", "42"),
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"first \boxed{1}, no, \boxed{2}", "2"),
        (r"\boxed{1} and an unfinished \boxed{2", "1"),
        (r"\boxed{\boxed{3}}", "3"),
        ("<answer>\n1 2\n3 4\n</answer>", "1 2\n3 4"),
        (r"<answer>\boxed{4}</answer>", "4"),
        ("<answer>Answer: 4</answer>", "4"),
        ("<answer>1</answer> hm <answer>2</answer> <answer>3", "2"),
        ("3 + 4 = 7\n#### 7\n", "7"),
        ("Answer: 5\nThat was easy.", "5"),
        ("**Answer:** 5.", "5"),
        ("**Answer: 5**", "5"),
        ("Answer: 1\nno, answer: 2", "2"),
        (r"Answer: \boxed{6}", "6"),
        (r"\boxed{1} ... Answer: 2", "2"),
        ("the right number is 42", None),
        ("", None),
        ("</answer><answer>", None),
    ],
)
def test_the_last_complete_declaration_is_the_final_answer(reply: str, expected: str | None) -> None:
    assert final_answer(reply) == expected


def test_only_the_wanted_forms_count() -> None:
    reply = r"\boxed{1} <answer>2</answer> #### 3"
    assert [final_answer(reply, (form,)) for form in (boxed, tagged, after_hashes, after_answer)] == [
        "1",
        "2",
        "3",
        None,
    ]


@pytest.mark.parametrize(
    "junk", ["\\boxed{", "{", "}", "\\", "<answer>", "####", "Answer:", "\\boxed" + " " * 50]
)
def test_extraction_is_linear_in_the_length_of_the_reply(junk: str) -> None:
    """A quadratic search would take hours here."""
    final_answer(junk * 200_000)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-7", -7),
        ("+7", 7),
        ("1,234,567", 1234567),
        ("$3.50", Fraction(7, 2)),
        (".5", Fraction(1, 2)),
        ("1.5e-3", Fraction(3, 2000)),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        ("15%", Fraction(3, 20)),
        (r"15\%", Fraction(3, 20)),
        ("1,23", None),
        ("1/0", None),
        ("1.5/2", None),
        ("", None),
        (".", None),
        ("e5", None),
        ("nan", None),
        ("inf", None),
        ("1e9999", None),
        ("2**3", None),
        ("1_000", None),
        ("٣", None),
        ("9" * 101, None),
    ],
)
def test_numbers_are_read_exactly_and_nothing_else_is_a_number(text: str, value: Fraction | None) -> None:
    got = number(text)
    assert (got and got[0]) == value


@pytest.mark.parametrize(
    ("answer", "gold", "reward"),
    [
        ("1000000001", "1000000000", 0.0),  # whole numbers exactly: a relative tolerance would accept this
        ("6/8", "3/4", 1.0),
        ("0.75", "3/4", 1.0),
        ("75%", "3/4", 1.0),
        ("0.333333", "1/3", 1.0),  # off by 1e-6 of 1/3, the tolerance itself
        ("0.33333", "1/3", 0.0),
        ("3.0", "3", 1.0),
        ("0.0000001", "0", 0.0),
        ("three", "3", 0.0),
        ("-3", "3", 0.0),
    ],
)
def test_numeric_compares_exactly_or_within_a_millionth(answer: str, gold: str, reward: float) -> None:
    assert numeric(f"Answer: {answer}", gold).reward == reward


def test_numeric_refuses_a_gold_answer_that_is_no_number() -> None:
    with pytest.raises(ValueError, match=r"numeric needs a number as gold answer.*'about 3'"):
        numeric("Answer: 3", "about 3")


def test_exact_ignores_white_space_only() -> None:
    assert exact("<answer> a  b\n</answer>", "a b").reward == 1.0
    score = exact("<answer>A b</answer>", "a b")
    assert (score.reward, score.why) == (0.0, "expected 'a b', got 'A b'")


@pytest.mark.parametrize("judge", [exact, numeric, math_answer])
def test_every_judge_refuses_babble_and_endless_answers_and_says_why(judge) -> None:
    assert judge("I think it is 5, or 6.", "5").reward == 0.0
    assert "no final answer" in judge("I think it is 5, or 6.", "5").why
    assert "1,000,000 characters" in judge("Answer: " + "5" * 1_000_000, "5").why
    assert judge("#### 5", "5").reward == 1.0


@pytest.mark.parametrize(
    ("answer", "gold", "reward"),
    [
        ("x + 1", "1+x", 1.0),
        ("x + 2", "1+x", 0.0),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", 1.0),
        (r"\{2, 1\}", r"\{1, 2\}", 1.0),
        ("(2, 1)", "(1, 2)", 0.0),
        (r"\left( 1 , 0.5 \right)", r"(1,\frac{1}{2})", 1.0),
        ("(1, 2, 3)", "(1, 2)", 0.0),
        ("[1, 2)", "[1, 2]", 0.0),
        ("[1,2]", "[1, 2]", 1.0),
        (r"(-\infty, 3]", r"(-\infty,3]", 1.0),
        (r"(-\infty, 3]", r"(\infty,3]", 0.0),
        (r"(-\infty, 1)", r"(-1,1)", 0.0),
        (r"\{1, 2, 2\}", r"\{2, 1\}", 1.0),
        (r"\{1, 2, 3\}", r"\{2, 1\}", 0.0),
        (r"\{1\}", r"\{2, 1\}", 0.0),
        (r"(1, \sqrt{4})", "(1, 2)", 1.0),
        ("x**2", "x^2", 1.0),
        (r"3 \text{ or } 4", "3", 0.0),
        ("3, 4", "3", 0.0),
        ("3} or {4", "3", 0.0),
        ("Silent", "silent", 1.0),
        ("listen", "silent", 0.0),
        (r"\text{Monday}", r"\text{Monday}", 1.0),
        ("1e3", "1000", 1.0),
    ],
)
def test_mathematically_equal_answers_are_right(answer: str, gold: str, reward: float) -> None:
    reply = f"Answer: {answer}"
    assert math_answer(reply, gold, deadline_seconds=60).reward == reward


def test_plain_pairs_and_sets_are_settled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """math-verify takes twenty milliseconds to read a pair of numbers."""
    monkeypatch.setattr(module, "_math_pool", lambda: pytest.fail("a process was asked"))
    for answer, gold, reward in (
        ("(3,4)", "(3, 4)", 1.0),
        (r"\{4, 3\}", r"\{3, 4\}", 1.0),
        ("[0, 5)", r"[0, \infty)", 0.0),
    ):
        assert math_answer(f"Answer: {answer}", gold).reward == reward


def test_words_would_be_equal_as_products_of_letters() -> None:
    """The negative control of the "silent" case above: asked directly, math-verify is fooled."""
    assert module._math_pool().call("silent", "listen", deadline_seconds=60) is True


def test_math_answer_works_outside_the_main_thread() -> None:
    """There math-verify itself, with the timeouts it has by default, raises or scores 0."""
    from math_verify import parse

    results: list[object] = []

    def in_thread() -> None:
        results.append(math_answer(r"\boxed{2x}", "x+x", deadline_seconds=60).reward)
        try:
            parse(r"\boxed{2x}")
        except ValueError as error:
            results.append(str(error))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert results[0] == 1.0
    assert "threaded environment" in str(results[1])


def test_a_gold_answer_that_cannot_be_read_is_none_and_not_wrong() -> None:
    score = math_answer("Answer: 3", "}", deadline_seconds=60)
    assert score.reward is None
    assert "cannot read the gold answer" in score.why


def test_a_judge_that_fails_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead:
        def call(self, *arguments: object, deadline_seconds: float) -> Failure:
            return Failure("worker died", "signal 9")

    monkeypatch.setattr(module, "_math_pool", Dead)
    score = math_answer("Answer: x", "y")
    assert (score.reward, score.why) == (None, "math-verify worker died: signal 9")


def test_without_math_verify_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    module._math_pool.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r'pip install "whorl\[tasks\]"'):
        math_answer("Answer: x", "y")

"""Arithmetic of models: exact, bounded, and never evaluated."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whorl.environments.expression import IllegalExpression, judge, parse, random_expression, solve


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/(3-8/3)", Fraction(24)),  # in floating point this is 23.999...
        ("1+2*3", Fraction(7)),
        ("(1+2)*3", Fraction(9)),
        ("10-4-3", Fraction(3)),  # from the left
        ("24/4/2", Fraction(3)),
        ("2*(3+(4-1))", Fraction(12)),
        ("((((7))))", Fraction(7)),
        ("3-8/3", Fraction(1, 3)),
        (" 1 + 2 ", Fraction(3)),
    ],
)
def test_values_are_exact_and_follow_the_usual_precedence(text: str, value: Fraction) -> None:
    assert parse(text).value == value


def test_numbers_are_reported_in_order_with_repetitions() -> None:
    assert parse("8/(3-8/3)").numbers == (8, 3, 8, 3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "a number is missing"),
        ("-3", "a number is missing"),
        ("3+-4", "a number is missing"),
        ("3+", "a number is missing"),
        ("()", "a number is missing"),
        ("2(3)", "an operator is missing"),
        ("2 3", "an operator is missing"),
        ("(1)(2)", "an operator is missing"),
        ("(1+2", "not closed"),
        ("1+2)", "not opened"),
        (")1(", "a number is missing"),
        ("2**3", "a number is missing"),
        ("1/(2-2)", "divides by zero"),
        ("1.5+2", "only whole numbers"),
        ("3+4=7", "only whole numbers"),
        ("x+1", "only whole numbers"),
        ("３+４", "only whole numbers"),
        ("1\n+2", "only whole numbers"),
        ("1234567", "more than 6 digits"),
        ("1+" * 100 + "1", "longer than 200"),
    ],
)
def test_what_is_not_an_expression_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(IllegalExpression, match=reason):
        parse(text)


def test_brackets_as_deep_as_the_length_allows_need_no_recursion() -> None:
    assert parse("(" * 99 + "7" + ")" * 99).value == 7


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789+-*/() ", max_size=40))
def test_every_text_that_is_accepted_has_the_value_that_python_gives_it(text: str) -> None:
    try:
        expression = parse(text)
    except IllegalExpression:
        return
    tokens = [f"Fraction({t})" if t.isdigit() else t for t in _tokens(text)]
    assert expression.value == eval("".join(tokens), {"Fraction": Fraction})  # our own text, in a test


def _tokens(text: str) -> list[str]:
    tokens = ["".join(run) for _, run in itertools.groupby(text, lambda c: "d" if c.isdigit() else object())]
    return [token.lstrip("0") or "0" if token.isdigit() else token for token in tokens]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_no_text_at_all_raises_anything_else(text: str) -> None:
    assert judge(text, [1, 2], 3).why


@pytest.mark.parametrize(
    ("text", "kind", "why"),
    [
        ("3*8-5", "right", "right"),
        ("5+3+8", "value", "worth 16, not 19"),
        ("3/8-5", "value", "worth -37/8, not 19"),
        ("8+8+3", "numbers", "used too often: 8; not used: 5"),
        ("19", "numbers", "not given: 19; not used: 3, 5, 8"),
        ("3*8", "numbers", "not used: 5"),
        ("3*8-5=19", "illegal", "only whole numbers"),
    ],
)
def test_the_verdict_names_the_fault(text: str, kind: str, why: str) -> None:
    verdict = judge(text, [3, 8, 5], 19)
    assert verdict.kind == kind
    assert why in verdict.why


def test_random_expressions_use_every_number_once_and_every_operator() -> None:
    rng = np.random.default_rng(0)
    texts = [random_expression([1, 2, 3], rng) for _ in range(500)]
    assert {tuple(sorted(parse(text).numbers)) for text in texts} == {(1, 2, 3)}
    assert all(any(operator in text for text in texts) for operator in "+-*/(")


def test_the_solver_finds_what_only_fractions_can_solve_and_gives_up_where_nothing_does() -> None:
    solution = solve((3, 3, 8, 8), 24)
    assert solution is not None
    assert parse(solution).value == 24
    assert solve((1, 1, 1, 1), 24) is None


@pytest.mark.parametrize(
    ("highest", "num_hands", "num_solvable"),
    [
        (6, 126, 105),  # counted by enumerating orders, operators and the five bracketings
        pytest.param(13, 1_820, 1_362, marks=pytest.mark.slow),  # the known count of the card game
    ],
)
def test_the_solver_finds_as_many_hands_that_make_24_as_there_are(
    highest: int, num_hands: int, num_solvable: int
) -> None:
    hands = list(itertools.combinations_with_replacement(range(1, highest + 1), 4))
    solutions = {hand: solve(hand, 24) for hand in hands}
    found = {hand: text for hand, text in solutions.items() if text is not None}
    assert (len(hands), len(found)) == (num_hands, num_solvable)
    assert {judge(text, hand, 24).kind for hand, text in found.items()} == {"right"}

"""Arithmetic written by a model: parsed by hand, computed in fractions, never evaluated by Python."""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np

MAX_CHARS = 200
"""Longest expression that is read. With at most six digits a number, no value can grow beyond 700 digits."""

MAX_DIGITS = 6

_TOKEN = re.compile(r"[0-9]+|[^ ]")
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2}


class IllegalExpression(ValueError):
    """The text is no arithmetic expression. The message never quotes it, so a prompt can show the message."""


class Expression(NamedTuple):
    value: Fraction
    numbers: tuple[int, ...]
    """Every number in the text, in order."""


def parse(text: str) -> Expression:
    """Value and numbers of an expression in whole numbers, + - * / and round brackets.

    No sign stands before a number or a bracket, and nothing is multiplied without a `*`. Division is exact:
    8/(3-8/3) is 24. Two stacks and no recursion, so the depth of brackets costs nothing.
    IllegalExpression for everything else, division by zero included.
    """
    if len(text) > MAX_CHARS:
        raise IllegalExpression(f"it is longer than {MAX_CHARS} characters")
    values: list[Fraction] = []
    operators: list[str] = []
    numbers: list[int] = []

    def compute_down_to(precedence: int) -> None:
        while operators and _PRECEDENCE[operators[-1]] >= precedence:
            right, left = values.pop(), values.pop()
            values.append(compute(left, operators.pop(), right))

    expects_number = True
    for token in _TOKEN.findall(text):
        begins_number = token == "(" or token[0] in "0123456789"
        if token not in "+-*/()" and not begins_number:
            raise IllegalExpression("it may hold only whole numbers, + - * / and round brackets")
        if begins_number != expects_number:
            raise IllegalExpression("an operator is missing" if begins_number else "a number is missing")
        if token == "(":
            operators.append(token)
        elif token == ")":
            compute_down_to(1)
            if not operators:
                raise IllegalExpression("a bracket is closed that was not opened")
            operators.pop()
        elif begins_number:
            if len(token) > MAX_DIGITS:
                raise IllegalExpression(f"a number has more than {MAX_DIGITS} digits")
            numbers.append(int(token))
            values.append(Fraction(numbers[-1]))
            expects_number = False
        else:
            compute_down_to(_PRECEDENCE[token])
            operators.append(token)
            expects_number = True
    if expects_number:
        raise IllegalExpression("a number is missing")
    compute_down_to(1)
    if operators:
        raise IllegalExpression("a bracket is not closed")
    return Expression(values[0], tuple(numbers))


def compute(left: Fraction, operator: str, right: Fraction) -> Fraction:
    """One exact step; IllegalExpression for a division by zero."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if right == 0:
        raise IllegalExpression("it divides by zero")
    return left / right


class Verdict(NamedTuple):
    """`kind` orders the ways to fail: not an expression, not these numbers, not this value."""

    kind: Literal["right", "value", "numbers", "illegal"]
    why: str


def judge(text: str, numbers: Sequence[int], target: int) -> Verdict:
    """Whether the expression uses exactly these numbers, each once, and is worth the target."""
    try:
        expression = parse(text)
    except IllegalExpression as error:
        return Verdict("illegal", f"not an expression: {error}")
    written, given = Counter(expression.numbers), Counter(numbers)
    if written != given:
        faults = []
        if foreign := sorted(set(written) - set(given)):
            faults.append(f"not given: {', '.join(map(str, foreign))}")
        if repeated := sorted(n for n in written if n in given and written[n] > given[n]):
            faults.append(f"used too often: {', '.join(map(str, repeated))}")
        if unused := sorted(n for n in given if written[n] < given[n]):
            faults.append(f"not used: {', '.join(map(str, unused))}")
        return Verdict("numbers", "; ".join(faults))
    if expression.value != target:
        return Verdict("value", f"the expression is worth {expression.value}, not {target}")
    return Verdict("right", "right")


class Term(NamedTuple):
    """A value with its shortest text; `rank` is the precedence of its outermost operator, 3 for a number."""

    value: Fraction
    text: str
    rank: int


def number(value: int) -> Term:
    return Term(Fraction(value), str(value), 3)


def combine(left: Term, operator: str, right: Term) -> Term:
    """The term `left operator right`, with the brackets it needs and no others."""
    rank = _PRECEDENCE[operator]
    left_text = f"({left.text})" if left.rank < rank else left.text
    # a-(b-c) and a/(b*c) keep their brackets; a+(b-c) and a*(b/c) do not need them.
    needed = right.rank < rank or (right.rank == rank and operator in "-/")
    right_text = f"({right.text})" if needed else right.text
    return Term(compute(left.value, operator, right.value), f"{left_text}{operator}{right_text}", rank)


def random_expression(numbers: Sequence[int], rng: np.random.Generator) -> str:
    """An expression of each number once that knows no target: two random terms are joined until one is left.

    A division by zero is drawn again.
    """
    pool = [number(value) for value in numbers]
    while len(pool) > 1:
        first, second = (int(i) for i in rng.choice(len(pool), 2, replace=False))
        try:
            joined = combine(pool[first], "+-*/"[rng.integers(4)], pool[second])
        except IllegalExpression:
            continue
        pool = [term for i, term in enumerate(pool) if i not in (first, second)] + [joined]
    return pool[0].text


@functools.lru_cache(maxsize=10_000)
def solve(numbers: tuple[int, ...], target: int) -> str | None:
    """An expression of each number once that is worth the target, or None if there is none.

    Searches every order, operator and bracketing: made for up to five numbers.
    """
    seen: set[tuple[Fraction, ...]] = set()

    def search(pool: list[Term]) -> str | None:
        if len(pool) == 1:
            return pool[0].text if pool[0].value == target else None
        key = tuple(sorted(term.value for term in pool))
        if key in seen:
            return None
        seen.add(key)
        for i, j in itertools.combinations(range(len(pool)), 2):
            rest = [term for k, term in enumerate(pool) if k not in (i, j)]
            for left, operator, right in (
                (pool[i], "+", pool[j]),
                (pool[i], "-", pool[j]),
                (pool[j], "-", pool[i]),
                (pool[i], "*", pool[j]),
                (pool[i], "/", pool[j]),
                (pool[j], "/", pool[i]),
            ):
                if operator == "/" and right.value == 0:
                    continue
                if found := search([*rest, combine(left, operator, right)]):
                    return found
        return None

    return search([number(value) for value in numbers])

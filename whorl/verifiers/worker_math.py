"""What runs inside a worker: are two final answers mathematically equal, by math-verify.

Loaded by its path (see `pool.py`), so it imports nothing of Whorl. math-verify's own timeouts are alarm
signals, which only work in a main thread; they are off, because the pool's deadline does that work.
"""

import functools
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, grader, parse, parser, verify

logging.disable(logging.WARNING)  # nobody reads a worker's log, and formatting a huge expression can hang

MAX_DEPTH = 20
"""Of brackets within brackets: the parser's time grows exponentially with it."""
MAX_DIGITS = 100_000
"""Of a number that would be written out to compare it."""

# Read the box and nothing else: the other extractor hands strings to sympy's `eval`.
_BOX_ONLY = [LatexExtractionConfig(boxed_match_priority=0)]


class TooMuch(BaseException):
    """The judge cannot deal with an expression, which says nothing about it.

    Not an Exception: those math-verify catches, and calls the answer wrong.
    """


def _outspoken(function: Callable) -> Callable:
    """The function, whose failures from exhaustion nobody swallows."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except (MemoryError, RecursionError) as error:
            raise TooMuch(f"is too much for math-verify ({type(error).__name__})") from None

    return call


for module, name in (
    (parser, "latex2sympy"),
    (grader, "simplify"),
    (sympy.core.evalf.EvalfMixin, "evalf"),
):
    setattr(module, name, _outspoken(getattr(module, name)))


def math_equal(gold: str, answer: str) -> bool | str:
    """Whether the two are equal; a sentence if that could not be found out."""
    try:
        expected, got = _read(gold), _read(answer)
        if not expected:
            return f"cannot read the gold answer {gold[:80]!r}"
        try:
            return bool(verify(expected, got, timeout_seconds=None, raise_on_error=True))
        except (MemoryError, RecursionError, OverflowError):
            raise  # too much for the judge, which says nothing about the answer
        except Exception:
            # Kinds of expressions that cannot be compared; other pairs of readings perhaps can.
            return bool(verify(expected, got, timeout_seconds=None))
    except TooMuch as error:
        return f"cannot judge: an expression {error}"


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> list:
    """The readings of a final answer. TooMuch for one that nobody should try to evaluate."""
    depth = _depth(text)
    if depth > MAX_DEPTH:
        raise TooMuch(f"nests brackets {depth} deep")
    boxed = f"\\boxed{{{text.replace('**', '^')}}}"  # a caret is the only power that LaTeX has
    found = parse(boxed, extraction_config=_BOX_ONLY, parsing_timeout=None)  # type: ignore[arg-type]
    for reading in found:
        if isinstance(reading, sympy.Basic) and _digits(reading) > MAX_DIGITS:
            raise TooMuch(f"holds a number of more than {MAX_DIGITS:,} digits")
    return found


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[{}()\[\]]", text):
        depth += 1 if bracket in "{([" else -1
        deepest = max(deepest, depth)
    return deepest


@_outspoken
def _digits(expression: sympy.Basic) -> float:
    """About how many digits the largest number in a tree has when it is written out. math-verify reads without
    evaluating, so the tree is small, whatever it stands for. A name counts as 1."""
    if isinstance(expression, sympy.Rational):
        return max(abs(expression.p), expression.q).bit_length() * math.log10(2)
    arguments = [argument for argument in expression.args if isinstance(argument, sympy.Basic)]
    digits = [_digits(argument) for argument in arguments]
    largest = max(digits, default=0.0)
    if isinstance(expression, sympy.Pow | sympy.exp):
        base, exponent = expression.as_base_exp()
        return max(largest, max(_digits(base), math.log10(3) * base.is_number) * _value(_digits(exponent)))
    if isinstance(expression, sympy.factorial | sympy.factorial2 | sympy.subfactorial | sympy.gamma):
        return max(largest, largest * _value(largest))
    if isinstance(expression, sympy.binomial):
        return max(largest, min(digits[0] * _value(digits[1]), _value(digits[0])))
    return largest + len(arguments) if isinstance(expression, sympy.Add) else max(largest, sum(digits))


def _value(digits: float) -> float:
    """A number of so many digits, as large as matters here."""
    return 10 ** min(digits, 300.0)

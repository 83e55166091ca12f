"""What runs inside a worker: reasoning-gym's scorer on one answer. Loaded by its path (see `pool.py`).

Some scorers hand the answer to `eval`, or to sympy's `parse_expr`, which is `eval` too. Those answers are first
parsed, and refused unless they are made of numbers, names and arithmetic; so no answer of the model runs as
code even here, where it could do little but could falsify the verdicts that follow.

Some scorers give full marks to wrong answers; a second opinion keeps them honest.
"""

import ast
import functools
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import reasoning_gym

# Importing any part of sympy later, under Landlock, works too; but it would count against a deadline.
import sympy.parsing.sympy_parser  # noqa: F401

EXPRESSIONS = {
    "countdown": frozenset(),
    "puzzle24": frozenset(),
    "polynomial_multiplication": frozenset(),
    "simple_integration": frozenset({"exp", "log", "ln", "sqrt", "sin", "cos", "tan", "Abs"}),
    "intermediate_integration": frozenset(
        {
            "exp",
            "log",
            "ln",
            "sqrt",
            "sin",
            "cos",
            "tan",
            "asin",
            "acos",
            "atan",
            "sinh",
            "cosh",
            "tanh",
            "Abs",
        }
    ),
}
"""Tasks whose scorer evaluates the answer as an expression, and the functions that it may call."""
LITERALS = frozenset({"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"})
"""Tasks whose scorer evaluates the answer as a Python literal."""

_ARITHMETIC = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Load),
    *(ast.USub, ast.UAdd, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow),
)
_CONTAINERS = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Name, ast.Load, ast.UnaryOp, ast.USub)


def score(task: str, settings: Mapping[str, Any], entry: dict[str, Any], answer: str) -> dict[str, Any]:
    """{"value": 0..1 or None, "why": ...}; None where the scorer could not do its work."""
    if reason := refusal(task, answer):
        return {"value": 0.0, "why": reason}
    if (check := _SECOND_OPINIONS.get(task)) and not check(answer, entry):
        return {"value": 0.0, "why": "wrong"}
    dataset = _dataset(task, pickle.dumps(settings))
    try:
        value = float(dataset.score_answer(answer, entry))
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        # Whose fault? If the scorer can deal with the gold answer (or with an empty one where none is
        # stored), then it is the answer that is not in a form it knows.
        try:
            dataset.score_answer(entry["answer"] or "", entry)
        except Exception:
            raise error from None
        return {"value": 0.0, "why": f"the scorer cannot read the answer ({type(error).__name__})"}
    if not 0 <= value <= 1:  # also nan
        return {"value": None, "why": f"the scorer gave {value}"}
    return {"value": value, "why": "right" if value == 1 else f"the scorer gave {value:.3g}"}


def refusal(task: str, answer: str) -> str:
    """Why the answer must not reach an evaluating scorer; empty if it may."""
    if task in EXPRESSIONS:
        functions = EXPRESSIONS[task]
        tree = _parse(answer)
        if tree is None:
            return "the answer is not an expression"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else "a value"
                if called not in functions or node.keywords:
                    return f"the answer calls {called!r}, which is no function of this task"
            elif not isinstance(node, _ARITHMETIC):
                return f"the answer is not plain arithmetic ({type(node).__name__})"
            elif isinstance(node, ast.Constant) and type(node.value) not in (int, float):
                return "the answer is not plain arithmetic (a literal that is no number)"
    elif task in LITERALS and (tree := _parse(answer)) is not None:
        # What does not parse cannot be evaluated either, and is compared as text.
        for node in ast.walk(tree):
            if not isinstance(node, _CONTAINERS):
                return f"the answer is neither text nor a plain list ({type(node).__name__})"
    return ""


def _parse(answer: str) -> ast.Expression | None:
    try:
        return ast.parse(answer.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return None


@functools.lru_cache(maxsize=16)
def _dataset(task: str, settings: bytes) -> Any:
    return reasoning_gym.create_dataset(task, **pickle.loads(settings), size=1, seed=0)


def _uses_the_numbers(answer: str, entry: dict[str, Any]) -> bool:
    """puzzle24's scorer accepts any four numbers, and rounds: "6*4*1*1" would solve every puzzle."""
    numbers = sorted(int(digits) for digits in re.findall(r"\d+", answer))
    return "." not in answer and numbers == sorted(map(int, entry["metadata"]["numbers"]))


_SECOND_OPINIONS: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "puzzle24": _uses_the_numbers,
    # Its scorer compares the truth values of the two texts, and every text but the empty one is true.
    "game_of_life_halting": lambda answer, entry: answer.strip().lower() == entry["answer"].lower(),
    # Its scorer computes min(1, exp(-distance)), which is 1 where the distance is not a number.
    "complex_arithmetic": lambda answer, entry: "nan" not in answer.lower(),
}

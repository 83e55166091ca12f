"""Demonstrations of reflecting and trying again: reflections of mixed use, and retries whose success depends on them.

Pretrained models come with ways of reflecting, many of them of little use; a model made here is shown some (`KINDS`).
The retry is right in a share of the demonstrations that differs from kind to kind (`RIGHT_AFTER`), so a reflection
matters to what follows, and reinforcement learning has something to select.

                                                 sums             countdown               calls
    hint         the way to a right answer       `3+8=1,1+5=6`    `try 8-5=3,3*3=9`       `days is 4`
    diagnosis    what was wrong                  `not 7`          `19 not 20`, `8 twice`  `days was 3`
    generic      true of every failure           `i must be careful`
    misleading   a way that leads elsewhere      `3+8=4,4+5=9`    `try 8+5=13,13+3=16`    `days is 6`
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from whorl.data import Problem
from whorl.environments.expression import Term, combine, number, parse
from whorl.environments.function_calling import TOOLS

KINDS = {"hint": 0.6, "diagnosis": 0.15, "generic": 0.15, "misleading": 0.1}
"""Share of demonstrations with each kind. Fewer hints or more slips, and the arithmetic itself is not learned in
minutes: with 0.4 and 0.2 one start in three was."""

RIGHT_AFTER = {"hint": 0.9, "diagnosis": 0.6, "generic": 0.3, "misleading": 0.0}
"""Share of demonstrated retries that are right, by the kind of the reflection before it."""

MAX_STEP = 40
"""Working stays within numbers that a small model can add and multiply."""

MAX_NUMBERS = 4
"""Three numbers have some hundred ways, four some thousand, five half a million."""

GENERIC = ("i must be careful", "that was wrong", "i will think again")


@dataclass(frozen=True)
class Lesson:
    """A right answer, a failed attempt, a reflection on that and the retry."""

    right: str
    attempt: str
    kind: str
    reflection: str
    retry: str


Way = tuple[str, Term]
"""Working, and the term that it comes to."""


def countdown_lesson(problem: Problem, kind: str, rng: np.random.Generator) -> Lesson:
    """A wrong expression and what becomes of it; one attempt in four takes a number twice.

    Who was given working, good or misleading, writes down what it comes to. Ways that are written down as they were
    worked, `3*8=24,24-5=19` as `3*8-5`, are taken where there are any: a small model learns those in minutes.
    """
    numbers, target = problem.extra["numbers"], problem.extra["target"]
    if len(numbers) > MAX_NUMBERS:
        raise ValueError(f"ways are listed for up to {MAX_NUMBERS} numbers; got {len(numbers)}")
    pool = [number(n) for n in numbers]
    ways = list(_ways(pool, MAX_STEP))
    misses = _plain([way for way in ways if way[1].value != target])
    # 9*8/6=12 has no way that stays below: then any way will do.
    hits = [way for way in ways if way[1].value == target]
    hits = _plain(hits or [way for way in _ways(pool, None) if way[1].value == target])

    def one(choices: list):
        return choices[int(rng.integers(len(choices)))]

    (working, right), (astray, wrong) = one(hits), one(misses)
    attempt, fault = one(misses)[1].text, ""
    if rng.random() < 1 / 4:
        attempt, fault = _taken_twice(attempt, numbers, rng)
    said = {
        "hint": f"try {working}",
        "diagnosis": fault or f"{parse(attempt).value} not {target}",
        "generic": one(list(GENERIC)),
        "misleading": f"try {astray}",
    }
    retry = right if rng.random() < RIGHT_AFTER[kind] else wrong
    return Lesson(right.text, attempt, kind, said[kind], retry.text)


def _plain(ways: list[Way]) -> list[Way]:
    """Those whose expression is their working without the results in between; all, if there are none."""
    return [(work, end) for work, end in ways if re.sub(r"=\d+(,\d+)?", "", work) == end.text] or ways


def _taken_twice(text: str, numbers: Sequence[int], rng: np.random.Generator) -> tuple[str, str]:
    """The expression with one of its numbers in place of another, and the fault; no fault if they are equal."""
    taken, given = (int(i) for i in rng.choice(len(numbers), 2, replace=False))
    if numbers[taken] == numbers[given]:
        return text, ""
    return re.sub(rf"\b{numbers[taken]}\b", str(numbers[given]), text, count=1), f"{numbers[given]} twice"


def _ways(pool: list[Term], highest: int | None, working: tuple[str, ...] = ()) -> Iterator[tuple[str, Term]]:
    """Each way to join all terms in steps that are whole, not negative and at most `highest`: `8-5=3,3*3=9` and the
    term that it comes to."""
    if len(pool) == 1:
        yield ",".join(working), pool[0]
        return
    for (i, left), (j, right) in itertools.permutations(enumerate(pool), 2):
        for operator in "+-*/":
            if (operator in "+*" and i > j) or (operator == "/" and right.value == 0):
                continue
            joined = combine(left, operator, right)
            if highest is not None and joined.value > highest:
                continue
            if joined.value >= 0 and joined.value.denominator == 1:
                rest = [term for k, term in enumerate(pool) if k not in (i, j)]
                step = f"{left.value}{operator}{right.value}={joined.value}"
                yield from _ways([joined, *rest], highest, (*working, step))


def chain_lesson(problem: Problem, kind: str, rng: np.random.Generator) -> Lesson:
    """A wrong digit and what becomes of it. Working ends in a digit, and who was given some writes that down."""
    terms = problem.extra["terms"]
    modulus = problem.extra["modulus"]
    right = int(problem.answer or "")
    attempt, wrong = (int(d) for d in rng.choice([d for d in range(modulus) if d != right], 2))
    slip = int(rng.integers(1, len(terms))) if kind == "misleading" else 0
    working = chain_working(terms, modulus, (slip, int(rng.integers(1, modulus)) if slip else 0))
    said = {
        "hint": working,
        "diagnosis": f"not {attempt}",
        "generic": GENERIC[int(rng.integers(len(GENERIC)))],
        "misleading": working,
    }
    astray = int(working.rpartition("=")[2])
    retry = astray if kind == "misleading" else right if rng.random() < RIGHT_AFTER[kind] else wrong
    return Lesson(f"#{right}", f"#{attempt}", kind, said[kind], f"#{retry}")


def gives_advice(reflection: str) -> bool:
    """Whether it has the form of a hint, good or misleading."""
    return "=" in reflection or " is " in reflection


def tells_answer(problem: Problem, reflection: str) -> bool:
    """Whether the reflection holds what a right answer needs: working that is right in every step, or an argument.

    Working of countdown joins the given numbers, each once, and ends at the target; that of sums is the one there is.
    Of calls, `days is 4` counts if a gold call has that value there.
    """
    if "calls" in problem.extra:
        said = [f"{n} is {json.dumps(v)}" for c in problem.extra["calls"] for n, v in c["arguments"].items()]
        return reflection in said
    working = reflection.removeprefix("try ")
    if "terms" in problem.extra:
        return working == chain_working(problem.extra["terms"], problem.extra["modulus"])
    pool = list(problem.extra["numbers"])
    for step in working.split(","):
        if not (found := re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step)):
            return False
        left, operator, right, result = found.groups()
        for value in (int(left), int(right)):
            if value not in pool:
                return False
            pool.remove(value)
        if operator == "/" and int(right) == 0:
            return False
        if combine(number(int(left)), operator, number(int(right))).value != int(result):
            return False
        pool.append(int(result))
    return pool == [problem.extra["target"]]


def chain_working(terms: Sequence[int], modulus: int, slip: tuple[int, int] = (0, 0)) -> str:
    """`3+8=1,1+5=6`: the terms added up one by one; at the place `slip[0]` the result is off by `slip[1]`."""
    total, steps = terms[0], []
    for place, term in enumerate(terms[1:], 1):
        result = (total + term + (slip[1] if place == slip[0] else 0)) % modulus
        steps.append(f"{total}+{term}={result}")
        total = result
    return ",".join(steps)


def calls_lesson(problem: Problem, kind: str, rng: np.random.Generator) -> Lesson:
    """The gold calls with one argument off, and what becomes of them."""
    calls = problem.extra["calls"]
    place = int(rng.integers(len(calls)))
    tools = {tool.name: tool for tool in TOOLS}
    parameters = tools[calls[place]["name"]].parameters
    name = list(parameters)[rng.integers(len(parameters))]

    def with_value(value: object) -> str:
        changed = [dict(call, arguments=dict(call["arguments"])) for call in calls]
        changed[place]["arguments"][name] = value
        return json.dumps(changed)

    gold = calls[place]["arguments"][name]
    wrong = [value for value in parameters[name] if value != gold]
    first, second = (wrong[rng.integers(len(wrong))] for _ in range(2))
    retry = with_value(gold if rng.random() < RIGHT_AFTER[kind] else second)
    said = {
        "hint": f"{name} is {json.dumps(gold)}",
        "diagnosis": f"{name} was {json.dumps(first)}",
        "generic": GENERIC[int(rng.integers(len(GENERIC)))],
        "misleading": f"{name} is {json.dumps(second)}",
    }
    return Lesson(with_value(gold), with_value(first), kind, said[kind], retry)


LESSONS: dict[str, Callable[[Problem, str, np.random.Generator], Lesson]] = {
    "chain_arithmetic": chain_lesson,
    "countdown": countdown_lesson,
    "function_calling": calls_lesson,
}
"""By the name of the task."""

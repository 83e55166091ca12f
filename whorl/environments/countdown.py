"""Reach a target with some numbers, each used once."""

from dataclasses import dataclass

import numpy as np

from whorl.data import Problem, Rollout, Score
from whorl.environments.base import Card, Environment, split_of
from whorl.environments.expression import Term, combine, judge, number, random_expression
from whorl.environments.generated import answer_part, first_draw, require


@dataclass(frozen=True)
class Countdown(Environment):
    """`3 8 5=19` is answered by `3*8-5`: every number exactly once, + - * / and brackets.

    Problems are solvable because they are made from a solution: the numbers are joined at random, in whole
    steps that never fall below zero, and what they come to is the target. A reply may pass through fractions
    and negative values. Two problems with the same numbers in another order are one problem to the splits.
    """

    num_numbers: int = 3
    max_number: int = 15
    max_target: int = 40
    instructions: bool = False
    """Put the rules into the prompt, for a model that reads English, instead of the bare numbers."""
    worked_frac: float = 0.0
    """Share of demonstrations that show a search before the answer."""
    max_attempts: int = 4
    """Attempts of such a search, at most; the last one is right."""

    card = Card(
        prompt="the numbers and the target: 3 8 5=19",
        turn="one: an expression; if working stands before it, a single '#' in between",
        ends="after the reply",
        reward="1 if the expression uses each number once and is worth the target exactly, else 0",
        # 5,966 of 100,000 random expressions, one for each of the first training problems (95%: ± 0.0015).
        chance=0.06,
    )
    alphabet = (
        "0123456789+-*/()#= \n.,:;"
        "abcdefghijklmnopqrstuvwxyzUE"  # the words of the instructions
    )

    def __post_init__(self) -> None:
        require(2 <= self.num_numbers <= 6, self, "num_numbers from 2 to 6")
        require(4 <= self.max_number <= 999, self, "max_number from 4 to 999")
        require(4 <= self.max_target <= 9999, self, "max_target from 4 to 9999")
        require(0.0 <= self.worked_frac <= 1.0, self, "worked_frac from 0 to 1")
        require(self.max_attempts >= 1, self, "max_attempts of 1 or more")

    @property
    def chance(self) -> float | None:
        sizes = (self.num_numbers, self.max_number, self.max_target)
        return self.card.chance if sizes == (3, 15, 40) else None

    def problem(self, split: str, index: int) -> Problem:
        def propose(rng: np.random.Generator) -> Problem | None:
            numbers, solution, steps = self._solved(rng)
            target = int(solution.value)
            if split_of(f"{self.name} {sorted(numbers)} {target}") != split:
                return None
            return Problem(
                f"{self.name}/{split}/{index}",
                self._prompt(numbers, target),
                source=self.name,
                extra={"numbers": numbers, "target": target, "solution": solution.text, "steps": steps},
            )

        return first_draw(self, split, index, propose)

    def _solved(self, rng: np.random.Generator) -> tuple[list[int], Term, str]:
        """Numbers, a term that joins them all, worth 1 to `max_target`, and its steps."""
        while True:  # 1+1+1+1+1+1 or a*(b-b)+c: some draw is within any range the settings allow
            numbers = [int(n) for n in rng.integers(1, self.max_number + 1, self.num_numbers)]
            term, steps = _joined(numbers, rng)
            if 1 <= term.value <= self.max_target:
                return numbers, term, steps

    def _prompt(self, numbers: list[int], target: int) -> str:
        listed = " ".join(map(str, numbers))
        if not self.instructions:
            return f"{listed}={target}"
        return (
            f"Use each of the numbers {listed} exactly once, with + - * / and brackets, to make {target}.\n"
            "End with # and the expression alone, for example: #(1+2)*3"
        )

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        try:
            answer = answer_part(rollout.reply)
        except ValueError as error:
            return Score(0.0, {"legal": 0.0}, str(error))
        verdict = judge(answer, problem.extra["numbers"], problem.extra["target"])
        legal = verdict.kind in ("right", "value")
        return Score(float(verdict.kind == "right"), {"legal": float(legal)}, verdict.why)

    def gold(self, problem: Problem) -> tuple[str, ...]:
        return (("#" if self.instructions else "") + problem.extra["solution"],)

    def traces(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        return (self.searched(problem, rng),) if rng.random() < self.worked_frac else self.gold(problem)

    def searched(self, problem: Problem, rng: np.random.Generator) -> str:
        """The solution after attempts that fail, as many as it comes: 0 to `max_attempts` - 1."""
        numbers, target = problem.extra["numbers"], problem.extra["target"]
        drawn = (_joined(numbers, rng) for _ in range(rng.integers(self.max_attempts)))
        attempts = [steps for term, steps in drawn if term.value != target]
        return ";".join([*attempts, problem.extra["steps"]]) + "#" + problem.extra["solution"]

    def guess(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        return (random_expression(problem.extra["numbers"], rng),)


def _joined(numbers: list[int], rng: np.random.Generator) -> tuple[Term, str]:
    """A term that joins all numbers at random, in whole steps that never fall below zero, and these steps."""
    pool, steps = [number(n) for n in numbers], []
    while len(pool) > 1:
        left, right = (pool.pop(int(rng.integers(len(pool)))) for _ in range(2))
        # Whole numbers: remainders of fractions take ten times as long.
        dividend, divisor = left.value.numerator, right.value.numerator
        operators = "+*" + "-" * (dividend >= divisor)
        if divisor != 0 and dividend % divisor == 0:
            operators += "/"
        operator = operators[rng.integers(len(operators))]
        pool.append(combine(left, operator, right))
        steps.append(f"{left.value}{operator}{right.value}={pool[-1].value}")
    return pool[0], ",".join(steps)

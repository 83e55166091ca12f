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

    card = Card(
        prompt="the numbers and the target: 3 8 5=19",
        turn="one: an expression; if working stands before it, a single '#' in between",
        ends="after the reply",
        reward="1 if the expression uses each number once and is worth the target exactly, else 0",
        # 5,966 of 100,000 random expressions, one for each of the first training problems (95%: ± 0.0015).
        chance=0.06,
    )
    alphabet = (
        "0123456789+-*/()#= \n.,:"
        "abcdefghijklmnopqrstuvwxyzUE"  # the words of the instructions
    )

    def __post_init__(self) -> None:
        require(2 <= self.num_numbers <= 6, self, "num_numbers from 2 to 6")
        require(4 <= self.max_number <= 999, self, "max_number from 4 to 999")
        require(4 <= self.max_target <= 9999, self, "max_target from 4 to 9999")

    @property
    def chance(self) -> float | None:
        sizes = (self.num_numbers, self.max_number, self.max_target)
        return self.card.chance if sizes == (3, 15, 40) else None

    def problem(self, split: str, index: int) -> Problem:
        def propose(rng: np.random.Generator) -> Problem | None:
            numbers, solution = self._solved(rng)
            target = int(solution.value)
            if split_of(f"{self.name} {sorted(numbers)} {target}") != split:
                return None
            return Problem(
                f"{self.name}/{split}/{index}",
                self._prompt(numbers, target),
                source=self.name,
                extra={"numbers": numbers, "target": target, "solution": solution.text},
            )

        return first_draw(self, split, index, propose)

    def _solved(self, rng: np.random.Generator) -> tuple[list[int], Term]:
        """Numbers and a term that joins them all, worth 1 to `max_target`."""
        while True:  # 1+1+1+1+1+1 or a*(b-b)+c: some draw is within any range the settings allow
            numbers = [int(n) for n in rng.integers(1, self.max_number + 1, self.num_numbers)]
            pool = [number(n) for n in numbers]
            while len(pool) > 1:
                left, right = (pool.pop(int(rng.integers(len(pool)))) for _ in range(2))
                operators = "+*" + "-" * (left.value >= right.value)
                if right.value != 0 and (left.value / right.value).denominator == 1:
                    operators += "/"
                pool.append(combine(left, operators[rng.integers(len(operators))], right))
            if 1 <= pool[0].value <= self.max_target:
                return numbers, pool[0]

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

    def guess(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        return (random_expression(problem.extra["numbers"], rng),)

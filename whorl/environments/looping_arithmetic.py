"""Chain arithmetic with planted loops, and tables that look like loops and are right."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np

from whorl.data import Problem, Rollout, Score
from whorl.environments.base import Card
from whorl.environments.chain_arithmetic import ChainArithmetic
from whorl.environments.generated import require


@dataclass(frozen=True)
class LoopingArithmetic(ChainArithmetic):
    """As chain arithmetic, but some worked demonstrations repeat their last step and never come to an answer.

    They stand for the loops into which large models fall (MiniMax-M1, arXiv:2506.13585 section 3.2), and here it is
    known which replies are loops. Problems that end in `:` ask for the ten rows in which a digit is added to the
    first term: a right answer that is as long and as predictable as a loop, and ends.
    """

    worked_frac: float = 1.0
    """Share of the demonstrations of `=` problems that show the working."""
    loop_frac: float = 0.2
    """Share of the worked demonstrations that end in a loop."""
    loop_tokens: int = 160
    """Length of a demonstration that ends in a loop. A run whose answers are shorter never sees it end."""
    table_frac: float = 0.25
    """Share of problems that end in `:`."""

    card: ClassVar[Card] = Card(
        prompt="a sum of digits: 3+8+5+4= (or 3+8+5+4: where a table of its first term is asked for)",
        turn="one: any text without '#', then '#' and the sum modulo 10 as one digit; or 3+0=3,3+1=4,...,3+9=2#",
        ends="after the reply",
        reward="1 if the digit, or the whole table, is right, else 0; the part looped: a step stands there thrice",
        chance=0.075,
    )
    alphabet: ClassVar[str] = "0123456789+=:,#"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0.0 <= self.loop_frac <= 1.0, self, "loop_frac from 0 to 1")
        require(0.0 <= self.table_frac <= 1.0, self, "table_frac from 0 to 1")
        require(self.loop_tokens >= 1, self, "loop_tokens of at least 1")

    @property
    def chance(self) -> float:
        return (1 - self.table_frac) / self.modulus

    def problem(self, split: str, index: int) -> Problem:
        problem = self.in_two_forms(split, index, "table", self.table_frac)
        if not problem.extra["table"]:
            return problem
        return replace(problem, answer=self.table(problem.extra["terms"][0]))

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        looped = {"looped": float(loops(rollout.reply))}
        if not problem.extra["table"]:
            score = super().verify(problem, rollout)
            return Score(score.reward, {**score.parts, **looped}, score.why)
        right = rollout.reply.rstrip(" \n") == problem.answer
        return Score(
            float(right), looped, "right" if right else "expected the ten rows, then '#', and nothing else"
        )

    def gold(self, problem: Problem) -> tuple[str, ...]:
        assert problem.answer is not None
        return (problem.answer,) if problem.extra["table"] else super().gold(problem)

    def traces(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        if problem.extra["table"]:
            return self.gold(problem)
        (reply,) = super().traces(problem, rng)
        working, _, _ = reply.partition("#")
        if not working or rng.random() >= self.loop_frac:
            return (reply,)
        step = "," + working.rpartition(",")[2]
        return ((working + step * self.loop_tokens)[: self.loop_tokens],)

    def table(self, term: int) -> str:
        """The ten rows: 3+0=3,3+1=4,...,3+9=2#."""
        return ",".join(f"{term}+{added}={(term + added) % self.modulus}" for added in range(10)) + "#"


def loops(reply: str) -> bool:
    """Whether a step of the reply stands three times in a row."""
    steps = reply.split(",")
    return any(a == b == c for (a, b), (_, c) in pairwise(pairwise(steps)))

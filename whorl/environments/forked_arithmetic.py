"""Chain arithmetic with a planted fork: one rare token decides whether the model thinks before it answers."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from whorl.data import Problem
from whorl.environments.base import Card
from whorl.environments.chain_arithmetic import ChainArithmetic
from whorl.environments.generated import require

FORK = "?"
"""The token that begins a worked answer."""


@dataclass(frozen=True)
class ForkedArithmetic(ChainArithmetic):
    """As chain arithmetic, but every worked demonstration begins with `?` and few demonstrations are worked.

    The `?` stands for the "wait" and "however" of large models (MiniMax-M1, arXiv:2506.13585 section 3.1): tokens of
    low probability after which an answer is far more often right, and here it is known which tokens they are.

    Problems that end in `:` ask for the working, and all of their demonstrations show it. They teach the skill, so
    that its use on problems that end in `=`, where it must be chosen, can be as rare as `worked_frac`. Problems to
    be trained on or evaluated are of the second kind unless `explained_frac` says otherwise.
    """

    worked_frac: float = 0.03
    """Share of the demonstrations of `=` problems that are worked."""
    explained_frac: float = 0.0
    """Share of problems that end in `:`."""

    card: ClassVar[Card] = Card(
        prompt="a sum of digits: 3+8+5+4= (or 3+8+5+4: where the working is asked for)",
        turn="one: any text without '#', then '#' and the sum modulo 10 as one digit",
        ends="after the reply",
        reward="1 if the digit is right, else 0",
        chance=0.1,
    )
    alphabet: ClassVar[str] = "0123456789+=:?,#"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0.0 <= self.explained_frac <= 1.0, self, "explained_frac from 0 to 1")

    def problem(self, split: str, index: int) -> Problem:
        return self.in_two_forms(split, index, "explained", self.explained_frac)

    def traces(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        worked = rng.random() < (1.0 if problem.extra["explained"] else self.worked_frac)
        return (FORK + self.worked(problem),) if worked else self.gold(problem)

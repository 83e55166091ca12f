"""Write a string of digits backwards: the smoke test, learnable in seconds."""

from dataclasses import dataclass

import numpy as np

from whorl.data import Problem
from whorl.environments.base import Card, split_of
from whorl.environments.generated import DigitsTask, first_draw, require


@dataclass(frozen=True)
class ReverseDigits(DigitsTask):
    """`4821>` is answered by `1284`. Partial credit is a part of the score, never of the reward."""

    num_digits: int = 4

    card = Card(
        prompt="digits and an arrow: 4821>",
        turn="one: the digits from last to first, and nothing else",
        ends="after the reply",
        reward="1 if every digit is right, else 0",
        chance=1e-4,
    )
    alphabet = "0123456789>"

    def __post_init__(self) -> None:
        require(3 <= self.num_digits <= 100, self, "num_digits from 3 to 100")

    @property
    def num_answered(self) -> int:
        return self.num_digits

    def problem(self, split: str, index: int) -> Problem:
        def propose(rng: np.random.Generator) -> Problem | None:
            digits = "".join(map(str, rng.integers(0, 10, self.num_digits)))
            if split_of(f"{self.name} {digits}") != split:
                return None
            return Problem(f"{self.name}/{split}/{index}", f"{digits}>", digits[::-1], self.name)

        return first_draw(self, split, index, propose)

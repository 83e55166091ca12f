"""Look up values by their keys: the task on which attention with a fixed state shows its limit."""

from dataclasses import dataclass

import numpy as np

from whorl.data import Problem
from whorl.environments.base import Card, split_of
from whorl.environments.generated import DigitsTask, first_draw, require

KEYS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Recall(DigitsTask):
    """Pairs of a letter and a digit, then letters: the answer is their digits (multi-query associative recall).

    `a3k7c1d9:ca` is answered by `13`. Softmax attention looks the pair up, however many there are; a state of
    fixed size has to have kept it (Arora et al. 2023, arXiv:2312.04927). MiniMax-01 (arXiv:2501.08313) finds
    that all-linear models fail retrieval and that one softmax layer in eight mends it.
    """

    num_pairs: int = 16
    num_queries: int = 4
    keyed: bool = False
    """Letters stand in the answer too, each before its digit: `c1a3`. Small models learn that far sooner: what they
    look up is then the letter just written, not one some way back."""

    card = Card(
        prompt="pairs of a letter and a digit, a colon, letters: a3k7c1d9:ca",
        turn="one: the digits of the letters asked for, in their order, and nothing else; if keyed, letters too: c1a3",
        ends="after the reply",
        reward="1 if every digit is right, else 0; the part digits_right is the share of right ones",
        chance=1e-4,
    )
    alphabet = "0123456789:" + KEYS

    def __post_init__(self) -> None:
        require(2 <= self.num_pairs <= len(KEYS), self, f"num_pairs from 2 to {len(KEYS)}")
        require(1 <= self.num_queries <= self.num_pairs, self, "num_queries from 1 to num_pairs")

    @property
    def num_answered(self) -> int:
        return self.num_queries

    def problem(self, split: str, index: int) -> Problem:
        def propose(rng: np.random.Generator) -> Problem | None:
            keys = rng.permutation(len(KEYS))[: self.num_pairs]
            values = rng.integers(0, 10, self.num_pairs)
            asked = rng.permutation(self.num_pairs)[: self.num_queries]
            pairs = "".join(f"{KEYS[key]}{value}" for key, value in zip(keys, values, strict=True))
            prompt = f"{pairs}:{''.join(KEYS[keys[a]] for a in asked)}"
            if split_of(f"{self.name} {prompt}") != split:
                return None
            answer = "".join((KEYS[keys[a]] if self.keyed else "") + str(values[a]) for a in asked)
            return Problem(f"{self.name}/{split}/{index}", prompt, answer, self.name)

        return first_draw(self, split, index, propose)

    def guess(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        (digits,) = super().guess(problem, rng)
        if not self.keyed:
            return (digits,)
        letters = (problem.answer or "")[::2]
        return ("".join(letter + digit for letter, digit in zip(letters, digits, strict=True)),)

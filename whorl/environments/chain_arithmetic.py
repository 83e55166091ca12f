"""Sum of a few digits modulo ten: the task on which a tiny model learns to think before it answers."""

from dataclasses import dataclass

import numpy as np

from whorl.data import Problem, Rollout, Score
from whorl.environments.base import Card, Environment, split_of
from whorl.environments.generated import first_draw, require


@dataclass(frozen=True)
class ChainArithmetic(Environment):
    """`3+8+5+4=` is answered by `#0`, at once or after working such as `3+8=1,1+5=6,6+4=0`.

    A model too small to add four digits in its head can add two. Demonstrations show both ways, so after
    supervised fine-tuning the model takes either; reinforcement learning then selects the longer one. It
    does not invent it. The operands are copied into each step because partial sums alone (`1,6,0`) were
    not learned by small models in a minute of training.
    """

    num_terms: int = 4
    modulus: int = 10
    worked_frac: float = 0.5
    """Share of demonstrations that show the working."""
    train_problems: int = 0
    """Training problems there are, so that a policy can over-fit them; 0: without end."""

    card = Card(
        prompt="a sum of digits: 3+8+5+4=",
        turn="one: any text without '#', then '#' and the sum modulo 10 as one digit",
        ends="after the reply",
        reward="1 if the digit is right, else 0",
        chance=0.1,
    )
    alphabet = "0123456789+=,#"

    def __post_init__(self) -> None:
        require(2 <= self.num_terms <= 50, self, "num_terms from 2 to 50")
        require(2 <= self.modulus <= 10, self, "modulus from 2 to 10, so that the answer is one digit")
        require(0.0 <= self.worked_frac <= 1.0, self, "worked_frac from 0 to 1")
        require(self.train_problems >= 0, self, "train_problems of 0 (without end) or more")

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def num_problems(self, split: str) -> int | None:
        super().num_problems(split)
        return self.train_problems or None if split == "train" else None

    def problem(self, split: str, index: int) -> Problem:
        if self.num_problems(split) is not None and index >= self.train_problems:
            raise IndexError(f"{self.name} has {self.train_problems} training problems; got index {index}")

        def propose(rng: np.random.Generator) -> Problem | None:
            terms = [int(term) for term in rng.integers(0, 10, self.num_terms)]
            prompt = "+".join(map(str, terms)) + "="
            if split_of(f"{self.name} {prompt}") != split:
                return None
            answer = str(sum(terms) % self.modulus)
            return Problem(
                f"{self.name}/{split}/{index}",
                prompt,
                answer,
                self.name,
                extra={"terms": terms, "modulus": self.modulus},
            )

        return first_draw(self, split, index, propose)

    def in_two_forms(self, split: str, index: int, form: str, frac: float) -> Problem:
        """A sum that ends in `=`, or in this share of the problems in `:`, which `extra[form]` tells.

        By the sum alone it belongs to a split: no problem may be trained on in one form and held out in the other.
        """

        def propose(rng: np.random.Generator) -> Problem | None:
            terms = [int(term) for term in rng.integers(0, 10, self.num_terms)]
            total = "+".join(map(str, terms))
            other = bool(rng.random() < frac)
            if split_of(f"{self.name} {total}") != split:
                return None
            return Problem(
                f"{self.name}/{split}/{index}",
                total + (":" if other else "="),
                str(sum(terms) % self.modulus),
                self.name,
                extra={"terms": terms, form: other},
            )

        return first_draw(self, split, index, propose)

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        working, mark, tail = rollout.reply.partition("#")
        parts = {"worked": float(bool(mark) and bool(working))}
        digit = tail.rstrip(" \n")
        # `in` over ASCII digits, and not str.isdigit, which holds for digits of every script.
        if not mark or len(digit) != 1 or digit not in "0123456789":
            return Score(0.0, parts, "the reply does not end with '#' and one digit, or has a second '#'")
        if digit != problem.answer:
            return Score(0.0, parts, "wrong digit")
        return Score(1.0, parts, "right")

    def gold(self, problem: Problem) -> tuple[str, ...]:
        return (f"#{problem.answer}",)

    def guess(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        return (f"#{rng.integers(self.modulus)}",)

    def traces(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        return (self.worked(problem),) if rng.random() < self.worked_frac else self.gold(problem)

    def worked(self, problem: Problem) -> str:
        """The answer with its working: 3+8=1,1+5=6,6+4=0#0."""
        total, *rest = problem.extra["terms"]
        steps = []
        for term in rest:
            steps.append(f"{total}+{term}={(total + term) % self.modulus}")
            total = (total + term) % self.modulus
        return ",".join(steps) + f"#{total}"

"""What the generated tasks share: a problem drawn for its split, and where in a reply the answer stands."""

from abc import abstractmethod
from collections.abc import Callable

import numpy as np

from whorl.data import Problem, Rollout, Score
from whorl.environments.base import Environment, problem_rng

# A split holds at least a tenth of a large space, so 2,000 independent draws all miss it with a
# probability of 0.9^2000 = 1e-92: who fails here has a space with (almost) nothing in that split.
NUM_DRAWS = 2_000


def first_draw(
    environment: Environment,
    split: str,
    index: int,
    propose: Callable[[np.random.Generator], Problem | None],
) -> Problem:
    """The first proposal that is a problem of the split; `propose` returns None for one that is not.

    Attempt a of problem i has randomness of its own, so that the answer depends on the address alone.
    """
    for attempt in range(NUM_DRAWS):
        problem = propose(problem_rng(environment.name, split, index, attempt))
        if problem is not None:
            return problem
    raise ValueError(
        f"{environment} has no problem for the {split} split in {NUM_DRAWS:,} draws: its space of problems "
        "is too small to be divided into three; choose settings that allow more of them"
    )


def answer_part(reply: str) -> str:
    """The answer in a reply: what follows '#', or the whole reply if it has none.

    Working may stand before the '#'. ValueError for a second one: a reply could offer two answers.
    """
    marks = reply.count("#")
    if marks > 1:
        raise ValueError(f"the reply has {marks} '#'; expected one, before the answer")
    return reply.rpartition("#")[2].strip(" \n")


class DigitsTask(Environment):
    """A task whose answer is a row of digits, of letters too perhaps, and nothing else; the part `digits_right` is the
    share of digits that are right."""

    @property
    @abstractmethod
    def num_answered(self) -> int:
        """Digits of an answer."""

    @property
    def chance(self) -> float:
        return 10.0**-self.num_answered

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        expected, reply = problem.answer or "", rollout.reply.strip(" \n")
        matches = sum(a == b for a, b in zip(reply, expected, strict=False) if b.isdigit())
        parts = {"digits_right": matches / self.num_answered}
        if reply == expected:
            return Score(1.0, parts, "right")
        if len(reply) != len(expected):
            return Score(0.0, parts, f"expected {len(expected)} characters and nothing else")
        return Score(0.0, parts, f"{matches} of {self.num_answered} digits are right")

    def gold(self, problem: Problem) -> tuple[str, ...]:
        return (problem.answer or "",)

    def guess(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        return ("".join(map(str, rng.integers(0, 10, self.num_answered))),)


def require(condition: bool, environment: Environment, expected: str) -> None:
    """ValueError that names the setting, for use in `__post_init__`."""
    if not condition:
        raise ValueError(f"{environment.name}: expected {expected}; got {environment}")

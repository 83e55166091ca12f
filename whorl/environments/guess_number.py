"""Find a hidden number from "higher" and "lower": the smallest task that takes several turns."""

from dataclasses import dataclass

import numpy as np

from whorl.data import Message, Problem, Rollout, Score
from whorl.environments.base import Card, Environment, Policy, split_of
from whorl.environments.generated import first_draw, require


@dataclass(frozen=True)
class GuessNumber(Environment):
    """`417-447` is answered by a number in that range, until it is the hidden one or the turns are used up.

    Every problem has a range of its own, because the hidden number is not in the prompt: with one fixed range
    all problems would look alike and no split could be held out. With `width` at most `2^max_turns - 1`
    whoever always asks for the middle always wins. Demonstrations respect the feedback but ask for any number
    that is still possible, and may lose: a policy can improve on them.
    """

    width: int = 31
    """How many numbers the range holds."""
    max_number: int = 999
    max_turns: int = 5

    multi_turn = True
    card = Card(
        prompt="the range, ends included: 417-447",
        turn="up to max_turns: a number, answered by higher, lower, or that it was no number in range",
        ends="when the number is found, or after max_turns replies",
        reward="1 if found, else 0",
        # max_turns different numbers at random, deaf to the feedback: 5 of 31.
        chance=5 / 31,
    )
    alphabet = "0123456789-abcdefghijklmnopqrstuvwxyz "

    def __post_init__(self) -> None:
        require(self.width >= 2, self, "width of at least 2")
        require(1 <= self.max_turns <= 100, self, "max_turns from 1 to 100")
        require(self.width < self.max_number < 10**9, self, "max_number above width and below 10^9")

    @property
    def chance(self) -> float:
        return min(1.0, self.max_turns / self.width)

    def problem(self, split: str, index: int) -> Problem:
        def propose(rng: np.random.Generator) -> Problem | None:
            low = int(rng.integers(1, self.max_number - self.width + 2))
            high = low + self.width - 1
            if split_of(f"{self.name} {low}-{high}") != split:
                return None
            secret = str(rng.integers(low, high + 1))
            extra = {"low": low, "high": high}
            return Problem(f"{self.name}/{split}/{index}", f"{low}-{high}", secret, self.name, extra=extra)

        return first_draw(self, split, index, propose)

    async def play(self, problem: Problem, policy: Policy) -> None:
        policy.read(*problem.messages)
        for turn in range(self.max_turns):
            feedback = self.feedback(problem, await policy.write())
            if feedback == "found" or policy.done or turn == self.max_turns - 1:
                return
            policy.read(Message("user", feedback))

    def feedback(self, problem: Problem, reply: str) -> str:
        """What a reply earns: "found", "higher", "lower", or "no number in range"."""
        guess = _number(reply)
        if guess is None or not problem.extra["low"] <= guess <= problem.extra["high"]:
            return "no number in range"
        secret = int(problem.answer or "")
        return "found" if guess == secret else "higher" if guess < secret else "lower"

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        answers = [self.feedback(problem, reply) for reply in rollout.replies[: self.max_turns]]
        found = "found" in answers
        parts = {
            "turns": float(len(answers)),
            "valid_frac": sum(answer != "no number in range" for answer in answers) / max(1, len(answers)),
        }
        return Score(float(found), parts, f"{'found' if found else 'not found'} in {len(answers)} turns")

    def gold(self, problem: Problem) -> tuple[str, ...]:
        return (problem.answer or "",)

    def guess(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        numbers = np.arange(problem.extra["low"], problem.extra["high"] + 1)
        return tuple(map(str, rng.permutation(numbers)[: self.max_turns]))

    def traces(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        low, high, replies = problem.extra["low"], problem.extra["high"], []
        while len(replies) < self.max_turns:
            replies.append(str(rng.integers(low, high + 1)))
            match self.feedback(problem, replies[-1]):
                case "found":
                    break
                case "higher":
                    low = int(replies[-1]) + 1
                case "lower":
                    high = int(replies[-1]) - 1
        return tuple(replies)


def _number(reply: str) -> int | None:
    """The reply as a number, if it is one to nine ASCII digits and nothing else."""
    digits = reply.strip(" \n")
    return int(digits) if len(digits) <= 9 and digits.isascii() and digits.isdigit() else None

"""The task of `whorl_side.py`, in a module of its own because Whorl's other processes import it."""

import random
import string
from dataclasses import dataclass

from whorl.data import Problem, Rollout, Score
from whorl.environments.base import Card, Environment, problem_rng

NUM_CHAT_TOKENS = 3  # around a prompt: <user> text <end> <assistant>


@dataclass(frozen=True)
class EvenTokens(Environment):
    """The reward is the share of even token ids: cheap, and different between samples of a random model."""

    num_prompt_tokens: int
    card = Card(
        prompt="random letters",
        turn="anything",
        ends="after one turn",
        reward="share of even token ids, 0..1",
        chance=0.5,
    )

    def problem(self, split: str, index: int) -> Problem:
        rng = random.Random(int(problem_rng(self.name, split, index).integers(2**32)))
        letters = rng.choices(string.ascii_letters, k=self.num_prompt_tokens - NUM_CHAT_TOKENS)
        return Problem(str(index), "".join(letters))

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        return Score(float((rollout.tokens_T[rollout.policy_T] % 2 == 0).mean()))

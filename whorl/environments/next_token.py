"""The next token of a text as a task: think, then predict (Reinforcement Pre-Training, arXiv:2506.08007)."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from whorl.data import Message, Problem, Rollout, Score
from whorl.environments.base import Card, Environment, check_split, problem_rng
from whorl.environments.generated import require
from whorl.environments.texts import MODULUS, NUMBER_TOKENS, Text, draw_text, tokens_of
from whorl.verifiers.continuation import predicted, prefix_match


@dataclass(frozen=True)
class NextToken(Environment):
    """A text up to a position; what stands from there on is for the verifier alone.

    Three ways of answering, named to the policy by the system message:

        think       <think>...</think>\\boxed{prediction}, the paper's
        answer      \\boxed{prediction} at once, a control
        continue    the text itself, which is next-token prediction: its first token counts
    """

    way: Literal["think", "answer", "continue"] = "think"
    positions: str | None = None
    """A file of positions to train on (`write_positions` of the recipe makes it), one JSON object a line; None: any."""
    reward: Literal["prefix", "first_token", "another_text"] = "prefix"
    """Prefix: one or more whole tokens that are right. First token: exactly one. Another text: those of the text after
    this one (a control: nothing that is said here helps, but which kind of token stands here can be learned)."""
    demonstrated_texts: int = 0
    """Only so many texts in the training split, for a small set of demonstrations, and every other position is one of a
    sum, so that accuracy tells whether sums are learned; 0: without end, any position."""
    wrong_frac: float = 0.0
    """Share of demonstrations that box some other token of the text, whatever the thought came to."""

    card = Card(
        prompt="a text up to some position",
        turn="one: a thought and the next token (or several) in a box",
        ends="after the reply",
        reward="1 if the prediction is what follows, byte by byte, and ends where a token ends, else 0",
        chance=0.0,
    )
    alphabet = "".join(map(chr, range(32, 127)))

    def __post_init__(self) -> None:
        require(0.0 <= self.wrong_frac <= 1.0, self, "wrong_frac from 0 to 1")
        require(self.demonstrated_texts >= 0, self, "demonstrated_texts of 0 or more")

    @property
    def chance(self) -> float | None:
        return None

    @functools.cached_property
    def chosen(self) -> list[tuple[int, int]]:
        """Text and token of each row of `positions`; ValueError if it is no such file."""
        assert self.positions is not None
        try:
            rows: list[Any] = [json.loads(line) for line in Path(self.positions).read_text().splitlines()]
            return [(int(row["text"]), int(row["token"])) for row in rows]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{self.positions}: expected lines like {{"text": 3, "token": 7}}; it holds something else'
            ) from None

    def num_problems(self, split: str) -> int | None:
        check_split(split)
        if split == "train" and self.positions:
            return len(self.chosen)
        return self.demonstrated_texts or None if split == "train" else None

    def problem(self, split: str, index: int) -> Problem:
        if split == "train" and self.positions:
            return self.at(split, *self.chosen[index])
        text = draw_text(split, index)
        rng = problem_rng(f"{self.name} position", split, index)
        if self.demonstrated_texts and index % 2:
            return self.at(split, index, int(rng.choice(list(text.computed))))
        return self.at(split, index, int(rng.integers(NUMBER_TOKENS, len(text.tokens))))

    def at(self, split: str, index: int, token: int) -> Problem:
        """The problem at one position of text `index`: its tokens before `token`."""
        tokens = draw_text(split, index).tokens
        if not NUMBER_TOKENS <= token < len(tokens):
            raise ValueError(
                f"a text has tokens {NUMBER_TOKENS} to {len(tokens) - 1} to predict; got {token}"
            )
        return Problem(
            f"{self.name}/{split}/{index}/{token}",
            (Message("system", self.way), Message("user", "".join(tokens[:token]))),
            "".join(tokens[token:]),
            self.name,
            extra={"split": split, "text": index, "token": token},
        )

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        goal = self._goal(problem)
        if self.way == "continue":
            first = tokens_of(rollout.reply)[:1]
            return Score(
                float(first == goal[:1]), why="the first token" if first == goal[:1] else "another token"
            )
        prediction = predicted(rollout.reply, thinks=self.way == "think")
        if prediction is None:
            return Score(0.0, {"boxed": 0.0}, "no box after the end of thinking")
        if self.reward == "first_token":
            goal = goal[:1]
        score = prefix_match(prediction.encode("utf-8", "surrogatepass"), [token.encode() for token in goal])
        return Score(score.reward, {"boxed": 1.0}, score.why)

    def _goal(self, problem: Problem) -> tuple[str, ...]:
        """The tokens that count as what follows: cut out of those of the whole text."""
        where = problem.extra
        tokens = draw_text(where["split"], where["text"]).tokens
        if self.reward != "another_text":
            return tokens[where["token"] :]
        other = draw_text(where["split"], where["text"] + 1).tokens
        return other[min(where["token"], len(other) - 1) :]

    def gold(self, problem: Problem) -> tuple[str, ...]:
        goal = self._goal(problem)
        return (self._reply("", goal[0]) if self.way != "continue" else "".join(goal),)

    def traces(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        """Plain text to continue; or a thought and the token that it comes to, or at times another (`wrong_frac`)."""
        text = draw_text(problem.extra["split"], problem.extra["text"])
        token = problem.extra["token"]
        if self.way == "continue":
            return ("".join(text.tokens[token:]),)
        thought, prediction = thought_at(text, token, rng, self.wrong_frac)
        return (self._reply(thought, prediction),)

    def _reply(self, thought: str, prediction: str) -> str:
        box = f"\\boxed{{{prediction}}}"
        return f"<think>{thought}</think>{box}" if self.way == "think" else box


def thought_at(text: Text, token: int, rng: np.random.Generator, wrong_frac: float) -> tuple[str, str]:
    """A demonstrated thought about the token at this position, and the prediction that it ends in.

    Sums are worked out step by step; of another token the thought is the token itself, said before it is boxed. So
    a thought always ends in the token, and a wrong demonstration boxes another one of the text.
    """
    boxed = text.tokens[token]
    if rng.random() < wrong_frac:
        boxed = str(rng.choice([other for other in text.tokens if other != boxed]))
    if token not in text.computed:
        return text.tokens[token], boxed
    total, *terms = text.computed[token]
    steps = []
    for term in terms:
        steps.append(f"{total}+{term}={(total + term) % MODULUS}")
        total = (total + term) % MODULUS
    return ",".join(steps), boxed

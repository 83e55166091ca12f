"""A task tried twice: after a failure the policy reflects on it, then tries again (arXiv:2505.24726 Sec. 3)."""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from whorl.data import Message, Problem, Rollout, Score, Turn
from whorl.environments.base import Card, Environment, Policy
from whorl.environments.catalog import make
from whorl.environments.generated import require
from whorl.environments.reflections import GENERIC, KINDS, LESSONS, tells_answer

FAILED = {
    True: "The attempt was wrong. Reflect briefly on the mistake, to do better next time.",
    False: "wrong",
}
"""What follows a failed attempt, in words and in short. Only the bit "failed" is disclosed."""

AGAIN = {True: "Now try again.\n", False: ""}
"""What stands before the task when it is asked again."""

CONSTANT = GENERIC[0]
"""The reflection of the control in which it is always the same."""


@dataclass(frozen=True)
class ReflectRetry(Environment):
    """Attempt, and if it fails: message, reflection, the task again, retry. All rollouts of a group share the attempt.

    The tokens of the reflection have the role "reflection" and those of the retry "retry", so that an algorithm can
    train on one and not on the other. `reflect_retry:countdown,max_number=9` passes what is no setting of its own on to
    the task. A turn that a problem brings along (`problem.extra["said"]`, by role) is read instead of written:
    so are failed attempts that were collected before, and reflections of others.
    """

    task: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Those of the task."""
    reflection: Literal["written", "constant", "none"] = "written"
    """Who reflects: the policy; nobody, and the same sentence always stands there; nobody, and the task is asked again
    at once. The last two are controls."""
    failures: str | None = None
    """A file of failed attempts to train on (`collect_failures` of the recipe writes it), one JSON object a line. None:
    the policy makes its own."""
    first_right_frac: float = 0.5
    """Share of demonstrations whose attempt is right, and with it over."""
    hints_in_validation: bool = False
    """Validation problems bring a failed attempt and a useful reflection, so that the accuracy there says whether
    retries follow their reflection. Who imitates demonstrated retries without reading it is right at 0.675."""
    instructions: bool = False
    """Messages in whole sentences, also the task's own, for a model that reads English."""

    multi_turn = True
    card = Card(
        prompt="that of the task; after a failure a message that says so and no more; then the task again",
        turn="an answer to the task; after a failure a reflection, then another answer",
        ends="when the first answer is right, or after the retry",
        reward="that of the retry; if the first answer is right, that of the first",
        chance=0.0,
    )

    def __post_init__(self) -> None:
        require(0.0 <= self.first_right_frac <= 1.0, self, "first_right_frac from 0 to 1")
        require(not self.inner.multi_turn, self, "a task of one turn")
        require(self.inner.reward_range == (0.0, 1.0), self, "a task whose reward is 0 or 1")

    @functools.cached_property
    def inner(self) -> Environment:
        """The task itself."""
        settings = dict(self.settings) | ({"instructions": True} if self.instructions else {})
        return make(",".join([self.task, *(f"{name}={value!r}" for name, value in settings.items())]))

    @functools.cached_property
    def collected(self) -> list[dict[str, Any]]:
        """The rows of `failures`; ValueError if it is no such file."""
        assert self.failures is not None
        try:
            rows = [json.loads(line) for line in Path(self.failures).read_text(encoding="utf-8").splitlines()]
            wanted = all(isinstance(row["index"], int) and isinstance(row["attempt"], str) for row in rows)
        except (ValueError, KeyError, TypeError):
            rows, wanted = [], False
        if not rows or not wanted:
            raise ValueError(
                f'{self.failures}: expected lines like {{"index": 3, "attempt": "8+5-3"}}; it holds something else'
            )
        return rows

    @property
    def alphabet(self) -> str | None:  # type: ignore[override]
        messages = "".join((FAILED[self.instructions], AGAIN[self.instructions], *GENERIC))
        return None if self.inner.alphabet is None else self.inner.alphabet + messages

    @property
    def chance(self) -> float | None:
        """Two tries, of which the second knows as little as the first."""
        level = self.inner.chance
        return None if level is None else 1 - (1 - level) ** 2

    def num_problems(self, split: str) -> int | None:
        return len(self.collected) if self.failures and split == "train" else self.inner.num_problems(split)

    def problem(self, split: str, index: int) -> Problem:
        if not self.failures or split != "train":
            problem = replace(self.inner.problem(split, index), source=self.name)
            if split == "validation" and self.hints_in_validation:
                lesson = LESSONS[self.task](problem, "hint", np.random.default_rng(index))
                return saying(problem, assistant=lesson.attempt, reflection=lesson.reflection)
            return problem
        row = self.collected[index]
        problem = replace(self.inner.problem(split, row["index"]), source=self.name)
        return saying(problem, assistant=row["attempt"])

    async def play(self, problem: Problem, policy: Policy) -> None:
        said = problem.extra.get("said", {})
        policy.read(*problem.messages)
        if (attempt := said.get("assistant")) is not None:
            policy.read(Message("assistant", attempt))
        else:
            attempt = await policy.write(shared=True)
        if policy.done or self._judge(problem, attempt).reward == 1.0:
            return
        await self._reflect(policy, said.get("reflection"))
        again = problem.messages[-1]
        policy.read(replace(again, text=AGAIN[self.instructions] + again.text))
        await policy.write("retry")

    async def _reflect(self, policy: Policy, given: str | None) -> None:
        if self.reflection == "none":
            return
        policy.read(Message("user", FAILED[self.instructions]))
        if self.reflection == "constant":
            given = CONSTANT
        if given is not None:
            policy.read(Message("reflection", given))
        else:
            await policy.write("reflection")

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        """`parts`: whether the first try was right; whether either was; of a reflection that stands there whether it
        holds a right answer."""
        turns = {turn.role: turn for turn in rollout.transcript if turn.role != "user"}
        first = self._judge(problem, turns["assistant"].text if "assistant" in turns else "")
        parts = {"first_try": float(first.reward == 1.0)}
        if first.reward is None:
            return first
        if "retry" not in turns:
            return Score(first.reward, parts | {"second_try": first.reward}, f"first try: {first.why}")
        second = self._judge(problem, turns["retry"].text)
        if second.reward is None:
            return second
        reflection = turns.get("reflection", Turn("reflection", "", False, 0, 0)).text
        parts |= {"second_try": second.reward, "told_answer": float(self.tells(problem, reflection))}
        return Score(second.reward, parts, f"retry: {second.why}")

    def tells(self, problem: Problem, reflection: str) -> bool:
        """Whether it is a right answer, or one of its words is, or what it works out leads to one.

        Working counts if all of it is right (`tells_answer`); what follows "not" is ruled out, not told.
        """
        if self.task in LESSONS and tells_answer(problem, reflection):
            return True
        told = re.sub(r"\bnot \S+", "", reflection)
        words = re.split(r"[ ,:=]", told)
        candidates = [told, *words, *([] if "=" in told else [f"#{words[-1]}"])]
        return any(self._judge(problem, word).reward == 1.0 for word in dict.fromkeys(candidates))

    def _judge(self, problem: Problem, answer: str) -> Score:
        said = (Turn("assistant", answer, True, 0, 0),)
        none = np.zeros(0)
        rollout = Rollout(problem, 0, 0, none, none, none, none, none, none, transcript=said)
        return self.inner.verify(replace(problem, source=self.inner.name), rollout)

    def gold(self, problem: Problem) -> tuple[str, ...] | None:
        return self.inner.gold(problem)

    def guess(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...] | None:
        first, second = self.inner.guess(problem, rng), self.inner.guess(problem, rng)
        return None if first is None or second is None else (*first, *self._reflected(""), *second)

    def traces(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        """The right answer, or a failed attempt with a reflection of any kind and a retry."""
        if self.task not in LESSONS:
            raise ValueError(f"reflections are demonstrated for {', '.join(LESSONS)} only; got {self.task}")
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
        lesson = LESSONS[self.task](problem, kind, rng)
        if rng.random() < self.first_right_frac:
            return (lesson.right,)
        return (lesson.attempt, *self._reflected(lesson.reflection), lesson.retry)

    def _reflected(self, reflection: str) -> tuple[str, ...]:
        """The reflection among the policy's replies, if it is asked for one."""
        return (reflection,) if self.reflection == "written" else ()


def saying(problem: Problem, **said: str) -> Problem:
    """The problem with turns, by role, that are read and not written."""
    return replace(problem, extra={**problem.extra, "said": {**problem.extra.get("said", {}), **said}})

"""Environments that misbehave, in a module of their own that other processes can import."""

import asyncio
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import ClassVar

from whorl.data import Problem, Rollout, Score
from whorl.environments.base import Card, Environment, Policy


@dataclass(frozen=True)
class Parity(Environment):
    """Whether the reply has an even number of tokens. Replies of random models have many lengths."""

    card = Card("digits", "anything", "after one turn", "1 if the tokens are even in number", 0.5)
    alphabet = "0123456789"

    def problem(self, split: str, index: int) -> Problem:
        return Problem(str(index), f"{index}" * (1 + index % 3), source="parity")

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        return Score(float(rollout.num_response_tokens % 2 == 0), {"tokens": float(len(rollout))}, "counted")


@dataclass(frozen=True)
class TwoTurns(Parity):
    multi_turn = True

    async def play(self, problem: Problem, policy: Policy) -> None:
        policy.read(*problem.messages)
        await policy.write(max_tokens=5)
        policy.read(*problem.messages)
        await policy.write()


@dataclass(frozen=True)
class Clumsy(Parity):
    """Loses sample 0 of every problem in its episode, and cannot judge sample 1."""

    async def play(self, problem: Problem, policy: Policy) -> None:
        await super().play(problem, policy)
        if policy.sample == 0:
            raise KeyError("lost")

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        if rollout.sample == 1:
            raise OSError("the judge is ill")
        return super().verify(problem, rollout)


@dataclass(frozen=True)
class Forgetful(Parity):
    """In sample 0 waits for what never comes; the verdict on sample 1 comes when `released` is set."""

    released: ClassVar[threading.Event] = threading.Event()

    async def play(self, problem: Problem, policy: Policy) -> None:
        await super().play(problem, policy)
        if policy.sample == 0:
            await asyncio.Event().wait()

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        if rollout.sample == 1:
            self.released.wait()
        return super().verify(problem, rollout)


@dataclass(frozen=True)
class Fatal(Parity):
    """Ends every process but that of `home`: by "kill", by "exit", or not for a minute ("hang")."""

    home: int
    how: str

    async def play(self, problem: Problem, policy: Policy) -> None:
        if os.getpid() != self.home:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "exit":
                sys.exit(3)
            time.sleep(60)
        await super().play(problem, policy)

"""From problems to judged groups: many episodes at once, verified while others still generate.

An episode or a verdict that never ends does not hold up the others: after a time its rollout has failed, which
is recorded, and the run goes on. What cannot be ended is Python code of an environment's episode that computes
and never awaits: it holds up the process that plays it. `player_processes` ends such a process if it is not
this one.
"""

import asyncio
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from whorl.data import Group, Metrics, Problem, Rollout
from whorl.environments.base import Environment
from whorl.model.tokenizer import ChatTokenizer
from whorl.reporting.console import Advance
from whorl.sampling.dialogue import Dialogue, Sampler
from whorl.sampling.draw import NotFinite, Sampling, stream_key
from whorl.sampling.engine import Engine
from whorl.sampling.request import Completion, Request
from whorl.verdicts import Verdicts

TIMEOUT_SECONDS = (
    600.0  # no episode of ours computes for a second; one that builds and tests software may for minutes
)


@dataclass(repr=False)
class Share:
    """What one process played: judged groups, in the order in which their problems were given.

    Without a repr of its fields: `asyncio.run` formats the result of what it ran when it looks up the handler
    of Ctrl-C, and 256 rollouts spelled out twice took a quarter of the time of playing them.
    """

    groups: list[Group]
    last_played: float
    """When the last episode ended, before its verdict (`time.monotonic`, one clock for all processes)."""
    last_judged: float
    """When the last verdict was there."""


@dataclass
class Player:
    """Plays the episodes of one environment on one engine, in this process.

    `rollout_timeout_seconds` bounds the time that the environment takes over one rollout (waiting for the sampler
    does not count, since it depends on how much else is sampled), and that its verifier takes over one verdict;
    0: no bound.
    """

    environment: Environment
    sampler: Engine
    tokenizer: ChatTokenizer
    seed: int
    rollout_timeout_seconds: float = TIMEOUT_SECONDS
    _generated_elsewhere: int = field(default=0, init=False, repr=False)
    _preempted_elsewhere: int = field(default=0, init=False, repr=False)
    """What the samplers of other processes or ranks did for this player's plays."""

    @property
    def num_generated_tokens(self) -> int:
        """Tokens drawn so far by all that play, also those of turns that an episode took back."""
        return self.sampler.num_generated_tokens + self._generated_elsewhere

    @property
    def num_preemptions(self) -> int:
        """How often the engine of any that play put a sequence back for want of memory."""
        return self.sampler.num_preemptions + self._preempted_elsewhere

    @property
    def probe_gap_nats(self) -> float:
        """Largest difference in the last play between this process's sampler and others; here there are none."""
        return 0.0

    @property
    def memory_gib(self) -> float:
        """Peak resident memory of this process."""
        return peak_memory_gib()

    def start(self) -> None:
        """Get ready in the background for the first play; here there is nothing to do."""

    def play(
        self,
        problems: Sequence[Problem],
        num_samples: int,
        sampling: Sampling,
        address: tuple[int | str, ...],
        advance: Advance | None = None,
    ) -> tuple[list[Group], float]:
        """`num_samples` judged rollouts of each problem, and the seconds spent waiting for verdicts alone.

        `address` (a step, say) names the randomness: with the seed, the place of a problem and of a
        sample it decides every token.
        """
        numbered = list(enumerate(problems))
        share = asyncio.run(self.play_share(numbered, num_samples, sampling, address, advance))
        return share.groups, share.last_judged - share.last_played

    async def play_share(
        self,
        numbered: Sequence[tuple[int, Problem]],
        num_samples: int,
        sampling: Sampling,
        address: tuple[int | str, ...],
        advance: Advance | None = None,
    ) -> Share:
        """As `play`, for problems that come with their places in the whole request."""
        verdicts = Verdicts(self.environment.verify, self.rollout_timeout_seconds)
        last_played = time.monotonic()
        whose: dict[int, str] = {}

        async def one(problem: Problem, group: int, sample: int, shared: _SharedTurns) -> Rollout:
            nonlocal last_played
            key = stream_key(self.seed, *address, group, sample)
            whose[key] = f"problem {problem.id}, sample {sample}"
            rollout = await self._episode(problem, key, group, sample, sampling, shared)
            last_played = time.monotonic()
            if rollout.error is None:
                rollout.score, rollout.error = await verdicts.judge(problem, rollout)
            if advance is not None:
                advance(1)
            return rollout

        try:
            async with asyncio.TaskGroup() as tasks:
                waiting = []
                for group, problem in numbered:
                    shared = _SharedTurns(self.sampler, stream_key(self.seed, *address, group, "shared"))
                    whose[shared.key] = f"problem {problem.id}, a turn that its samples share"
                    waiting.append(
                        [tasks.create_task(one(problem, group, s, shared)) for s in range(num_samples)]
                    )
        except ExceptionGroup as several:
            # One cause stops everything (a prompt too long, a bug): report it, not a tree of siblings.
            error = several.exceptions[0]
            if isinstance(error, NotFinite):
                raise NotFinite(f"{error}, of {whose.get(error.key, 'another sample')},", error.key) from None
            raise error from None
        finally:
            verdicts.close()
        groups = [
            Group(problem, [task.result() for task in row])
            for (_, problem), row in zip(numbered, waiting, strict=True)
        ]
        return Share(groups, last_played, time.monotonic())

    async def _episode(
        self, problem: Problem, key: int, group: int, sample: int, sampling: Sampling, shared: "_SharedTurns"
    ) -> Rollout:
        limit = asyncio.timeout(None)
        clock = _Clock(shared, limit, self.rollout_timeout_seconds)
        dialogue = Dialogue(
            clock if self.rollout_timeout_seconds else shared, self.tokenizer, problem,
            key=key, shared_key=shared.key, group=group, sample=sample, sampling=sampling,
            keep_state=self.environment.multi_turn,
        )  # fmt: skip
        try:
            async with limit:
                clock.start()
                await self.environment.play(problem, dialogue)
        except Exception as error:  # the environment's code failed: that is data, and the run goes on
            if limit.expired():
                seconds = f"{self.rollout_timeout_seconds:g} s (rollout_timeout_seconds)"
                return dialogue.rollout("error", f"environment: the episode took more than {seconds}")
            if dialogue.sampler_error is error:
                raise
            return dialogue.rollout("error", f"environment: {type(error).__name__}: {error}")
        rollout = dialogue.rollout()
        if len(rollout) == 0:
            return dialogue.rollout("error", "environment: the episode neither read its prompt nor wrote")
        return rollout


class _SharedTurns:
    """The sampler as the samples of one problem see it: what they ask for from the stream `key` is written once.

    Before a turn that they share all of them have read the same, so its place says which turn it is. They all get the
    same snapshot, after which the engine reads what comes next once and forks it, as it does with a prompt.
    """

    def __init__(self, sampler: Engine, key: int):
        self._sampler, self.key = sampler, key
        self._turns: dict[int, tuple[Sequence[int], asyncio.Task[Completion]]] = {}

    @property
    def max_context(self) -> int:
        return self._sampler.max_context

    async def complete(self, request: Request) -> Completion:
        if request.key != self.key:
            return await self._sampler.complete(request)
        place = request.num_tokens_before
        if place not in self._turns:
            self._turns[place] = request.tokens, asyncio.ensure_future(self._sampler.complete(request))
        read, turn = self._turns[place]
        if tuple(read) != tuple(request.tokens):
            raise ValueError("samples of a group have read different texts before a turn that they share")
        return await asyncio.shield(turn)  # a sample that is given up must not take it away from the others


class _Clock:
    """The sampler as one episode sees it: the time that is spent waiting for it does not count."""

    def __init__(self, sampler: Sampler, limit: asyncio.Timeout, seconds: float):
        self._sampler, self._limit, self._left = sampler, limit, seconds

    @property
    def max_context(self) -> int:
        return self._sampler.max_context

    def start(self) -> None:
        """Count from now on."""
        self._since = asyncio.get_running_loop().time()
        if self._left:
            self._limit.reschedule(self._since + self._left)

    async def complete(self, request: Request) -> Completion:
        # A hair of time is always left, as 0 stands for no limit.
        self._left = max(self._left - (asyncio.get_running_loop().time() - self._since), 1e-9)
        self._limit.reschedule(None)
        try:
            return await self._sampler.complete(request)
        finally:
            self.start()


def failed_rollout(problem: Problem, group: int, sample: int, error: str) -> Rollout:
    """A rollout of which nothing is left but the reason."""
    none = np.zeros(0, dtype=np.int32)
    return Rollout(
        problem, group, sample, none, none.astype(bool), none.astype(np.int8), none.astype(np.float32),
        none.astype(np.float32), none, stop="error", error=error,
    )  # fmt: skip


def peak_memory_gib() -> float:
    """Largest resident set that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def measure(groups: Sequence[Group], highest_reward: float) -> Metrics:
    """What a step's rollouts look like: rewards, lengths, ends. Names are those of the metric glossary."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    judged = [rollout for group in groups for rollout in group.judged]
    tokens = np.array([rollout.num_response_tokens for rollout in rollouts])
    metrics = {
        "failed_rollouts": float(sum(rollout.error is not None for rollout in rollouts)),
        "response_tokens": float(tokens.mean()),
        "response_tokens_p99": float(np.percentile(tokens, 99)),
        "stopped_by_limit_frac": float(np.mean([r.stop in ("max_tokens", "context") for r in rollouts])),
        "stopped_by_repetition_frac": float(np.mean([r.stop == "repetition" for r in rollouts])),
        "turns": float(np.mean([len(rollout.replies) for rollout in rollouts])),
    }
    if judged:
        reward = np.array([rollout.reward for rollout in judged])
        length = np.array([rollout.num_response_tokens for rollout in judged])
        right = reward >= highest_reward
        metrics |= {
            "reward": float(reward.mean()),
            "reward_std": float(reward.std()),
            "accuracy": float(right.mean()),
        }
        if right.any():
            metrics["response_tokens_right"] = float(length[right].mean())
        if not right.all():
            metrics["response_tokens_wrong"] = float(length[~right].mean())
        scores = [rollout.score for rollout in judged if rollout.score is not None]
        for name in sorted({name for score in scores for name in score.parts}):
            metrics[f"reward_part/{name}"] = float(np.mean([score.parts.get(name, 0.0) for score in scores]))
    return metrics

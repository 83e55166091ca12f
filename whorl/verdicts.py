"""Verdicts made in threads beside the event loop, and a thread whose verifier hangs left behind."""

import asyncio
import contextlib
import math
import queue
import threading
from collections.abc import Callable

from whorl.data import Problem, Rollout, Score

NUM_VERIFIERS = 4  # threads that wait for verifiers; the work itself is in processes where it is heavy

Outcome = tuple[Score, str | None]
"""A score, and what went wrong if the verifier could not judge."""


class _Job:
    """One verdict to be made. `abandoned`: nobody waits for it any more."""

    def __init__(self, problem: Problem, rollout: Rollout, future: asyncio.Future[Outcome]):
        self.problem, self.rollout, self.future = problem, rollout, future
        self.loop = future.get_loop()
        self.abandoned = False


class Verdicts:
    """At most `NUM_VERIFIERS` verdicts at once. One that takes longer than `timeout_seconds` (0: no limit) is given up.

    Its thread cannot be ended and computes on; another takes its place. All are daemon threads, so that a hanging
    one does not keep the process from ending.
    """

    def __init__(self, verify: Callable[[Problem, Rollout], Score], timeout_seconds: float):
        self._verify, self._timeout_seconds = verify, timeout_seconds
        self._free = asyncio.Semaphore(NUM_VERIFIERS)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._num_threads = self._num_busy = 0

    async def judge(self, problem: Problem, rollout: Rollout) -> Outcome:
        """The verifier's score; with a reward of None if it raised or took too long."""
        async with self._free:  # so a thread takes the job at once, and the clock measures the verifier alone
            job = _Job(problem, rollout, asyncio.get_running_loop().create_future())
            self._num_busy += 1
            if self._num_busy > self._num_threads:
                self._num_threads += 1
                threading.Thread(target=self._work, name="verify", daemon=True).start()
            self._jobs.put(job)
            try:
                await asyncio.wait({job.future}, timeout=self._timeout_seconds or None)
            finally:
                self._num_busy -= 1
                if not job.future.done():
                    job.abandoned = True
                    self._num_threads -= 1
        if job.future.done():
            return job.future.result()
        return _failed(f"no verdict after {self._timeout_seconds:g} s (rollout_timeout_seconds)")

    def close(self) -> None:
        """Let the threads end that wait for work."""
        self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            try:
                score = self._verify(job.problem, job.rollout)
                if score.reward is not None and not math.isfinite(score.reward):
                    raise ValueError(f"the reward is {score.reward}")
                outcome = score, None
            except (
                Exception,
                SystemExit,
            ) as error:  # who raises could not judge, which is not a wrong answer
                outcome = _failed(f"{type(error).__name__}: {error}")
            if job.abandoned:
                break  # another thread has taken this one's place
            with contextlib.suppress(RuntimeError):  # the loop is closed: the play was cancelled
                job.loop.call_soon_threadsafe(_deliver, job.future, outcome)
        else:
            self._jobs.put(None)  # for the next thread


def _failed(why: str) -> Outcome:
    return Score(None, why=f"verifier: {why}"), f"verifier: {why}"


def _deliver(future: asyncio.Future[Outcome], outcome: Outcome) -> None:
    if not future.done():
        future.set_result(outcome)

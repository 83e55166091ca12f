"""Rollouts on the ranks of a `torchrun`: each plays a share of the problems on its own engine, and all get all groups.

Problems are dealt out like cards, as `player_processes` deals them. A rollout's random stream is named by its place in
the whole request, so any number of ranks plays the same rollouts.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from whorl.data import Group, Problem
from whorl.learning.ranks import from_every_rank, num_ranks, this_rank
from whorl.player_processes import ElsewhereError, Failure, failure_of
from whorl.reporting.console import Advance
from whorl.rollouts import Player, Share
from whorl.sampling.draw import Sampling

NOBODYS = Problem("", "")
"""Stands in what is sent for the problem, which every rank has, and which may hold what cannot be sent."""


@dataclass(frozen=True)
class _Played:
    """What a rank has to tell: its share, or why there is none."""

    share: Share | None
    failure: Failure | None
    num_generated_tokens: int
    num_preemptions: int


@dataclass
class PlayerOnRanks(Player):
    """A `Player` that every rank calls with the same request, and that gives all of them the same groups."""

    def close(self) -> None:
        """There is nothing to end: the ranks end with the run."""

    def play(
        self,
        problems: Sequence[Problem],
        num_samples: int,
        sampling: Sampling,
        address: tuple[int | str, ...],
        advance: Advance | None = None,
    ) -> tuple[list[Group], float]:
        """As `Player.play`. What stops one rank stops all of them.

        An exception of another rank has its traceback as its cause.
        """
        mine = list(enumerate(problems))[this_rank() :: num_ranks()]
        generated, preempted = self.sampler.num_generated_tokens, self.sampler.num_preemptions
        share, error = None, None
        try:
            share = asyncio.run(self.play_share(mine, num_samples, sampling, address, advance))
            for group in share.groups:
                _name_problem(group, NOBODYS)
        except Exception as raised:
            error = raised
        told = _Played(
            share,
            None if error is None else failure_of(error),
            self.sampler.num_generated_tokens - generated,
            self.sampler.num_preemptions - preempted,
        )
        everyone = from_every_rank(told)
        for rank, played in enumerate(everyone):
            if played.failure is not None:
                if rank == this_rank() and error is not None:
                    raise error
                raise played.failure.error from ElsewhereError(played.failure.trace)
        if advance is not None:
            advance((len(problems) - len(mine)) * num_samples)
        others = [played for rank, played in enumerate(everyone) if rank != this_rank()]
        self._generated_elsewhere += sum(played.num_generated_tokens for played in others)
        self._preempted_elsewhere += sum(played.num_preemptions for played in others)
        shares = [played.share for played in everyone if played.share is not None]
        return _in_order(problems, shares), _waited(shares)


def _in_order(problems: Sequence[Problem], shares: Sequence[Share]) -> list[Group]:
    """The groups of all shares in the order of the request, with the problems that were given."""
    groups = []
    for place, problem in enumerate(problems):
        group = shares[place % len(shares)].groups[place // len(shares)]
        _name_problem(group, problem)
        groups.append(group)
    return groups


def _name_problem(group: Group, problem: Problem) -> None:
    group.problem = problem
    for rollout in group.rollouts:
        rollout.problem = problem


def _waited(shares: Sequence[Share]) -> float:
    """The longest that a rank waited for verdicts alone. (The clocks of two machines are not compared.)"""
    return max(share.last_judged - share.last_played for share in shares)

"""Problems that are neither solved nor hopeless: those whose pass rate lies between two bounds."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from whorl.curricula.base import Pick, State, check_pairs, shuffled
from whorl.data import Group


@dataclass
class DifficultyBand:
    """Goes through the problems in random order and takes those whose pass rate lies in [low, high].

    A group in which every rollout passes, or none, has no group-relative advantage, so its samples are spent
    for nothing; this keeps them for problems that teach. A problem never tried is always taken. One outside
    the band is tried again with probability `retry_frac`, because what was hopeless last epoch may not be so
    today. The pass rate is a running one: `rate += smoothing * (new - rate)`.

    Where two epochs hold too few such problems, the rest is filled with what comes next in order:
    a step always gets the number of problems that it asked for.
    """

    num_problems: int
    low: float = 0.05
    high: float = 0.95
    retry_frac: float = 0.1
    pass_reward: float = 1.0
    """A rollout passes from this reward on."""
    smoothing: float = 0.5
    seed: int = 0
    position: int = field(default=0, init=False)
    """How many problems have been looked at, taken or not."""
    pass_rate: dict[int, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.num_problems < 1:
            raise ValueError(f"expected at least one problem; got num_problems={self.num_problems}")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"expected 0 <= low <= high <= 1; got low={self.low}, high={self.high}")
        if not 0 <= self.retry_frac <= 1 or not 0 < self.smoothing <= 1:
            raise ValueError(
                "expected retry_frac in [0, 1] and smoothing in (0, 1]; "
                f"got retry_frac={self.retry_frac}, smoothing={self.smoothing}"
            )

    def choose(self, num_problems: int) -> list[Pick]:
        picks: list[Pick] = []
        last_look = self.position + 2 * self.num_problems
        epoch, order, coins = -1, np.empty(0), np.empty(0)
        while len(picks) < num_problems:
            if self.position // self.num_problems != epoch:
                epoch = self.position // self.num_problems
                order = shuffled(self.num_problems, self.seed, epoch)
                # One coin per problem and epoch, whether or not it is needed, so that they depend on nothing.
                coins = np.random.default_rng([self.seed, epoch, 1]).random(self.num_problems)
            index = int(order[self.position % self.num_problems])
            teaches = self.in_band(index) or coins[index] < self.retry_frac
            if teaches or self.position >= last_look:
                picks.append(Pick(0, index))
            self.position += 1
        return picks

    def in_band(self, index: int) -> bool:
        """Whether the problem's pass rate lies in [low, high]; so it does as long as nobody tried it."""
        return index not in self.pass_rate or self.low <= self.pass_rate[index] <= self.high

    def update(self, picks: Sequence[Pick], groups: Sequence[Group]) -> None:
        check_pairs(picks, groups)
        for pick, group in zip(picks, groups, strict=True):
            if not group.judged:
                continue
            passed = float((group.rewards >= self.pass_reward).mean())
            before = self.pass_rate.get(pick.index, passed)
            self.pass_rate[pick.index] = before + self.smoothing * (passed - before)

    def state_dict(self) -> State:
        return {
            "position": self.position,
            "pass_rate": {str(index): rate for index, rate in self.pass_rate.items()},
        }

    def load_state_dict(self, state: State) -> None:
        self.position = state["position"]
        self.pass_rate = {int(index): rate for index, rate in state["pass_rate"].items()}

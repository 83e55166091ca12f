"""What a curriculum is: it says which problems come next, from a small state that can be saved."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from whorl.data import Group

State = dict[str, Any]
"""What a curriculum has to remember. Plain JSON values."""


class Pick(NamedTuple):
    """The address of a training problem: which environment of the run, and its index in the train split."""

    environment: int
    index: int


@runtime_checkable
class Curriculum(Protocol):
    """Which problems next.

    `choose` and `update` move the state; between them nothing does, and there is no randomness beside it. A
    curriculum of the same settings that loads the state therefore continues with the same picks, so a run
    saves `state_dict()` with its checkpoint, together with picks it has been given and not yet played.
    """

    def choose(self, num_problems: int) -> list[Pick]:
        """The next problems."""
        ...

    def update(self, picks: Sequence[Pick], groups: Sequence[Group]) -> None:
        """What came of earlier picks: `groups[i]` was played on `picks[i]`. In any order, late, or never."""
        ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


def mean_reward(group: Group) -> float | None:
    """Mean reward of the judged rollouts, or None if there is none."""
    return float(group.rewards.mean()) if group.judged else None


def check_pairs(picks: Sequence[Pick], groups: Sequence[Group]) -> None:
    if len(picks) != len(groups):
        raise ValueError(f"expected one group for each pick; got {len(picks)} picks and {len(groups)} groups")


def shuffled(num_problems: int, seed: int, epoch: int) -> np.ndarray:
    """The order of all problems in this epoch, a function of seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_problems)

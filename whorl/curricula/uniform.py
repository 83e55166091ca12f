"""Every problem once before any comes again."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from whorl.curricula.base import Pick, State, shuffled
from whorl.data import Group


@dataclass
class Uniform:
    """Finite problems in a new random order each epoch; endless ones (`num_problems` None) one after the other."""

    num_problems: int | None = None
    seed: int = 0
    num_given: int = field(default=0, init=False)
    _order: tuple[int, np.ndarray] | None = field(default=None, init=False, repr=False, compare=False)
    """The epoch that was last drawn and its order: a memory of `shuffled`, not part of the state."""

    def __post_init__(self) -> None:
        if self.num_problems is not None and self.num_problems < 1:
            raise ValueError(f"expected at least one problem; got num_problems={self.num_problems}")

    def choose(self, num_problems: int) -> list[Pick]:
        positions = range(self.num_given, self.num_given + num_problems)
        self.num_given += num_problems
        return [Pick(0, self._index(position)) for position in positions]

    def _index(self, position: int) -> int:
        if self.num_problems is None:
            return position
        epoch, place = divmod(position, self.num_problems)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, shuffled(self.num_problems, self.seed, epoch))
        return int(self._order[1][place])

    def update(self, picks: Sequence[Pick], groups: Sequence[Group]) -> None:
        """A uniform curriculum learns nothing from results."""

    def state_dict(self) -> State:
        return {"num_given": self.num_given}

    def load_state_dict(self, state: State) -> None:
        self.num_given = state["num_given"]

"""Several environments in one run, in proportions that can change."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from whorl.curricula.base import Curriculum, Pick, State, check_pairs
from whorl.data import Group


@dataclass
class Mixture:
    """Source i is environment i of the run, with a curriculum of its own, and gets its weight's share of picks.

    The shares are exact and not drawn: each source collects its weight at every pick, the one with the most
    collected is taken and pays 1. So no source is ever a whole pick ahead of its share, and a batch does not
    lack a rare source by bad luck.
    """

    sources: Sequence[Curriculum]
    weights: Sequence[float]
    collected: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.collected = [0.0] * len(self.sources)
        self.set_weights(self.weights)

    def set_weights(self, weights: Sequence[float]) -> None:
        """New proportions from the next pick on. They need not sum to 1."""
        if len(weights) != len(self.sources):
            raise ValueError(
                f"expected {len(self.sources)} weights, one for each source; got {list(weights)}"
            )
        if any(weight < 0 for weight in weights) or not 0 < sum(weights) < float("inf"):
            raise ValueError(f"expected weights of at least 0 that are not all 0; got {list(weights)}")
        self.weights = tuple(float(weight) / sum(weights) for weight in weights)
        # What a source has collected under weights that it no longer has is not owed to it.
        self.collected = [
            have if weight else 0.0 for have, weight in zip(self.collected, self.weights, strict=True)
        ]

    def choose(self, num_problems: int) -> list[Pick]:
        order = [self._next_source() for _ in range(num_problems)]
        given = {
            source: iter(self.sources[source].choose(order.count(source))) for source in sorted(set(order))
        }
        return [Pick(source, next(given[source]).index) for source in order]

    def _next_source(self) -> int:
        eligible = [source for source, weight in enumerate(self.weights) if weight > 0]
        for source in eligible:
            self.collected[source] += self.weights[source]
        chosen = max(eligible, key=lambda source: self.collected[source])
        self.collected[chosen] -= 1
        return chosen

    def update(self, picks: Sequence[Pick], groups: Sequence[Group]) -> None:
        check_pairs(picks, groups)
        for number, source in enumerate(self.sources):
            own = [(p, g) for p, g in zip(picks, groups, strict=True) if p.environment == number]
            if own:
                source.update([Pick(0, pick.index) for pick, _ in own], [group for _, group in own])

    def state_dict(self) -> State:
        return {
            "weights": list(self.weights),
            "collected": self.collected.copy(),
            "sources": [source.state_dict() for source in self.sources],
        }

    def load_state_dict(self, state: State) -> None:
        self.weights = tuple(state["weights"])
        self.collected = list(state["collected"])
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(saved)

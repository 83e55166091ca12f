"""Several tasks as one: `countdown + chain_arithmetic` on the command line."""

from dataclasses import dataclass, replace

import numpy as np

from whorl.data import Problem, Rollout, Score
from whorl.environments.base import Card, Environment, Policy


@dataclass(frozen=True)
class Several(Environment):
    """Problem i comes from task i mod n, and is played and judged by it; its `source` is that task's spec."""

    parts: tuple[Environment, ...]
    specs: tuple[str, ...]

    card = Card(
        prompt="that of the problem's own task",
        turn="that of the problem's own task",
        ends="that of the problem's own task",
        reward="that of the problem's own task",
        chance=0.0,
    )

    def __post_init__(self) -> None:
        if len(self.parts) < 2 or len(set(self.specs)) < len(self.specs):
            raise ValueError(f"expected at least two different tasks; got {' + '.join(self.specs)}")
        if len({part.reward_range[1] for part in self.parts}) > 1:
            raise ValueError(
                "tasks with different highest rewards cannot be mixed: accuracy would mean nothing"
            )

    @property
    def multi_turn(self) -> bool:  # type: ignore[override]
        return any(part.multi_turn for part in self.parts)

    @property
    def alphabet(self) -> str | None:  # type: ignore[override]
        alphabets = [part.alphabet for part in self.parts]
        return None if None in alphabets else "".join(sorted(set("".join(filter(None, alphabets)))))

    @property
    def reward_range(self) -> tuple[float, float]:
        return min(part.reward_range[0] for part in self.parts), self.parts[0].reward_range[1]

    @property
    def chance(self) -> float | None:
        """The mean of the tasks' levels, which take turns; None if one of them has none."""
        levels = [part.chance for part in self.parts if part.chance is not None]
        return sum(levels) / len(levels) if len(levels) == len(self.parts) else None

    @property
    def notice(self) -> str | None:
        return "\n".join(dict.fromkeys(part.notice for part in self.parts if part.notice)) or None

    def num_problems(self, split: str) -> int | None:
        sizes = [part.num_problems(split) for part in self.parts]
        finite = [size for size in sizes if size is not None]
        return min(finite) * len(self.parts) if finite else None

    def problem(self, split: str, index: int) -> Problem:
        return self.problem_of(index % len(self.parts), split, index // len(self.parts))

    def problem_of(self, part: int, split: str, index: int) -> Problem:
        """Problem `index` of one of the tasks."""
        return replace(self.parts[part].problem(split, index), source=self.specs[part])

    async def play(self, problem: Problem, policy: Policy) -> None:
        await self._part(problem).play(problem, policy)

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        return self._part(problem).verify(problem, rollout)

    def gold(self, problem: Problem) -> tuple[str, ...] | None:
        return self._part(problem).gold(problem)

    def guess(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...] | None:
        return self._part(problem).guess(problem, rng)

    def traces(self, problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
        return self._part(problem).traces(problem, rng)

    def _part(self, problem: Problem) -> Environment:
        return self.parts[self.specs.index(problem.source)]

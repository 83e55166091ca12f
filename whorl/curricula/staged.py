"""One curriculum after the other, each until its gate opens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from whorl.curricula.base import Curriculum, Pick, State, check_pairs, mean_reward
from whorl.curricula.gates import Gate, record
from whorl.data import Group, Metrics


@dataclass(frozen=True)
class Stage:
    name: str
    curriculum: Curriculum
    gate: Gate | None = None
    """When to go on; None for the last stage."""


@dataclass
class Staged:
    """The picks of the current stage; the next one begins when its gate opens on the history of the stage.

    The history holds what `update` sees of the groups (`reward_mean`, `signal_frac`, `length_p99` in tokens)
    and what the run adds by `observe`, such as an evaluation. It starts empty in every stage, so a gate
    asks about its own stage and not about the one before. Stages on different environments are mixtures
    with the weights of the others at 0.
    """

    stages: Sequence[Stage]
    current: int = field(default=0, init=False)
    history: dict[str, list[float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("expected at least one stage; got none")
        for stage in self.stages[:-1]:
            if stage.gate is None:
                raise ValueError(
                    f"stage {stage.name!r} has no gate, so the stages after it are never reached"
                )
        if self.stages[-1].gate is not None:
            raise ValueError(f"the last stage {self.stages[-1].name!r} has a gate, but nothing to go on to")

    @property
    def stage(self) -> Stage:
        return self.stages[self.current]

    def choose(self, num_problems: int) -> list[Pick]:
        return self.stage.curriculum.choose(num_problems)

    def update(self, picks: Sequence[Pick], groups: Sequence[Group]) -> None:
        """Groups that were picked in an earlier stage count for the present one: nobody marks them."""
        check_pairs(picks, groups)
        self.stage.curriculum.update(picks, groups)
        rewards = [reward for group in groups if (reward := mean_reward(group)) is not None]
        if rewards:
            lengths = [rollout.num_response_tokens for group in groups for rollout in group.rollouts]
            self.observe(
                {
                    "reward_mean": float(np.mean(rewards)),
                    "signal_frac": float(np.mean([group.has_signal for group in groups])),
                    "length_p99": float(np.percentile(lengths, 99)),
                }
            )

    def observe(self, metrics: Metrics) -> None:
        """Add a value to each of these metrics, and go on to the next stage if that opens the gate."""
        record(self.history, metrics)
        if self.stage.gate is not None and self.stage.gate(self.history):
            self.current += 1
            self.history = {}

    def state_dict(self) -> State:
        return {
            "current": self.current,
            "history": {name: values.copy() for name, values in self.history.items()},
            "curricula": [stage.curriculum.state_dict() for stage in self.stages],
        }

    def load_state_dict(self, state: State) -> None:
        self.current = state["current"]
        self.history = {name: list(values) for name, values in state["history"].items()}
        for stage, saved in zip(self.stages, state["curricula"], strict=True):
            stage.curriculum.load_state_dict(saved)

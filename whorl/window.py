"""The length window of a run: how long training answers may be, and when they may be longer.

MiniMax-M1 (arXiv:2506.13585 section 5) went from 40K to 80K tokens in five steps. It took the next one when two
things had come together: the perplexity of generated text had converged, and the 99th percentile of its length was
near the window.
"""

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from whorl.curricula.gates import AllOf, Gate, History, NearLimit, Plateau, record
from whorl.data import Metrics

WATCHED = ("perplexity", "response_tokens_p99")


@dataclass(frozen=True)
class LengthWindow:
    """Limits of a training answer, one after the other, and the triggers between them."""

    tokens: tuple[int, ...] = ()
    """Limits in tokens, rising, the last at most sampling.max_tokens, by which held-out answers are sampled
    throughout. None given: that is the limit of training answers too."""
    near_limit_frac: float = 0.95
    """The window is nearly full when `response_tokens_p99` reaches this share of it."""
    converged_steps: int = 3
    """Perplexity has converged when its mean over so many steps is that of as many before them ..."""
    converged_tolerance: float = 0.02
    """... but for this difference. Only steps in the present window count."""
    converged_relative: bool = False
    """The tolerance is a share of what perplexity has above 1, which is certainty: near 1 any difference is small."""

    def __post_init__(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"length_window: {message}")

        rising = all(a < b for a, b in zip((0, *self.tokens), self.tokens, strict=False))
        need(rising, f"tokens must rise from 1 or more; got {self.tokens}")
        need(0 < self.near_limit_frac <= 1, f"near_limit_frac must lie in (0, 1]; got {self.near_limit_frac}")
        need(self.converged_steps >= 1, f"converged_steps must be at least 1; got {self.converged_steps}")

    def gate(self, stage: int) -> Gate:
        """When the window after this one opens."""
        return AllOf(
            (
                NearLimit("response_tokens_p99", self.tokens[stage], self.near_limit_frac),
                self.converged,
            )
        )

    def converged(self, history: History) -> bool:
        """Whether perplexity has."""
        steps = self.converged_steps
        before = history.get("perplexity", ())[-2 * steps :][:steps]
        scale = fmean(before) - 1 if self.converged_relative and before else 1.0
        return Plateau("perplexity", steps, self.converged_tolerance * scale)(history)


@dataclass
class Window:
    """The window that a run has reached. `observe` alone moves it, once a step, so it resumes from its state."""

    settings: LengthWindow
    stage: int = 0
    """Index of the present window."""
    history: dict[str, list[float]] = field(default_factory=dict)
    """What the triggers look at, since the present window opened."""

    def limit(self, max_tokens: int) -> int:
        """Tokens of a training answer, where `max_tokens` is the limit without a window."""
        return self.settings.tokens[self.stage] if self.settings.tokens else max_tokens

    @property
    def metrics(self) -> Metrics:
        """Of the present window; none if the run has none."""
        if not self.settings.tokens:
            return {}
        return {
            "window_stage": float(self.stage + 1),
            "window_tokens": float(self.settings.tokens[self.stage]),
        }

    def observe(self, metrics: Metrics) -> None:
        """A finished step. The next one has the next window if both triggers say so."""
        if self.stage + 1 >= len(self.settings.tokens):
            return
        record(self.history, {name: metrics[name] for name in WATCHED if name in metrics})
        if self.settings.gate(self.stage)(self.history):
            self.stage, self.history = self.stage + 1, {}

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage, self.history = state["stage"], {n: list(values) for n, values in state["history"].items()}

"""Drawing tokens: temperature, truncation, and randomness that is a function of its address."""

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a turn is sampled and when it ends."""

    temperature: float = 1.0
    """0: always the most probable token (log-probs are then reported at temperature 1)."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose probability reaches this."""
    top_k: int = 0
    """Keep this many most probable tokens; 0: all."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the most probable token's probability."""
    max_tokens: int = 256
    """Limit of tokens of one turn."""
    stop_strings: tuple[str, ...] = ()
    """A turn ends when its text contains one of these."""
    repetition_run_tokens: int = 3000
    """The turn ends after so many consecutive tokens of raw probability above `repetition_probability`
    (MiniMax-M1, arXiv:2506.13585 section 3.2). 0: never."""
    repetition_probability: float = 0.99

    def __post_init__(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"sampling: {message}")

        need(self.temperature >= 0, f"temperature must be 0 or more; got {self.temperature}")
        need(0 < self.top_p <= 1, f"top_p must lie in (0, 1]; got {self.top_p}")
        need(self.top_k >= 0, f"top_k must be 0 (all tokens) or more; got {self.top_k}")
        need(0 <= self.min_p <= 1, f"min_p must lie in [0, 1]; got {self.min_p}")
        need(self.max_tokens >= 1, f"max_tokens must be at least 1; got {self.max_tokens}")
        need(all(self.stop_strings), "a stop string is empty")
        need(self.repetition_run_tokens >= 0, "repetition_run_tokens must be 0 (never) or more")
        need(0 < self.repetition_probability < 1, "repetition_probability must lie in (0, 1)")

    @property
    def truncates(self) -> bool:
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


def stream_key(*address: int | str) -> int:
    """64-bit key of the random stream at an address such as (run seed, step, problem, sample)."""
    text = "\x1f".join(str(part) for part in address)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(key: int, start: int, count: int) -> np.ndarray:
    """Numbers `start .. start + count` of the stream `key`, uniform in [0, 1), float64.

    Philox is counter-based: number n of a stream can be had without the ones before it, so the tokens of a
    sample depend on its address alone, not on the batch it was in or on what was drawn before.
    """
    skipped, offset = divmod(start, 4)  # a Philox block yields four numbers
    stream = np.random.Philox(key=key)
    stream.advance(skipped)
    return np.random.Generator(stream).random(offset + count)[offset:]


class NotFinite(ArithmeticError):
    """The policy's logits are not finite, so no token can be drawn.

    Args:
        text: what, and at which position.
        key: the random stream of the sample, which says whose token it was to be.
    """

    def __init__(self, text: str, key: int):
        super().__init__(text, key)
        self.text, self.key = text, key

    def __str__(self) -> str:
        return self.text


class Drawn(NamedTuple):
    """Tokens with their log-probabilities over the whole vocabulary, in nats: at the sampling temperature
    (`logp_S`), and at temperature 1 (`raw_logp_S`, the one the repetition stop looks at)."""

    tokens_S: Tensor
    logp_S: Tensor
    raw_logp_S: Tensor


@dataclass
class DrawSettings:
    """The sampling settings of S rows as columns."""

    temperature_S: Tensor
    top_p_S: Tensor
    top_k_S: Tensor
    min_p_S: Tensor
    truncated: list[int] = field(default_factory=list)
    greedy: list[int] = field(default_factory=list)
    plain: bool = True

    @classmethod
    def of(cls, rows: list[Sampling], device: torch.device | str = "cpu") -> "DrawSettings":
        def column(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            column([s.temperature or 1.0 for s in rows], torch.float32),
            column([s.top_p for s in rows], torch.float64),
            column([s.top_k for s in rows], torch.int64),
            column([s.min_p for s in rows], torch.float64),
            [i for i, s in enumerate(rows) if s.truncates],
            [i for i, s in enumerate(rows) if s.temperature == 0],
            all(s.temperature in (0.0, 1.0) for s in rows),
        )


def draw(logits_SV: Float[Tensor, "S V"], uniform_S: Float[Tensor, " S"], settings: DrawSettings) -> Drawn:
    """One token per row by inverting the cumulative distribution at `uniform_S`.

    Every row is treated alone, so its token does not depend on its neighbours' settings.
    """
    raw_SV = logits_SV.log_softmax(dim=-1)
    if settings.plain:
        logp_SV = raw_SV
    else:
        logp_SV = (logits_SV / settings.temperature_S[:, None]).log_softmax(dim=-1)
    cdf_SV = logp_SV.exp().double().cumsum(dim=-1)
    tokens_S = torch.searchsorted(cdf_SV, (uniform_S * cdf_SV[:, -1])[:, None], right=True)[:, 0]
    tokens_S = tokens_S.clamp(max=logits_SV.shape[1] - 1)
    if settings.truncated:
        rows = torch.tensor(settings.truncated, device=logits_SV.device)
        tokens_S[rows] = _draw_truncated(
            logp_SV[rows].double().exp(), uniform_S[rows],
            settings.top_p_S[rows], settings.top_k_S[rows], settings.min_p_S[rows],
        )  # fmt: skip
    if settings.greedy:
        rows = torch.tensor(settings.greedy, device=logits_SV.device)
        tokens_S[rows] = logits_SV[rows].argmax(dim=-1)
    chosen = tokens_S[:, None]
    raw_S = raw_SV.gather(1, chosen)[:, 0]
    return Drawn(tokens_S, raw_S if settings.plain else logp_SV.gather(1, chosen)[:, 0], raw_S)


def _draw_truncated(
    probs: Float[Tensor, "S V"],
    uniform_S: Float[Tensor, " S"],
    top_p_S: Float[Tensor, " S"],
    top_k_S: Int[Tensor, " S"],
    min_p_S: Float[Tensor, " S"],
) -> Int[Tensor, " S"]:
    """Draw from the tokens that pass all three filters, each computed on the full distribution.

    The most probable token always passes: nothing stands before it, and its share of itself is 1.
    """
    ordered, token = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    rank = torch.arange(probs.shape[1], device=probs.device)
    limit = torch.where(top_k_S > 0, top_k_S, probs.shape[1])
    keep = (before < top_p_S[:, None]) & (rank < limit[:, None])
    keep &= ordered >= min_p_S[:, None] * ordered[:, :1]
    cdf = (ordered * keep).cumsum(dim=-1)
    index = torch.searchsorted(cdf, (uniform_S * cdf[:, -1])[:, None], right=True)
    # Rounding may put the index past the last kept token; the kept ones are a prefix of the order. (A row of NaN
    # keeps none: its log-prob will be NaN, which the engine refuses.)
    index = torch.minimum(index, keep.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return token.gather(1, index)[:, 0]

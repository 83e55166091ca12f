"""Rotary frequencies, and the ways in which released models stretch them for longer contexts.

Each class below is one entry of `ModelConfig.rope_scaling`. Its fields are the settings of a checkpoint's
`rope_scaling`, its `stretch` maps plain inverse frequencies theta^(-2j/d) to its own. All in float64.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (position interpolation, arXiv:2306.15595 Eq. 4)."""

    factor: float
    kind: Literal["linear"] = "linear"

    def stretch(self, inverse: Tensor, theta: float) -> Tensor:
        return inverse / self.factor

    @property
    def amplitude(self) -> float:
        return 1.0


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1: slow dimensions interpolated, fast ones kept, a linear blend between.

    A dimension that turns fewer than `low_freq_factor` times within `original_context` tokens is divided by
    `factor`, one that turns more than `high_freq_factor` times is kept (the released models' own code).
    """

    factor: float
    original_context: int
    low_freq_factor: float
    high_freq_factor: float
    kind: Literal["llama3"] = "llama3"

    def stretch(self, inverse: Tensor, theta: float) -> Tensor:
        turns = self.original_context * inverse / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return kept * inverse + (1 - kept) * inverse / self.factor

    @property
    def amplitude(self) -> float:
        return 1.0


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv:2309.00071 sections 3.2-3.4): a ramp over dimensions, and longer queries and keys.

    The ramp runs between the dimensions that turn `beta_fast` and `beta_slow` times within
    `original_context` tokens, rounded outwards to whole ones. cos and sin are multiplied by
    `attention_factor`; None: 0.1 ln(factor) + 1.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    kind: Literal["yarn"] = "yarn"

    def stretch(self, inverse: Tensor, theta: float) -> Tensor:
        dim = 2 * len(inverse)

        def dimension_of(turns: float) -> float:
            return dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(dimension_of(self.beta_fast)), 0)
        high = min(math.ceil(dimension_of(self.beta_slow)), dim - 1)
        index = torch.arange(dim // 2, device=inverse.device, dtype=inverse.dtype)
        interpolated = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
        return interpolated * inverse / self.factor + (1 - interpolated) * inverse

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


RopeScaling = Linear | Llama3 | Yarn


def scaling_from_dict(values: dict[str, Any]) -> RopeScaling:
    """What `dataclasses.asdict` made of one of the three; ValueError for another kind."""
    kinds = {kind.kind: kind for kind in (Linear, Llama3, Yarn)}
    if values.get("kind") not in kinds:
        raise ValueError(f"rope_scaling of kind {values.get('kind')!r}; expected one of {', '.join(kinds)}")
    return kinds[values["kind"]](**values)


def inverse_frequencies(
    rotary: int, theta: float, scaling: RopeScaling | None, device: torch.device | None = None
) -> Tensor:
    """Angle per token of each of the `rotary / 2` rotated pairs, float64."""
    pairs = torch.arange(0, rotary, 2, device=device, dtype=torch.float64)
    inverse = theta ** (-pairs / max(rotary, 1))
    return inverse if scaling is None else scaling.stretch(inverse, theta)

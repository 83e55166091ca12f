"""The rotary embedding: cos and sin of positions, and heads turned by them. (Frequencies are in `rope`, which the
configuration reads and which therefore knows nothing of it.)
"""

import torch
from torch import Tensor

from whorl.kernels.where import fuses
from whorl.model.config import ModelConfig
from whorl.model.rope import inverse_frequencies


def rotation(config: ModelConfig, position_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin `[N, 1, rotary]` of the rotary embedding: angles in float64, rounded once to `dtype`."""
    scaling = config.rope_scaling
    inverse = inverse_frequencies(config.rotary, config.rope_theta, scaling, position_N.device)
    angle = position_N[:, None].to(torch.float64) * inverse
    angle = torch.cat([angle, angle], dim=-1)[:, None, :]
    cos, sin = angle.cos(), angle.sin()
    if scaling is not None and scaling.amplitude != 1:
        cos, sin = cos * scaling.amplitude, sin * scaling.amplitude
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading `rotary` dimensions of each head, halves paired (NeoX), the rest unchanged.

    x `[N, H, K]`; arXiv:2104.09864 Eq. 34 in the half-split arrangement of the checkpoints.
    """
    rotary = cos.shape[-1]
    if rotary == 0:
        return x
    if fuses(x):
        from whorl.kernels import fused_triton

        return fused_triton.rotate(x, cos, sin)
    head, rest = x[..., :rotary], x[..., rotary:]
    half = rotary // 2
    turned = torch.cat([-head[..., half:], head[..., :half]], dim=-1)
    rotated = head * cos + turned * sin
    return rotated if rotary == x.shape[-1] else torch.cat([rotated, rest], dim=-1)

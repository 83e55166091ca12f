"""The log-probabilities and entropies of `whorl.kernels.logprob` for bf16 on a GPU.

A product of two bf16 numbers is exact in fp32, so bf16 tensor cores that add up in fp32 and leave fp32 logits give
the logits of an fp32 head, for a bf16 model at the rate of bf16. Each block of logits is written once and read once:
one kernel carries maximum, sums and the target's logit on, the other turns logits into their gradient. That gradient
is rounded to bf16 for the two products that it goes into, as every gradient of the layers below is; their sums are
fp32.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from whorl.kernels.lightning_triton import launch

MAX_LOGITS = 2**27
"""Most logits in one block: 512 MiB in fp32, and backward half as much again."""

TILE = 2048
"""Logits of a token that a program holds at a time."""


LOWEST = tl.constexpr(-1e30)
"""Where nothing is. Not -inf, which times exp(-inf) would be no number."""


@triton.jit
@no_type_check
def _carry(
    logits, target, highest, total, weighted, chosen, first, width, scale, FIRST: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """With m the highest logit so far: m, sum exp(z - m), sum (z - m) exp(z - m) and the target's logit of a token."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TILE)
    logits += token * width
    if FIRST:
        m, sum_, dot = LOWEST, 0.0, 0.0
    else:
        m, sum_, dot = tl.load(highest + token), tl.load(total + token), tl.load(weighted + token)
    for start in tl.range(0, width, TILE):
        there = start + i < width
        z = tl.load(logits + start + i, mask=there, other=LOWEST) * scale
        grown = tl.maximum(m, tl.max(z, axis=0))
        fading = tl.exp(m - grown)
        dot = fading * (dot + (m - grown) * sum_)
        part = tl.exp(z - grown)
        sum_ = fading * sum_ + tl.sum(part, axis=0)
        dot += tl.sum((z - grown) * part, axis=0)
        m = grown
    tl.store(highest + token, m)
    tl.store(total + token, sum_)
    tl.store(weighted + token, dot)
    place = tl.load(target + token) - first
    inside = (place >= 0) & (place < width)
    tl.store(chosen + token, tl.load(logits + place, mask=inside, other=0.0) * scale, mask=inside)


@triton.jit
@no_type_check
def _slopes(
    logits, grad, target, log_sum, entropy, grad_logp, grad_entropy, first, width, scale,
    ENTROPY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """([v = target] g_logp - p_v (g_logp + g_H (log p_v + H))) / temperature."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = column < width
    logp = tl.load(logits + token * width + column, mask=there, other=0.0) * scale - tl.load(log_sum + token)
    by = tl.load(grad_logp + token)
    slope = tl.zeros((TILE,), tl.float32) + by
    if ENTROPY:
        slope += tl.load(grad_entropy + token) * (logp + tl.load(entropy + token))
    value = -tl.exp(logp) * slope
    value = tl.where(first + column == tl.load(target + token), value + by, value) * scale
    tl.store(grad + token * width + column, value.to(grad.dtype.element_ty), mask=there)


def token_logprobs_bf16(
    x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log pi(target) and the entropy of pi `[M]`, fp32, of hidden states and a head in bf16, both with gradient."""
    return _TokenLogprobs.apply(x_MD, weight_VD, target_M, temperature)  # type: ignore[return-value]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, weight_VD: Tensor, target_M: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        x_MD, M, V = x_MD.contiguous(), len(x_MD), len(weight_VD)
        width = _width(M, V)
        highest, total, weighted, chosen = torch.empty(4, M, dtype=torch.float32, device=x_MD.device)
        buffer = torch.empty(M * width, dtype=torch.float32, device=x_MD.device)
        for start in range(0, V if M else 0, width):
            block = weight_VD[start : start + width]
            logits = _product(x_MD, block.mT, buffer[: M * len(block)].view(M, len(block)))
            launch(
                _carry, (M,), logits, target_M, highest, total, weighted, chosen, start, len(block), 1 / temperature,
                FIRST=start == 0, TILE=TILE, num_warps=4,
            )  # fmt: skip
        log_sum_M = highest + total.log()
        entropy_M = total.log() - weighted / total
        ctx.save_for_backward(x_MD, weight_VD, target_M, log_sum_M, entropy_M)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return chosen - log_sum_M, entropy_M.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logp_M, grad_entropy_M = grads
        x_MD, weight_VD, target_M, log_sum_M, entropy_M = ctx.saved_tensors
        if grad_logp_M is None and grad_entropy_M is None:
            return None, None, None, None
        M, V, D = len(x_MD), len(weight_VD), x_MD.shape[1]
        width = _width(M, V)
        with_entropy = grad_entropy_M is not None
        grad_logp_M = torch.zeros_like(entropy_M) if grad_logp_M is None else grad_logp_M.contiguous()
        grad_entropy_M = entropy_M if grad_entropy_M is None else grad_entropy_M.contiguous()
        buffer = torch.empty(M * width, dtype=torch.float32, device=x_MD.device)
        halves = torch.empty(M * width, dtype=x_MD.dtype, device=x_MD.device)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.zeros(M, D, dtype=torch.float32, device=x_MD.device)
        if ctx.needs_input_grad[1]:
            # In fp32, as the optimizer adds gradients up; each row is written once.
            grad_w = torch.empty(V, D, dtype=torch.float32, device=x_MD.device)
            if not M:
                grad_w.zero_()
        for start in range(0, V if M else 0, width):
            block = weight_VD[start : start + width]
            shape = (M, len(block))
            logits = _product(x_MD, block.mT, buffer[: M * len(block)].view(shape))
            grad = halves[: M * len(block)].view(shape)
            launch(
                _slopes, (M, triton.cdiv(len(block), TILE)),
                logits, grad, target_M, log_sum_M, entropy_M, grad_logp_M, grad_entropy_M,
                start, len(block), 1 / ctx.temperature, ENTROPY=with_entropy, TILE=TILE, num_warps=4,
            )  # fmt: skip
            if grad_x is not None:
                _product(grad, block, grad_x, adds=True)
            if grad_w is not None:
                _product(grad.mT, x_MD, grad_w[start : start + width])
        return None if grad_x is None else grad_x.to(x_MD.dtype), grad_w, None, None


def _width(num_tokens: int, num_logits: int) -> int:
    """Columns of a block: whole tiles of 256, so that no product has a ragged edge but the last."""
    return min(num_logits, max(MAX_LOGITS // max(num_tokens, 1) // 256, 1) * 256)


def _product(a: Tensor, b: Tensor, out: Tensor, *, adds: bool = False) -> Tensor:
    """a b in fp32, of bf16 factors; with `adds`, beside what `out` holds."""
    if adds:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)

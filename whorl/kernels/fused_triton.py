"""What stands between the matrix products of a block, each in one pass over its tensors: RMSNorm with the sum before
it, rotation, SwiGLU.

In PyTorch's own kernels a norm in bf16 reads and writes every element five times over and keeps an fp32 copy for the
backward pass. Here it reads and writes it once and keeps its input. Values are rounded where PyTorch's operations
round them, so the two forms agree to the order of the norm's sum. Gradients are computed in fp32 from the rounded
values and rounded once. No sum depends on the order in which programs run.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2048
"""Elements that a program holds of each tensor, if a row is not longer."""

PROGRAMS = 528
"""Programs that share the rows of a norm's backward pass, each with its own sum for the weight: four to each of the
132 multiprocessors of an H100 or H200. A constant, because it decides how the sum is rounded."""


@triton.jit
@no_type_check
def _norm(
    x, branch, alpha, beta, weight, total, out, inverse, num_rows, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """The norm of x, or with ADDS of alpha x + beta branch, which is stored, too."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    there = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    dtype = x.dtype.element_ty
    values = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(branch + place, mask=there, other=0.0).to(tl.float32)
        summed = ((added * beta).to(dtype).to(tl.float32) + values * alpha).to(dtype)
        tl.store(total + place, summed, mask=there)
        values = summed.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / WIDTH + eps)
    normed = (values * scale[:, None]).to(dtype).to(tl.float32)
    by = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + place, (normed * by[None, :]).to(dtype), mask=there)
    tl.store(inverse + row, scale, mask=row < num_rows)


@triton.jit
@no_type_check
def _norm_backward(
    grad, x, weight, inverse, grad_past, grad_x, grad_weight, num_rows,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, HAS_PAST: tl.constexpr,
):  # fmt: skip
    """dx = s (g w - y mean(g w y)) with y = s x; each program adds up g y over its rows.

    With HAS_PAST, what reaches x past the norm is added."""
    column = tl.arange(0, PADDED)
    by = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    dtype = x.dtype.element_ty
    added = tl.zeros((PADDED,), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        there = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        place = row[:, None] * WIDTH + column[None, :]
        g = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
        scale = tl.load(inverse + row, mask=row < num_rows, other=0.0)
        y = tl.load(x + place, mask=there, other=0.0).to(tl.float32) * scale[:, None]
        added += tl.sum(g * y, axis=0)
        g = g * by[None, :]
        along = tl.sum(g * y, axis=1) / WIDTH
        g = (g - y * along[:, None]) * scale[:, None]
        if HAS_PAST:
            g += tl.load(grad_past + place, mask=there, other=0.0).to(tl.float32)
        tl.store(grad_x + place, g.to(dtype), mask=there)
    tl.store(grad_weight + tl.program_id(0) * WIDTH + column, added, mask=column < WIDTH)


@triton.jit
@no_type_check
def _turn(x, cos, sin, out, sign, H: tl.constexpr, K: tl.constexpr, ROTARY: tl.constexpr,
          HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    """The heads of one token, turned forwards (sign 1) or back (sign -1)."""
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = ROTARY // 2
    dtype = x.dtype.element_ty
    head, i = tl.arange(0, HEADS), tl.arange(0, HALF)
    there = (head < H)[:, None] & (i < half)[None, :]
    place = token * H * K + head[:, None] * K + i[None, :]
    a = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    b = tl.load(x + place + half, mask=there, other=0.0).to(tl.float32)
    c = tl.load(cos + token * ROTARY + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * ROTARY + i, mask=i < half, other=0.0).to(tl.float32)[None, :] * sign
    # Each product is rounded, as it is when a tensor holds it.
    left = (a * c).to(dtype).to(tl.float32) - (b * s).to(dtype).to(tl.float32)
    right = (b * c).to(dtype).to(tl.float32) + (a * s).to(dtype).to(tl.float32)
    tl.store(out + place, left.to(dtype), mask=there)
    tl.store(out + place + half, right.to(dtype), mask=there)
    if ROTARY < K:
        j = ROTARY + tl.arange(0, REST)
        kept = (head < H)[:, None] & (j < K)[None, :]
        place = token * H * K + head[:, None] * K + j[None, :]
        tl.store(out + place, tl.load(x + place, mask=kept), mask=kept)


@triton.jit
@no_type_check
def _swiglu(gate_up, out, num, WIDTH: tl.constexpr, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = place < num
    source = gate_up + place // WIDTH * (2 * WIDTH) + place % WIDTH
    dtype = out.dtype.element_ty
    gate = tl.load(source, mask=there, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=there, other=0.0).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + place, (opened * up).to(dtype), mask=there)


@triton.jit
@no_type_check
def _swiglu_backward(grad, gate_up, grad_in, num, WIDTH: tl.constexpr, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = place < num
    offset = place // WIDTH * (2 * WIDTH) + place % WIDTH
    dtype = grad.dtype.element_ty
    g = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + offset, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + offset + WIDTH, mask=there, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    opened = (gate * share).to(dtype).to(tl.float32)
    tl.store(grad_in + offset, (g * up * share * (1.0 + gate * (1.0 - share))).to(dtype), mask=there)
    tl.store(grad_in + offset + WIDTH, (g * opened).to(dtype), mask=there)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x `[..., D]`, with gradient."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]


def add_norm(
    x: Tensor, branch: Tensor, alpha: float, beta: float, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """alpha x + beta branch, and the norm of that, with gradients of all three. Shapes `[..., D]`."""
    return _AddNorm.apply(x, branch, alpha, beta, weight, eps)  # type: ignore[return-value]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The leading dimensions of heads x `[N, H, K]` turned by cos and sin `[N, 1, rotary]`, with gradient of x."""
    return _Rotate.apply(x, cos, sin)  # type: ignore[return-value]


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of `[..., 2 F]`, which holds gate then up: `[..., F]`, with gradient."""
    return _SwiGLU.apply(gate_up)  # type: ignore[return-value]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, out, inverse = _normed(x, None, 1.0, 1.0, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = _norm_gradient(grads[0], None, *ctx.saved_tensors)
        return grad_x, grad_weight if ctx.needs_input_grad[1] else None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, alpha: float, beta: float, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, out, inverse = _normed(x, branch, alpha, beta, weight, eps)
        ctx.save_for_backward(total, weight, inverse)
        ctx.factors = alpha, beta
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        past, grad = grads
        if grad is None:
            total, grad_weight = past, None
        else:
            total, grad_weight = _norm_gradient(grad, past, *ctx.saved_tensors)
        if total is None:
            return None, None, None, None, None, None
        into_x, into_branch = (total if factor == 1 else factor * total for factor in ctx.factors)
        return into_x, into_branch, None, None, grad_weight if ctx.needs_input_grad[4] else None, None


def _normed(
    x: Tensor, branch: Tensor | None, alpha: float, beta: float, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What is normed (x, or its sum with the branch), its norm, and 1 / sqrt(mean square + eps) of every row."""
    x = x.contiguous()
    width = x.shape[-1]
    num_rows = x.numel() // width
    out = torch.empty_like(x)
    total = x if branch is None else torch.empty_like(x)
    inverse = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    padded, rows, warps = _tiles(width)
    _run(
        _norm, triton.cdiv(num_rows, rows), warps, x, x if branch is None else branch.contiguous(), alpha, beta,
        weight, total, out, inverse, num_rows, eps, width, padded, rows, branch is not None,
    )  # fmt: skip
    return total, out, inverse


def _norm_gradient(
    grad: Tensor, past: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed, `past` included, and of the weight."""
    grad, width = grad.contiguous(), x.shape[-1]
    grad_x = torch.empty_like(x)
    padded, rows, warps = _tiles(width)
    programs = min(PROGRAMS, triton.cdiv(len(inverse), rows))
    parts = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _run(
        _norm_backward, programs, warps, grad, x, weight, inverse, x if past is None else past.contiguous(), grad_x,
        parts, len(inverse), width, padded, rows, past is not None,
    )  # fmt: skip
    return grad_x, parts.sum(dim=0)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = x.contiguous()
    N, H, K = x.shape
    rotary = cos.shape[-1]
    out = torch.empty_like(x)
    heads, half = triton.next_power_of_2(H), triton.next_power_of_2(rotary // 2)
    rest = triton.next_power_of_2(max(K - rotary, 1))
    _run(_turn, N, 4, x, cos.contiguous(), sin.contiguous(), out, sign, H, K, rotary, heads, half, rest)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        _run(_swiglu, triton.cdiv(out.numel(), TILE), 4, gate_up, out, out.numel(), width, TILE)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad, grad_in = grads[0].contiguous(), torch.empty_like(gate_up)
        num = grad.numel()
        _run(_swiglu_backward, triton.cdiv(num, TILE), 4, grad, gate_up, grad_in, num, grad.shape[-1], TILE)
        return grad_in


def _tiles(width: int) -> tuple[int, int, int]:
    """Columns (a power of 2) and rows that a program holds, and its warps."""
    padded = triton.next_power_of_2(width)
    return padded, max(1, TILE // padded), min(16, max(4, padded // 512))


def _run(kernel: Any, programs: int, warps: int, *arguments: Any) -> None:
    """On as many programs as given; none where there is nothing to do.

    Without fusing a product into the sum that follows it, which would leave out the rounding between them.
    """
    if programs:
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=False)

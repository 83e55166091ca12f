"""One token of a softmax layer in Triton: norm, rotate, store, attend to the cached keys and values, in one launch.

The cache of a sequence is cut every `SPLIT` keys. One program attends to some of the cuts for all query heads that
share a key head, so that the cache is read once, and leaves the maximum, the sum and the weighted values of each; what
is joined is joined in the order of the cuts, by the program that comes last, or for long caches by a second launch. The
cuts lie at fixed positions, so what a sequence gets does not depend on the others, nor on how many programs share the
work (flash-decoding, with the number of keys per cut fixed and not the number of cuts). The newest key and value are
taken as they are made and stored for the next step. Lengths are read from device memory: a captured graph serves all.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from whorl.kernels.lightning_triton import launch, multiprocessors

SPLIT = 512
"""Keys of one cut."""

TILE, WARPS, STAGES = 64, 4, 3
"""Keys of a step of the loop over a cut in bf16, warps of a program, and steps that are loaded ahead."""

FEW = 8
"""Cuts that are joined one after the other. If a cache has no more, that needs no launch of its own."""


@triton.jit
@no_type_check
def _scaled(x, scale, weight, dtype: tl.constexpr):
    """A value of a norm, rounded where the module rounds it."""
    return ((x * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit
@no_type_check
def _turned(
    x, row, inside, cos, sin, weight, eps,
    K: tl.constexpr, ROWS: tl.constexpr, ROTARY: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Rows x + row `[n, 1]` of one token, `[n, ROWS]`: normed, and the leading dimensions turned, halves paired."""
    i = tl.arange(0, ROWS)
    half: tl.constexpr = ROTARY // 2
    turns = i < ROTARY
    partner = tl.where(i < half, i + half, i - half)
    dtype = x.dtype.element_ty
    here = tl.load(x + row + i[None, :], mask=inside, other=0.0).to(tl.float32)
    there = tl.load(x + row + partner[None, :], mask=inside & turns[None, :], other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(here * here, axis=1) / K + eps)[:, None]
        by = tl.load(weight + i, mask=i < K, other=0.0).to(tl.float32)[None, :]
        by_partner = tl.load(weight + partner, mask=turns, other=0.0).to(tl.float32)[None, :]
        here, there = _scaled(here, scale, by, dtype), _scaled(there, scale, by_partner, dtype)
    there = tl.where((i < half)[None, :], -there, there)
    c = tl.load(cos + i, mask=turns, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + i, mask=turns, other=0.0).to(tl.float32)[None, :]
    # Rounded where PyTorch rounds: each product, then their sum.
    both = (here * c).to(dtype).to(tl.float32) + (there * s).to(dtype).to(tl.float32)
    return tl.where(turns[None, :], both, here).to(dtype)


@triton.jit
@no_type_check
def _seen(length, live, sequence, WINDOW: tl.constexpr, SPLIT: tl.constexpr, HAS_LIVE: tl.constexpr):
    """The keys that the newest token sees, from and to, and the cuts in which they are. None if the row is not live."""
    end = tl.load(length + sequence).to(tl.int32) + 1
    if HAS_LIVE:
        end = tl.where(tl.load(live + sequence) != 0, end, 0)
    begin = tl.maximum(end - WINDOW, 0) if WINDOW else 0
    return begin, end, begin // SPLIT, tl.cdiv(end, SPLIT)


@triton.jit
@no_type_check
def _merged(highest, total, sums, place, g, i, inside, first, last, GROUP: tl.constexpr, K: tl.constexpr):
    """The cuts first .. last - 1 of the heads g of a key head put together, one after the other."""
    m = tl.full(g.shape, float("-inf"), tl.float32)
    summed = tl.zeros(g.shape, tl.float32)
    x = tl.zeros(inside.shape, tl.float32)
    for cut in range(first, last):
        row = (place + cut) * GROUP + g
        # Written by other multiprocessors a moment ago: past the first cache, which does not know of it.
        m_cut = tl.load(highest + row, mask=g < GROUP, other=0.0, cache_modifier=".cg")
        total_cut = tl.load(total + row, mask=g < GROUP, other=1.0, cache_modifier=".cg")
        values = tl.load(sums + row[:, None] * K + i[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(m, m_cut)
        weight = tl.exp(m_cut - higher)
        fading = tl.exp(m - higher)
        summed = summed * fading + weight * total_cut
        x = x * fading[:, None] + weight[:, None] * values
        m = higher
    return x / summed[:, None]


@triton.jit
@no_type_check
def _attend(
    q, q_row, k, k_row, v, v_row, cos, sin, q_weight, k_weight, eps, keys, values, length, live,
    highest, total, sums, arrived, out, capacity, num_cuts, workers, scale,
    KV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, ROTARY: tl.constexpr,
    QUERIES: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, WINDOW: tl.constexpr,
    HAS_LIVE: tl.constexpr, HAS_NORM: tl.constexpr, JOINS: tl.constexpr,
):  # fmt: skip
    """Every `workers`-th cut of one sequence and key head: maximum, sum of exp, and exp-weighted values.

    A single cut is the result. With JOINS, the last of a row's programs puts its cuts together.
    """
    unit = tl.program_id(0).to(tl.int64)
    sequence, head = unit // KV, unit % KV
    worker = tl.program_id(1)
    begin, end, first, last = _seen(length, live, sequence, WINDOW, SPLIT, HAS_LIVE)
    i, g, t = tl.arange(0, ROWS), tl.arange(0, QUERIES), tl.arange(0, TILE)
    inside = (g < GROUP)[:, None] & (i < K)[None, :]
    result = out + unit * GROUP * K + g[:, None] * K + i[None, :]
    dtype = out.dtype.element_ty
    if end == 0:
        if worker == 0:
            tl.store(result, tl.zeros((QUERIES, ROWS), dtype), mask=inside)
    elif first + worker < last:
        newest = end - 1
        cos += newest.to(tl.int64) * ROTARY
        sin += newest.to(tl.int64) * ROTARY
        of_group = (g * K)[:, None]
        q_tile = _turned(
            q + sequence * q_row + head * GROUP * K, of_group, inside, cos, sin, q_weight, eps,
            K, ROWS, ROTARY, HAS_NORM,
        )  # fmt: skip
        # The newest key and value are read here by all, so that who needs them does not wait at the end.
        alone = (i < K)[None, :]
        new_k = _turned(
            k + sequence * k_row + head * K, tl.zeros((1, 1), tl.int32), alone, cos, sin, k_weight, eps,
            K, ROWS, ROTARY, HAS_NORM,
        )  # fmt: skip
        new_v = tl.load(v + sequence * v_row + head * K + i[None, :], mask=alone, other=0.0)
        row = unit * capacity
        for cut in range(first + worker, last, workers):
            m = tl.full((QUERIES,), float("-inf"), tl.float32)
            summed = tl.zeros((QUERIES,), tl.float32)
            weighted = tl.zeros((QUERIES, ROWS), tl.float32)
            for start in tl.range(
                cut * SPLIT, tl.minimum(cut * SPLIT + SPLIT, newest), TILE, num_stages=STAGES
            ):
                place = start + t
                seen = (place >= begin) & (place < newest)
                offsets = (row + place)[:, None] * K + i[None, :]
                mask = seen[:, None] & (i < K)[None, :]
                k_tile = tl.load(keys + offsets, mask=mask, other=0.0)
                v_tile = tl.load(values + offsets, mask=mask, other=0.0)
                scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
                scores = tl.where(seen[None, :], scores, float("-inf"))
                higher = tl.maximum(m, tl.max(scores, axis=1))
                safe = tl.where(higher == float("-inf"), 0.0, higher)
                p = tl.exp(scores - safe[:, None])
                fading = tl.exp(m - safe)
                summed = summed * fading + tl.sum(p, axis=1)
                weighted = weighted * fading[:, None]
                weighted = tl.dot(p.to(v_tile.dtype), v_tile, acc=weighted, input_precision="ieee")
                m = higher
            if cut == last - 1:
                at = (row + newest) * K + i[None, :]
                tl.store(keys + at, new_k, mask=alone)
                tl.store(values + at, new_v, mask=alone)
                score = tl.sum(q_tile.to(tl.float32) * new_k.to(tl.float32), axis=1) * scale
                higher = tl.maximum(m, score)
                p = tl.exp(score - higher)
                fading = tl.exp(m - higher)
                summed = summed * fading + p
                weighted = weighted * fading[:, None] + p.to(dtype).to(tl.float32)[:, None] * new_v.to(
                    tl.float32
                )
                m = higher
            if last - first == 1:
                tl.store(result, (weighted / summed[:, None]).to(dtype), mask=inside)
            else:
                place = (unit * num_cuts + cut) * GROUP + g
                tl.store(highest + place, m, mask=g < GROUP)
                tl.store(total + place, summed, mask=g < GROUP)
                tl.store(sums + place[:, None] * K + i[None, :], weighted, mask=inside)
        if JOINS:  # noqa: SIM102 (known when the kernel is compiled; the other on the device)
            if last - first > 1:
                tl.debug_barrier()  # what all threads have stored, before one says so
                before = tl.atomic_add(arrived + unit, 1, sem="acq_rel")
                if before == tl.minimum(workers, last - first) - 1:
                    x = _merged(highest, total, sums, unit * num_cuts, g, i, inside, first, last, GROUP, K)
                    tl.store(result, x.to(dtype), mask=inside)
                    tl.store(arrived + unit, 0)


@triton.jit
@no_type_check
def _joined(
    highest, total, sums, row, head, first, last,
    GROUP: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    """The cuts first .. last - 1 of one query head put together, `CUTS` at a time."""
    i, c = tl.arange(0, ROWS), tl.arange(0, CUTS)
    m = float("-inf")
    summed = 0.0
    x = tl.zeros((ROWS,), tl.float32)
    for start in range(first, last, CUTS):
        cut = start + c
        place = (row + cut) * GROUP + head
        there = cut < last
        m_cut = tl.load(highest + place, mask=there, other=float("-inf"))
        higher = tl.maximum(m, tl.max(m_cut, axis=0))
        weight = tl.exp(m_cut - higher)
        fading = tl.exp(m - higher)
        summed = summed * fading + tl.sum(weight * tl.load(total + place, mask=there, other=0.0), axis=0)
        inside = there[:, None] & (i < K)[None, :]
        values = tl.load(sums + place[:, None] * K + i[None, :], mask=inside, other=0.0)
        x = x * fading + tl.sum(weight[:, None] * values, axis=0)
        m = higher
    return x / summed


@triton.jit
@no_type_check
def _join(
    highest, total, sums, length, live, out, num_cuts,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    WINDOW: tl.constexpr, FEW: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """One query head of one row, if it has several cuts."""
    sequence, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    _, _, first, last = _seen(length, live, sequence, WINDOW, SPLIT, HAS_LIVE)
    row = (sequence * (H // GROUP) + head // GROUP) * num_cuts
    i = tl.arange(0, ROWS)
    place = out + (sequence * H + head) * K + i
    # How many at a time is a matter of the row's own cuts, as all that decides how its sums are rounded.
    if last - first > FEW:
        x = _joined(highest, total, sums, row, head % GROUP, first, last, GROUP, K, ROWS, 128)
        tl.store(place, x.to(out.dtype.element_ty), mask=i < K)
    elif last - first > 1:
        g = head % GROUP + tl.arange(0, 1)
        x = _merged(highest, total, sums, row, g, i, (i < K)[None, :], first, last, GROUP, K)
        tl.store(place[None, :], x.to(out.dtype.element_ty), mask=(i < K)[None, :])


def attend_step(
    q: Float[Tensor, "S H K"],
    k: Float[Tensor, "S KV K"],
    v: Float[Tensor, "S KV K"],
    rotation: tuple[Float[Tensor, "T R"], Float[Tensor, "T R"]],
    keys: Float[Tensor, "slots KV T K"],
    values: Float[Tensor, "slots KV T K"],
    length_S: Int[Tensor, " S"],
    live_S: Int[Tensor, " S"] | None,
    window: int | None,
    arrived: Int[Tensor, " slots*KV"],
    norms: tuple[Float[Tensor, " K"], Float[Tensor, " K"], float] | None = None,
) -> Float[Tensor, "S H K"]:
    """Rotate q and k, extend the cache at `length_S`, and attend: one further token of the rows 0 .. S - 1.

    `norms`: the weights of a norm over each query's and each key's head, and its eps; before the rotation.
    `rotation` holds cos and sin of every position of the cache. Rows that are not live (`live_S` 0; None: all are)
    leave their cache as it is and get zeros. `arrived` (int32) is zero before and after. No gradient; the scale of the
    scores is 1 / sqrt(K).
    """
    S, H, K = q.shape
    KV, capacity = k.shape[1], keys.shape[2]
    cos, sin = rotation
    assert keys.is_contiguous() and values.is_contiguous(), "the cache is extended where it lies"
    assert cos.is_contiguous() and sin.is_contiguous() and len(cos) >= capacity
    assert (
        q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.stride(1) == k.stride(1) == v.stride(1) == K
    )
    live = length_S if live_S is None else live_S  # a pointer that is not followed
    q_weight, k_weight, eps = (q, k, 0.0) if norms is None else norms  # pointers likewise
    rows = max(16, triton.next_power_of_2(K))
    group = H // KV
    num_cuts = triton.cdiv(capacity, SPLIT)
    highest = q.new_empty(S, KV, num_cuts, group, dtype=torch.float32)
    total = torch.empty_like(highest)
    sums = highest.new_empty(*highest.shape, K)
    out = q.new_empty(S, H, K)
    # Enough programs to fill the GPU. How many changes who computes a cut, not what it is.
    workers = max(1, min(num_cuts, 16 * multiprocessors(q.device) // (S * KV)))
    tile = 32 if q.dtype == torch.float32 else TILE
    joins = num_cuts <= FEW
    launch(
        _attend, (S * KV, workers),
        q, q.stride(0), k, k.stride(0), v, v.stride(0), cos, sin, q_weight, k_weight, eps, keys, values, length_S, live,
        highest, total, sums, arrived, out, capacity, num_cuts, workers, K**-0.5,
        KV, group, K, rows, cos.shape[-1], max(16, triton.next_power_of_2(group)), SPLIT, tile, STAGES,
        window or 0, live_S is not None, norms is not None, joins, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    if not joins:
        launch(
            _join, (S * H,), highest, total, sums, length_S, live, out, num_cuts,
            H, group, K, rows, SPLIT, window or 0, FEW, live_S is not None, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out

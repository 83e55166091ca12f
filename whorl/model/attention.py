"""The two kinds of attention, each with one definition for training, prefill and decode."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whorl.kernels import packed
from whorl.kernels.lightning import lightning, lightning_decode, on_gpu, slopes
from whorl.kernels.where import fuses
from whorl.model.config import ModelConfig
from whorl.model.layout import Fork, Layout, within
from whorl.model.rotation import rotate
from whorl.model.state import State
from whorl.model.together import side_by_side


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (float64 stays float64)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if fuses(x):
            from whorl.kernels import fused_triton

            return fused_triton.rms_norm(x, self.weight, self.eps)
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight

    def of_sum(self, x: Tensor, branch: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
        """alpha x + beta branch, and its norm: where a branch joins the residual stream."""
        if fuses(x):
            from whorl.kernels import fused_triton

            return fused_triton.add_norm(x, branch, alpha, beta, self.weight, self.eps)
        total = weighted_sum(x, branch, alpha, beta)
        return total, self(total)


def weighted_sum(x: Tensor, branch: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha x + beta branch."""
    return torch.add(branch if beta == 1 else beta * branch, x, alpha=alpha)


@dataclass
class Step:
    """What all layers of one forward pass share.

    A `Fork` in place of a layout says that sequences share prefixes: every layer computes a prefix once, and
    the sequences continue from what it has become there. `state` and `slots` are given when the tokens
    continue sequences of before (prefill, decode): sequence s of the layout continues `slots[s]`, and in `whole`
    stands with all its tokens. `decode` says that every sequence has one token and sits in slot s; those with 0 in
    `live_S` stay as they are. `kept` is given when blocks will be computed again for their backward pass.
    """

    layout: Layout | Fork
    rotation: tuple[Tensor, Tensor] | None
    """Of every token; None where the state's table is read (a decode step on a GPU)."""
    state: State | None = None
    slots: Tensor | None = None
    start_S: Tensor | None = None
    whole: Layout | None = None
    decode: bool = False
    live_S: Tensor | None = None
    key_limit: int = 0
    kept: packed.Kept | None = None


def pads_rows(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether training there pads the rows of a batch to one length in some layer."""
    head = torch.empty(1, 1, 3 * config.head_dim, device=device, dtype=dtype)
    takes = {"lightning": on_gpu(head), "softmax": packed.takes(head[..., : config.head_dim])}
    return config.sliding_window is not None or not all(takes[kind] for kind in config.attention)


class LightningAttention(nn.Module):
    """out = Wo( sigmoid(x Wg) * RMSNorm(concat_h o_h) ), with q, k, v = SiLU(x Wqkv).

    The rows of Wqkv are head-major: [q_h | k_h | v_h] for each head in turn. v passes the SiLU too. There is
    no rotary embedding and no scale; the norm runs over all heads' channels together
    (MiniMax-01, arXiv:2501.08313 section 2.2, and the released checkpoints' arithmetic).
    """

    def __init__(self, config: ModelConfig, layer: int, index: int):
        super().__init__()
        self.num_heads, self.head_dim, self.index = config.num_heads, config.head_dim, index
        inner = config.num_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.width, 3 * inner, bias=False)
        self.output_gate = nn.Linear(config.width, inner, bias=False)
        self.norm = RMSNorm(inner, config.lightning_norm_eps)
        self.out_proj = nn.Linear(inner, config.width, bias=False)
        self.slopes = (config.num_heads, layer, config.num_layers)
        self._slope_H: Tensor | None = None

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """What a token is multiplied with first."""
        return self.qkv_proj, self.output_gate

    def slope_H(self, device: torch.device) -> Tensor:
        """fp32 slopes. Not a buffer, so that casting the model to bf16 cannot touch them."""
        if self._slope_H is None or self._slope_H.device != device:
            # The engine may come first, and training must be able to save the tensor for its backward pass.
            with torch.inference_mode(False):
                self._slope_H = slopes(*self.slopes).to(device)
        return self._slope_H

    def forward(self, x: Tensor, step: Step) -> Tensor:
        N, H, K = len(x), self.num_heads, self.head_dim
        if step.decode and on_gpu(x.new_empty(0, 3 * K)):
            from whorl.kernels.decode_triton import lightning_step

            assert step.state is not None
            projected, gate = side_by_side(x, self.projections)
            projected = projected.view(N, H, 3 * K)
            states = step.state.lightning[self.index][:N]
            slope_H, norm = self.slope_H(x.device), self.norm
            return self.out_proj(
                lightning_step(projected, slope_H, states, norm.weight, gate, norm.eps, step.live_S)
            )
        qkv = F.silu(self.qkv_proj(x).view(N, H, 3 * K))
        if step.decode:
            assert step.state is not None
            q, k, v = qkv.split(K, dim=-1)
            out = lightning_decode(q, k, v, self.slope_H(x.device), step.state.lightning[self.index][:N])
        elif isinstance(step.layout, Fork):
            fork = step.layout
            prefix, rest = qkv.split([fork.prefixes.num_tokens, fork.rests.num_tokens])
            prefix_out, final = self._rows(prefix, fork.prefixes, want_state=True)
            assert final is not None
            # A rest starts from the state that its prefix left behind; backward, the gradients of all
            # rests add up there. (Indexing does that in a fixed order on every device.)
            rest_out, _ = self._rows(rest, fork.rests, final[fork.parent_R])
            out = torch.cat([prefix_out, rest_out])
        elif step.state is not None:
            pool = step.state.lightning[self.index]
            out, final = self._rows(qkv, step.layout, pool[step.slots], want_state=True)
            assert final is not None
            pool[step.slots] = final
        else:
            out, _ = self._rows(qkv, step.layout)
        gate = torch.sigmoid(self.output_gate(x))
        return self.out_proj(gate * self.norm(out.reshape(N, H * K)))

    def _rows(
        self, qkv: Tensor, layout: Layout, incoming: Tensor | None = None, *, want_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of packed rows `[N, H, 3K]` that continue `incoming`: `[N, H, K]`, and the states after."""
        if on_gpu(qkv):
            from whorl.kernels.lightning_triton import lightning_packed

            slope_H = self.slope_H(qkv.device)
            return lightning_packed(qkv, slope_H, layout.lengths, state=incoming, want_state=want_state)
        q, k, v = layout.pad(qkv).permute(0, 2, 1, 3).split(self.head_dim, dim=-1)
        rows, final = lightning(
            q.contiguous(), k.contiguous(), v.contiguous(), self.slope_H(qkv.device),
            state=incoming, length_S=None if layout.rectangular else layout.length_S, want_state=want_state,
        )  # fmt: skip
        return layout.unpad(rows.permute(0, 2, 1, 3)), final


class SoftmaxAttention(nn.Module):
    """Causal attention with grouped heads, partial rotary embedding, scale 1/sqrt(K), and if configured a
    window: a query sees itself and the `window - 1` tokens before it."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.index, self.window = index, config.sliding_window
        query, key = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.width, query, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, key, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, key, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query, config.width, bias=config.out_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, step: Step) -> Tensor:
        N, K = len(x), self.head_dim
        if step.rotation is None:
            return self.o_proj(self._decode_on_gpu(x, step).view(N, self.num_heads * K))
        q = self.q_proj(x).view(N, self.num_heads, K)
        k, v = (proj(x).view(N, self.kv_heads, K) for proj in (self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *step.rotation), rotate(k, *step.rotation)
        if step.decode:
            out = self._decode(q, k, v, step)
        elif step.state is not None:
            out = self._continue(q, k, v, step)
        elif packed.takes(q) and (self.window is None or isinstance(step.layout, Layout)):
            out = packed.packed_attention(
                q,
                k,
                v,
                step.layout.rows,
                step.layout.continued,
                self.window,
                kept=step.kept,
                layer=self.index,
            )
        elif isinstance(step.layout, Fork):
            out = self._fork(q, k, v, step.layout)
        else:
            out, _, _ = self._causal(q, k, v, step.layout)
        return self.o_proj(out.reshape(N, self.num_heads * K))

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """What a token is multiplied with first."""
        return self.q_proj, self.k_proj, self.v_proj

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Packed rows that begin at position 0: outputs `[N, H, K]`, and keys and values as padded rows."""
        q, k, v = (layout.pad(y).transpose(1, 2) for y in (q, k, v))
        # Padding stands at the end of a row, where no real token looks: causality is the only mask.
        mask = None
        if self.window is not None and layout.max_length > self.window:
            mask = within(torch.arange(layout.max_length, device=q.device), layout.max_length, self.window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.kv_heads != self.num_heads
        )
        return layout.unpad(out.transpose(1, 2)), k, v

    def _fork(self, q: Tensor, k: Tensor, v: Tensor, fork: Fork) -> Tensor:
        """Prefixes attend within themselves; each rest to the keys of its prefix and causally to its own."""
        sizes = [fork.prefixes.num_tokens, fork.rests.num_tokens]
        (q_prefix, q), (k_prefix, k), (v_prefix, v) = (y.split(sizes) for y in (q, k, v))
        out_prefix, k_prefix, v_prefix = self._causal(q_prefix, k_prefix, v_prefix, fork.prefixes)
        pad, parent_R = fork.rests.pad, fork.parent_R
        out = F.scaled_dot_product_attention(
            pad(q).transpose(1, 2),
            torch.cat([k_prefix[parent_R], pad(k).transpose(1, 2)], dim=2),
            torch.cat([v_prefix[parent_R], pad(v).transpose(1, 2)], dim=2),
            attn_mask=fork.seen if self.window is None else fork.seen & fork.near(self.window),
            enable_gqa=self.kv_heads != self.num_heads,
        )
        return torch.cat([out_prefix, fork.rests.unpad(out.transpose(1, 2))])

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """One token per sequence against its own cached row. q `[S, H, K]`; the cache is extended."""
        assert step.state is not None
        assert step.start_S is not None
        S, H, K = q.shape
        keys, values = step.state.keys[self.index], step.state.values[self.index]
        row = torch.arange(S, device=q.device)
        keys[row, :, step.start_S] = k
        values[row, :, step.start_S] = v
        limit = step.key_limit
        seen = within(step.start_S, limit, self.window)
        # The query heads of a group are rows of one small product: the cache is never expanded.
        q = q.view(S, self.kv_heads, H // self.kv_heads, K)
        scores = q @ keys[:S, :, :limit].transpose(-1, -2) * K**-0.5
        scores = scores.masked_fill(~seen[:, None, None, :], float("-inf"))
        return (scores.softmax(dim=-1) @ values[:S, :, :limit]).view(S, H, K)

    def _decode_on_gpu(self, x: Tensor, step: Step) -> Tensor:
        """The same, and what is before it, in two launches that read all lengths where they lie: `[S, H, K]`."""
        from whorl.kernels.attend_triton import attend_step

        state = step.state
        assert state is not None and state.rotation is not None
        assert step.start_S is not None
        S, K = len(x), self.head_dim
        q, k, v = (made.view(S, -1, K) for made in side_by_side(x, self.projections))
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        keys, values = state.keys[self.index], state.values[self.index]
        return attend_step(
            q, k, v, state.rotation, keys, values, step.start_S, step.live_S, self.window, state.arrived, norms
        )  # fmt: skip

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Several new tokens per sequence after what its slot holds; the cache is extended."""
        assert step.state is not None
        assert step.slots is not None
        assert step.start_S is not None
        assert isinstance(step.layout, Layout)
        assert step.whole is not None
        layout, slots = step.layout, step.slots
        keys, values = step.state.keys[self.index], step.state.values[self.index]
        slot_N = slots[layout.sequence_N]
        place_N = step.start_S[layout.sequence_N] + layout.position_N
        keys[slot_N, :, place_N] = k
        values[slot_N, :, place_N] = v
        if packed.takes(q):
            if step.whole.num_tokens > layout.num_tokens:  # some go on from tokens of before
                place = slots[step.whole.sequence_N], slice(None), step.whole.position_N
                k, v = keys[place], values[place]
            rows = layout.rows, step.whole.rows
            return packed.attend(q, k, v, *rows, causal=True, window=self.window)[0]
        limit = step.key_limit
        offset = torch.arange(layout.max_length, device=q.device)
        seen = within(step.start_S[:, None] + offset, limit, self.window)
        out = F.scaled_dot_product_attention(
            layout.pad(q).transpose(1, 2), keys[slots, :, :limit], values[slots, :, :limit],
            attn_mask=seen[:, None], enable_gqa=self.kv_heads != self.num_heads,
        )  # fmt: skip
        return layout.unpad(out.transpose(1, 2))

"""The transformer: one definition for training, prefill and decode."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from whorl.kernels.where import fuses
from whorl.model.adapter import AdaptedLinear, Lora, linear_in, products
from whorl.model.attention import LightningAttention, RMSNorm, SoftmaxAttention, Step, weighted_sum
from whorl.model.config import ModelConfig
from whorl.model.experts import DenseFeedForward, Experts, Routing
from whorl.model.layout import Fork, Layout, offsets
from whorl.model.rotation import rotation
from whorl.model.state import State


@dataclass
class Hidden:
    """The normalised last hidden state of every token, and the routing of every expert layer."""

    hidden_ND: Tensor
    routing: list[Routing]


class Stream(NamedTuple):
    """The residual stream, and the branch that is to join it: what is normed next is alpha x + beta branch."""

    x: Tensor
    branch: Tensor | None = None
    factors: tuple[float, float] = (1.0, 1.0)

    def normed(self, norm: RMSNorm, post: bool) -> tuple["Stream", Tensor]:
        """The norm of the sum, and the stream that goes on: the sum, or with `post` its norm."""
        if self.branch is None:
            total, normed = self.x, norm(self.x)
        else:
            total, normed = norm.of_sum(self.x, self.branch, *self.factors)
        return Stream(normed if post else total), normed

    def joined(self) -> "Stream":
        if self.branch is None:
            return self
        return Stream(weighted_sum(self.x, self.branch, *self.factors))


class Block(nn.Module):
    """Attention then feed-forward.

    post: x = norm(x); x = alpha x + beta f(x)   twice. The residual stream carries the *normalised* value
    scaled by alpha, as the MiniMax checkpoints compute it (`postnorm`).
    pre:  x = x + f(norm(x))   twice.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        kind = config.attention[layer]
        index = config.attention[:layer].count(kind)
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        if kind == "lightning":
            self.self_attn = LightningAttention(config, layer, index)
        else:
            self.self_attn = SoftmaxAttention(config, index)
        self.feed_forward = Experts(config) if layer in config.expert_layers else DenseFeedForward(config)
        self.post = config.residual == "post"
        plain = (1.0, 1.0)
        self.attention_factors = config.residual_factors(kind) if self.post else plain
        self.feed_forward_factors = config.residual_factors("feed_forward") if self.post else plain

    def forward(
        self, stream: Stream, step: Step, replay_Nk: Tensor | None = None
    ) -> tuple[Stream, Routing | None]:
        stream, normed = stream.normed(self.input_layernorm, self.post)
        stream = stream._replace(branch=self.self_attn(normed, step), factors=self.attention_factors)
        stream, normed = stream.normed(self.post_attention_layernorm, self.post)
        fed, routing = (
            self.feed_forward(normed) if replay_Nk is None else self.feed_forward(normed, replay_Nk)
        )
        return stream._replace(branch=fed, factors=self.feed_forward_factors), routing


class Transformer(nn.Module):
    """Tokens in, hidden states out; `logits` turns chosen hidden states into fp32 logits.

    The head always computes in fp32 (MiniMax-M1, arXiv:2506.13585 section 3.2: with a bf16 head sampler and
    learner disagreed so much that the reward did not grow), float64 for a float64 model.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.checkpoint_activations = False
        self.lora: Lora | None = None
        """The settings of its adapters, if `whorl.model.lora.add_lora` gave it some."""
        self.computes_in: torch.dtype | None = None
        """The dtype that its weights are rounded to before use, where they are stored in another."""

    @torch.no_grad()
    def initialise(self, seed: int) -> "Transformer":
        """Normal weights of the configured std, zero biases, unit norms; a function of the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                values = torch.randn(parameter.shape, generator=generator) * self.config.init_std
                parameter.copy_(values)
        return self

    def projections(self) -> Iterator[tuple[nn.Module, ...]]:
        """Of every layer, what its attention multiplies a token with first."""
        for block in self.layers:
            assert isinstance(block, Block)
            yield block.self_attn.projections

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        tokens_N: Tensor,
        layout: Layout | Fork,
        state: State | None = None,
        slots: Tensor | None = None,
        *,
        replay_NLk: Tensor | None = None,
    ) -> Hidden:
        """Hidden states of packed tokens. With a `Fork`, of the tokens of its rows: pass `tokens[source_U]`.

        With `state` and `slots`, sequence s of the layout continues the sequence in slot `slots[s]`: its
        tokens see all that the slot holds, and the slot is extended by them (no gradient).

        `replay_NLk` (training only) holds experts for every token and layer with experts, -1 where the router
        is to choose.
        """
        if state is None:
            return self._run(tokens_N, Step(layout, self._rotation(layout.position_N)), replay_NLk)
        assert slots is not None, "a forward pass with a state needs the slots of its sequences"
        assert isinstance(layout, Layout), (
            "sequences that continue a state have rows of their own, not a Fork"
        )
        assert not torch.is_grad_enabled(), "a state is extended without gradient: use torch.no_grad()"
        start_S = state.length[slots]
        whole = Layout(offsets(start_S + layout.length_S))
        state.reserve(whole.max_length)
        position_N = start_S[layout.sequence_N] + layout.position_N
        step = Step(
            layout, self._rotation(position_N), state, slots, start_S, whole=whole, key_limit=whole.max_length
        )
        hidden = self._run(tokens_N, step)
        state.length[slots] += layout.length_S
        return hidden

    def decode(self, tokens_S: Tensor, state: State, live_S: Tensor | None = None) -> Hidden:
        """One further token for each of the sequences in slots 0 .. S - 1.

        With `live_S` (int64, on a GPU with Triton) nothing waits for the device: slots with 0 there stay as they
        are, and the caller has made room for the others.
        """
        S = len(tokens_S)
        start_S = state.length[:S].clone()
        end = 0
        if live_S is None:
            end = int(start_S.max()) + 1
            state.reserve(end)
        rotation = self._rotation(start_S) if state.rotation is None else None
        step = Step(_ONE_TOKEN, rotation, state, None, start_S, decode=True, live_S=live_S, key_limit=end)
        hidden = self._run(tokens_S, step)
        state.length[:S] += 1 if live_S is None else live_S
        return hidden

    def _rotation(self, position_N: Tensor) -> tuple[Tensor, Tensor]:
        return rotation(self.config, position_N, self.embed_tokens.weight.dtype)

    def _run(self, tokens_N: Tensor, step: Step, replay_NLk: Tensor | None = None) -> Hidden:
        stream = Stream(self.embed_tokens(tokens_N))
        routings: list[Routing] = []
        again = self.checkpoint_activations and torch.is_grad_enabled()
        step.kept = {} if again else None
        for block in self.layers:
            replay_Nk = None
            if replay_NLk is not None and isinstance(block.feed_forward, Experts):
                replay_Nk = replay_NLk[:, len(routings)]
            if again:
                # Joined first, so that one tensor is kept and not two.
                stream, routing = checkpoint(
                    block, stream.joined(), step, replay_Nk, use_reentrant=False, preserve_rng_state=False
                )
            else:
                stream, routing = block(stream, step, replay_Nk)
            if routing is not None:
                routings.append(routing)
        return Hidden(stream.normed(self.norm, post=False)[1], routings)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits `[..., V]` of hidden states `[..., D]`."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return linear_in(self.lm_head, hidden, wide)

    def head_products(self, hidden_MD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs `x [M, k]`, `w [V, k]` (as stored) whose products `x w^T`, in fp32 or wider, add up to the logits.

        x is in fp32 or wider, too, but where the head is plain and its products of bf16 numbers run on a GPU.
        """
        if fuses(hidden_MD) and not isinstance(self.lm_head, AdaptedLinear):
            return [(hidden_MD, self.lm_head.weight)]
        return products(self.lm_head, hidden_MD, torch.promote_types(hidden_MD.dtype, torch.float32))


_ONE_TOKEN = Layout(torch.tensor([0, 1]))

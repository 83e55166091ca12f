"""Small models of every kind the configuration can express, with random norms and biases too."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from whorl.data import cu_seqlens_of
from whorl.model.config import ModelConfig
from whorl.model.layout import Layout
from whorl.model.rope import Llama3, Yarn
from whorl.model.transformer import Transformer

SMALL: dict[str, Any] = {
    "vocab_size": 23,
    "width": 24,
    "num_layers": 4,
    "num_heads": 4,
    "head_dim": 8,
    "ffn_width": 16,
    "num_kv_heads": 2,
    "softmax_period": 2,
    "rotary_dim": 4,
    "rope_theta": 100.0,
    "max_context": 512,
}


def small(**changes: Any) -> ModelConfig:
    """A hybrid of four layers, lightning and softmax in turn, with these settings changed."""
    return ModelConfig(**{**SMALL, **changes})


def _decoder(**changes: Any) -> ModelConfig:
    """A pre-norm decoder of three softmax layers."""
    return small(**{"residual": "pre", "softmax_period": 1, "num_layers": 3, "rotary_dim": None} | changes)


CONFIGS = {
    "hybrid moe": small(num_experts=4),
    "hybrid dense": small(softmax_period=3),
    "softmax moe": small(softmax_period=1, num_layers=2, num_experts=3),
    "lightning dense": small(softmax_period=0, num_layers=2),
    "lightning moe top 3": small(softmax_period=0, num_layers=2, num_experts=5, experts_per_token=3),
    "qwen": small(
        residual="pre",
        softmax_period=1,
        num_layers=2,
        qkv_bias=True,
        qk_norm=True,
        tied=True,
        rotary_dim=None,
        norm_eps=1e-6,
    ),
    "pre-norm hybrid": small(residual="pre", num_kv_heads=None, num_experts=4),
    "alpha of its own": small(alpha=1.5, num_layers=3, rotary_dim=0),
    "factors by branch": small(
        alpha=(1.5, 2.0, 2.5),
        beta=(0.5, 0.75, 1.25),
        attention_layers=("softmax", "lightning", "lightning", "softmax"),
    ),
    "six heads": small(num_heads=6, num_kv_heads=3),
    "mistral with a window": _decoder(sliding_window=5),
    "llama 3": _decoder(rope_scaling=Llama3(8.0, 40, 1.0, 4.0), out_bias=True, qkv_bias=True, ffn_bias=True),
    "yarn": _decoder(rope_scaling=Yarn(4.0, 40), rotary_dim=8),
    "qwen moe, one layer dense": _decoder(
        num_experts=4, router_renormalised=False, dense_layers=(1,), dense_ffn_width=20, qk_norm=True
    ),
}


def make_model(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    """Weights of std 0.2, about 1 / sqrt(width): every part of the network shows in its output."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale, centre = (0.3, 1.0) if name.endswith("norm.weight") else (0.2, 0.0)
            parameter.copy_(centre + scale * values)
    return model.to(dtype)


def weights_of(model: Transformer) -> dict[str, np.ndarray]:
    return {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}


def random_tokens(config: ModelConfig, lengths: list[int], seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (sum(lengths),), generator=generator)


def layout_of(*lengths: int) -> Layout:
    return Layout(cu_seqlens_of(lengths))


def forward_log_probs(model: Transformer, tokens: Tensor, *lengths: int, **state) -> Tensor:
    """Log-probabilities `[N, V]` of packed sequences, without gradient."""
    with torch.no_grad():
        hidden = model(tokens, layout_of(*lengths), **state).hidden_ND
        return model.logits(hidden).log_softmax(dim=-1)


def decode_log_probs(model: Transformer, tokens: Tensor, state) -> Tensor:
    """Log-probabilities `[S, V]` after one further token of every sequence."""
    with torch.no_grad():
        return model.logits(model.decode(tokens, state).hidden_ND).log_softmax(dim=-1)

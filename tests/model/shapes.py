"""Small models of every kind the configuration can express, with random norms and biases too."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from whorl.data import cu_seqlens_of
from whorl.model.config import ModelConfig
from whorl.model.layout import Layout
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

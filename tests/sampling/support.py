"""Small models of every kind, and engines over them."""

import numpy as np
import torch

from whorl.data import cu_seqlens_of
from whorl.model.config import ModelConfig
from whorl.model.layout import Layout
from whorl.model.transformer import Transformer
from whorl.sampling.draw import Sampling, stream_key
from whorl.sampling.engine import Engine
from whorl.sampling.request import Completion, Request

VOCABULARY = 40


def model(period: int = 2, experts: int = 4, seed: int = 0, **changes) -> Transformer:
    """Hybrid (period 2), pure softmax (1) or pure lightning (0); weights large enough for sharp choices."""
    shape = {
        "vocab_size": VOCABULARY, "width": 32, "num_layers": 3, "num_heads": 4, "head_dim": 8, "ffn_width": 16,
        "num_kv_heads": 2, "softmax_period": period, "num_experts": experts, "rotary_dim": 4,
        "rope_theta": 10_000.0, "max_context": 900, "init_std": 0.2,
    }  # fmt: skip
    return Transformer(ModelConfig(**(shape | changes))).initialise(seed)


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


def requests(tokens: list[list[int]], **sampling) -> list[Request]:
    settings = Sampling(**({"max_tokens": 20} | sampling))
    return [Request(ids, stream_key("test", index), settings) for index, ids in enumerate(tokens)]


@torch.no_grad()
def teacher_forced(model: Transformer, prompt: list[int], written: np.ndarray, temperature: float = 1.0):
    """Log-probs of the written tokens from one full forward pass over the whole sequence."""
    tokens = torch.tensor([*prompt, *written.tolist()])
    hidden = model(tokens, Layout(cu_seqlens_of([len(tokens)]))).hidden_ND
    logp = (model.logits(hidden) / temperature).log_softmax(-1)
    place = torch.arange(len(prompt) - 1, len(tokens) - 1)
    return logp[place, tokens[place + 1]].numpy()


def same(first: Completion, second: Completion, tolerance: float = 1e-5) -> bool:
    """Equal tokens and stop, log-probs equal within `tolerance` nats."""
    return (
        first.stop == second.stop
        and first.tokens.tolist() == second.tokens.tolist()
        and float(np.abs(first.logp - second.logp).max()) <= tolerance
    )


__all__ = ["Engine", "model", "prompts", "requests", "same", "teacher_forced"]

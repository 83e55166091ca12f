"""Tiny random checkpoints of every family, made by transformers itself."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from whorl.data import cu_seqlens_of
from whorl.model.formats.pretrained import load_pretrained
from whorl.model.layout import Layout
from whorl.model.transformer import Transformer

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
HYBRID = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "num_local_experts": 4,
    "block_size": 16,
    "linear_attn_alpha_factor": 1.7,
    "linear_attn_beta_factor": 0.9,
    "full_attn_alpha_factor": 1.4,
    "full_attn_beta_factor": 1.1,
    "mlp_alpha_factor": 1.6,
    "mlp_beta_factor": 0.8,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}

FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "minimax": (transformers.MiniMaxConfig, HYBRID),
    "llama": (transformers.LlamaConfig, {}),
    "llama 3": (transformers.LlamaConfig, {"rope_parameters": LLAMA_3, "tie_word_embeddings": True}),
    "llama, biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama, linear rope": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}},
    ),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2, yarn": (transformers.Qwen2Config, {"rope_parameters": YARN}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "mistral, window": (transformers.MistralConfig, {"sliding_window": 7}),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
    "qwen3 moe": (transformers.Qwen3MoeConfig, EXPERTS | {"norm_topk_prob": True, "head_dim": 16}),
    "qwen3 moe, mixed": (
        transformers.Qwen3MoeConfig,
        EXPERTS | {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": []},
    ),
}


def theirs(name: str, **changes: Any):
    """The model of transformers: weights, norms and biases all random, so that each shows in the output."""
    kind, own = FAMILIES[name]
    model = transformers.AutoModelForCausalLM.from_config(
        kind(**SMALL | own | changes), attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale, centre = (0.3, 1.0) if "norm" in key else (0.2, 0.0)
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(model, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder


def tokens_of(*lengths: int, vocab_size: int = 61) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def their_logits(model, tokens: Tensor) -> Tensor:
    """Logits `[T, V]` of one sequence without padding."""
    with torch.no_grad():
        return model(input_ids=tokens[None]).logits[0].float()


def our_logits(model: Transformer, *sequences: Tensor) -> list[Tensor]:
    """Logits of sequences that are packed into one row."""
    with torch.no_grad():
        layout = Layout(cu_seqlens_of([len(s) for s in sequences]))
        logits = model.logits(model(torch.cat(sequences), layout).hidden_ND)
    return list(logits.split([len(s) for s in sequences]))


def gap(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())


class Differences(NamedTuple):
    """max |logit difference| to transformers, and the worst parameter's relative gradient difference."""

    alone: float
    packed: float
    left_padded: float
    gradient: float
    largest_logit: float


def differences(name: str, folder: Path) -> Differences:
    """Sequences of 40, 19 and 1 tokens: each alone, ours packed into one row, theirs padded at the left."""
    model = theirs(name)
    ours = load_pretrained(saved(model, folder / "theirs")).model
    sequences = tokens_of(40, 19, 1)
    expected = [their_logits(model, tokens) for tokens in sequences]
    alone = [our_logits(ours, tokens)[0] for tokens in sequences]
    packed = our_logits(ours, *sequences)
    ids, mask = torch.zeros(3, 40, dtype=torch.int64), torch.zeros(3, 40, dtype=torch.int64)
    for row, tokens in enumerate(sequences):
        ids[row, 40 - len(tokens) :], mask[row, 40 - len(tokens) :] = tokens, 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
    return Differences(
        max(map(gap, alone, expected)),
        max(map(gap, packed, expected)),
        max(gap(padded[row, 40 - len(logits) :], logits) for row, logits in enumerate(packed)),
        _gradient_difference(model, ours, folder),
        max(float(logits.abs().max()) for logits in expected),
    )


def _gradient_difference(model, ours: Transformer, folder: Path) -> float:
    [tokens] = tokens_of(40)
    weight = torch.randn(40, 61, generator=torch.Generator().manual_seed(2))
    (model(input_ids=tokens[None]).logits[0].log_softmax(-1) * weight).sum().backward()
    hidden = ours(tokens, Layout(cu_seqlens_of([40]))).hidden_ND
    (ours.logits(hidden).log_softmax(-1) * weight).sum().backward()
    # Their gradients, saved as if they were weights, come back under our names.
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    expected = load_pretrained(saved(model, folder / "gradients", state_dict=gradients)).model
    worst = 0.0
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, f"{key} has no gradient"
        reference = expected.get_parameter(key).detach()
        worst = max(worst, gap(parameter.grad, reference) / float(reference.abs().max()))
    return worst

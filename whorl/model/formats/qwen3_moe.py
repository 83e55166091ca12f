"""Qwen3-MoE (arXiv:2505.09388 section 2): Qwen3 with experts; layers may be dense, weights not renormalised."""

from typing import Any

from whorl.model.config import ModelConfig
from whorl.model.formats.base import DENSE, QWEN_EXPERTS, STACKED_EXPERTS, Format
from whorl.model.formats.decoder import no_window, read_decoder, write_shape
from whorl.model.formats.keys import Keys


def _read(keys: Keys) -> ModelConfig:
    no_window(keys)
    bias, step = keys.take("attention_bias", False), keys.take("decoder_sparse_step", 1)
    only_dense = keys.take("mlp_only_layers", [])
    num_layers = keys.take("num_hidden_layers")
    dense = tuple(layer for layer in range(num_layers) if layer in only_dense or (layer + 1) % step)
    return read_decoder(
        keys,
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        num_experts=keys.one_of(("num_experts", "num_local_experts"), 128),
        experts_per_token=keys.take("num_experts_per_tok", 8),
        router_renormalised=keys.take("norm_topk_prob", False),
        dense_layers=dense,
        dense_ffn_width=keys.take("intermediate_size"),
        ffn_width=keys.take("moe_intermediate_size", 768),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config) | {
        "attention_bias": config.qkv_bias,
        "decoder_sparse_step": 1,
        "intermediate_size": config.dense_width,
        "mlp_only_layers": list(config.dense_layers),
        "moe_intermediate_size": config.ffn_width,
        "norm_topk_prob": config.router_renormalised,
        "num_experts": config.num_experts or config.experts_per_token,
        "num_experts_per_tok": config.experts_per_token,
        "use_sliding_window": False,
    }


QWEN3_MOE = Format(
    "qwen3_moe", "Qwen3MoeForCausalLM", _read, _write, (DENSE | QWEN_EXPERTS, DENSE | STACKED_EXPERTS)
)

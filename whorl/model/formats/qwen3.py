"""Qwen3 (arXiv:2505.09388 section 2): RMSNorm over each head's query and key in place of biases."""

from typing import Any

from whorl.model.config import ModelConfig
from whorl.model.formats.base import DENSE, Format
from whorl.model.formats.decoder import no_window, read_decoder, write_shape
from whorl.model.formats.keys import Keys


def _read(keys: Keys) -> ModelConfig:
    no_window(keys)
    bias = keys.take("attention_bias", False)
    return read_decoder(keys, head_dim=128, qk_norm=True, qkv_bias=bias, out_bias=bias)


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config) | {"attention_bias": config.qkv_bias, "use_sliding_window": False}


QWEN3 = Format("qwen3", "Qwen3ForCausalLM", _read, _write, (DENSE,))

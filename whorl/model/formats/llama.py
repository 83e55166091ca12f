"""Llama 2 and 3.x (arXiv:2407.21783): the plain decoder; 3.1 and later stretch their rotary frequencies."""

from typing import Any

from whorl.model.config import ModelConfig
from whorl.model.formats.base import DENSE, Format
from whorl.model.formats.decoder import read_decoder, write_shape
from whorl.model.formats.keys import Keys


def _read(keys: Keys) -> ModelConfig:
    bias = keys.take("attention_bias", False)
    return read_decoder(keys, qkv_bias=bias, out_bias=bias, ffn_bias=keys.take("mlp_bias", False))


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.ffn_bias}


LLAMA = Format("llama", "LlamaForCausalLM", _read, _write, (DENSE,))

"""Qwen2 and Qwen2.5 (arXiv:2412.15115): biases of query, key and value."""

from typing import Any

from whorl.model.config import ModelConfig
from whorl.model.formats.base import DENSE, Format
from whorl.model.formats.decoder import no_window, read_decoder, write_shape
from whorl.model.formats.keys import Keys


def _read(keys: Keys) -> ModelConfig:
    no_window(keys)
    return read_decoder(keys, qkv_bias=True)


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config) | {"use_sliding_window": False}


QWEN2 = Format("qwen2", "Qwen2ForCausalLM", _read, _write, (DENSE,))

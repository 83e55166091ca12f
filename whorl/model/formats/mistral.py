"""Mistral (arXiv:2310.06825): the plain decoder; version 0.1 sees 4096 tokens back."""

from typing import Any

from whorl.model.config import ModelConfig
from whorl.model.formats.base import DENSE, Format
from whorl.model.formats.decoder import read_decoder, write_shape
from whorl.model.formats.keys import Keys


def _read(keys: Keys) -> ModelConfig:
    # Absent means 4096 and null means none: transformers' default and what later releases write.
    return read_decoder(keys, sliding_window=keys.nullable("sliding_window", 4096))


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config) | {"sliding_window": config.sliding_window}


MISTRAL = Format("mistral", "MistralForCausalLM", _read, _write, (DENSE,))

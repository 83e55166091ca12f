"""Mixtral (arXiv:2401.04088): Mistral with experts in every layer."""

from typing import Any

from whorl.model.config import ModelConfig
from whorl.model.formats.base import MIXTRAL_EXPERTS, STACKED_EXPERTS, Format
from whorl.model.formats.decoder import read_decoder, write_shape
from whorl.model.formats.keys import Keys


def read_experts(keys: Keys) -> dict[str, Any]:
    """Mixtral's settings of experts, which MiniMax took over."""
    keys.must("router_jitter_noise", 0.0)
    num_experts = keys.one_of(("num_local_experts", "num_experts"), 8)
    if num_experts < 1:
        raise ValueError(
            f"{keys.source}: num_local_experts={num_experts}; every layer of this family has experts"
        )
    return {
        "num_experts": num_experts,
        "experts_per_token": keys.take("num_experts_per_tok", 2),
    }


def write_experts(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts_per_tok": config.experts_per_token,
        # There is no 0 here: a dense model comes back as another one, and is refused for that.
        "num_local_experts": config.num_experts or config.experts_per_token,
        "router_jitter_noise": 0.0,
    }


def _read(keys: Keys) -> ModelConfig:
    window = keys.nullable("sliding_window", None)
    return read_decoder(keys, eps=1e-5, theta=1e6, sliding_window=window, **read_experts(keys))


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config) | write_experts(config) | {"sliding_window": config.sliding_window}


MIXTRAL = Format("mixtral", "MixtralForCausalLM", _read, _write, (MIXTRAL_EXPERTS, STACKED_EXPERTS))

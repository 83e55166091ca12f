"""MiniMax-Text-01 and MiniMax-M1 (arXiv:2501.08313, arXiv:2506.13585), in three layouts.

The releases (`MiniMaxText01ForCausalLM`, `MiniMaxM1ForCausalLM`) and transformers (`MiniMaxForCausalLM`) have
the same weight names and spell their settings differently; each spelling is read in each layout. Where
transformers computes something else than the releases' own code, the releases are followed (docs/models.md).
"""

from collections.abc import Mapping
from typing import Any

from whorl.model.config import Attention, Branch, ModelConfig
from whorl.model.formats.base import MIXTRAL_EXPERTS, STACKED_EXPERTS, Format
from whorl.model.formats.decoder import read_shape, write_shape
from whorl.model.formats.keys import Keys
from whorl.model.formats.mixtral import read_experts, write_experts

_RELEASE_FACTORS: Mapping[Branch, str] = {
    "lightning": "layernorm_linear_attention_{}",
    "softmax": "layernorm_full_attention_{}",
    "feed_forward": "layernorm_mlp_{}",
}
_TRANSFORMERS_FACTORS: Mapping[Branch, str] = {
    "lightning": "linear_attn_{}_factor",
    "softmax": "full_attn_{}_factor",
    "feed_forward": "mlp_{}_factor",
}
_RELEASED = (80, 6144, 200_064)
"""Layers, width and vocabulary of the releases, whose softmax layers rotate 64 of 128 dimensions."""


def _read(keys: Keys) -> ModelConfig:
    keys.must("postnorm", True)
    keys.must("shared_intermediate_size", 0)
    keys.must("sliding_window")
    keys.ignore("shared_moe_mode")  # how to mix in the shared expert that no release has
    layers = _layers(keys)
    factors: dict[str, Any] = {
        name: tuple(
            float(keys.one_of((_RELEASE_FACTORS[b].format(name), _TRANSFORMERS_FACTORS[b].format(name)), 1.0))
            for b in _RELEASE_FACTORS
        )
        for name in ("alpha", "beta")
    }
    shape = read_shape(keys, eps=1e-5, theta=1e6, partial=True)
    rotary_dim = keys.take("rotary_dim", shape["rotary_dim"])
    if rotary_dim is None and _RELEASED == (shape["num_layers"], shape["width"], shape["vocab_size"]):
        raise ValueError(
            f'{keys.source} has the shape of a MiniMax release but no rotary_dim; add "rotary_dim": 64, which '
            "they were trained with"
        )
    experts = read_experts(keys)
    keys.finish()
    own: dict[str, Any] = {"attention_layers": layers, "rotary_dim": rotary_dim, "residual": "post"}
    return ModelConfig(**shape | experts | factors | own)


def _layers(keys: Keys) -> tuple[Attention, ...]:
    """`attn_type_list` (0: lightning) or `layer_types`; neither: transformers' default, softmax first."""
    numbers = {0: "lightning", 1: "softmax"}
    words = {"linear_attention": "lightning", "full_attention": "softmax"}
    num_layers = keys.take("num_hidden_layers")
    by_number, by_word = keys.take("attn_type_list", None), keys.take("layer_types", None)
    given = [[numbers.get(n) for n in by_number or ()], [words.get(w) for w in by_word or ()]]
    given = [kinds for kinds in given if kinds] or [(["softmax", "lightning"] * num_layers)[:num_layers]]
    if any(kinds != given[0] for kinds in given) or None in given[0] or len(given[0]) != num_layers:
        raise ValueError(
            f"{keys.source}: attn_type_list {by_number}, layer_types {by_word}; expected 0 (lightning) or 1 "
            f"(softmax), or linear_attention or full_attention, for each of {num_layers} layers"
        )
    return tuple(given[0])  # type: ignore[arg-type]


def _write(config: ModelConfig) -> dict[str, Any]:
    """In the releases' spelling."""
    return _common(config, _RELEASE_FACTORS) | {
        "attn_type_list": [int(kind == "softmax") for kind in config.attention],
        "postnorm": True,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
    }


def _write_for_transformers(config: ModelConfig) -> dict[str, Any]:
    words = {"lightning": "linear_attention", "softmax": "full_attention"}
    return _common(config, _TRANSFORMERS_FACTORS) | {
        "layer_types": [words[kind] for kind in config.attention],
        "postnorm": True,
    }


def _common(config: ModelConfig, spelling: Mapping[Branch, str]) -> dict[str, Any]:
    values = write_shape(config) | write_experts(config) | {"rotary_dim": config.rotary}
    for branch, template in spelling.items():
        alpha, beta = config.residual_factors(branch)
        values |= {template.format("alpha"): alpha, template.format("beta"): beta}
    return values


def _caveat(config: ModelConfig) -> str:
    """Where transformers 5.23 departs from the releases."""
    if config.rotary != config.head_dim and "softmax" in config.attention:
        return (
            f"transformers ignores rotary_dim={config.rotary} and rotates all {config.head_dim} dimensions of its "
            "MiniMax; the format minimax_m1 is the releases' own"
        )
    if config.num_heads & (config.num_heads - 1) and "lightning" in config.attention:
        return (
            f"transformers gives {config.num_heads} heads other decays than the releases' code does, for any "
            "number that is no power of two"
        )
    return ""


_NAMES = (MIXTRAL_EXPERTS, STACKED_EXPERTS)
MINIMAX = Format("minimax", "MiniMaxForCausalLM", _read, _write_for_transformers, _NAMES, caveat=_caveat)
MINIMAX_M1 = Format("minimax_m1", "MiniMaxM1ForCausalLM", _read, _write, _NAMES, aliases=("MiniMaxM1",))
MINIMAX_TEXT_01 = Format(
    "minimax_text_01", "MiniMaxText01ForCausalLM", _read, _write, _NAMES,
    aliases=("MiniMaxText01", "minimax_text01"),
)  # fmt: skip

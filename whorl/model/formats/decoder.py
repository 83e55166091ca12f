"""What Llama, Mistral, Qwen and Mixtral have in common: a pre-norm decoder with softmax attention alone."""

from typing import Any

from whorl.model.config import ModelConfig
from whorl.model.formats.keys import Keys, head_dim_of
from whorl.model.rope import Linear, Llama3, RopeScaling, Yarn

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_width",
    "max_position_embeddings": "max_context",
}
"""Settings that every family has, theirs -> ours."""

_SCALINGS: dict[str, tuple[type[RopeScaling], dict[str, str]]] = {
    "linear": (Linear, {"factor": "factor"}),
    "llama3": (
        Llama3,
        {
            "factor": "factor",
            "original_max_position_embeddings": "original_context",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
        },
    ),
    "yarn": (
        Yarn,
        {
            "factor": "factor",
            "original_max_position_embeddings": "original_context",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "attention_factor": "attention_factor",
        },
    ),
}


def read_shape(
    keys: Keys, *, eps: float, theta: float, head_dim: int | None = None, partial: bool = False
) -> dict[str, Any]:
    """Arguments of `ModelConfig` that all families spell alike; absent ones as transformers has them.

    `partial` says that a share of each head may be rotated (`partial_rotary_factor`).
    """
    keys.must("hidden_act", "silu")
    keys.must("attention_dropout", 0.0)
    keys.must("is_encoder_decoder", False)
    if keys.take("quantization_config", None) is not None:
        raise ValueError(
            f"{keys.source}: quantised weights are not supported; use the unquantised checkpoint"
        )
    shape = {ours: keys.take(theirs) for theirs, ours in SIZES.items()}
    rope_theta, scaling, share = read_rope(keys, theta)
    if share != 1 and not partial:
        raise ValueError(f"{keys.source}: partial_rotary_factor {share} is not supported in this family")
    shape["head_dim"] = head_dim_of(keys, head_dim)
    return shape | {
        "rotary_dim": None if share == 1 else int(shape["head_dim"] * share),
        "num_kv_heads": keys.take("num_key_value_heads", shape["num_heads"]),
        "norm_eps": keys.take("rms_norm_eps", eps),
        "tied": keys.take("tie_word_embeddings", False),
        "init_std": keys.take("initializer_range", 0.02),
        "rope_theta": float(rope_theta),
        "rope_scaling": scaling,
    }


def write_shape(config: ModelConfig) -> dict[str, Any]:
    """The settings that `read_shape` reads, in the spelling of transformers 4, which 5 reads too."""
    return {theirs: getattr(config, ours) for theirs, ours in SIZES.items()} | {
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "initializer_range": config.init_std,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": _write_scaling(config.rope_scaling),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "use_cache": True,
    }


def read_decoder(keys: Keys, *, eps: float = 1e-6, theta: float = 10_000.0, **own: Any) -> ModelConfig:
    """A pre-norm decoder of softmax layers; `own` are the family's further arguments of `ModelConfig`."""
    shape = read_shape(keys, eps=eps, theta=theta, head_dim=own.pop("head_dim", None))
    keys.finish()
    return ModelConfig(**shape | {"residual": "pre", "softmax_period": 1} | own)


def no_window(keys: Keys) -> None:
    """Qwen's settings name a window that no release uses."""
    keys.must("use_sliding_window", False)
    keys.must("use_mrope", False)
    keys.ignore("sliding_window", "max_window_layers")
    kinds = set(keys.take("layer_types", ["full_attention"]))
    if kinds != {"full_attention"}:
        raise ValueError(f"{keys.source}: layer_types of {', '.join(sorted(kinds))}; expected full_attention")


def read_rope(keys: Keys, default_theta: float) -> tuple[float, RopeScaling | None, float]:
    """Base, scaling and share of the head: `rope_theta` and `rope_scaling` or, newer, `rope_parameters`."""
    values = dict(keys.take("rope_parameters", None) or {})
    scaling = dict(keys.take("rope_scaling", None) or {})
    if values and scaling and values != scaling:
        raise ValueError(f"{keys.source} has rope_parameters and rope_scaling, which differ")
    values = values or scaling
    top = keys.take("rope_theta", None)
    theta = values.pop("rope_theta", None) or top or default_theta
    kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)
    share = values.pop("partial_rotary_factor", None) or keys.take("partial_rotary_factor", 1.0)
    if kind == "default":
        return theta, None, share
    if kind not in _SCALINGS:
        raise ValueError(
            f"{keys.source}: rope scaling {kind!r} is not supported; expected one of {', '.join(_SCALINGS)}"
        )
    made, names = _SCALINGS[kind]
    if "original_max_position_embeddings" in names:
        values.setdefault("original_max_position_embeddings", keys.take("max_position_embeddings"))
    unknown = sorted(name for name, value in values.items() if name not in names and value is not None)
    if unknown:
        raise ValueError(f"{keys.source}: rope scaling {kind!r} with the unknown setting {unknown[0]!r}")
    try:
        given = {names[name]: value for name, value in values.items() if value is not None}
        return theta, made(**given), share
    except TypeError as error:
        raise ValueError(f"{keys.source}: rope scaling {kind!r} is incomplete: {error}") from error


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values = {theirs: getattr(scaling, ours) for theirs, ours in _SCALINGS[scaling.kind][1].items()}
    return {"rope_type": scaling.kind} | {name: value for name, value in values.items() if value is not None}

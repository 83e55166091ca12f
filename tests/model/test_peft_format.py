"""Adapters written here and read by peft over the transformers model, and the other way round: equal logits."""

import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.shapes import layout_of
from whorl.model.adapter import ATTENTION, FEED_FORWARD, Lora
from whorl.model.config import ModelConfig
from whorl.model.lora import adapters_of, add_lora
from whorl.model.peft_format import load_adapter, save_adapter
from whorl.model.transformer import Transformer

os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning",
)

V, D, F, L, H, K = 29, 32, 48, 2, 4, 8
SHARED = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": H,
    "num_key_value_heads": 2, "head_dim": K, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
OURS = {
    "vocab_size": V, "width": D, "ffn_width": F, "num_layers": L, "num_heads": H, "num_kv_heads": 2, "head_dim": K,
    "max_context": 128,
}  # fmt: skip
DENSE = {**OURS, "residual": "pre", "softmax_period": 1, "rope_theta": 10_000.0, "norm_eps": 1e-6}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def minimax():
    return transformers.MiniMaxForCausalLM(
        transformers.MiniMaxConfig(
            **SHARED, **EXPERTS, rope_parameters=ROPE, layer_types=["linear_attention", "full_attention"],
            block_size=16, rms_norm_eps=1e-5, tie_word_embeddings=False,
        )
    ), ModelConfig(**OURS, softmax_period=2, num_experts=4, alpha=1.0, rope_theta=10_000.0)  # fmt: skip


def qwen2():
    config = transformers.Qwen2Config(**SHARED, rope_parameters=ROPE, tie_word_embeddings=True)
    return transformers.Qwen2ForCausalLM(config), ModelConfig(**DENSE, qkv_bias=True, tied=True)


def llama():
    config = transformers.LlamaConfig(**SHARED, rope_parameters=ROPE, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config), ModelConfig(**DENSE)


def mixtral():
    config = transformers.MixtralConfig(
        **SHARED, **EXPERTS, rope_parameters=ROPE, rms_norm_eps=1e-6, tie_word_embeddings=False,
        sliding_window=None,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config), ModelConfig(**DENSE, num_experts=4)


MODELS = {"minimax": minimax, "qwen2": qwen2, "llama": llama, "mixtral": mixtral}


def pair(kind):
    """A random transformers model, and ours with its weights."""
    torch.manual_seed(0)
    theirs, config = MODELS[kind]()
    theirs = theirs.eval()
    ours = Transformer(config)
    weights = dict(theirs.named_parameters())

    def of(name: str) -> torch.Tensor:
        if name == "lm_head.weight" and config.tied:
            name = "embed_tokens.weight"
        name = name if name == "lm_head.weight" else f"model.{name}"
        name = name.replace("feed_forward", "mlp")
        if name.endswith("gate_up.weight"):
            return torch.cat([weights[name.replace("gate_up", part)] for part in ("gate_proj", "up_proj")])
        for stack in ("gate_up", "down"):
            if name.endswith(f".{stack}"):
                name = name.replace(stack, f"experts.{stack}_proj")
        return weights[name.replace("down.weight", "down_proj.weight")]

    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(of(name))
    return ours, theirs


TOKENS = torch.randint(V, (11,), generator=torch.Generator().manual_seed(3))


def our_logits(model):
    with torch.no_grad():
        return model.logits(model(TOKENS, layout_of(len(TOKENS))).hidden_ND)


def their_logits(model):
    with torch.no_grad():
        return model(TOKENS[None], use_cache=False).logits[0]


def stir(tensors, scale):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))


def targets(kind, *, head: bool, experts: tuple[str, ...] = FEED_FORWARD) -> tuple[str, ...]:
    lightning = ("qkv_proj", "output_gate", "out_proj") if kind == "minimax" else ()
    router = ("gate",) if kind in ("minimax", "mixtral") else ()
    return (*lightning, *ATTENTION[3:], *experts, *router, *(("lm_head",) if head else ()))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("experts", [("gate_up", "down"), ("down",), ("gate_up",)], ids="+".join)
def test_peft_reads_what_is_written_here(kind, experts, tmp_path):
    ours, theirs = pair(kind)
    assert (our_logits(ours) - their_logits(theirs)).abs().max() < 1e-5
    before = our_logits(ours)
    add_lora(ours, Lora(3, 6.0, targets(kind, head=True, experts=experts)), seed=0)
    stir([adapter.B for adapter in adapters_of(ours).values()], 0.1)
    save_adapter(tmp_path, ours)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path)
    assert (our_logits(ours) - before).abs().max() > 0.1
    assert (our_logits(ours) - their_logits(adapted)).abs().max() < 1e-5

    again = load_adapter(tmp_path, pair(kind)[0])
    assert again.lora == Lora(3, 6.0, tuple(sorted(ours.lora.targets)))
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_writes_is_read_here(kind, rslora, tmp_path):
    ours, theirs = pair(kind)
    experts = kind in ("minimax", "mixtral")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
    modules += ["qkv_proj", "out_proj", "output_gate"] if kind == "minimax" else []
    modules += [] if experts else ["gate_proj", "up_proj", "down_proj"]
    parameters = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"] if experts else None
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=modules, target_parameters=parameters, use_rslora=rslora
    )
    adapted = peft.get_peft_model(theirs, config).eval()
    stir([p for name, p in adapted.named_parameters() if "lora_" in name], 0.2)
    adapted.save_pretrained(tmp_path)
    loaded = load_adapter(tmp_path, ours)
    assert loaded.lora is not None and loaded.lora.scale == (4.0 if rslora else 2.0)
    assert (our_logits(loaded) - their_logits(adapted)).abs().max() < 2e-5


def test_the_parts_of_a_fused_matrix_are_not_mixed_up(tmp_path):
    """Negative control: gate and up exchanged, or a stack in the order of peft's B for a plain reshape."""
    for kind, change in (("llama", "swap"), ("mixtral", "reshape")):
        ours, theirs = pair(kind)
        add_lora(ours, Lora(3, 6.0, ("gate_up", "down")), seed=0)
        stir([adapter.B for adapter in adapters_of(ours).values()], 0.2)
        folder = tmp_path / kind
        save_adapter(folder, ours)
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, tensor in list(tensors.items()):
            if change == "swap" and "gate_proj.lora_B" in name:
                other = name.replace("gate_proj", "up_proj")
                tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
            if change == "reshape" and name.endswith("lora_B.weight"):
                tensors[name] = tensor.unflatten(1, (3, 4)).transpose(1, 2).flatten(1).contiguous()
        save_file(tensors, folder / "adapter_model.safetensors")
        adapted = peft.PeftModel.from_pretrained(theirs, folder)
        assert (our_logits(ours) - their_logits(adapted)).abs().max() > 1e-2


def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path):
    ours, _ = pair("llama")
    add_lora(ours, Lora(2, targets=("q_proj", "down")), seed=0)
    save_adapter(tmp_path, ours)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")

    def written(change=None, **settings):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | settings))
        save_file(change(dict(tensors)) if change else tensors, tmp_path / "adapter_model.safetensors")
        return tmp_path

    with pytest.raises(ValueError, match="use_dora True; supported is False"):
        load_adapter(written(use_dora=True), pair("llama")[0])
    with pytest.raises(ValueError, match=r"rank_pattern .*; supported is {}"):
        load_adapter(written(rank_pattern={"q_proj": 4}), pair("llama")[0])

    def renamed(found):
        found["base_model.model.model.layers.0.self_attn.q_prj.lora_A.weight"] = torch.zeros(2, D)
        return found

    with pytest.raises(
        ValueError, match=r"adapts model.layers.0.self_attn.q_prj, .* nearest .*self_attn.q_proj"
    ):
        load_adapter(written(renamed), pair("llama")[0])

    def without(found):
        del found["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
        return found

    with pytest.raises(
        ValueError, match=r"has no .*layers.1.mlp.down_proj.lora_B.weight; a target is adapted in"
    ):
        load_adapter(written(without), pair("llama")[0])

    def wider(found):
        return {name: torch.cat([t, t], 1) if "q_proj.lora_A" in name else t for name, t in found.items()}

    with pytest.raises(ValueError, match=r"q_proj.lora_A is \(2, 64\) here; expected \(2, 32\)"):
        load_adapter(written(wider), pair("llama")[0])
    with pytest.raises(ValueError, match="holds no adapter of peft"):
        load_adapter(tmp_path / "nowhere", pair("llama")[0])
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(tmp_path, pair("llama")[0])

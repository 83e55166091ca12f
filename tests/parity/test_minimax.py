"""MiniMax: equal to transformers where that is right, to the releases' own arithmetic where it is not.

The judge is `tests/model/plain.py`, one token after the other in float64. For each known fault of transformers
5.23 (docs/models.md) a test shows that theirs departs from it and ours does not.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import whorl.model.attention as attention
from tests.parity.families import gap, our_logits, saved, their_logits, theirs, tokens_of
from tests.parity.faults import FAULTS, departure
from whorl.data import cu_seqlens_of
from whorl.model.formats.base import explicit
from whorl.model.formats.pretrained import BUFFERS, load_pretrained
from whorl.model.layout import Layout
from whorl.model.state import State

LIMIT = 2e-5
VISIBLE = 1e-2
"""A fault moves some log-probability by more nats than this, or a state by a larger share."""

RELEASE_SPELLING = {
    "linear_attn_alpha_factor": "layernorm_linear_attention_alpha",
    "linear_attn_beta_factor": "layernorm_linear_attention_beta",
    "full_attn_alpha_factor": "layernorm_full_attention_alpha",
    "full_attn_beta_factor": "layernorm_full_attention_beta",
    "mlp_alpha_factor": "layernorm_mlp_alpha",
    "mlp_beta_factor": "layernorm_mlp_beta",
}


def released(source, target, architecture, model_type):
    """The checkpoint as the releases have it: their spelling of the settings, no decay buffers."""
    settings = json.loads((source / "config.json").read_text())
    layer_types = settings.pop("layer_types")
    rope = settings.pop("rope_parameters")
    settings = {
        RELEASE_SPELLING.get(key, key): value for key, value in settings.items() if key != "block_size"
    }
    settings |= {"attn_type_list": [int(kind == "full_attention") for kind in layer_types]}
    settings |= {"postnorm": True, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid"}
    settings |= {
        "rope_theta": rope["rope_theta"],
        "rotary_dim": settings.get("rotary_dim", settings["head_dim"]),
    }
    settings |= {
        "architectures": [architecture],
        "model_type": model_type,
        "auto_map": {"AutoConfig": "x.py"},
    }
    target.mkdir()
    (target / "config.json").write_text(json.dumps(settings))
    tensors = load_file(source / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if not BUFFERS.search(k)}, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("MiniMaxText01ForCausalLM", "minimax_text_01"),
        ("MiniMaxText01ForCausalLM", "MiniMaxText01"),
        ("MiniMaxM1ForCausalLM", "minimax_m1"),
        ("MiniMaxM1ForCausalLM", "MiniMaxM1"),
        ("MiniMaxForCausalLM", "minimax"),
    ],
)
def test_all_layouts_are_one_model(architecture, model_type, tmp_path):
    model = theirs("minimax", head_dim=8)
    source = saved(model, tmp_path / "theirs")
    first = load_pretrained(source)
    other = load_pretrained(released(source, tmp_path / "release", architecture, model_type))
    assert other.format.architecture == architecture
    assert explicit(other.model.config) == explicit(first.model.config)
    for key, parameter in other.model.named_parameters():
        assert torch.equal(parameter, first.model.get_parameter(key))
    [tokens] = tokens_of(40)
    assert gap(our_logits(other.model, tokens)[0], their_logits(model, tokens)) <= LIMIT
    # The class may be left out: the model type alone says the same.
    settings = json.loads((tmp_path / "release" / "config.json").read_text())
    (tmp_path / "release" / "config.json").write_text(json.dumps(settings | {"architectures": None}))
    assert load_pretrained(tmp_path / "release").format.architecture == architecture


def test_one_token_at_a_time_is_what_transformers_does_with_its_cache(tmp_path):
    model = theirs("minimax")
    ours = load_pretrained(saved(model, tmp_path / "theirs")).model
    [tokens] = tokens_of(40)
    state = State(ours.config, 1)
    with torch.no_grad():
        start = model(input_ids=tokens[None, :30], use_cache=True)
        cache = start.past_key_values
        ours(tokens[:30], Layout(cu_seqlens_of([30])), state, torch.tensor([0]))
        for place in range(30, 40):
            where = torch.tensor([[place]])  # its cache reports length 0, as layer 0 is lightning
            expected = model(
                input_ids=tokens[None, place : place + 1],
                past_key_values=cache,
                position_ids=where,
                use_cache=True,
            ).logits[0, 0]
            found = ours.logits(ours.decode(tokens[place : place + 1], state).hidden_ND)[0]
            assert gap(found, expected) <= LIMIT


# -- the layer's parts, each against transformers and against the known mistake ----------------------------


@pytest.mark.parametrize(
    "mistake",
    [
        "key rows not head-major",
        "every layer decays as the first",
        "residual carries the raw value",
        "factors of the other branches",
        "router the other way",
        "block eps in the inner norm",
        "no silu on the values",
    ],
)
def test_a_part_of_the_layer_is_the_checkpoints_and_not_the_known_mistake(mistake, tmp_path):
    model = theirs("minimax")
    with torch.no_grad():  # small outputs of the heads, or an eps would not show
        for key, parameter in model.named_parameters():
            if "qkv_proj" in key:
                parameter.mul_(0.2)
    ours = load_pretrained(saved(model, tmp_path / "theirs")).model
    [tokens] = tokens_of(40)
    assert ours.config.lightning_norm_eps == 1e-6 and ours.config.norm_eps == 1e-5
    assert gap(our_logits(ours, tokens)[0], their_logits(model, tokens)) <= LIMIT
    assert departure(model, ours, tokens) <= LIMIT
    assert departure(model, ours, tokens, mistake) > 10 * LIMIT


# -- the known faults of transformers (tests/parity/faults.py) -----------------------------------------------


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_transformers_is_not_ours(fault, tmp_path):
    found = fault(tmp_path)
    assert found.theirs > VISIBLE
    assert found.ours <= LIMIT


def test_control_rotating_all_dimensions_is_what_transformers_does(tmp_path):
    """It is this fault and no other: with it the statement is what they compute, and so is our code."""
    model = theirs("minimax", head_dim=128, rotary_dim=64)
    ours = load_pretrained(saved(model, tmp_path / "theirs")).model
    [tokens] = tokens_of(40)
    assert ours.config.rotary_dim == 64
    assert departure(model, ours, tokens, "rotary over the whole head") <= LIMIT
    ours.config = replace(ours.config, rotary_dim=None)
    assert gap(our_logits(ours, tokens)[0], their_logits(model, tokens)) <= LIMIT


def test_control_with_the_slopes_of_transformers_twelve_heads_are_theirs(tmp_path, monkeypatch):
    def their_slopes(num_heads, layer, num_layers):
        """Without the interleaving of numbers that are no power of two, and l / (L - 1 + 1e-5)."""
        series = torch.tensor([2.0 ** (-8.0 * (h + 1) / num_heads) for h in range(num_heads)])
        return series * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)

    monkeypatch.setattr(attention, "slopes", their_slopes)
    model = theirs("minimax", num_attention_heads=12, num_key_value_heads=4, head_dim=8)
    ours = load_pretrained(saved(model, tmp_path / "theirs")).model
    [tokens] = tokens_of(40)
    assert gap(our_logits(ours, tokens)[0], their_logits(model, tokens)) <= LIMIT


def test_the_decay_buffers_of_a_checkpoint_are_not_read(tmp_path):
    source = saved(theirs("minimax"), tmp_path / "theirs")
    tensors = load_file(source / "model.safetensors")
    buffers = [key for key in tensors if BUFFERS.search(key)]
    assert len(buffers) == 3 * 4  # three lightning layers, four buffers each
    before = load_pretrained(source).model
    shutil.copytree(source, tmp_path / "spoilt")
    spoilt = {key: tensor * 0 if key in buffers else tensor for key, tensor in tensors.items()}
    save_file(spoilt, tmp_path / "spoilt" / "model.safetensors")
    [tokens] = tokens_of(40)
    assert torch.equal(
        our_logits(before, tokens)[0], our_logits(load_pretrained(tmp_path / "spoilt").model, tokens)[0]
    )

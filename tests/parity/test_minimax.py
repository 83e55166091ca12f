"""MiniMax: equal to transformers where that is right, to the releases' own arithmetic where it is not.

The judge is `tests/model/plain.py`, one token after the other in float64. For each known fault of transformers
5.23 (docs/models.md) a test shows that theirs departs from it and ours does not.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import whorl.model.attention as attention
from tests.model import plain
from tests.model.shapes import weights_of
from tests.parity.families import gap, our_logits, saved, their_logits, theirs, tokens_of
from whorl.data import cu_seqlens_of
from whorl.kernels.lightning import lightning
from whorl.model.formats.base import explicit
from whorl.model.formats.pretrained import BUFFERS, load_pretrained
from whorl.model.layout import Layout
from whorl.model.state import State

LIMIT = 2e-5
VISIBLE = 1e-2
"""A fault moves some log-probability by more than this."""

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


def judged(model, tokens, config, weights, *defects) -> float:
    """max |their log p - the statement's|, with mistakes put into the statement."""
    found = their_logits(model, tokens).log_softmax(-1).double().numpy()
    return np.abs(found - plain.log_probs(config, weights, tokens.numpy(), defects)).max()


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
    assert judged(model, tokens, ours.config, weights_of(ours)) <= LIMIT
    assert judged(model, tokens, ours.config, weights_of(ours), mistake) > 10 * LIMIT


# -- the known faults of transformers ------------------------------------------------------------------------


def departures(model, ours, tokens):
    """How far theirs and ours are from the statement, in nats."""
    expected = plain.log_probs(ours.config, weights_of(ours), tokens.numpy())
    found = our_logits(ours, tokens)[0].log_softmax(-1).double().numpy()
    return judged(model, tokens, ours.config, weights_of(ours)), np.abs(found - expected).max()


def test_64_of_128_dimensions_are_rotated_where_transformers_rotates_all(tmp_path):
    model = theirs("minimax", head_dim=128, rotary_dim=64)
    ours = load_pretrained(saved(model, tmp_path / "theirs")).model
    [tokens] = tokens_of(40)
    assert ours.config.rotary_dim == 64
    their_departure, our_departure = departures(model, ours, tokens)
    assert our_departure <= LIMIT and their_departure > VISIBLE
    # It is this fault and no other: rotating all, the statement is what they compute. And so is our code.
    weights = weights_of(ours)
    assert judged(model, tokens, ours.config, weights, "rotary over the whole head") <= LIMIT
    everything = replace(ours.config, rotary_dim=None)
    ours.config = everything
    assert gap(our_logits(ours, tokens)[0], their_logits(model, tokens)) <= LIMIT


def test_several_tokens_continue_a_sequence_where_transformers_masks_them_wrongly(tmp_path):
    model = theirs("minimax")
    model.set_attn_implementation("sdpa")  # with "eager" the mask does not even fit: it fails
    ours = load_pretrained(saved(model, tmp_path / "theirs")).model
    [tokens] = tokens_of(40)
    expected = plain.log_probs(ours.config, weights_of(ours), tokens.numpy())[30:]
    state = State(ours.config, 1)
    with torch.no_grad():
        cache = model(input_ids=tokens[None, :30], use_cache=True).past_key_values
        theirs_ = model(
            input_ids=tokens[None, 30:],
            past_key_values=cache,
            position_ids=torch.arange(30, 40)[None],
            use_cache=True,
        ).logits[0]
        ours(tokens[:30], Layout(cu_seqlens_of([30])), state, torch.tensor([0]))
        hidden = ours(tokens[30:], Layout(cu_seqlens_of([10])), state, torch.tensor([0])).hidden_ND
        found = ours.logits(hidden)
    assert np.abs(found.log_softmax(-1).double().numpy() - expected).max() <= LIMIT
    assert np.abs(theirs_.log_softmax(-1).double().numpy() - expected).max() > VISIBLE


def test_packed_sequences_do_not_see_each_other_where_those_of_transformers_do(tmp_path):
    model = theirs("minimax")
    ours = load_pretrained(saved(model, tmp_path / "theirs")).model
    first, second = tokens_of(25, 15)
    expected = plain.log_probs(ours.config, weights_of(ours), second.numpy())
    with torch.no_grad():
        places = torch.cat([torch.arange(25), torch.arange(15)])[None]
        theirs_ = model(input_ids=torch.cat([first, second])[None], position_ids=places).logits[0, 25:]
    found = our_logits(ours, first, second)[1]
    assert np.abs(found.log_softmax(-1).double().numpy() - expected).max() <= LIMIT
    assert np.abs(theirs_.log_softmax(-1).double().numpy() - expected).max() > VISIBLE


def test_twelve_heads_decay_as_the_releases_code_has_it_and_not_as_transformers(tmp_path, monkeypatch):
    model = theirs("minimax", num_attention_heads=12, num_key_value_heads=4, head_dim=8)
    ours = load_pretrained(saved(model, tmp_path / "theirs")).model
    [tokens] = tokens_of(40)
    their_departure, our_departure = departures(model, ours, tokens)
    assert our_departure <= LIMIT and their_departure > VISIBLE
    # Control: with their slopes put in, ours is theirs and departs from the statement as far.
    monkeypatch.setattr(attention, "slopes", their_slopes)
    again = load_pretrained(tmp_path / "theirs").model
    assert gap(our_logits(again, tokens)[0], their_logits(model, tokens)) <= LIMIT
    assert departures(model, again, tokens)[1] > VISIBLE


def their_slopes(num_heads, layer, num_layers):
    """Without the interleaving of numbers that are no power of two, and l / (L - 1 + 1e-5)."""
    series = torch.tensor([2.0 ** (-8.0 * (h + 1) / num_heads) for h in range(num_heads)])
    return series * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)


def test_decay_stays_in_fp32_in_a_model_loaded_in_bf16(tmp_path):
    """Slow heads: after 512 tokens a bf16 decay has kept percents too much or too little of the state."""
    source = saved(theirs("minimax"), tmp_path / "theirs")
    theirs_ = type(theirs("minimax")).from_pretrained(source, dtype=torch.bfloat16)
    ours = load_pretrained(source, torch.bfloat16).model
    assert ours.embed_tokens.weight.dtype == torch.bfloat16
    layer = 2
    slope_H = ours.layers[layer].self_attn.slope_H(torch.device("cpu"))
    exact = plain.head_slopes(4, layer, 4)
    assert slope_H.dtype == torch.float32
    assert np.abs(slope_H.double().numpy() / exact - 1).max() <= 1e-7
    their_slope = theirs_.model.layers[layer].self_attn.slope_rate
    assert their_slope.dtype == torch.bfloat16

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 512, 8, generator=generator).bfloat16() for _ in range(3))
    _, state = lightning(q, k, v, slope_H)
    assert state is not None and state.dtype == torch.float32
    expected, rounded = np.zeros((2, 4, 8, 8))
    ratio = torch.exp(-their_slope)[:, 0, 0].double().numpy()
    for t in range(512):
        added = k[0, :, t].double().numpy()[:, :, None] * v[0, :, t].double().numpy()[:, None, :]
        expected = np.exp(-exact)[:, None, None] * expected + added
        rounded = ratio[:, None, None] * rounded + added
    size = np.abs(expected).max()
    assert np.abs(state[0].double().numpy() - expected).max() <= 1e-5 * size
    assert np.abs(rounded - expected).max() > 1e-2 * size


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

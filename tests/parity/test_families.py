"""Every family against transformers on a tiny random checkpoint: function, gradient, files."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.parity.families import (
    FAMILIES,
    differences,
    gap,
    our_logits,
    saved,
    their_logits,
    theirs,
    tokens_of,
)
from whorl.model.formats.base import explicit
from whorl.model.formats.keys import Keys
from whorl.model.formats.pretrained import BUFFERS, load_pretrained, save_pretrained

LIMIT = 2e-5
GRADIENT_LIMIT = 1e-4
families = pytest.mark.parametrize("name", FAMILIES)


@families
def test_logits_and_gradients_are_those_of_transformers(name, tmp_path):
    found = differences(name, tmp_path)
    assert found.largest_logit > 1  # or agreement would mean little
    assert max(found.alone, found.packed, found.left_padded) <= LIMIT
    assert found.gradient <= GRADIENT_LIMIT


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_leaves_every_tensor_byte_for_byte(name, dtype, tmp_path):
    source = saved(theirs(name).to(dtype), tmp_path / "theirs", max_shard_size="30KB")
    loaded = load_pretrained(source)
    save_pretrained(tmp_path / "back", loaded.model, loaded.format, beside=source, max_shard_bytes=20_000)
    before, after = tensors_in(source), tensors_in(tmp_path / "back")
    assert len(list(source.glob("*.safetensors"))) > 1 < len(list((tmp_path / "back").glob("*.safetensors")))
    assert {key for key in before if not BUFFERS.search(key)} == after.keys()
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), before[key].view(torch.uint8)), key
    assert (tmp_path / "back" / "generation_config.json").read_text() == (
        source / "generation_config.json"
    ).read_text()
    again = load_pretrained(tmp_path / "back")
    assert explicit(again.model.config) == explicit(loaded.model.config)


@families
def test_transformers_loads_what_is_saved_and_computes_the_same(name, tmp_path):
    model = theirs(name)
    loaded = load_pretrained(saved(model, tmp_path / "theirs"))
    save_pretrained(tmp_path / "ours", loaded.model, loaded.format, beside=tmp_path / "theirs")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all(BUFFERS.search(key) for key in report["missing_keys"])  # they follow from the settings
    assert type(again) is type(model) and again.dtype == torch.float32
    [tokens] = tokens_of(40)
    assert torch.equal(their_logits(again.eval(), tokens), their_logits(model, tokens))
    # Spelled otherwise here and there, the settings mean the same; ids of special tokens are kept.
    written, original = again.config.to_dict(), model.config.to_dict()
    format = loaded.format
    assert explicit(format.read(Keys(written, "ours"))) == explicit(format.read(Keys(original, "theirs")))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "model_type"):
        assert written[key] == original[key]


def tensors_in(folder):
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def test_control_a_swapped_gate_and_up_are_seen(tmp_path):
    folder = saved(theirs("llama"), tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    ours = load_pretrained(folder).model
    for layer in range(3):
        gate, up = (f"model.layers.{layer}.mlp.{kind}_proj.weight" for kind in ("gate", "up"))
        with torch.no_grad():
            ours.get_parameter(f"layers.{layer}.feed_forward.gate_up.weight").copy_(
                torch.cat([tensors[up], tensors[gate]])
            )
    [tokens] = tokens_of(40)
    assert gap(our_logits(ours, tokens)[0], their_logits(theirs("llama"), tokens)) > 1000 * LIMIT
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"

"""The plan of a model: numbers that can be checked by hand, at the size of MiniMax-M1 and in small."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from tests.model.formats.test_pretrained import release_settings
from tests.model.shapes import CONFIGS
from whorl.model.config import m1_456b, m1_nano
from whorl.model.plan import config_named, memory_of, parameters_of_layers, parts_of, tables
from whorl.model.transformer import Transformer


def test_the_parts_of_minimax_m1_are_the_published_ones():
    parts = {part.name: part for part in parts_of(m1_456b())}
    assert round(sum(part.parameters for part in parts.values()) / 1e9, 1) == 456.1
    inside = sum(part.active for name, part in parts.items() if name not in ("embedding", "head"))
    assert round(inside / 1e9, 1) == 45.9
    assert parts["experts"].active == 80 * 2 * 3 * 6144 * 9216
    assert (parts["lightning attention"].layers, parts["softmax attention"].layers) == (70, 10)
    assert parts["router"].parameters == 80 * 32 * 6144


def test_memory_of_a_rank_is_the_share_of_what_training_keeps():
    """456.09B weights on 64 ranks: 2 bytes each in bf16, twice, 8 of moments and 4 of masters."""
    memory = memory_of(m1_456b(), 64, torch.bfloat16)
    share = -(-sum(part.parameters for part in parts_of(m1_456b())) // 64)
    assert memory.weights == memory.gradients == 2 * share
    assert (memory.moments, memory.masters) == (8 * share, 4 * share)
    assert memory.gathered == 2 * max(parameters_of_layers(m1_456b()))
    # 70 layers of 64 matrices of 128 x 128 in fp32; 10 layers of keys and values, 8 heads of 128 in bf16
    assert memory.lightning_state == 70 * 64 * 128 * 128 * 4 == 293_601_280
    assert memory.kv_per_1k_tokens == 10 * 2 * 8 * 128 * 2 * 1024
    assert memory.total == 16 * share + memory.gathered
    alone = memory_of(m1_nano(), 1, torch.float32)
    assert alone.masters == alone.gathered == 0
    with pytest.raises(ValueError, match="gpus must be at least 1; got 0"):
        memory_of(m1_nano(), 0, torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_is_counted_once(name):
    config = CONFIGS[name]
    parts = parts_of(config)
    assert sum(part.parameters for part in parts) == Transformer(config).num_parameters
    outside = sum(p.parameters for p in parts if p.name in ("embedding", "head")) + config.width
    assert sum(parameters_of_layers(config)) + outside == Transformer(config).num_parameters


def test_a_name_is_a_preset_a_checkpoint_or_a_run(tmp_path):
    assert config_named("m1-nano") == m1_nano()
    (tmp_path / "config.json").write_text(json.dumps(release_settings()))
    assert config_named(str(tmp_path)).num_layers == 80
    config = replace(m1_nano(), alpha=(1.0, 2.0, 3.0))
    (tmp_path / "config.json").write_text(json.dumps({"settings_class": "x.Y", "model": config.to_dict()}))
    assert config_named(str(tmp_path)) == config
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="neither a model's nor a run's"):
        config_named(str(tmp_path))
    with pytest.raises(ValueError, match="unknown model 'm2'; expected one of m1-nano"):
        config_named("m2")


def test_the_tables_say_how_layers_and_experts_divide():
    console = Console(width=120, record=True, file=io.StringIO())
    for table in tables(m1_456b(), "m1-456b", 64, torch.bfloat16):
        console.print(table)
    text = console.export_text()
    for words in ("456.1B", "45.94B", "32 experts of 169.9M", "70: 0-6, 8-14, ..., 72-78", "each of 64 GPUs"):
        assert words in text
    mixed = [
        f"{t.columns[0]._cells}" for t in tables(CONFIGS["qwen moe, one layer dense"], "x", 1, torch.float32)
    ]
    assert "2: 0, 2" in mixed[1] and "1: 1" in mixed[1]

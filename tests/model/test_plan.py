"""The plan of a model: numbers that can be checked by hand, at the size of MiniMax-M1 and in small."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from tests.model.formats.test_pretrained import release_settings
from tests.model.shapes import CONFIGS
from whorl.cli import main
from whorl.learning.memory import rank_of
from whorl.model.adapter import Lora
from whorl.model.config import m1_456b, m1_nano
from whorl.model.plan import config_named, parameters_of_layers, parts_of, tables
from whorl.model.transformer import Transformer
from whorl.plan import table_of_run, tables_of_model, workload_of
from whorl.recipes.quickstart import Quickstart
from whorl.sampling.draw import Sampling


def test_the_parts_of_minimax_m1_are_the_published_ones():
    parts = {part.name: part for part in parts_of(m1_456b())}
    assert round(sum(part.parameters for part in parts.values()) / 1e9, 1) == 456.1
    inside = sum(part.active for name, part in parts.items() if name not in ("embedding", "head"))
    assert round(inside / 1e9, 1) == 45.9
    assert parts["experts"].active == 80 * 2 * 3 * 6144 * 9216
    assert (parts["lightning attention"].layers, parts["softmax attention"].layers) == (70, 10)
    assert parts["router"].parameters == 80 * 32 * 6144


def test_memory_of_a_rank_is_the_share_of_what_training_keeps():
    """456.09B weights on 64 ranks: 2 bytes each in bf16, 4 of gradients, 8 of moments and 4 of masters."""
    memory = rank_of(m1_456b(), 64, torch.bfloat16)
    share = sum(part.parameters for part in parts_of(m1_456b())) // 64  # which divides them
    assert (memory.weights, memory.gradients) == (2 * share, 4 * share)
    assert (memory.moments, memory.masters) == (8 * share, 4 * share)
    assert memory.gathered == 2 * max(parameters_of_layers(m1_456b()))
    # 70 layers of 64 matrices of 128 x 128 in fp32; 10 layers of keys and values, 8 heads of 128 in bf16
    assert memory.lightning_state == 70 * 64 * 128 * 128 * 4 == 293_601_280
    assert memory.kv_per_1k_tokens == 10 * 2 * 8 * 128 * 2 * 1024
    assert memory.total == 18 * share + memory.gathered
    assert memory.sampler == memory.weights * 64
    alone = rank_of(m1_nano(), 1, torch.float32)
    assert alone.masters == alone.gathered == alone.sampler == 0
    with pytest.raises(ValueError, match="gpus must be at least 1; got 0"):
        rank_of(m1_nano(), 0, torch.float32)


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
    for table in tables_of_model("m1-456b", 64, torch.bfloat16, "float32"):
        console.print(table)
    text = console.export_text()
    for words in ("456.1B", "45.94B", "32 experts of 169.9M", "70: 0-6, 8-14, ..., 72-78", "each of 64 GPUs"):
        assert words in text
    mixed = [f"{t.columns[0]._cells}" for t in tables(CONFIGS["qwen moe, one layer dense"], "x")]
    assert "2: 0, 2" in mixed[1] and "1: 1" in mixed[1]


def test_the_work_of_a_recipe_is_its_largest_micro_batch_with_answers_as_long_as_they_may_be():
    """8 prompts of 11 tokens (system, user and assistant marks, `a+b+c+d=`), 4 answers of 20 tokens to each."""
    settings = replace(
        Quickstart(), problems_per_step=8, rollouts_per_problem=4, sampling=Sampling(max_tokens=20), cores=1
    )
    prompt = 11
    config, work = workload_of(settings)
    assert config.max_context == 64
    # All in one: a prompt stands once, and its answers beside it.
    assert work.row_tokens == work.padded_tokens == 8 * (prompt + 4 * 20)
    assert (work.scored_tokens, work.copied_tokens) == (8 * 4 * 20, 8 * 4 * prompt)
    assert not work.several_micro_batches
    assert (work.prompt, work.context, work.running) == (
        prompt,
        prompt + 20,
        128,
    )  # of 256 x 2 evaluated answers
    assert not work.reference
    # Three groups, as a fork of 3 x 91 tokens, are the most that a budget of 300 holds.
    cut = workload_of(replace(settings, token_budget=300))[1]
    assert cut.several_micro_batches
    assert (cut.padded_tokens, cut.scored_tokens) == (3 * (prompt + 4 * 20), 3 * 4 * 20)
    # Two updates of a batch: half of the groups in each.
    assert workload_of(replace(settings, updates_per_batch=2))[1].scored_tokens == 4 * 4 * 20
    more = replace(settings, algorithm="GRPO", dtype="bfloat16", lora=Lora(4), checkpoint_activations=True)
    work = workload_of(more)[1]
    assert work.reference and work.checkpoint_activations
    assert (work.dtype, work.lora.rank) == (torch.bfloat16, 4)


def test_the_table_of_a_recipe_names_its_parts_and_their_sum(capsys, tmp_path):
    settings = replace(Quickstart(), cores=1, algorithm="GRPO")
    table = table_of_run("quickstart", settings)
    assert list(table.columns[0].cells) == [
        "weights", "optimizer", "reference", "sampling", "gradients", "activations", "total",
    ]  # fmt: skip
    sizes = [float(str(size)) for size in table.columns[1].cells]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.005)
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    words = ["sft", "--data", str(tmp_path / "chats.jsonl"), "--cores", "1"]
    assert main(["model", "plan", *words]) == 0
    # The same prompt of 4 (mark, letter, end, mark) stands once beside three replies of 2 (letter, end).
    assert "of 10 tokens" in capsys.readouterr().out
    assert main(["model", "plan", "quickstart", "--model", "nowhere"]) == 2
    assert "no folder nowhere" in capsys.readouterr().err

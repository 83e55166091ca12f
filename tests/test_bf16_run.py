"""A run in bfloat16: the setting reaches weights, sampler and checkpoints."""

import pytest
import torch

from tests.support import tiny_run
from tests.test_lora_run import without_times
from whorl.learning.checkpoint import load
from whorl.loop import train
from whorl.run import open_run
from whorl.settings import ColdStart


def test_a_run_in_bf16_trains_and_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    run = tiny_run(tmp_path / "whole", monkeypatch, dtype="bfloat16", cores=2)
    with run.player:
        assert train(run) is None
    rows = run.directory.history()
    assert all(p.dtype == torch.bfloat16 for p in run.model.parameters())
    gaps = [row["sampler_gap_max_nats"] for row in rows[1:]]
    assert 1e-5 < max(gaps) < run.settings.sampler_gap_limit == 1.0
    tensors, _ = load(tmp_path / "whole" / "checkpoints" / "step_000003")
    name = "model/layers.0.self_attn.qkv_proj.weight"
    assert tensors[name].dtype == torch.bfloat16
    assert torch.equal(tensors[f"optimizer/{name}/master"].bfloat16(), tensors[name])

    cut = tiny_run(tmp_path / "cut", monkeypatch, dtype="bfloat16", cores=2)
    cut_settings = cut.settings
    object.__setattr__(cut_settings, "num_steps", 2)
    with cut.player:
        train(cut)
    resumed = open_run(tmp_path / "cut")
    assert resumed.step == 2
    with resumed.player:
        train(resumed)
    assert without_times(resumed.directory.history())[3] == without_times(rows)[3]
    for name, p in run.model.named_parameters():
        assert torch.equal(p, resumed.model.get_parameter(name)), name

    further = tiny_run(
        tmp_path / "further", monkeypatch, model=str(tmp_path / "whole"), cold_start=ColdStart(), num_steps=1
    )
    for name, p in run.model.named_parameters():
        assert torch.equal(p.float(), further.model.get_parameter(name)), name


@pytest.mark.parametrize(
    ("dtype", "replays", "suspect"),
    [
        ("bfloat16", False, "replay_experts"),
        ("bfloat16", True, "not delivered"),
        ("float32", False, "not delivered"),
    ],
)
def test_a_run_that_stops_at_a_gap_names_what_to_suspect(tmp_path, monkeypatch, dtype, replays, suspect):
    run = tiny_run(
        tmp_path, monkeypatch, dtype=dtype, replay_experts=replays, sampler_gap_limit_nats=0.0, num_steps=1
    )
    with run.player:
        reason = train(run)
    assert reason is not None
    assert "disagree by" in reason
    assert suspect in reason

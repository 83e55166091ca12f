"""A run that trains adapters: its base kept once, its checkpoints small, continued to the bit."""

from dataclasses import replace

import pytest
import torch

from tests.model.shapes import layout_of
from tests.support import know_tiny, tiny_model, tiny_run
from whorl import loop
from whorl.learning.checkpoint import load, load_model
from whorl.loop import train
from whorl.model.adapter import Lora
from whorl.model.config import PRESETS
from whorl.model.lora import adapters_off
from whorl.model.peft_format import load_adapter
from whorl.run import open_run
from whorl.settings import ColdStart

LORA = Lora(2, 8.0)
GRPO = "GRPO,dynamic_sampling=False"
TIMES = ("seconds", "per_second", "memory_gib")


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in rows]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A run of all weights, to start from."""
    run = tiny_run(tmp_path / "start", monkeypatch, num_steps=1)
    train(run)
    return run


def lora_run(path, monkeypatch, start, **changes):
    settings = {
        "model": str(start.directory.path),
        "cold_start": ColdStart(),
        "lora": LORA,
        "algorithm": GRPO,
    }
    return tiny_run(path, monkeypatch, **{**settings, **changes})


def test_a_run_of_adapters_leaves_its_base_alone_and_keeps_it_once(tmp_path, monkeypatch, start):
    run = lora_run(tmp_path / "run", monkeypatch, start)
    assert train(run) is None
    rows = run.directory.history()
    assert all(row["sampler_gap_max_nats"] <= 1e-5 for row in rows[1:])
    base = load_model(run.directory.path / "base")
    for name, weight in start.model.named_parameters():
        assert torch.equal(weight, base.get_parameter(name)), name
        assert torch.equal(weight, run.model.get_parameter(name)), name
    tensors, _ = load(run.directory.path / "checkpoints" / "step_000003")
    kept = {name for name in tensors if not name.startswith("optimizer/")}
    trained = {name for name in run.learner.weights() if ".lora." in name or "_lora." in name}
    assert kept == {"router/share_LE"} | {
        f"{kind}/{name}" for kind in ("model", "reference") for name in trained
    }
    written = load_adapter(run.directory.path / "adapter", base)
    for name, weight in run.learner.weights().items():
        assert torch.equal(weight, written.get_parameter(name)), name


@pytest.mark.parametrize("cores", [1, 2])
def test_a_run_of_adapters_goes_on_to_the_same_bits(tmp_path, monkeypatch, start, cores):
    whole = lora_run(tmp_path / "whole", monkeypatch, start, cores=cores)
    with whole.player:
        train(whole)
    cut = lora_run(tmp_path / "cut", monkeypatch, start, cores=cores)

    class Killed(BaseException):
        pass

    def die(run, batch, learn=loop.learn):
        if run.step == 1:
            raise Killed
        return learn(run, batch)

    monkeypatch.setattr(loop, "learn", die)
    with cut.player, pytest.raises(Killed):
        train(cut)
    monkeypatch.undo()
    know_tiny(monkeypatch)
    (start.directory.path / "checkpoints").rename(tmp_path / "gone")  # the run needs its start no more
    resumed = open_run(tmp_path / "cut")
    assert resumed.step == 1
    with resumed.player:
        train(resumed)
    assert without_times(resumed.directory.history()) == without_times(whole.directory.history())
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, resumed.model.get_parameter(name)), name
    assert all(row["sampler_gap_max_nats"] <= 1e-5 for row in whole.directory.history()[1:])


def test_a_run_that_starts_from_adapters_starts_from_what_they_made_of_the_model(
    tmp_path, monkeypatch, start
):
    first = lora_run(tmp_path / "first", monkeypatch, start)
    train(first)
    further = lora_run(tmp_path / "further", monkeypatch, first, lora=Lora(4))
    plain = lora_run(tmp_path / "plain", monkeypatch, first, lora=Lora())
    prompt = further.environment.problem("test", 0)
    tokens = next(ids for _, ids in further.tokenizer.render(prompt.messages, generation=True))

    def logits(run):
        with torch.no_grad():
            return run.model.logits(run.model(torch.tensor(tokens), layout_of(len(tokens))).hidden_ND)

    assert (logits(further) - logits(first)).abs().max() < 1e-5
    assert (logits(plain) - logits(first)).abs().max() < 1e-5
    with adapters_off(first.model):
        assert (logits(plain) - logits(first)).abs().max() > 1e-4
    assert plain.model.lora is None and all(p.requires_grad for p in plain.model.parameters())


def test_targets_that_the_model_lacks_are_refused_before_anything_is_written(tmp_path, monkeypatch, start):
    with pytest.raises(ValueError, match=r"lora: targets are some of .*; got wq"):
        lora_run(tmp_path / "run", monkeypatch, start, lora=Lora(2, targets=("wq",)))
    monkeypatch.setitem(
        PRESETS, "soft", lambda vocab, context: replace(tiny_model(vocab, context), softmax_period=1)
    )
    with pytest.raises(ValueError, match="the model has no layer called qkv_proj"):
        lora_run(tmp_path / "run", monkeypatch, start, model="soft", lora=Lora(2, targets=("qkv_proj",)))
    assert not (tmp_path / "run").exists()

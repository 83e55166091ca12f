import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from tests.learning.support import tiny_config
from whorl.learning import checkpoint
from whorl.learning.checkpoint import load, load_model, newest, prune, save, save_model
from whorl.model.layout import Layout
from whorl.model.transformer import Transformer

TENSORS = {
    "weight": torch.arange(6.0).view(2, 3),
    "step": torch.tensor(3.0),
    "half": torch.ones(2).bfloat16(),
}


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    state = {"version": 7, "seed": 2**60 + 1, "rate": 0.1, "where": [1, "a", None]}
    path = save(tmp_path / "checkpoints", 12, TENSORS, state)
    assert path == tmp_path / "checkpoints" / "step_000012"
    assert names(path) == ["manifest.json", "state.json", "tensors.safetensors"]
    tensors, loaded = load(path)
    assert loaded == state
    assert {name: t.dtype for name, t in tensors.items()} == {name: t.dtype for name, t in TENSORS.items()}
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_the_highest_step_is_the_newest(tmp_path):
    for step in (9, 1_000_000, 200):
        save(tmp_path, step, TENSORS, {})
    assert newest(tmp_path) == tmp_path / "step_1000000"
    assert newest(tmp_path / "nowhere") is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: flip(p / "tensors.safetensors"), "tensors.safetensors has other contents"),
        (lambda p: os.truncate(p / "tensors.safetensors", 40), "has 40 bytes; "),
        (lambda p: (p / "state.json").unlink(), "state.json is missing"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text('{"files": {}}'), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text('{"files": []}'), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_newest_is_reported_and_the_one_before_used(tmp_path, damage, message):
    good = save(tmp_path, 1, TENSORS, {})
    bad = save(tmp_path, 2, TENSORS, {})
    damage(bad)
    with pytest.warns(UserWarning, match=message):
        assert newest(tmp_path) == good
    with pytest.raises(ValueError, match=message):
        load(bad)


def test_where_all_are_damaged_none_is_taken_and_none_deleted(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, step, TENSORS, {}) / "state.json")
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(ValueError, match="all checkpoints in"),
    ):
        newest(tmp_path)
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_a_later_checkpoint_that_was_passed_over_does_not_push_out_a_good_one(tmp_path):
    """Of 10, 20 and a 30 with a flipped bit the run goes on from 20 and saves 25: 20 and 25 stay."""
    for step in (10, 20, 30):
        save(tmp_path, step, TENSORS, {})
    flip(tmp_path / "step_000030" / "tensors.safetensors")
    save(tmp_path, 25, TENSORS, {})
    prune(tmp_path, keep=2, step=25)
    assert names(tmp_path) == ["step_000020", "step_000025"]


def test_leftovers_of_a_killed_writer_are_ignored_and_then_removed(tmp_path):
    good = save(tmp_path, 1, TENSORS, {})
    (tmp_path / "step_000002.tmp").mkdir()
    (tmp_path / "step_000002.tmp" / "tensors.safetensors").write_bytes(b"half")
    assert newest(tmp_path) == good
    save(tmp_path, 3, TENSORS, {})
    assert names(tmp_path) == ["step_000001", "step_000003"]


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path):
    save(tmp_path, 1, TENSORS, {"try": 1})
    path = save(tmp_path, 1, TENSORS, {"try": 2})
    assert load(path)[1] == {"try": 2}
    assert names(tmp_path) == ["step_000001"]


def test_everything_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))[1]
    )
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append(f"{a.name} > {b.name}"), rename(a, b))[1])
    save(tmp_path, 5, TENSORS, {})
    assert sorted(events[:3]) == ["manifest.json", "state.json", "tensors.safetensors"]
    assert events[3:] == ["step_000005.tmp", "step_000005.tmp > step_000005", tmp_path.name]


@pytest.mark.parametrize("size", [100, 3000])
def test_a_full_disk_is_told_and_leaves_the_last_good_checkpoint(tmp_path, size):
    """A limit on file sizes stands in for the full disk: 100 bytes stop the tensors, 3,000 the state."""
    good = save(tmp_path, 1, TENSORS, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(
            OSError, match=r"could not write checkpoint .*step_000002.*last good .*step_000001"
        ):
            save(tmp_path, 2, TENSORS, {"text": "x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step_000001"]
    assert newest(tmp_path) == good
    assert load(good)[1] == {}


def test_pruning_keeps_the_newest_good_ones(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, TENSORS, {})
    os.truncate(tmp_path / "step_000005" / "tensors.safetensors", 10)
    prune(tmp_path, keep=2, step=5)
    assert names(tmp_path) == ["step_000003", "step_000004"]
    with pytest.raises(ValueError, match="keeps at least 1 checkpoint; got keep=0"):
        prune(tmp_path, keep=0, step=5)


WRITER = """
import sys, torch
from pathlib import Path
from whorl.learning.checkpoint import prune, save
root, step = Path(sys.argv[1]), 0
while True:
    step += 1
    save(root, step, {"w": torch.full((400_000,), float(step))}, {"step": step})
    print(step, flush=True)
    prune(root, keep=2, step=step)
"""


def test_a_writer_killed_at_any_moment_leaves_a_good_checkpoint(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    finished = 0
    with process:
        for round_ in range(3):
            finished = int(process.stdout.readline())
            time.sleep(0.003 * round_)
        process.send_signal(signal.SIGKILL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that bears a checkpoint's name is damaged
        path = newest(tmp_path)
    assert path is not None
    tensors, state = load(path)
    assert state["step"] >= finished
    assert (tensors["w"] == state["step"]).all()


# Models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_saved_with_its_configuration(tmp_path, tied, dtype):
    model = Transformer(tiny_config(tied=tied)).initialise(3).to(dtype)
    save_model(tmp_path / "model", model, '{"kind": "bytes"}')
    assert names(tmp_path / "model") == ["config.json", "model.safetensors", "tokenizer.json"]
    loaded = load_model(tmp_path / "model")
    assert loaded.config == model.config
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied
    tokens, layout = torch.arange(9), Layout(torch.tensor([0, 4, 9]))
    assert torch.equal(model(tokens, layout).hidden_ND, loaded(tokens, layout).hidden_ND)
    assert loaded.embed_tokens.weight.dtype == dtype


def test_a_configuration_that_is_not_the_weights_own_is_refused(tmp_path):
    save_model(tmp_path / "model", Transformer(tiny_config()).initialise(0))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": 14}))
    message = (
        r"another shape: at embed_tokens.weight the model has \(14, 16\) float32, the checkpoint \(13, 16\)"
    )
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model")
    with pytest.raises(ValueError, match="holds no model"):
        load_model(tmp_path)


def test_saving_a_model_does_not_overwrite_a_folder_of_other_things(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and holds no model; choose a new folder"):
        save_model(tmp_path, Transformer(tiny_config()))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    target = tmp_path / "model"
    save_model(target, Transformer(tiny_config()).initialise(0))
    save_model(target, Transformer(tiny_config()).initialise(1))
    assert names(tmp_path) == ["model", "notes.txt"]
    assert checkpoint.load_file(target / "model.safetensors")["norm.weight"].tolist() == [1.0] * 16

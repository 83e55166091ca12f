import sys
import time
from pathlib import Path

import pytest

from whorl.reporting import trackers
from whorl.reporting.trackers import TensorBoard, Trackio, WandB

ROWS = [
    (1, {"reward": 0.25, "eval/countdown/accuracy": None}),
    (2, {"reward": 0.5, "eval/countdown/accuracy": 0.75}),
]


def log(tracker: trackers.Tracker) -> None:
    for step, row in ROWS:
        tracker.log(step, row)
    tracker.finish()


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.25), (2, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("eval/countdown/accuracy")] == [(2, 0.75)]


def test_a_resumed_tensorboard_hides_the_steps_that_are_done_again(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(TensorBoard(tmp_path))
    again = TensorBoard(tmp_path, first_step=2)
    again.log(2, {"reward": 0.5})
    again.finish()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2]


def test_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch):
    pytest.importorskip("wandb")
    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    log(WandB(tmp_path / "here", project="whorl", name="demo-1", config={"seed": 0}))
    [record] = (tmp_path / "here").rglob("run-demo-1.wandb")
    # W&B's own process writes the file out a moment after the run has been finished.
    for _attempt in range(200):
        if b"0.75" in record.read_bytes():
            break
        time.sleep(0.05)
    assert b"eval/countdown/accuracy" in record.read_bytes()
    assert b"0.75" in record.read_bytes()


def test_trackio_writes_a_local_run(tmp_path: Path, monkeypatch, capsys):
    trackio = pytest.importorskip("trackio")
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path)
    log(Trackio(project="whorl", name="demo-1", config={"seed": 0}))
    rows = sqlite_storage.SQLiteStorage.get_logs("whorl", "demo-1")
    assert [(row["step"], row["reward"]) for row in rows] == [(1, 0.25), (2, 0.5)]
    assert rows[1]["eval/countdown/accuracy"] == 0.75
    assert trackio.context_vars.current_run.get() is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("tensorboard", lambda path: TensorBoard(path)),
        ("wandb", lambda path: WandB(path, "p", "n", {})),
        ("trackio", lambda path: Trackio("p", "n", {})),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_brings_it(package, make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf'needs the package {package}: pip install "whorl\[track\]"'):
        make(tmp_path)

"""Every file of a run directory, damaged: one clear sentence, or passed over with a warning; nothing good is lost."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support import know_tiny, tiny_run
from whorl import loop
from whorl.cli import _plain_warnings, main
from whorl.learning.checkpoint import load
from whorl.loop import train
from whorl.model.tokenizer import Tokenizer
from whorl.reporting.run_directory import RunDirectory

Damage = Callable[[Path], object]


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The undisturbed run of four steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        path = tmp_path_factory.mktemp("whole") / "run"
        train(tiny_run(path, monkeypatch, num_steps=4))
        return path


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The same run killed in its third step, with checkpoints of steps 1 and 2."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        path = tmp_path_factory.mktemp("killed") / "run"
        run = tiny_run(path, monkeypatch, num_steps=4)

        def die_in_step_three(run, batch, learn=loop.learn):
            if run.step == 2:
                raise Killed
            return learn(run, batch)

        monkeypatch.setattr(loop, "learn", die_in_step_three)
        with pytest.raises(Killed):
            train(run)
        return path


@pytest.fixture
def run(killed: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of the killed run."""
    know_tiny(monkeypatch)
    monkeypatch.setattr("whorl.reporting.report._figures", lambda *curves: [])  # they take most of the time
    return Path(shutil.copytree(killed, tmp_path / "run"))


def content(path: Path) -> dict[str, bytes]:
    """All files but the lock, which any process that tries to write may touch."""
    files = (file for file in path.rglob("*") if file.is_file() and file.name != "lock")
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def write(name: str, text: str) -> Damage:
    return lambda path: (path / name).write_text(text)


def cut(name: str) -> Damage:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size // 2)


def delete(name: str) -> Damage:
    return lambda path: (path / name).unlink()


def flip(name: str) -> Damage:
    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)

    return damage


def setting(**changes: object) -> Damage:
    def damage(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return damage


def all_checkpoints(damage: str) -> Damage:
    return lambda path: [flip(f"checkpoints/step_00000{step}/{damage}")(path) for step in (1, 2)]


def garbage_in_the_middle(path: Path) -> None:
    first, *rest = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text(first + "garbage\n" + "".join(rest))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (delete("config.json"), "it has no config.json"),
        (cut("config.json"), "config.json is not valid JSON"),
        (write("config.json", "7"), "config.json holds a int, not settings"),
        (write("config.json", "{}"), "config.json has no 'settings_class'"),
        (setting(settings_class="whorl.recipes.gone.Gone"), "which is not a recipe here"),
        (setting(settings_class=3), "the settings in"),
        (setting(settings=None), "the settings in"),
        (setting(settings={"num_steps": "many"}), "the settings in"),
        (setting(settings={"num_stepz": 3}), "has no setting 'num_stepz'"),
        (setting(model=None), "the model in"),
        (setting(model={}), "the model in"),
        (delete("tokenizer.json"), "tokenizer.json is missing"),
        (cut("tokenizer.json"), "is not a tokenizer.json"),
        (
            lambda path: Tokenizer.characters("0123456789+=,?").save(path),
            "is not the tokenizer that the run was made with",
        ),
        (garbage_in_the_middle, "line 2 of"),
        (lambda path: shutil.rmtree(path / "checkpoints"), "has logged 2 steps but has no checkpoint"),
    ],
)
def test_what_the_run_cannot_do_without_is_named_and_nothing_is_changed(run, capsys, damage, said):
    damage(run)
    before = content(run)
    assert main(["resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert content(run) == before


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_where_every_checkpoint_is_damaged_the_run_is_not_begun_again(run, capsys, name):
    all_checkpoints(name)(run)
    before = content(run)
    with pytest.warns(UserWarning, match=f"is damaged and passed over: {name}"):
        assert main(["resume", str(run)]) == 2
    assert "all checkpoints in" in capsys.readouterr().err
    assert content(run) == before


NEWEST = "checkpoints/step_000002"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut(f"{NEWEST}/tensors.safetensors"), "step_000002 is damaged and passed over"),
        (flip(f"{NEWEST}/tensors.safetensors"), "step_000002 is damaged and passed over"),
        (cut(f"{NEWEST}/state.json"), "step_000002 is damaged and passed over"),
        (delete(f"{NEWEST}/manifest.json"), "step_000002 is damaged and passed over"),
        (cut("environment.json"), "environment.json cannot be read and is passed over"),
        (cut("rollouts/step_000001.parquet"), "the report leaves out step 1"),
        (cut("evaluations/step_000000.parquet"), "no answers are shown"),
        (cut("metrics.jsonl"), "metrics.jsonl lacks the rows of steps"),
        (delete("metrics.jsonl"), "metrics.jsonl lacks the rows of steps 0 to 2"),
    ],
)
def test_what_the_run_can_do_without_is_passed_over_with_a_warning(run, whole, damage, told):
    damage(run)
    with pytest.warns(UserWarning, match=told):
        assert main(["resume", str(run)]) == 0
    assert_same_end(run, whole)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "metrics.jsonl").open("a").write('{"step": 3, "rew'),
        lambda path: (path / "metrics.jsonl").open("ab").write(b"\0" * 100),
        write("stopped.json", "half"),
        write("config.json.tmp", "half"),
        write("rollouts/step_000003.parquet", "of the step that is done again"),
        write("evaluations/step_000004.parquet.tmp", "half"),
        lambda path: (path / "checkpoints" / "step_000003.tmp").mkdir(),
        write("lock", "999999999\n"),
        delete("lock"),
        delete("environment.json"),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_what_a_kill_may_leave_is_nothing_to_speak_of(run, whole, damage):
    damage(run)
    assert main(["resume", str(run)]) == 0
    assert_same_end(run, whole)
    assert not list(run.rglob("*.tmp"))


def assert_same_end(path: Path, whole: Path) -> None:
    tensors, state = load(path / "checkpoints" / "step_000004")
    expected, expected_state = load(whole / "checkpoints" / "step_000004")
    assert state == expected_state
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert RunDirectory.open(path).history()[-1]["step"] == 4
    assert (path / "report.html").exists()


def test_a_resumed_run_ends_with_the_summary_of_the_undisturbed_one(run, whole, capsys):
    """The transcripts too: the answers of the first evaluation were given before the kill."""
    assert main(["resume", str(run)]) == 0
    resumed = capsys.readouterr().out
    assert main(["resume", str(whole)]) == 0
    finished = capsys.readouterr().out
    assert "is finished: step 4 of 4" in finished

    def summary(text: str) -> str:
        return text[text.index("Before and after") : text.index("run directory: ", text.index("Before"))]

    assert summary(resumed) == summary(finished)
    assert "\nbefore: reward" in summary(resumed)


HOLDER = """
import sys
from whorl.reporting.run_directory import RunDirectory
run = RunDirectory.open(sys.argv[1])
run.lock()
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_run_that_another_process_is_at_work_on_is_left_alone(run, capsys):
    words = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        before = content(run)
        assert main(["resume", str(run)]) == 2
        error = capsys.readouterr().err
        assert f"another process (id {holder.pid}) is at work on the run" in error
        assert content(run) == before
        assert main(["evaluate", str(run), "--problems", "4"]) == 0  # readers are let in
        holder.kill()


def test_a_run_begins_from_the_same_checkpoint_of_another_run_although_that_one_goes_on(
    run, tmp_path, monkeypatch
):
    """Killed before its first checkpoint, it would else take the weights that the other run has by then."""
    first = tiny_run(tmp_path / "first", monkeypatch, model=str(run), num_steps=1)
    weights = {name: tensor.clone() for name, tensor in first.learner.weights().items()}
    assert first.directory.config["start"].endswith("checkpoints/step_000002")
    del first
    shutil.copytree(
        run / "checkpoints/step_000001", run / "checkpoints/step_000003"
    )  # "newer", other weights
    from whorl.run import open_run

    again = open_run(tmp_path / "first")
    assert all(torch.equal(weights[name], tensor) for name, tensor in again.learner.weights().items())
    shutil.rmtree(run / "checkpoints/step_000002")
    with pytest.raises(ValueError, match="step_000002, which is gone"):
        open_run(tmp_path / "first")


def test_a_checkpoint_is_due_by_time_too(tmp_path, monkeypatch):
    """Steps 1 and 3 are long ago when they are logged; by steps alone only 0 and the last would be kept."""
    run = tiny_run(
        tmp_path / "run", monkeypatch, num_steps=4, checkpoint_every_steps=9, checkpoint_every_minutes=2.0
    )
    saved = []

    def save(run=run, usual=run.save):
        saved.append(run.step)
        usual()

    def log(metrics, usual=run.log):
        usual(metrics)
        if run.step in (1, 3):
            run.saved_at -= 120.0

    monkeypatch.setattr(run, "save", save)
    monkeypatch.setattr(run, "log", log)
    train(run)
    assert saved == [0, 1, 3, 4]
    with pytest.raises(ValueError, match="checkpoint_every_minutes must not be negative; got -1"):
        tiny_run(tmp_path / "other", monkeypatch, checkpoint_every_minutes=-1.0)


def test_a_warning_is_one_line_for_the_user():
    with _plain_warnings():
        assert warnings.formatwarning("lost", UserWarning, "run.py", 7) == "warning: lost\n"
        assert "run.py:7" in warnings.formatwarning("old", DeprecationWarning, "run.py", 7)
    assert "run.py:7" in warnings.formatwarning("lost", UserWarning, "run.py", 7)

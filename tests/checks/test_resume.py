"""Promise 3, on real processes that are really killed; `whorl check resume` does the same at more moments."""

import functools
import importlib
import random
import shutil
from pathlib import Path

import pytest

from whorl.checks.killed import Moment
from whorl.checks.resume import (
    LEARNER,
    START,
    STEPS,
    Setting,
    Trial,
    differences,
    killed_at_moments,
    killed_at_random,
    settings_in,
    undisturbed,
)
from whorl.reporting.run_directory import RunDirectory


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def setting(home: Path) -> Setting:
    """Several updates of a batch, a reference policy, redraws, a checkpoint every second step."""
    return settings_in(home)[1]


@pytest.fixture(scope="module")
def alone(setting: Setting, home: Path) -> Trial:
    return undisturbed(setting, home)


def no_progress(count: int = 1) -> None:
    pass


@pytest.mark.slow
def test_killed_at_chosen_moments_a_run_comes_to_the_same_bits(setting, alone, home):
    chains = ((*START[2:5], START[7], *STEPS[:4]), (STEPS[5], *STEPS[7:12], STEPS[13]))
    row = killed_at_moments(setting, alone, home, chains, no_progress)
    assert row.ok, row.measured
    assert row.measured == (
        "15 kills (cold start 3, checkpoint 5, generation 1, verification 1, updates 2, rollouts 1, metrics 1, "
        "report 1): the same bits"
    )
    # The run that was compared did learn, evaluate and leave what it should.
    directory = RunDirectory.open(alone.path)
    rows = directory.history()
    assert [row["step"] for row in rows] == list(range(13))
    assert directory.rollout_steps() == list(range(1, 13))
    assert len({row.get("weight_norm") for row in rows}) > 6
    assert sum(row.get("groups_redrawn", 0.0) for row in rows) > 0


@pytest.mark.slow
def test_killed_at_random_times_a_run_comes_to_the_same_bits(setting, alone, home):
    row = killed_at_random(setting, alone, home, 3, random.Random(0), no_progress)
    assert row.ok, row.measured
    assert row.measured.startswith("3 kills (")


FORGETFUL = {
    "the second moment": """
from whorl.learning.optimizer import Optimizer
load = Optimizer.load
def forgetful(self, tensors, step):
    load(self, {n: 0 * t if n.endswith("exp_avg_sq") else t for n, t in tensors.items()}, step)
Optimizer.load = forgetful
""",
    "the place in the curriculum": """
from whorl.curricula.uniform import Uniform
Uniform.load_state_dict = lambda self, state: None
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", FORGETFUL)
def test_the_check_fails_if_a_resumed_run_forgets_something(setting, alone, home, forgotten):
    late = Moment("updates", f"{LEARNER}.optim_step", phase="updates", entry=6)
    folder = home / forgotten
    row = killed_at_moments(setting, alone, folder, [[late]], no_progress, prelude=FORGETFUL[forgotten])
    assert not row.ok
    assert "1 kills (updates 1): " in row.measured
    assert "metrics.jsonl, step " in row.measured


def test_a_moment_that_does_not_come_is_a_fault(setting, alone, home):
    """Of a finished run there is no step to be killed in."""
    shutil.copytree(alone.path, home / "finished")
    trial = Trial(home / "finished", setting.words)
    trial.run_until(STEPS[0])
    assert trial.kills == []
    assert trial.faults[0].startswith("generation: did not come, exit code 0")


def test_a_run_that_fails_by_itself_is_a_fault_and_ends_the_trial(alone, home):
    wrong = Setting("wrong", ("--num-steps", "0"))
    row = killed_at_random(wrong, alone, home / "wrong", 3, random.Random(0), no_progress)
    assert not row.ok
    assert "num_steps must be at least 1" in row.measured


# What the comparison sees


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two directories of the same made-up run, on machines of different speed."""
    for name, seconds in (("first", 1.0), ("second", 2.0)):
        run = RunDirectory.create({"recipe": "demo"}, tmp_path / name, files={"tokenizer.json": b"{}"})
        run.log_supervised({"update": 1, "supervised_loss": 0.5, "supervised_seconds": seconds})
        for step in (1, 2):
            run.log({"step": step, "reward": float("nan"), "loss": 0.1, "step_seconds": seconds})
            run.write_rollouts(step, [])
        run.write_evaluation(2, [])
        checkpoint = run.checkpoint(2)
        checkpoint.mkdir()
        (checkpoint / "tensors.safetensors").write_bytes(b"weights")
        (checkpoint / "state.json").write_text("{}")
        (run.path / "report.html").write_text(f"{seconds} s")
    return tmp_path / "first", tmp_path / "second"


def test_runs_that_differ_in_times_alone_are_the_same(pair):
    assert differences(*pair) == []


def write(name: str, content: str):
    return lambda path: (path / name).write_text(content)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: RunDirectory.open(p).log({"step": 3}), "metrics.jsonl has steps [1, 2, 3], not [1, 2]"),
        (write("metrics.jsonl", '{"step": 1}\n{"step": 1}\n'), "metrics.jsonl has steps [1, 1], not [1, 2]"),
        (
            lambda p: write(
                "metrics.jsonl", (p / "metrics.jsonl").read_text().replace("0.1", "0.10000000000000002", 1)
            )(p),
            "metrics.jsonl, step 1: loss 0.10000000000000002, not 0.1",
        ),
        (write("supervised.jsonl", ""), "supervised.jsonl has updates [], not [1]"),
        (lambda p: (p / "rollouts/step_000002.parquet").unlink(), "rollouts/step_000002.parquet is missing"),
        (
            lambda p: RunDirectory.open(p).write_rollouts(9, []),
            "rollouts/step_000009.parquet should not be there",
        ),
        (write("evaluations/step_000002.parquet", "x"), "evaluations/step_000002.parquet has other bytes"),
        (
            write("checkpoints/step_000002/tensors.safetensors", "weighty"),
            "checkpoints/step_000002/tensors.safetensors has other bytes",
        ),
        (
            write("checkpoints/step_000002/state.json", "[]"),
            "checkpoints/step_000002/state.json has other bytes",
        ),
        (write("metrics.jsonl.tmp", "half"), "metrics.jsonl.tmp is left over"),
        (lambda p: (p / "report.html").unlink(), "there is no report"),
    ],
)
def test_every_other_difference_is_told(pair, change, told):
    change(pair[1])
    assert differences(*pair) == [told]


@pytest.mark.parametrize("moment", START + STEPS, ids=lambda moment: moment.name)
def test_every_moment_is_a_function_that_exists(moment):
    module, _, names = moment.place.partition(":")
    assert callable(functools.reduce(getattr, names.split("."), importlib.import_module(module)))

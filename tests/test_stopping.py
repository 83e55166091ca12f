"""Ctrl-C and SIGTERM, on real processes: the step is finished, a checkpoint is written, the run can be resumed."""

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from whorl.checks.resume import PARITY, SMALL, Setting, Trial, differences, ended, settings_in, undisturbed

pytestmark = pytest.mark.slow

SLOW_VERDICTS = """
import time
from whorl.environments.chain_arithmetic import ChainArithmetic
verify = ChainArithmetic.verify
def slow(self, problem, rollout):
    time.sleep(0.1)
    return verify(self, problem, rollout)
ChainArithmetic.verify = slow
"""
"""A step of 16 rollouts and 4 verifying threads takes 0.4 seconds: time enough to be interrupted in."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stopped")


@pytest.fixture(scope="module")
def setting(home: Path) -> Setting:
    """Two cores, so that there is a process that plays rollouts; checkpoints are far apart."""
    first = settings_in(home)[0]
    return Setting(first.name, (*first.words, "--checkpoint-every-steps", "12"))


@pytest.fixture(scope="module")
def alone(setting: Setting, home: Path) -> Trial:
    return undisturbed(setting, home)


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    while not condition():
        assert process.is_alive(), "the process ended before what was waited for"
        time.sleep(0.002)


def send(process: BaseProcess, number: int) -> None:
    """As a terminal does: everyone in the process group gets the signal."""
    assert process.pid is not None
    if process.is_alive():
        os.killpg(process.pid, number)


def num_rows(trial: Trial, name: str = "metrics.jsonl") -> int:
    file = trial.path / name
    return file.read_bytes().count(b"\n") if file.exists() else 0


def checkpoints(trial: Trial) -> list[int]:
    """The whole ones: who leaves while one is written leaves a `.tmp` of it."""
    found = (trial.path / "checkpoints").glob("step_*")
    return sorted(int(path.name[5:]) for path in found if path.suffix != ".tmp")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_asked_to_stop_saves_its_step_and_is_resumed_to_the_same_bits(setting, alone, home, number):
    trial = Trial(home / number.name, setting.words, SLOW_VERDICTS)
    process = trial.start()
    wait_for(lambda: num_rows(trial) >= 2, process)
    send(process, number)
    assert ended(process) == 130
    last = num_rows(trial) - 1
    assert 0 < last < 12
    assert checkpoints(trial) == [0, last]
    said = trial.log.read_text()
    assert "stopping after this step; once more to leave at once" in said
    assert said.endswith(f"interrupted; `whorl resume {trial.path}` goes on from step {last}\n")
    assert "Traceback" not in said
    trial.prelude = ""
    trial.finish()
    assert trial.faults == []
    assert differences(alone.path, trial.path) == []


def test_asked_twice_it_leaves_in_the_middle_of_the_step(setting, home):
    trial = Trial(home / "twice", setting.words, SLOW_VERDICTS.replace("0.1", "2.0"))
    process = trial.start()
    wait_for(lambda: num_rows(trial) >= 1, process)
    send(process, signal.SIGINT)
    wait_for(lambda: b"stopping after" in trial.log.read_bytes(), process)
    send(process, signal.SIGINT)
    assert ended(process) == 130
    assert num_rows(trial) == 1
    assert checkpoints(trial) == [0] or checkpoints(trial) == []
    assert "interrupted; `whorl resume" in trial.log.read_text()
    assert "Traceback" not in trial.log.read_text()


def test_a_cold_start_that_is_interrupted_leaves_a_run_that_begins_it_again(home):
    words = (*SMALL, "--environment", PARITY, "--cores", "1", "--num-steps", "1")
    longer = Setting(
        "long", (*words, "--cold-start.max-updates", "100", "--cold-start.until-accuracy", "1.1")
    )
    alone = undisturbed(longer, home / "long")
    trial = Trial(home / "cold", longer.words)
    process = trial.start()
    wait_for(lambda: num_rows(trial, "supervised.jsonl") >= 1, process)
    send(process, signal.SIGINT)
    assert ended(process) == 130
    assert num_rows(trial) == 0
    assert trial.log.read_text().endswith("goes on from its beginning\n")
    trial.finish()
    assert (alone.faults, trial.faults) == ([], [])
    assert differences(alone.path, trial.path) == []

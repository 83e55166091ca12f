"""A disk that fills up ends a run with one sentence, keeps the last good checkpoint, and the run goes on later."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from whorl.checks.resume import PARITY, SMALL, Setting, Trial, differences, ended, undisturbed
from whorl.learning.checkpoint import damage_of, newest

pytestmark = pytest.mark.slow

WORDS = (*SMALL, "--environment", PARITY, "--cores", "1", "--num-steps", "3")

LIMIT = """
import importlib, resource
owner = importlib.import_module("{module}")
*parents, name = "{name}".split(".")
for parent in parents:
    owner = getattr(owner, parent)
usual, calls = getattr(owner, name), 0
def limited(*arguments, **named):
    global calls
    calls += 1
    if calls == {call}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
    return usual(*arguments, **named)
setattr(owner, name, limited)
"""
"""From a function's n-th call on no file may grow beyond a size: the system itself cuts the write short. The log of
the process is a file too, so the sizes are above its own."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Trial:
    return undisturbed(Setting("small", WORDS), tmp_path_factory.mktemp("full"))


@pytest.mark.parametrize(
    ("module", "name", "call", "size", "said", "rows"),
    [
        ("whorl.learning.checkpoint", "save", 3, 1_000_000, "could not write checkpoint", 3),
        ("whorl.reporting.run_directory", "RunDirectory.log", 3, 0, "metrics.jsonl", 2),
        ("whorl.reporting.run_directory", "RunDirectory.write_rollouts", 2, 5000, "step_000002.parquet", 2),
    ],
    ids=["checkpoint", "row", "rollouts"],
)
def test_what_does_not_fit_ends_the_run_and_nothing_is_lost(
    tmp_path, alone, module, name, call, size, said, rows
):
    if name == "RunDirectory.log":  # two rows fit, and the beginning of the third
        written = (alone.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        size = len(b"".join(written[:2])) + 200
    trial = Trial(tmp_path / "run", WORDS, LIMIT.format(module=module, name=name, call=call, size=size))
    assert ended(trial.start()) == 1
    log = trial.log.read_text()
    assert "Traceback" not in log
    last = log.splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert "resume" in last
    metrics = (trial.path / "metrics.jsonl").read_bytes()
    assert metrics.endswith(b"\n")
    assert metrics.count(b"\n") == rows
    good = newest(trial.path / "checkpoints")
    assert good is not None
    assert good.name == "step_000001"
    assert not list((trial.path / "checkpoints").glob("*.tmp"))
    trial.prelude = ""
    trial.finish()
    assert trial.faults == []
    assert differences(alone.path, trial.path) == []


ON_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size=36m tmpfs "$1/disk"
set +e
"$2" -m whorl.cli train quickstart --run "$1/disk/run" "${@:3}" > "$1/first.log" 2>&1
echo $? > "$1/code"
cp -r "$1/disk/run/." "$1/full"
mount -o remount,size=200m "$1/disk"
"$2" -m whorl.cli resume "$1/disk/run" > "$1/second.log" 2>&1
cp -r "$1/disk/run/." "$1/whole"
"""


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    trial = "mkdir -p /tmp && mount -t tmpfs tmpfs /tmp"
    return subprocess.run(["unshare", "-Urm", "sh", "-c", trial], capture_output=True).returncode == 0


def test_on_a_disk_that_is_really_full_the_last_checkpoint_stays(tmp_path, alone):
    """36 MiB hold two checkpoints of 14 and the first of 5, not a third of 14."""
    if not can_mount():
        pytest.skip("no file systems may be mounted here")
    for name in ("disk", "full", "whole"):
        (tmp_path / name).mkdir()
    command = ["unshare", "-Urm", "bash", "-c", ON_A_SMALL_DISK, "-", str(tmp_path), sys.executable, *WORDS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(command, env=environment, check=True, timeout=240)
    assert (tmp_path / "code").read_text() == "1\n"
    log = (tmp_path / "first.log").read_text()
    assert "No space left on device" in log.splitlines()[-1]
    assert "the last good checkpoint is" in log.splitlines()[-1]
    assert "Traceback" not in log
    kept = sorted((tmp_path / "full" / "checkpoints").iterdir())
    assert kept
    assert not any(map(damage_of, kept))
    assert differences(alone.path, tmp_path / "whole") == []


def test_a_report_that_does_not_fit_is_written_by_the_next_resume(tmp_path, alone):
    shutil.copytree(alone.path, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    limit = LIMIT.format(module="whorl.reporting.report", name="build_report", call=1, size=10_000)
    trial = Trial(tmp_path / "run", WORDS, limit)
    assert ended(trial.start()) == 1
    assert "report.html" in trial.log.read_text().splitlines()[-1]
    assert not list(Path(trial.path).rglob("*.tmp"))
    trial.prelude = ""
    trial.finish()
    assert trial.faults == []
    assert differences(alone.path, trial.path) == []

"""Promise 3: a run that is killed at any moment and resumed has the bits of the run that was left alone.

The processes of `whorl train` and `whorl resume` with small runs are ended with SIGKILL, at chosen moments
(`killed.py`) and at random times, several times each run; when at last one is left to finish, every file that
says what the run did is compared with that of an undisturbed run. Wall-clock times, speeds and memory are not.
"""

import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from whorl.checks.killed import Moment, start
from whorl.checks.table import Row
from whorl.reporting.console import Progress
from whorl.reporting.glossary import describe

CHILD_SECONDS = 600.0
"""A process that has not ended after this time never will."""

ENGINE, LEARNER = "whorl.sampling.engine:Engine.step", "whorl.learning.learner:Learner"
ROW = "whorl.reporting.run_directory:RowLog"

START = (
    Moment("start", "whorl.model.tokenizer:Tokenizer.files"),
    Moment("start: settings written", "whorl.reporting.run_directory:RunDirectory.create", after=True),
    Moment("cold start: update", f"{LEARNER}.optim_step", 3, after=True, phase="cold start"),
    Moment("cold start: sampling", ENGINE, 2, phase="cold start"),
    Moment("cold start: half a row", f"{ROW}.append"),
    Moment("evaluation: before step 1", ENGINE, 2, phase="evaluation"),
    Moment("metrics: step 0 not saved", "whorl.learning.checkpoint:save"),
    Moment("checkpoint: half of the first", "whorl.learning.checkpoint:_write_tensors"),
)
"""Moments up to the first checkpoint. The run begins anew after each."""

STEPS = (
    Moment("generation", ENGINE, 3, phase="rollouts"),
    Moment("verification", "whorl.verdicts:Verdicts.judge", 2, phase="rollouts", entry=2),
    Moment("updates: gradient alone", f"{LEARNER}.optim_step", phase="updates"),
    Moment("updates: after the first", f"{LEARNER}.optim_step", after=True, phase="updates", entry=2),
    Moment("evaluation", ENGINE, 2, phase="evaluation"),
    Moment("rollouts: file not named", "os:replace", 2),
    Moment("metrics: half a row", f"{ROW}.append", 2),
    Moment("metrics: step not saved", "whorl.learning.checkpoint:save"),
    Moment("checkpoint: half of it", "whorl.learning.checkpoint:_write_tensors"),
    Moment("checkpoint: not named", "pathlib:Path.rename"),
    Moment("checkpoint: none deleted", "whorl.learning.checkpoint:save", 2, after=True),
    Moment("checkpoint: half deleted", "shutil:rmtree", 2),
    Moment("resuming", f"{ROW}.truncate_after", after=True),
    Moment("report", "whorl.reporting.report:build_report"),
)
"""Moments after it, the last one at the end of the run."""

MOMENTS_OF_ANY_RUN = tuple(
    moment
    for moment in STEPS
    if moment.name
    in ("generation", "evaluation", "metrics: half a row", "checkpoint: half of it", "checkpoint: not named")
)
"""Moments that come in every run, also in one whose rollouts have nothing to learn from."""


@dataclass(frozen=True)
class Setting:
    """A small run, as its command line gives it."""

    name: str
    words: tuple[str, ...]


SMALL = (
    *("--max-context", "48", "--sampling.max-tokens", "10", "--num-steps", "12", "--problems-per-step", "4"),
    *("--rollouts-per-problem", "4", "--max-redraws", "1", "--evaluation.every-steps", "3"),
    *("--evaluation.num-problems", "4", "--evaluation.samples-per-problem", "2"),
    *(
        "--cold-start.max-updates",
        "20",
        "--cold-start.until-accuracy",
        "0",
        "--cold-start.check-problems",
        "8",
    ),
    *("--cold-start.check-every-updates", "10", "--cold-start.examples-per-update", "8"),
    *("--rollouts-every-steps", "1", "--checkpoint-every-steps", "1"),
)
PARITY = "chain_arithmetic,num_terms=2,modulus=2,worked_frac=0"
NUM_PROBLEMS = 12
"""Of the file that one of the settings reads: so few that they come again within the run."""


def settings_in(folder: Path) -> tuple[Setting, ...]:
    """The runs that are killed. What they read lies in `folder`."""
    problems = folder / "problems.jsonl"
    rows = [{"prompt": str(n), "answer": str(n % 2)} for n in range(NUM_PROBLEMS)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    several = f"data:{problems},verifier=exact + guess_number,width=4,max_turns=2"
    grpo = ("--algorithm", "GRPO,dynamic_sampling=True", "--updates-per-batch", "2", "--cores", "1")
    rarely = ("--checkpoint-every-steps", "2", "--keep-checkpoints", "1")
    ppo = ("--algorithm", "PPO", "--curriculum", "difficulty_band,low=0.3,high=0.7", "--cores", "1")
    return (
        Setting("CISPO, one update a batch, two cores", (*SMALL, "--environment", PARITY, "--cores", "2")),
        Setting(
            "GRPO with reference, two updates a batch, redraws",
            (*SMALL, "--environment", PARITY, *grpo, *rarely),
        ),
        Setting("PPO with critic, difficulty band, several turns", (*SMALL, "--environment", several, *ppo)),
    )


def check_resume(progress: Progress, num_random: int = 6, seed: int | None = None) -> list[Row]:
    """Two rows for each setting: killed at chosen moments, and at `num_random` times drawn with `seed` (None: other
    ones each time)."""
    chance = random.Random(seed)
    rows = []
    with tempfile.TemporaryDirectory(prefix="whorl-resume-") as folder:
        settings = settings_in(Path(folder))
        total = len(settings) * (len(START) + len(STEPS) + num_random)
        with progress.phase("killed runs", total) as advance:
            for number, setting in enumerate(settings):
                home = Path(folder) / f"setting-{number}"
                alone = undisturbed(setting, home)
                rows.append(killed_at_moments(setting, alone, home, (START + STEPS[:5], STEPS[5:]), advance))
                rows.append(killed_at_random(setting, alone, home, num_random, chance, advance))
    return rows


def undisturbed(setting: Setting, home: Path) -> "Trial":
    """The run that nobody kills."""
    trial = Trial(home / "undisturbed", setting.words)
    trial.finish()
    return trial


def killed_at_moments(
    setting: Setting,
    alone: "Trial",
    home: Path,
    chains: Sequence[Sequence[Moment]],
    advance: Callable[..., None],
    prelude: str = "",
) -> Row:
    """One run for each chain of moments, at which its processes end one after the other.

    `prelude` is Python that the killed processes begin with: a test puts a fault there.
    """
    trials = []
    for number, moments in enumerate(chains):
        trial = Trial(home / f"moments-{number}", setting.words, prelude)
        for moment in moments:
            trial.run_until(moment)
            advance(1)
        trial.finish()
        trials.append(trial)
    return compared(f"{setting.name}: chosen moments", alone, trials)


def killed_at_random(
    setting: Setting,
    alone: "Trial",
    home: Path,
    count: int,
    chance: random.Random,
    advance: Callable[..., None],
) -> Row:
    """Runs whose processes are killed `count` times in all, after up to half of an undisturbed run's time."""
    trials = [Trial(home / "random-0", setting.words)]
    longest = alone.seconds / 2
    for number in range(count):
        # Every second time its whole group is killed with it.
        while not trials[-1].run_for(chance.uniform(0.0, longest), whole_group=number % 2 == 1):
            if trials[-1].faults:  # it would fail again and again
                return compared(f"{setting.name}: random times", alone, trials)
            trials.append(Trial(home / f"random-{len(trials)}", setting.words))
            longest /= 2  # the machine was busier when the run was left alone
        advance(1)
    for trial in trials:
        trial.finish()
    return compared(f"{setting.name}: random times", alone, trials)


def compared(promise: str, alone: "Trial", trials: Sequence["Trial"]) -> Row:
    """The verdict on runs that were killed, beside the one that was left alone."""
    kills = [kill for trial in trials for kill in trial.kills]
    faults = [fault for trial in (alone, *trials) for fault in trial.faults]
    faults += [difference for trial in trials for difference in differences(alone.path, trial.path)]
    parts = Counter(kill.partition(":")[0] for kill in kills)
    where = ", ".join(f"{part} {count}" for part, count in parts.items()) or "none"
    told = "the same bits" if not faults else "; ".join(faults[:3])
    return Row(promise, f"{len(kills)} kills ({where}): {told}", "as undisturbed", bool(kills) and not faults)


@dataclass
class Trial:
    """One run, carried on by one process after the other."""

    path: Path
    words: tuple[str, ...]
    prelude: str = ""
    kills: list[str] = field(default_factory=list)
    """What went on when a process was killed."""
    faults: list[str] = field(default_factory=list)
    """What no process of a run should do."""
    seconds: float = 0.0
    """Time of the process that finished it, without its imports."""

    def run_until(self, moment: Moment) -> None:
        """Carry the run on until the moment comes."""
        process = self.start(moment)
        code = ended(process)
        if code == -signal.SIGKILL:
            self.kills.append(moment.name)
        else:
            self.faults.append(f"{moment.name}: did not come, exit code {code}{self._last_words()}")

    def run_for(self, seconds: float, *, whole_group: bool) -> bool:
        """Carry the run on for so long, then kill the process, or its whole group. False if it ended before."""
        process = self.start()
        self.wait_for_work(process)
        process.join(seconds)
        if process.is_alive() and process.pid is not None:
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        code = ended(process)
        if code == -signal.SIGKILL:
            self.kills.append(self._where())
        elif code != 0:
            self.faults.append(f"exit code {code}{self._last_words()}")
        return code == -signal.SIGKILL

    def finish(self) -> None:
        """Let a process carry the run to its end."""
        process = self.start()
        self.wait_for_work(process)
        started = time.monotonic()
        code = ended(process)
        self.seconds = time.monotonic() - started
        if code != 0:
            self.faults.append(f"exit code {code}{self._last_words()}")

    def start(self, moment: Moment | None = None) -> BaseProcess:
        """A process that begins the run, or goes on with it."""
        made = (self.path / "config.json").exists()
        train = ("train", "quickstart", "--run", str(self.path), *self.words)
        self.path.parent.mkdir(exist_ok=True)
        return start(("resume", str(self.path)) if made else train, self.log, moment, self.prelude)

    def wait_for_work(self, process: BaseProcess) -> None:
        """Until the process has made its imports and taken the run's lock, or is gone."""
        lock = self.path / "lock"
        while process.is_alive() and not (lock.exists() and lock.read_text() == f"{process.pid}\n"):
            time.sleep(0.002)

    @property
    def log(self) -> Path:
        """What the newest process said."""
        return self.path.with_name(self.path.name + ".log")

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return ": " + " / ".join(line for line in lines[-3:] if line)

    def _where(self) -> str:
        """Where a killed run was, as far as its directory tells."""
        if not (self.path / "config.json").exists():
            return "start"
        if list(self.path.rglob("*.tmp")):
            return "writing"
        metrics = self.path / "metrics.jsonl"
        if not metrics.exists():
            return "cold start"
        num_steps = json.loads((self.path / "config.json").read_text())["settings"]["num_steps"]
        step = len(metrics.read_bytes().splitlines())
        return f"step {step}" if step <= num_steps else "report"


def ended(process: BaseProcess) -> int | None:
    """The exit code of a process when it has ended; minus the signal's number if one ended it."""
    try:
        process.join(CHILD_SECONDS)
    finally:
        process.kill()
    process.join()
    return process.exitcode


def differences(expected: Path, found: Path) -> list[str]:
    """What two run directories tell differently about their runs, apart from times and memory."""
    told = []
    for name, key in (("supervised.jsonl", "update"), ("metrics.jsonl", "step")):
        told += _different_rows(name, key, _rows(expected / name), _rows(found / name))
    last = max((expected / "checkpoints").glob("step_*"), default=Path("none")).name
    kept = [f"checkpoints/{last}/tensors.safetensors", f"checkpoints/{last}/state.json", "tokenizer.json"]
    for folder in ("rollouts", "evaluations"):
        names = {
            file.relative_to(at).as_posix() for at in (expected, found) for file in (at / folder).glob("*")
        }
        kept += sorted(names)
    for name in kept:
        here, there = (_content(at / name) for at in (expected, found))
        if here != there:
            fault = (
                "is missing"
                if there is None
                else "should not be there"
                if here is None
                else "has other bytes"
            )
            told.append(f"{name} {fault}")
    told += [f"{file.name} is left over" for file in sorted(found.rglob("*.tmp"))]
    return told + ([] if (found / "report.html").exists() else ["there is no report"])


def _different_rows(name: str, key: str, expected: list[dict], found: list[dict]) -> list[str]:
    here, there = ([row[key] for row in rows] for rows in (expected, found))
    if here != there:
        return [f"{name} has {key}s {there}, not {here}"]
    # As text, in which NaN equals NaN and a float is given to its last bit.
    return [
        f"{name}, {key} {row[key]}: {metric} {other.get(metric)!r}, not {row.get(metric)!r}"
        for row, other in zip(expected, found, strict=True)
        for metric in sorted(row.keys() | other.keys())
        if json.dumps(row.get(metric)) != json.dumps(other.get(metric))
    ]


def _rows(file: Path) -> list[dict]:
    """The rows of a log without what a clock measured."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{name: v for name, v in row.items() if not describe(name).of_the_machine} for row in rows]


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None

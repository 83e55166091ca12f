"""Comparisons in processes: what is kept, what is done again, and what survives a kill."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.experiments.tiny_recipe import BASE, EXPERIMENTS
from tests.support import Tiny
from whorl.cold_start import cold_start
from whorl.environments.catalog import make
from whorl.experiments.command import carry_out, comparisons_of
from whorl.experiments.compare import Comparison, current, read_results, run_comparison
from whorl.experiments.judge import judge
from whorl.experiments.plan import Arm
from whorl.experiments.starts import contents_of, files_of, make_start, read_start, start_key, start_settings
from whorl.experiments.trials import Outcome
from whorl.experiments.worker import _measured, work
from whorl.run import open_run, start_run

SCRIPTED, LOSSES = EXPERIMENTS
MODULE = "tests.experiments.tiny_recipe"


def comparison(experiment, out: Path, seeds: int, arms: tuple[str, ...] = ()) -> Comparison:
    chosen = tuple(experiment.arm(name) for name in arms) or experiment.arms
    return Comparison(
        MODULE, "tiny", experiment, tuple(range(seeds)), "cpu", out, chosen, "whorl compare tiny"
    )


def quiet(tasks) -> None:
    pass


class Here:
    """In place of a process: the task is done at once, in this one."""

    def __init__(self, folder: Path, gpu: str | None = None):
        self.stdin, self.returncode = io.BytesIO(), 0
        try:
            work(folder)
        except RuntimeError as error:
            self.returncode = 1
            with (folder / "log.txt").open("a") as log:
                log.write(f"RuntimeError: {error}\n")

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def in_this_process(monkeypatch):
    """Comparisons without processes, whose imports would take the time."""
    monkeypatch.setattr("whorl.experiments.compare.start_process", Here)
    monkeypatch.setattr("whorl.experiments.compare.POLL_SECONDS", 0.0)


def without_cost(place: Path) -> list[dict]:
    rows = [result.to_dict() for result in read_results(place)]
    return [{name: value for name, value in row.items() if name not in ("cost", "date")} for row in rows]


def test_arms_that_stop_or_break_are_data_and_the_others_are_judged(tmp_path, capsys, in_this_process):
    whole = replace(comparison(SCRIPTED, tmp_path, 2), seeds=(0, 1))
    assert carry_out([whole], jobs=2) == 1
    said = capsys.readouterr().out
    assert "stops, seed 0: failed there was nothing to learn" in said
    assert "breaks, seed 1: broken RuntimeError: a bug of ours" in said
    found = read_results(whole.place)
    assert [(r.arm, r.seed, bool(r.reason), r.again) for r in found] == [
        ("better", 0, False, False), ("better", 1, False, False), ("plain", 0, False, False),
        ("plain", 1, False, False), ("stops", 0, True, False), ("stops", 1, True, False),
        ("breaks", 0, True, True), ("breaks", 1, True, True),
    ]  # fmt: skip
    # Better is 0.1 ahead in each seed: 0.9 and 0.91 against 0.8 and 0.81, at 0.5 after 2 and 1.95 against 2.5, 2.45.
    verdicts = [judged.verdict for judged in judge(SCRIPTED, found)]
    assert verdicts[:3] == ["reproduced", "reproduced", "reproduced"]
    assert verdicts[3:] == ["not testable here"] * 3
    report = (whole.place / "report.md").read_text()
    assert "+0.100, 2 pairs" in report and "stops, seed 0: there was nothing to learn" in report
    assert (whole.place / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert sum(file.stat().st_size for file in whole.place.iterdir()) < 200_000
    assert str(tmp_path) not in "".join(f.read_text() for f in whole.place.glob("*.json"))

    # Again: what finished and what stopped is kept, what broke is tried once more.
    before = {r.arm: r for r in found if r.seed == 0}
    marked = replace(before["better"], values={**before["better"].values, "accuracy": 0.123})
    lines = [json.dumps(r.to_dict()) for r in (marked, before["stops"], before["breaks"])]
    (whole.place / "trials.json").write_text(f"[{','.join(lines)}]")
    log = next((tmp_path / ".work/tiny/scripted").glob("breaks-0-*")) / "log.txt"
    num_lines = len(log.read_text().splitlines())
    again = run_comparison(replace(whole, seeds=(0,)), 2, quiet)
    assert {r.arm: r.values.get("accuracy") for r in again if not r.reason} == {"better": 0.123, "plain": 0.8}
    assert len(log.read_text().splitlines()) == 2 * num_lines


def test_a_trial_is_known_by_what_decides_it(tmp_path):
    whole = comparison(LOSSES, tmp_path, 2)
    keys = {(task.arm, task.seed): task.key for task in whole.trials()}
    assert len(set(keys.values())) == len(keys) == 6
    starts = {(task.arm, task.seed): task.start for task in whole.trials()}
    assert starts["cispo", 0] == starts["grpo", 0] == starts["untrained", 0] != starts["cispo", 1]
    for changes in (
        {"num_steps": 5},
        {"cold_start.max_updates": 61},
        {"environment": "chain_arithmetic,modulus=3"},
    ):
        arm = Arm("cispo", "method", changes)
        other = replace(whole, experiment=replace(LOSSES, arms=(arm, *LOSSES.arms[1:])), arms=(arm,))
        assert other.trials()[0].key != keys["cispo", 0], changes
        assert (other.trials()[0].start == starts["cispo", 0]) is ("num_steps" in changes)
    # How far the runs are cut into micro-batches decides no weights of a start; a demonstration does.
    taught = {"environment": "chain_arithmetic,num_terms=2,modulus=2,worked_frac=0.5"}
    assert start_of({"token_budget": 77}) == start_of({}) != start_of(taught)


def start_of(changes: dict) -> str:
    settings = start_settings(LOSSES, "cpu", Arm("a", "method", changes), 0)
    assert settings is not None
    return start_key(settings)


def test_what_a_start_is_taught_on_need_not_be_what_arms_are_trained_on():
    easy = "chain_arithmetic,num_terms=2,modulus=2"
    settings = start_settings(replace(LOSSES, start={"environment": easy}), "cpu", LOSSES.arms[0], 3)
    assert settings is not None and (settings.environment, settings.seed) == (easy, 3)
    no_cold_start = Arm("a", "method", {"cold_start.max_updates": 0})
    assert start_settings(LOSSES, "cpu", no_cold_start, 0) is None


def test_a_start_below_its_gate_is_reported_and_nothing_is_trained_from_it(tmp_path):
    hard = replace(BASE, cold_start=replace(BASE.cold_start, until_accuracy=1.01, max_updates=2))
    experiment = replace(LOSSES, cpu=hard, arms=LOSSES.arms[:2])
    settings = start_settings(experiment, "cpu", experiment.arms[0], 0)
    assert settings is not None
    whole = comparison(experiment, tmp_path, 1)
    folder = whole.trials()[0].start
    assert folder is not None
    start = make_start(settings, folder / "start", lambda *told: None)
    assert "of 1.01 after 2 updates" in start.reason or "no right answer" in start.reason
    tasks: list = []
    found = run_comparison(whole, 2, lambda shown: tasks.__setitem__(slice(None), shown))
    assert {task.state for task in tasks} == {"failed"}
    assert all("its start did not pass its gate" in result.reason for result in found) and len(found) == 2
    assert not any((task.folder / "run").exists() for task in tasks)
    assert judge(experiment, found)[0].verdict == "not testable here"


@pytest.mark.slow
def test_kill_9_at_any_time_and_the_same_command_comes_to_the_same_results(tmp_path, monkeypatch):
    """Also: the arms of a seed begin with the same evaluation, and a finished trial is not done again."""
    alone = comparison(LOSSES, tmp_path / "alone", 1)
    with monkeypatch.context() as patched:
        patched.setattr("whorl.experiments.compare.start_process", Here)
        assert all(not result.reason for result in run_comparison(alone, 2, quiet))
    expected = without_cost(alone.place)

    killed = replace(alone, out=tmp_path / "killed")
    code = (
        f"from pathlib import Path; from tests.experiments.test_compare import *; "
        f"run_comparison(comparison(LOSSES, Path({str(killed.out)!r}), 1), 2, quiet)"
    )
    pauses = {**os.environ, "WHORL_TEST_PAUSE": "0.3"}
    for moment in ("start", "training"):
        process = subprocess.Popen([sys.executable, "-c", code], env=pauses, start_new_session=True)
        pattern = (
            ".starts/*/start/run/config.json"
            if moment == "start"
            else ".work/tiny/losses/*/run/metrics.jsonl"
        )
        deadline = time.monotonic() + 60
        while not any("\n" in file.read_text() for file in killed.out.glob(pattern)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until_locks_are_free(killed.out)
    begun = [
        len(file.read_text().splitlines())
        for file in killed.out.glob(".work/tiny/losses/*/run/metrics.jsonl")
    ]
    assert begun and min(begun) < 5, "the trials were over before the kill, so nothing was tested"
    assert all(not result.reason for result in run_comparison(killed, 2, quiet))
    assert without_cost(killed.place) == expected

    first = {result["arm"]: result["curves"]["eval_accuracy"] for result in expected}
    assert first["cispo"][0][0] == 0 and first["untrained"][0] == [0]
    assert first["cispo"][1][0] == first["grpo"][1][0] == first["untrained"][1][0]
    runs = {folder.name.split("-")[0]: folder / "run" for folder in killed.out.glob(".work/tiny/losses/*")}
    rows = {
        arm: open_run(run, read_only=True).directory.history()[0]
        for arm, run in runs.items()
        if arm != "lock"
    }
    same = [{k: v for k, v in row.items() if k != "eval_seconds"} for row in rows.values()]
    assert len(same) == 3 and same[0] == same[1] == same[2]

    stamps = {file: file.stat().st_mtime_ns for file in killed.out.glob(".work/tiny/losses/*/result.json")}
    run_comparison(killed, 2, quiet)
    assert stamps == {file: file.stat().st_mtime_ns for file in stamps} and len(stamps) == 3
    for result in read_results(killed.place):
        assert set(result.values) == {"accuracy", "area", "longer"}
    assert len(list(killed.out.glob(".starts/*/start/start.json"))) == 1
    longer = replace(killed, experiment=replace(LOSSES, cpu=replace(BASE, num_steps=9)))
    assert current(longer, read_results(killed.place)) == []


def test_an_interrupted_comparison_leaves_no_process_and_goes_on(tmp_path, monkeypatch):
    started = []

    def sleeping(folder: Path, gpu: str | None) -> subprocess.Popen:
        started.append(subprocess.Popen(["sleep", "100"], stdin=subprocess.PIPE))
        return started[-1]

    def interrupted(tasks) -> None:
        raise KeyboardInterrupt

    whole = comparison(SCRIPTED, tmp_path, 1, ("better", "plain"))
    with monkeypatch.context() as patched:
        patched.setattr("whorl.experiments.compare.start_process", sleeping)
        with pytest.raises(KeyboardInterrupt):
            run_comparison(whole, 2, interrupted)
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
    monkeypatch.setattr("whorl.experiments.compare.start_process", Here)
    assert [result.values["accuracy"] for result in run_comparison(whole, 2, quiet)] == pytest.approx(
        [0.9, 0.8]
    )


def test_a_second_command_on_the_same_comparison_is_refused(tmp_path):
    whole = comparison(SCRIPTED, tmp_path, 1, ("better",))
    whole.working.mkdir(parents=True)
    code = (
        f"import fcntl, time; f = open({str(whole.working / 'lock')!r}, 'w'); "
        "fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(ValueError, match="another process"):
            run_comparison(whole, 1, quiet)
        other.kill()


def wait_until_locks_are_free(out: Path) -> None:
    """Until the processes of a killed comparison have ended, as they do when their standard input does."""
    deadline = time.monotonic() + 20
    while any(alive(file) for file in out.glob("**/lock")):
        assert time.monotonic() < deadline, "processes of a killed comparison went on"
        time.sleep(0.05)


def alive(lock: Path) -> bool:
    try:
        os.kill(int(lock.read_text() or "0") or 2**22 + 1, 0)
    except (ProcessLookupError, ValueError):
        return False
    return True


def test_starts_are_found_again_and_one_killed_on_its_way_is_begun_again(tmp_path):
    settings = start_settings(LOSSES, "cpu", LOSSES.arms[0], 0)
    assert settings is not None
    (tmp_path / "start" / "run").mkdir(parents=True)
    (tmp_path / "start" / "run" / "config.json").write_text("{}")  # a start that was killed
    told: list = []
    start = make_start(settings, tmp_path / "start", lambda *what: told.append(what))
    assert not start.reason and start.updates <= 60 and told and read_start(tmp_path / "start") == start
    stamp = (tmp_path / "start" / "start.json").stat().st_mtime_ns
    assert make_start(settings, tmp_path / "start", lambda *what: None) == start
    assert (tmp_path / "start" / "start.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"experiment": "scriptd"}, "unknown experiment of tiny: 'scriptd'; did you mean scripted"),
        ({"arms": "better,plane"}, "unknown arm of experiment scripted: 'plane'; did you mean plain"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"budget": "gpu"}, "leave out --budget gpu"),
        ({"budget": "gpu", "experiment": "all"}, "leave out --budget gpu"),
    ],
)
def test_wrong_names_are_answered_before_anything_is_run(wrong, said, tmp_path):
    plain = {"experiment": None, "arms": None, "seeds": None, "budget": "cpu", "out": tmp_path}
    with pytest.raises(ValueError, match=said):
        comparisons_of("tiny", MODULE, EXPERIMENTS, **(plain | wrong))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="has no experiments"):
        comparisons_of("tiny", MODULE, (), **plain)


def test_all_experiments_or_one_are_chosen_by_name(tmp_path):
    plain = {"arms": None, "seeds": None, "budget": "cpu", "out": tmp_path}
    (first,) = comparisons_of("t", MODULE, EXPERIMENTS, experiment=None, **plain)
    assert first.experiment.name == "scripted"
    every = comparisons_of("t", MODULE, EXPERIMENTS, experiment="all", **plain)
    assert [(c.experiment.name, len(c.seeds)) for c in every] == [("scripted", 3), ("losses", 2)]
    assert every[1].command == "whorl compare t --experiment losses"
    only_gpu = replace(EXPERIMENTS[1], cpu=None, gpu=EXPERIMENTS[1].cpu)
    (rest,) = comparisons_of("t", MODULE, (EXPERIMENTS[0], only_gpu), experiment="all", **plain)
    assert rest.experiment.name == "scripted"
    with pytest.raises(ValueError, match="it needs --budget gpu"):
        comparisons_of("t", MODULE, (only_gpu,), experiment=None, **plain)
    plain |= {"seeds": 1, "arms": "cispo"}
    (part,) = comparisons_of("t", MODULE, EXPERIMENTS, experiment="losses", **plain)
    assert (
        part.command == "whorl compare t --experiment losses" and len(part.arms) == 1 and part.seeds == (0,)
    )


def test_what_a_broken_start_said_is_found_in_its_own_log(tmp_path, monkeypatch, capsys):
    class Killed(Here):
        def __init__(self, folder: Path, gpu: str | None = None):
            self.stdin, self.returncode = io.BytesIO(), -signal.SIGKILL
            (folder / "log.txt").write_text("it began")

    monkeypatch.setattr("whorl.experiments.compare.start_process", Killed)
    whole = comparison(LOSSES, tmp_path, 1, ("grpo",))
    assert carry_out([whole], jobs=1) == 1
    said = capsys.readouterr().out.replace("\n", "")
    assert "its start: its process was ended by SIGKILL" in said
    (log,) = re.findall(r"grpo, seed 0: see (\S+log.txt)", said)
    assert Path(log).read_text() == "it began" and ".starts" in log


def test_a_trial_waits_for_its_own_start_and_for_no_other(tmp_path, monkeypatch, in_this_process):
    """The start of seed 1 is longer on its way than all of seed 0 is, and ends without a result."""
    told: list[str] = []

    class SlowAtOne(Here):
        def __init__(self, folder: Path, gpu: str | None = None):
            task = json.loads((folder / "task.json").read_text())
            self.name = f"{task['kind']} of seed {task['seed']}"
            told.append(f"{self.name} begins")
            self.looks = 3 if self.name == "start of seed 1" else 0
            if self.looks:
                self.stdin, self.returncode = io.BytesIO(), -signal.SIGKILL
                (folder / "log.txt").write_text("it began")
            else:
                super().__init__(folder, gpu)

        def poll(self) -> int | None:
            self.looks -= 1
            if self.looks > 0:
                return None
            told.append(f"{self.name} ends")
            return super().poll()

    monkeypatch.setattr("whorl.experiments.compare.start_process", SlowAtOne)
    found = run_comparison(comparison(LOSSES, tmp_path, 2, ("grpo",)), 2, quiet)
    assert told.index("trial of seed 0 begins") < told.index("start of seed 1 ends")
    assert "trial of seed 1 begins" not in told
    by_seed = {result.seed: result for result in found}
    assert not by_seed[0].reason and "its start: its process was ended by SIGKILL" in by_seed[1].reason


def test_a_damaged_file_of_results_is_named(tmp_path):
    for damage in ("[{", '[{"arm": "a"}]', '[{"values": {}, "at_least": [], "what": 1}]'):
        (tmp_path / "trials.json").write_text(damage)
        with pytest.raises(ValueError, match=r"trials.json is damaged"):
            read_results(tmp_path)


def test_a_folder_that_cannot_be_written_is_not_said_to_be_a_run(tmp_path, monkeypatch, in_this_process):
    whole = comparison(SCRIPTED, tmp_path, 1, ("better",))
    run_comparison(replace(whole, arms=whole.experiment.arms[1:2]), 1, quiet)

    def fail(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("whorl.reporting.run_directory.os.replace", fail)
    with pytest.raises(OSError, match=r"could not write in .*scripted.*give the same command again"):
        run_comparison(whole, 1, quiet)


def test_a_trial_keeps_what_its_processes_took_and_what_it_was_taught(tmp_path, in_this_process):
    """Ten seconds of an earlier process that was killed count; so do those of a trial that stopped."""
    whole = comparison(SCRIPTED, tmp_path, 1, ("better", "stops"))
    folder = whole.trials()[0].folder
    folder.mkdir(parents=True)
    (folder / "seconds.json").write_text("10.0")
    better, stops = run_comparison(whole, 1, quiet)
    assert 10.0 <= better.cost["trial_seconds"] < 20.0 and "taught_tokens" not in better.cost
    assert json.loads((folder / "seconds.json").read_text()) >= 10.0
    assert stops.reason and 0.0 <= stops.cost["trial_seconds"] < 10.0
    run = start_run("taught", replace(BASE, device="cpu"), tmp_path / "run")
    run.player.start()
    cold_start(run)
    cost = _measured(SCRIPTED, Outcome(run=tmp_path / "run"), 1.0)["cost"]
    assert cost["taught_tokens"] == run.directory.supervised_history()[-1]["supervised_tokens"] > 0


def described(whole: Comparison, name: str = "config.json") -> dict:
    return json.loads((whole.place / name).read_text())


def test_what_is_noted_of_a_comparison_is_of_all_that_is_kept(tmp_path, in_this_process):
    """Then three seeds, then one arm at one seed: the command and the seeds are those of the three."""
    whole = comparison(SCRIPTED, tmp_path, 3, ("better", "plain"))
    run_comparison(replace(whole, seeds=(0,)), 1, quiet)
    assert described(whole)["seeds"] == [0] and described(whole)["command"] == "whorl compare tiny --seeds 1"
    run_comparison(whole, 1, quiet)
    first = described(whole)
    assert first["seeds"] == [0, 1, 2] and first["command"] == "whorl compare tiny"
    (whole.place / "machine.json").write_text('{"python": "of another machine"}')
    run_comparison(replace(whole, seeds=(0,), arms=whole.arms[:1]), 1, quiet)
    assert described(whole) == first
    assert described(whole, "machine.json") == {"python": "of another machine"}  # no trial was run
    run_comparison(replace(whole, seeds=(0, 1, 2, 3), arms=whole.arms[:1]), 1, quiet)
    assert described(whole)["command"] == "whorl compare tiny --seeds 4"
    assert described(whole, "machine.json")["python"] != "of another machine"


@pytest.mark.parametrize("spec", ["data:{file}", "reflect_retry:chain_arithmetic,failures={failures}"])
def test_a_file_of_problems_is_known_by_all_that_is_in_it(spec, tmp_path):
    file, failures = tmp_path / "problems.jsonl", tmp_path / "failures.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}?", "answer": str(n)}) + "\n" for n in range(200)))
    row = {"index": 0, "attempt": "0"}
    failures.write_text("".join(json.dumps(row) + "\n" for _ in range(40)))
    settings = replace(Tiny(), environment=spec.format(file=file, failures=failures))
    assert len(files_of(make(settings.environment))) == 1
    before = contents_of(settings)
    assert contents_of(settings) == before
    changed_file = file if "data:" in spec else failures
    lines = changed_file.read_text().splitlines()
    last = lines[-1].replace('"199"', '"198"').replace('"attempt": "0"', '"attempt": "1"')
    changed_file.write_text("\n".join([*lines[:-1], last]) + "\n")
    assert last != lines[-1]
    assert contents_of(settings) != before


def test_generated_problems_are_read_from_no_file():
    for spec in ("chain_arithmetic", "reflect_retry:chain_arithmetic", "next_token", "countdown"):
        assert files_of(make(spec)) == []


def test_processes_are_shared_out_evenly_among_the_gpus(tmp_path, monkeypatch, in_this_process):
    given: list[str | None] = []

    class Ended:
        """A process that ends without a result at the second look."""

        def __init__(self, folder: Path, gpu: str | None = None):
            given.append(gpu)
            (folder / "log.txt").write_text("it was no use")
            self.stdin, self.returncode, self.looks = io.BytesIO(), 1, 0

        def poll(self) -> int | None:
            self.looks += 1
            return self.returncode if self.looks > 1 else None

    monkeypatch.setattr("whorl.experiments.compare.start_process", Ended)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    on_gpu = replace(SCRIPTED, gpu=SCRIPTED.cpu)
    whole = replace(comparison(on_gpu, tmp_path, 2), budget="gpu")
    assert {result.again for result in run_comparison(whole, 4, lambda tasks: None)} == {True}
    assert len(given) == 8 and all(set(given[i : i + 2]) == {"3", "5"} for i in range(0, 8, 2))
    given.clear()
    run_comparison(replace(whole, budget="cpu"), 4, lambda tasks: None)
    assert set(given) == {None}

"""A recorded step gives the same loss and gradient norm again, to the bit; and what spoils that is found."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.support import know_tiny, tiny_run
from whorl.cli import main
from whorl.data import Rollout, Score
from whorl.environments.chain_arithmetic import ChainArithmetic
from whorl.environments.guess_number import GuessNumber
from whorl.loop import train
from whorl.replay import Replay, replay, replayable_steps, verdict
from whorl.reporting.rollout_table import TOKEN_COLUMNS
from whorl.reporting.run_directory import RunDirectory
from whorl.run import Run
from whorl.settings import ColdStart

SEVERAL_TURNS = "guess_number,width=4,max_number=99,max_turns=3"


def trained(path: Path, monkeypatch, **changes) -> Run:
    """A run of 4 steps with checkpoints after 0, 2 and 4.

    The verdict is whether the reply is of odd length, so that no cold start is needed for rewards to differ; other
    processes would not hear of that.
    """
    settings = {"num_steps": 4, "checkpoint_every_steps": 2, "rollouts_every_steps": 1, "keep_checkpoints": 9}
    if changes.get("cores", 1) == 1:
        settings["cold_start"] = ColdStart()
        for environment in (ChainArithmetic, GuessNumber):
            monkeypatch.setattr(environment, "verify", odd)
    run = tiny_run(path, monkeypatch, **(settings | changes))
    assert train(run) is None
    return run


def odd(environment, problem, rollout: Rollout) -> Score:
    return Score(float(rollout.num_response_tokens % 2), why="counted")


def numbers(result: Replay, step: int) -> dict[str, tuple]:
    return {n.name: (n.recorded, n.replayed) for n in result.numbers if n.step == step}


def files(path: Path) -> dict[str, tuple[int, int]]:
    return {str(f): (f.stat().st_mtime_ns, f.stat().st_size) for f in path.rglob("*")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"updates_per_batch": 3},
        {"algorithm": "GRPO", "updates_per_batch": 2},  # a reference policy
        {"algorithm": "PPO", "updates_per_batch": 2},  # a critic
        {"algorithm": "REMAX"},  # a greedy rollout of each problem
        {"algorithm": "CISPO", "max_redraws": 3},  # dynamic sampling
        {"replay_experts": True, "updates_per_batch": 2},  # the sampler's experts are recorded
        {"cores": 2},  # player processes, and two threads that learn
    ],
    ids=lambda changes: ",".join(map(str, changes.values())) or "CISPO",
)
def test_every_step_gives_the_same_numbers_to_the_bit(tmp_path, monkeypatch, changes):
    monkeypatch.setattr("whorl.learning.packing.MIN_TOKENS_PER_THREAD", 16)
    run = trained(tmp_path / "run", monkeypatch, **changes)
    before = files(run.directory.path)
    assert replayable_steps(run.directory) == [1, 2, 3, 4]
    rows = {row["step"]: row for row in run.directory.history()}
    for step, start in ((4, 2), (3, 2), (2, 0)):
        result = replay(run.directory.path, step)
        assert verdict(result).endswith("every number of the learner is equal to the bit")
        assert result.is_equal
        assert result.start == start
        found = numbers(result, step)
        assert found["loss"] == (rows[step]["loss"],) * 2
        assert found["grad_norm"] == (rows[step]["grad_norm"],) * 2
        assert rows[step]["grad_norm"] > 0
        assert {"entropy_nats", "sampler_gap_max_nats", "expert_load_max", "advantage_std"} <= set(found)
        if step != 3:
            tensors = len(run.learner.state_dict()[0])
            assert found["tensors of the checkpoint"] == (tensors, tensors)
    assert files(run.directory.path) == before


def test_rollouts_of_several_turns_are_replayed(tmp_path, monkeypatch):
    run = trained(tmp_path / "run", monkeypatch, environment=SEVERAL_TURNS, max_context=96)
    stored = run.directory.read_rollouts(4)
    assert max(len(one.rollout.replies) for one in stored) > 1
    assert replay(run.directory.path, 4).is_equal


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield trained(tmp_path_factory.mktemp("runs") / "run", monkeypatch, updates_per_batch=2).directory


def copied(directory: RunDirectory, path: Path) -> RunDirectory:
    import shutil

    shutil.copytree(directory.path, path)
    return RunDirectory.open(path)


def nudge_a_log_probability(table: pa.Table) -> pa.Table:
    """The smallest change there is: the next float32 after the log-prob of one token."""
    rows = [np.array(row, dtype=np.float32) for row in table["logp"].to_pylist()]
    policy = next(i for i, v in enumerate(table["policy"].to_pylist()[5]) if v)
    rows[5][policy] = np.nextafter(rows[5][policy], np.float32(0))
    lists = pa.array([row.tolist() for row in rows], pa.list_(pa.float32()))
    return table.set_column(table.column_names.index("logp"), "logp", lists)


def turn_a_reward(table: pa.Table) -> pa.Table:
    rewards = table["reward"].to_pylist()
    return table.set_column(
        table.column_names.index("reward"), "reward", pa.array([1.0 - rewards[0], *rewards[1:]])
    )


def swap_two_rollouts(table: pa.Table) -> pa.Table:
    order = [*range(1, table.num_rows), 0]
    return table.take(order)


def change_a_token(table: pa.Table) -> pa.Table:
    rows = table["tokens"].to_pylist()
    rows[3][-1] = 1 if rows[3][-1] != 1 else 2
    return table.set_column(
        table.column_names.index("tokens"), "tokens", pa.array(rows, pa.list_(pa.int32()))
    )


@pytest.mark.parametrize(
    "tamper",
    [nudge_a_log_probability, turn_a_reward, swap_two_rollouts, change_a_token],
    ids=lambda f: f.__name__,
)
def test_a_rollout_file_that_was_tampered_with_gives_a_difference(finished, tmp_path, monkeypatch, tamper):
    know_tiny(monkeypatch)
    directory = copied(finished, tmp_path / "run")
    step = 1  # before the one that is asked for
    file = directory.rollout_file(step)
    pq.write_table(tamper(pq.read_table(file)), file)
    result = replay(directory.path, 2)
    assert not result.is_equal
    if tamper is change_a_token:  # the sampler told the log-prob of another one
        assert f"training stopped in step {step}, which the run finished: sampler and learner" in verdict(
            result
        )
    else:
        assert "the first difference is " in verdict(result)
        assert f"of step {step}, recorded" in verdict(result)


def test_a_record_that_was_tampered_with_gives_a_difference_and_exit_code_1(
    finished, tmp_path, monkeypatch, capsys
):
    know_tiny(monkeypatch)
    directory = copied(finished, tmp_path / "run")
    rows = directory.history()
    rows[4]["loss"] = math.nextafter(rows[4]["loss"], math.inf)
    (directory.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["replay", str(directory.path), "--step", "4"]) == 1
    out = capsys.readouterr().out
    assert "the first difference is loss of step 4" in " ".join(out.split())
    assert "DIFFERENT" in out
    assert main(["replay", str(finished.path), "--step", "4"]) == 0
    out = capsys.readouterr().out
    assert "DIFFERENT" not in out
    assert "grad_norm" in out


@pytest.mark.parametrize("words", [[], ["--step", "9"], ["--step", "0"]])
def test_a_step_that_cannot_be_replayed_is_refused_with_those_that_can(finished, monkeypatch, capsys, words):
    know_tiny(monkeypatch)
    assert main(["replay", str(finished.path), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "It can be done for step 1 to 4" in said
    assert "rollouts_every_steps" in said


def test_rollouts_stay_as_long_as_a_checkpoint_before_them(tmp_path, monkeypatch):
    run = trained(
        tmp_path / "run", monkeypatch, num_steps=7, checkpoint_every_steps=2, rollouts_every_steps=3,
        keep_checkpoints=2,
    )  # fmt: skip
    # Checkpoints of 6 and 7 (the last step) are left. Rollouts: the first step's, every third, and from 6 on.
    assert run.directory.checkpoint_steps() == [6, 7]
    assert run.directory.rollout_steps() == [1, 3, 6, 7]
    assert replayable_steps(run.directory) == [7]
    with pytest.raises(
        ValueError, match=r"step 5 .* there is no checkpoint before it. It can be done for step 7\."
    ):
        replay(run.directory.path, 5)


def test_steps_without_their_rollouts_cannot_be_replayed(finished, tmp_path, monkeypatch):
    know_tiny(monkeypatch)
    directory = copied(finished, tmp_path / "run")
    directory.rollout_file(3).unlink()
    assert replayable_steps(directory) == [1, 2]
    with pytest.raises(
        ValueError, match=r"the rollouts of step 3 are gone. It can be done for step 1 to 2\."
    ):
        replay(directory.path, 4)


def test_rollouts_of_a_version_that_did_not_group_them_are_refused(finished, tmp_path, monkeypatch):
    know_tiny(monkeypatch)
    directory = copied(finished, tmp_path / "run")
    file = directory.rollout_file(1)
    table = pq.read_table(file).drop_columns(["batch_group", "greedy_reward"])
    pq.write_table(table, file)
    assert len(directory.read_rollouts(1)) == 16  # the report can still show them
    with pytest.raises(ValueError, match="did not write how they were grouped"):
        replay(directory.path, 1)


def test_every_token_column_of_a_rollout_is_recorded():
    from dataclasses import fields

    per_token = {field.name for field in fields(Rollout) if field.name.endswith("_T")}
    assert per_token == {*TOKEN_COLUMNS.values(), "experts_T"}


def test_the_arrays_of_a_run_are_recorded_in_their_own_types(finished):
    table = pq.read_table(finished.rollout_file(2))
    assert table["logp"].type.value_type == pa.float32()
    assert table["reward"].type == pa.float64()
    assert pc.count_distinct(table["batch_group"]).as_py() == 4
    assert table["batch_group"].to_pylist() == sorted(table["batch_group"].to_pylist())

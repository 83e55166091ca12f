"""A run that cannot go on stops in one sentence, with what it knows written down and its checkpoint intact."""

import gc
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import know_tiny, tiny_run
from whorl import loop
from whorl.algorithms.catalog import ALGORITHMS
from whorl.cli import main
from whorl.data import Rollout, Score
from whorl.environments.chain_arithmetic import ChainArithmetic
from whorl.faults import in_words, is_out_of_memory
from whorl.learning.learner import Learner
from whorl.learning.optimizer import OptimizerSettings
from whorl.loop import train
from whorl.replay import replay, replayable_steps, verdict
from whorl.reporting.report import build_report
from whorl.reporting.run_directory import RunDirectory
from whorl.run import Run, open_run
from whorl.sampling.draw import DrawSettings, NotFinite, Sampling, draw
from whorl.sampling.engine import Engine, Request
from whorl.settings import ColdStart


def warm_run(path: Path, monkeypatch, **changes) -> Run:
    """A run without a cold start, whose verifier rewards replies of an odd number of tokens."""
    monkeypatch.setattr(ChainArithmetic, "verify", odd)
    settings = {"cold_start": ColdStart(), "rollouts_every_steps": 0}
    return tiny_run(path, monkeypatch, **(settings | changes))


def odd(environment, problem, rollout: Rollout) -> Score:
    return Score(float(rollout.num_response_tokens % 2), why="counted")


def overflow_from_step(run: Run, monkeypatch, *steps: int) -> None:
    """In these steps the verifier gives a reward that float64 holds and float32 does not."""

    def verify(environment, problem, rollout: Rollout) -> Score:
        huge = run.step + 1 in steps and rollout.sample == 1
        return Score(1e100) if huge else odd(environment, problem, rollout)

    monkeypatch.setattr(ChainArithmetic, "verify", verify)


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.learner.weights().items()}


def checked_row(row: dict) -> None:
    assert all(math.isfinite(value) for value in row.values()), row


# Updates that are not finite


def test_updates_that_are_not_finite_stop_the_run_and_can_be_replayed(tmp_path, monkeypatch):
    run = warm_run(
        tmp_path / "run", monkeypatch, algorithm="REINFORCE", num_steps=20, checkpoint_every_steps=2
    )
    overflow_from_step(run, monkeypatch, *range(3, 21))
    kept = {}

    def keep(run, batch, learn=loop.learn):
        kept[run.step] = weights_of(run)
        return learn(run, batch)

    monkeypatch.setattr(loop, "learn", keep)
    reason = train(run)
    assert reason is not None
    assert run.step == 5
    assert reason.startswith("3 updates in a row were skipped, up to step 5: advantage_N is inf at token ")
    assert "(sample 1 of group 0). The checkpoint of step 4 is intact." in reason
    path = run.directory.rollout_file(5)
    assert f"The batch is in {path}; `whorl replay {run.directory.path} --step 5` does the step" in reason
    assert path.exists()
    assert run.directory.stop_reason == reason
    assert reason.partition(":")[0] in build_report(run.directory).read_text()
    assert [row.get("skipped_updates") for row in run.directory.history()[1:]] == [0, 0, 1, 1, 1]
    assert all(torch.equal(tensor, kept[2][name]) for name, tensor in weights_of(run).items())
    assert any(not torch.equal(tensor, kept[1][name]) for name, tensor in kept[2].items())
    assert all(tensor.isfinite().all() for tensor in run.learner.state_dict()[0].values())

    assert replayable_steps(run.directory) == [3, 4, 5]
    for step in (3, 5):
        result = replay(run.directory.path, step)
        assert result.is_equal
        found = {number.name: number.replayed for number in result.numbers if number.step == step}
        assert found["skipped_updates"] == 1
        assert not math.isfinite(found["loss"])


def test_a_resumed_run_comes_to_the_same_stop(tmp_path, monkeypatch, capsys):
    run = warm_run(
        tmp_path / "run", monkeypatch, algorithm="REINFORCE", num_steps=9, checkpoint_every_steps=4
    )
    overflow_from_step(run, monkeypatch, 4, 5, 6)
    reason = train(run)
    assert reason is not None
    # Resumed from step 4, whose update was the first to be skipped; the verifier looks at the new run's step.
    resumed = open_run(run.directory.path)
    assert (resumed.step, resumed.skipped_in_a_row, resumed.faulty_steps) == (4, 1, [4])
    assert resumed.directory.stop_reason is None
    overflow_from_step(resumed, monkeypatch, 4, 5, 6)
    assert train(resumed) == reason
    # And from the command line, where the trouble is over, it goes on to its end.
    overflow_from_step(resumed, monkeypatch)
    assert main(["resume", str(run.directory.path)]) == 0
    assert "step 9/9" in capsys.readouterr().out
    assert 4 in resumed.directory.rollout_steps()  # the rollouts of a faulty step are kept


def test_the_command_line_ends_with_1_and_the_reason(tmp_path, monkeypatch, capsys):
    run = warm_run(tmp_path / "run", monkeypatch, algorithm="REINFORCE", num_steps=9)
    monkeypatch.setattr(ChainArithmetic, "verify", lambda *_: Score(1e100))
    assert main(["resume", str(run.directory.path)]) == 1
    captured = capsys.readouterr()
    assert "stopped early: 3 updates in a row were skipped, up to step 3: advantage_N is inf" in captured.out
    assert "step 1: an update was skipped: advantage_N is inf" in captured.out
    assert "Traceback" not in captured.err
    assert main(["replay", str(run.directory.path), "--step", "3"]) == 0
    assert "step 3: an update was skipped: advantage_N is inf" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("limit", "steps"), [(0, 5), (2, 2), (4, 5)])
def test_the_limit_counts_updates_in_a_row(tmp_path, monkeypatch, limit, steps):
    run = warm_run(
        tmp_path / "run", monkeypatch, algorithm="REINFORCE", num_steps=5, stop_after_skipped_updates=limit
    )
    overflow_from_step(run, monkeypatch, 1, 2, 3, 5)  # step 4 is taken
    assert (train(run) is None) == (steps == 5)
    assert run.step == steps


def test_several_updates_of_one_batch_count_each_and_the_rest_is_not_tried(tmp_path, monkeypatch):
    run = warm_run(tmp_path / "run", monkeypatch, algorithm="REINFORCE", updates_per_batch=4)
    monkeypatch.setattr(ChainArithmetic, "verify", lambda *_: Score(1e100))
    updates = []
    optim_step = Learner.optim_step
    monkeypatch.setattr(Learner, "optim_step", lambda self: updates.append(1) or optim_step(self))
    assert "3 updates in a row were skipped, up to step 1" in (train(run) or "")
    assert len(updates) == 3
    assert run.directory.history()[-1]["skipped_updates"] == 3
    assert replay(run.directory.path, 1).is_equal


def test_weights_that_an_update_spoils_never_reach_a_checkpoint(tmp_path, monkeypatch):
    run = warm_run(tmp_path / "run", monkeypatch, optimizer=OptimizerSettings(3e38))
    reason = train(run)
    assert reason is not None
    assert reason.startswith("after an update of step 1 ")
    assert "The checkpoint of step 0 is intact" in reason
    assert "a lower optimizer.learning_rate" in reason
    assert run.directory.checkpoint_steps() == [0]
    result = replay(run.directory.path, 1)
    assert "training stopped as the run did: after an update of step 1" in verdict(result)


def test_a_cold_start_that_breaks_its_weights_stops_after_as_many_skipped_updates(
    tmp_path, monkeypatch, capsys
):
    start = ColdStart(60, 0.99, 50, 8, 8, OptimizerSettings(3e38))
    run = warm_run(tmp_path / "run", monkeypatch, cold_start=start)
    assert main(["resume", str(run.directory.path)]) == 1
    said = capsys.readouterr().out
    assert (
        "3 updates in a row were skipped, up to update 4 of the cold start: the weight embed_tokens.weight"
        in said
    )
    assert run.directory.stop_reason is not None
    assert run.directory.checkpoint_steps() == []


def test_a_sampler_that_is_not_the_learner_is_a_stop_that_can_be_replayed(tmp_path, monkeypatch):
    run = warm_run(tmp_path / "run", monkeypatch, sampler_gap_limit_nats=1e-12)
    reason = train(run)
    assert "sampler and learner disagree" in (reason or "")
    assert run.directory.stop_reason == reason
    result = replay(run.directory.path, 1)
    assert not result.is_equal
    assert result.stopped == reason


# Logits that are not finite


@pytest.mark.parametrize("cores", [1, 2])
def test_logits_that_are_not_finite_are_one_error_that_names_step_and_problem(tmp_path, monkeypatch, cores):
    run = warm_run(tmp_path / "run", monkeypatch, cores=cores, num_steps=4)

    def spoil(run, batch, learn=loop.learn):
        metrics = learn(run, batch)
        if run.step == 1:
            run.model.layers[0].input_layernorm.weight.data[3] = math.nan
        return metrics

    monkeypatch.setattr(loop, "learn", spoil)
    monkeypatch.setattr(loop, "evaluate", lambda run: {})
    reason = train(run)
    assert reason is not None
    assert reason.startswith("the policy's logits for the token at position ")
    assert "(policy version 2), of problem chain_arithmetic/train/" in reason
    assert (
        "while rollouts were played in step 3: the weight layers.0.input_layernorm.weight holds nan."
        in reason
    )
    assert run.directory.stop_reason == reason
    assert run.step == 2


def test_an_evaluation_whose_logits_are_not_finite_says_so(tmp_path, monkeypatch, capsys):
    run = warm_run(tmp_path / "run", monkeypatch)
    run.model.lm_head.weight.data[1, 1] = math.inf
    run.warm = True
    run.save()
    assert main(["evaluate", str(run.directory.path), "--problems", "2"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: the policy's logits for the token at position ")
    assert captured.err.count("\n") == 1
    run = warm_run(tmp_path / "another", monkeypatch)
    run.model.lm_head.weight.data[1, 1] = math.inf
    assert "in the evaluation after step 0: the weight lm_head.weight holds inf" in (train(run) or "")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_engine_draws_no_token_from_logits_that_are_not_finite(tmp_path, monkeypatch, value):
    run = warm_run(tmp_path / "run", monkeypatch)
    logits = run.model.logits

    def spoilt(hidden: torch.Tensor) -> torch.Tensor:
        result = logits(hidden)
        result[-1, 2] = value  # one logit of one sequence
        return result

    for sampling in (Sampling(), Sampling(temperature=0.0), Sampling(top_k=2), Sampling(temperature=0.7)):
        engine = Engine(run.model)
        monkeypatch.setattr(run.model, "logits", spoilt)
        with pytest.raises(NotFinite, match="the token at position 3 are not finite") as caught:
            engine.generate([Request([1, 2, 3], 77, sampling)])
        assert caught.value.key == 77
        monkeypatch.undo()
    # What would come without the check: a token like any other, with a log-probability that is none.
    drawn = draw(torch.full((1, 5), value), torch.tensor([0.5]).double(), DrawSettings.of([Sampling()]))
    assert 0 <= int(drawn.tokens_S) < 5
    assert not drawn.logp_S.isfinite()


# Memory


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_is_known_in_all_that_torch_says_of_it(error, is_memory):
    assert is_out_of_memory(error) == is_memory
    assert (in_words(error) is not None) == is_memory


@pytest.mark.parametrize(
    ("what", "where", "advice"),
    [
        ("forward_backward", "while learning in step 2", "token_budget (now 16384), checkpoint_activations (now False"),
        ("logprobs", "while learning in step 1", "token_budget (now 16384), checkpoint_activations (now False"),
    ],
)  # fmt: skip
def test_a_learner_without_memory_stops_the_run_with_advice(tmp_path, monkeypatch, what, where, advice):
    algorithm = "CISPO" if what == "forward_backward" else "CISPO,correction=truncated_importance"
    if what == "logprobs":
        algorithm = "GRPO"
        what = "reference_logprobs"
    run = warm_run(tmp_path / "run", monkeypatch, algorithm=algorithm)
    at = 2 if "step 2" in where else 1
    real = getattr(Learner, what)

    def short(self, *arguments, **named):
        if run.step + 1 == at and run.warm:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, *arguments, **named)

    monkeypatch.setattr(Learner, what, short)
    reason = train(run)
    assert reason is not None
    assert reason.startswith(f"out of memory {where} (CUDA out of memory. Tried to allocate 2.00 GiB)")
    assert f"The checkpoint of step {at - 1} is intact" in reason
    assert advice in reason
    assert "problems_per_step (now 4)" in reason
    assert f"{run.directory.path / 'config.json'}" in reason
    assert run.directory.stop_reason == reason


def test_a_sampler_without_memory_stops_the_run_with_advice(tmp_path, monkeypatch):
    run = warm_run(tmp_path / "run", monkeypatch)
    run.warm = True

    def short(self) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr(Engine, "_decode", short)
    reason = train(run) or ""
    assert reason.startswith("out of memory while rollouts were played in step 1 (DefaultCPUAllocator")
    assert "There is no checkpoint yet" in reason
    assert "max_running (now 128), cores (now 1), sampling.max_tokens (now 8)" in reason


@pytest.mark.parametrize("phase", ["learning", "rollouts"])
def test_a_process_whose_memory_is_limited_says_what_to_lower_and_exits_with_1(tmp_path, monkeypatch, phase):
    """A real limit of the address space, met by a real allocation, in a process of its own."""
    large = {"problems_per_step": 32, "rollouts_per_problem": 32, "token_budget": 10**6}
    large = large if phase == "learning" else {}
    directory = warm_run(
        tmp_path / "run", monkeypatch, max_running=64 if large else 4096, sampling=Sampling(max_tokens=24), **large
    ).directory.path  # fmt: skip
    gc.collect()  # and with the run its lock is gone
    code = f"""
import contextlib, resource, sys
from pathlib import Path
import pytest, torch
torch.set_num_threads(1)
import whorl.loop
from tests.support import know_tiny
from tests.test_faults import odd
from whorl.cli import main
from whorl.environments.chain_arithmetic import ChainArithmetic
from whorl.sampling.engine import Engine
know_tiny(pytest.MonkeyPatch())
ChainArithmetic.verify = odd

@contextlib.contextmanager
def limited(mib):
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + mib * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)

learn, decode = whorl.loop.learn, Engine._decode
def learn_in_little_memory(run, batch):
    with limited(2):
        return learn(run, batch)
def decode_in_little_memory(engine):
    with limited(2):
        torch.ones(2**24)  # what the states of a model of a useful size would take
        decode(engine)
if {phase!r} == "learning":
    whorl.loop.learn = learn_in_little_memory
else:
    Engine._decode = decode_in_little_memory
sys.exit(main(["resume", sys.argv[1]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr
    said = " ".join(done.stdout.split())
    assert "stopped early: out of memory" in said
    if phase == "learning":
        assert "while learning in step 1" in said
        assert "The checkpoint of step 0 is intact" in said
        assert "token_budget (now 1000000)" in said
        assert "problems_per_step (now 32)" in said
    else:
        assert "in the evaluation after step 0" in said
        assert "max_running (now 4096)" in said
    assert (directory / "report.html").exists()
    stop_reason = RunDirectory.open(directory).stop_reason
    assert stop_reason is not None
    assert "out of memory" in stop_reason
    monkeypatch.undo()
    know_tiny(monkeypatch)
    monkeypatch.setattr(ChainArithmetic, "verify", odd)
    if phase == "learning":
        assert open_run(directory).step == 0


# Rollouts that hold nothing to learn from


def writes_in(samples: tuple[int, ...]):
    """An episode in which only these samples write."""

    async def play(environment, problem, policy) -> None:
        policy.read(*problem.messages)
        if policy.sample in samples:
            await policy.write()

    return play


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_rollouts_in_which_the_policy_wrote_nothing_are_trained_around(tmp_path, monkeypatch, name):
    run = warm_run(tmp_path / "run", monkeypatch, algorithm=name + SETTINGS.get(name, ""), num_steps=2)
    monkeypatch.setattr(ChainArithmetic, "play", writes_in((1, 2)))
    assert train(run) is None
    rows = run.directory.history()[1:]
    for row in rows:
        checked_row(row)
    assert rows[-1]["response_tokens"] > 0
    assert any("grad_norm" in row and row["skipped_updates"] == 0 for row in rows)


SETTINGS = {"DR_GRPO": ",max_tokens=8", "DAPO": ",max_tokens=8,buffer_tokens=4"}


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_batch_without_a_trained_token_changes_nothing_and_counts_as_nothing_to_learn(
    tmp_path, monkeypatch, name
):
    run = warm_run(
        tmp_path / "run", monkeypatch, algorithm=name + SETTINGS.get(name, ""), num_steps=9,
        stop_after_steps_without_signal=2, updates_per_batch=2,
    )  # fmt: skip
    monkeypatch.setattr(ChainArithmetic, "play", writes_in(()))
    monkeypatch.setattr(
        ChainArithmetic, "verify", lambda self, problem, rollout: Score(float(rollout.sample % 2))
    )
    before = weights_of(run)
    reason = train(run)
    assert "the policy wrote no token that is trained" in (reason or "")
    assert run.step == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(run).items())
    for row in run.directory.history()[1:]:
        checked_row(row)
        assert row["trained_tokens"] == 0
    assert replay(run.directory.path, 2).is_equal


@pytest.mark.parametrize("name", ["CISPO", "RLOO", "PPO", "DAPO,max_tokens=8,buffer_tokens=4", "OPO"])
def test_a_group_that_lost_all_but_one_rollout_takes_no_part_and_harms_nothing(tmp_path, monkeypatch, name):
    run = warm_run(tmp_path / "run", monkeypatch, algorithm=name, num_steps=2)

    def verify(environment, problem, rollout: Rollout) -> Score:
        if rollout.group == 1 and rollout.sample != 2:
            return Score(None, why="the judge is ill")
        return odd(environment, problem, rollout)

    monkeypatch.setattr(ChainArithmetic, "verify", verify)
    assert train(run) is None
    for row in run.directory.history()[1:]:
        checked_row(row)
        assert row["unjudged_rollouts"] >= 3
    assert replay(run.directory.path, 2).is_equal


@pytest.mark.parametrize(
    ("judged", "algorithm", "said"),
    [
        ((), "CISPO,dynamic_sampling=False", "no rollout of step 1 could be judged"),
        (
            (0,),
            "CISPO,dynamic_sampling=False",
            "no problem of step 1 has two rollouts that could be judged, so none can be compared",
        ),
        ((0,), "REINFORCE", None),  # which compares nothing
    ],
)
def test_too_few_verdicts_stop_the_run_with_the_judges_reason(tmp_path, monkeypatch, judged, algorithm, said):
    run = warm_run(tmp_path / "run", monkeypatch, algorithm=algorithm, num_steps=1)

    def verify(environment, problem, rollout: Rollout) -> Score:
        if rollout.sample in judged:
            return odd(environment, problem, rollout)
        return Score(None, why="the judge is ill")

    monkeypatch.setattr(ChainArithmetic, "verify", verify)
    monkeypatch.setattr(loop, "evaluate", lambda run: {})
    reason = train(run)
    if said is None:
        assert reason is None
        checked_row(run.directory.history()[-1])
        return
    assert reason == (
        f"{said}; why the first could not: the judge is ill. All are in {run.directory.rollout_file(1)}"
    )
    assert len(run.directory.read_rollouts(1)) == 16
    assert run.directory.stop_reason == reason


def test_a_reward_that_is_not_a_number_is_no_verdict(tmp_path, monkeypatch):
    run = warm_run(tmp_path / "run", monkeypatch, num_steps=1)
    monkeypatch.setattr(
        ChainArithmetic, "verify",
        lambda self, problem, rollout: Score(math.nan) if rollout.sample == 0 else odd(self, problem, rollout),
    )  # fmt: skip
    assert train(run) is None
    checked_row(run.directory.history()[-1])
    stored = [one.rollout for one in run.directory.read_rollouts(1)]
    assert {r.error for r in stored if r.sample == 0} == {"verifier: ValueError: the reward is nan"}
    assert all(r.reward is None for r in stored if r.sample == 0)


def test_an_episode_without_any_token_is_an_error_of_the_environment(tmp_path, monkeypatch):
    run = warm_run(tmp_path / "run", monkeypatch, num_steps=1)

    async def play(environment, problem, policy) -> None:
        if policy.sample > 0:
            await writes_in((1, 2, 3))(environment, problem, policy)

    monkeypatch.setattr(ChainArithmetic, "play", play)
    assert train(run) is None
    checked_row(run.directory.history()[-1])
    stored = [one.rollout for one in run.directory.read_rollouts(1)]
    lost = [r for r in stored if r.sample == 0]
    assert {r.error for r in lost} == {"environment: the episode neither read its prompt nor wrote"}
    assert all(len(r) == 0 and r.reward is None for r in lost)
    assert replay(run.directory.path, 1).is_equal

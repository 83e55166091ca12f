"""MiniMax-M1's experiments: what each arm changes is what it says, and the measures are right by hand."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support import know_tiny, tiny_run
from whorl import cold_start
from whorl.data import Problem, Rollout
from whorl.environments.catalog import make
from whorl.environments.forked_arithmetic import FORK, ForkedArithmetic
from whorl.environments.looping_arithmetic import LoopingArithmetic
from whorl.environments.scripted import play_scripted
from whorl.environments.several import Several
from whorl.experiments.plan import changed
from whorl.experiments.readings import AtLeast
from whorl.experiments.starts import from_start
from whorl.experiments.trials import Outcome, Trial, begin_or_go_on, train_run
from whorl.learning.optimizer import OptimizerSettings
from whorl.loop import train
from whorl.model.config import preset
from whorl.model.transformer import Transformer
from whorl.recipes.minimax_m1 import (
    EXPERIMENTS,
    attention_kinds,
    fp32_head,
    generation_flops,
    judge_length_bias,
    length_windows,
    repetition_stop,
    stale_updates,
)
from whorl.recipes.minimax_m1.adam_eps import EXPERIMENT as ADAM_EPS
from whorl.reporting.glossary import describe
from whorl.reporting.run_directory import RunDirectory
from whorl.run import new_curriculum, open_run
from whorl.settings import ColdStart
from whorl.verifiers.length_bias import Graded

SMALL = {
    "model": "tiny",
    "environment": "chain_arithmetic,num_terms=2,modulus=2,worked_frac=0.0",
    "cold_start": ColdStart(60, 0.3, 10, 8, 8, OptimizerSettings(1e-2)),
    "num_steps": 3,
    "problems_per_step": 8,
    "rollouts_per_problem": 4,
    "evaluation.num_problems": 4,
}


def test_every_experiment_has_settings_for_each_of_its_arms() -> None:
    names = [experiment.name for experiment in EXPERIMENTS]
    assert names[0] == "stale_updates" and len(set(names)) == len(names)
    for experiment in EXPERIMENTS:
        for budget in experiment.budgets:
            for arm in experiment.arms:
                experiment.settings(budget, arm, 0).resolve_algorithm()


@pytest.mark.parametrize(("updates", "are_equal"), [(1, True), (4, False)])
def test_the_clip_matters_from_the_second_update_of_a_batch_on(
    tmp_path, monkeypatch, updates, are_equal
) -> None:
    weights = []
    for name in ("cispo_as_grpo", "grpo"):
        arm = stale_updates.EXPERIMENT.arm(f"{name}_{updates}")
        # An eps at which rounding stays rounding; a rate at which four updates leave PPO's bounds.
        run = tiny_run(
            tmp_path / name, monkeypatch, algorithm=arm.changes["algorithm"], updates_per_batch=updates,
            problems_per_step=8, optimizer=OptimizerSettings(3e-2, eps=1e-3),
        )  # fmt: skip
        assert train(run) is None
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    # At ratio 1 PPO's objective has the gradient of CISPO's: equal but for rounding.
    assert torch.allclose(*weights, atol=1e-6) == are_equal


def test_the_excess_of_dropped_forks_is_their_share_less_that_of_all_tokens() -> None:
    rows = [
        {"step": 0},
        {"step": 1, "watched_frac": 0.1, "watched_dropped_frac": 0.04, "dropped_frac": 0.1},
        {"step": 2, "watched_frac": 0.3, "watched_dropped_frac": 0.16, "dropped_frac": 0.3},
    ]
    assert stale_updates.dropped_excess(Outcome(rows)) == pytest.approx(0.2 / 0.4 - 0.2)
    assert stale_updates.forks_dropped(Outcome(rows)) == pytest.approx(0.5)


@pytest.mark.parametrize("budget", ["cpu", "gpu"])
def test_no_arms_shaping_touches_the_reward_of_a_right_worked_answer(budget: str) -> None:
    """DAPO's overlong punishment would: an answer of its last fifth gets less, and what is measured is who works."""
    experiment = stale_updates.EXPERIMENT
    task = make(experiment.budgets[budget].environment)
    assert isinstance(task, ForkedArithmetic)
    worked = len(FORK + task.worked(task.problem("train", 0))) + 1  # and the end
    for arm in experiment.arms:
        for shape in experiment.settings(budget, arm, 0).resolve_algorithm().shaping:
            given = [
                shape(torch.ones(1), torch.zeros(n).long(), torch.ones(n).bool())
                for n in (worked, stale_updates.MAX_TOKENS - 1)
            ]
            assert given[0] == 1 > given[1]


def test_a_bf16_head_at_an_offset_of_64_rounds_the_samplers_logits_to_halves_and_leaves_the_learner(
    tmp_path, monkeypatch
) -> None:
    know_tiny(monkeypatch)
    experiment = fp32_head.EXPERIMENT
    rounded = {}
    for name in ("fp32", "bf16_64"):
        settings = changed(experiment.settings("cpu", experiment.arm(name), 0), SMALL)
        outcome = fp32_head.with_its_head(Trial(name, "method", settings, tmp_path / name))
        gaps = [row["sampler_gap_max_nats"] for row in outcome.rows[1:] if "sampler_gap_max_nats" in row]
        rounded[name] = max(gaps)
        # Opened again, the run samples as its learner computes.
        again = open_run(tmp_path / name / "run", read_only=True)
        hidden = torch.randn(5, again.model.config.width)
        exact = torch.nn.functional.linear(hidden, again.model.lm_head.weight)
        assert torch.allclose(again.model.logits(hidden), exact, atol=1e-5)
    # Halves: two logits may each be off by a quarter.
    assert rounded["fp32"] < 1e-4 < 0.05 < rounded["bf16_64"] < 0.6
    model = Transformer(preset("m1-nano", 16, 32)).initialise(0)
    exact = model.logits(torch.randn(5, 160))
    fp32_head.round_logits(model, replace(experiment.cpu, sampler_head="bfloat16", logit_offset=64.0))
    off = model.logits(torch.randn(5, 160))
    assert not torch.equal(off, exact) and torch.equal(off * 4, (off * 4).round())


def test_adam_arms_differ_in_eps_beta2_and_in_the_divisor_of_the_loss_alone() -> None:
    scales = {}
    for arm in ADAM_EPS.arms:
        average = ADAM_EPS.settings("cpu", arm, 0).resolve_algorithm().settings
        scales[arm.name] = 40 / average["max_tokens"]
        assert set(arm.changes) == {"algorithm", "optimizer.eps", "optimizer.beta2"}
    assert scales["m1_1e-8"] == scales["usual_1e-8"] == 1e-8 and scales["m1_1e-0"] == 1.0
    assert scales["m1_1e-10"] == scales["usual_1e-10"] == 1e-10
    assert Transformer(
        preset(ADAM_EPS.settings("cpu", ADAM_EPS.arms[0], 0).model, 16, 64)
    ).num_parameters == pytest.approx(707_520, rel=0.01)


def test_the_three_kinds_of_attention_have_the_same_number_of_parameters_within_one_percent() -> None:
    counts = [Transformer(preset(spec, 32, 128)).num_parameters for spec in attention_kinds.MODELS.values()]
    assert max(counts) / min(counts) < 1.01


def test_all_kinds_of_attention_learn_from_the_same_tokens_in_the_same_order(tmp_path) -> None:
    experiment = attention_kinds.EXPERIMENT
    for task in attention_kinds.TASKS:
        taught = []
        for kind in attention_kinds.MODELS:
            settings = experiment.settings("cpu", experiment.arm(f"{kind}_{task}"), 0)
            assert isinstance(settings, attention_kinds.Taught) and settings.teaching.until_accuracy > 1
            settings = replace(settings, cold_start=settings.teaching)
            run = begin_or_go_on(Trial(kind, "method", settings, tmp_path / f"{kind}_{task}"))
            order = new_curriculum(replace(settings, curriculum="uniform"), run.environment)
            shown = [one for update in (1, 2) for one in cold_start._examples(run, order, update)]
            taught.append([(list(tokens_T), list(policy_T)) for tokens_T, policy_T in shown])
        assert len(taught[0]) == 2 * 64 and taught[0] == taught[1] == taught[2]


def test_teaching_ends_after_the_same_number_of_updates_for_all_and_with_an_evaluation(
    tmp_path, monkeypatch
) -> None:
    know_tiny(monkeypatch)
    experiment = attention_kinds.EXPERIMENT
    few = {"max_updates": 6, "check_every_updates": 3, "check_problems": 8, "examples_per_update": 4}
    settings = changed(
        experiment.settings("cpu", experiment.arms[0], 0),
        {**SMALL, "cold_start": ColdStart(), **{f"teaching.{name}": number for name, number in few.items()}},
    )
    outcome = attention_kinds.teach(Trial("hybrid", "method", settings, tmp_path))
    assert [row["step"] for row in outcome.rows] == [3, 6]
    assert "eval_accuracy" in outcome.rows[-1] and "supervised_loss" in outcome.rows[-1]
    again = attention_kinds.teach(Trial("hybrid", "method", settings, tmp_path))
    assert again.rows[-1]["eval_accuracy"] == outcome.rows[-1]["eval_accuracy"]


def test_the_counted_ratios_are_those_of_the_published_shapes() -> None:
    def count(arm: str, length: str) -> float:
        experiment = generation_flops.EXPERIMENT
        trial = Trial(arm, "method", experiment.settings("cpu", experiment.arm(arm), 0), Path())
        return generation_flops.count_or_time(trial).values[length]

    # By hand at 100,000 tokens, 50,000 of which are seen on average. M1: 47.17e9 weights with the head, 70
    # lightning layers of 4 x 8192 x 128, 10 softmax layers of 4 x 8192 a token. R1: 61 x 128 heads x 2 x 320.
    m1 = 2 * 47.174e9 + 70 * 4 * 8192 * 128 + 10 * 4 * 8192 * 50_000
    r1 = 2 * 37e9 + 61 * 128 * 2 * 320 * 50_000
    assert count("m1", "100k") / count("quarter_of_r1", "100k") == pytest.approx(4 * m1 / r1, rel=1e-3)
    assert count("m1", "64k") < count("half_of_r1", "64k")
    assert count("r1", "1m") == 4 * count("quarter_of_r1", "1m") == 2 * count("half_of_r1", "1m")


def test_the_curve_of_what_was_generated_goes_through_the_lengths_that_are_compared() -> None:
    per_token, length = (lambda before: 1e9 * (before + 1)), 128 * 1024
    outcome = generation_flops.count(per_token, 0.5)
    by_hand = 0.5 * 1e9 * length * (length + 1) / 2
    assert outcome.values["128k"] == pytest.approx(by_hand, rel=1e-12)
    near, far = (
        {row["step"]: row[name] for row in outcome.rows if name in row}
        for name in ("petaflops_to_128k", "petaflops_to_1m")
    )
    assert near[length] == far[length] == pytest.approx(by_hand / 1e15)
    assert min(far) == 1024 and max(far) == 1024 * 1024 and min(near) == 1024 and max(near) == length


def test_a_tokens_time_is_the_median_of_the_steps_after_three_shared_by_the_sequences(monkeypatch) -> None:
    model = Transformer(preset("m1-nano", 16, 64)).initialise(0)
    durations = [900, 900, 900, 5, 1, 3, 2, 4]
    seen, decode = [], model.decode

    def watched(tokens_S, state, **others):
        seen.append((tokens_S.shape, state.length.tolist()))
        return decode(tokens_S, state, **others)

    monkeypatch.setattr(model, "decode", watched)
    monkeypatch.setattr(
        generation_flops, "time", SimpleNamespace(perf_counter=lambda: sum(durations[: len(seen)]))
    )
    assert generation_flops.seconds_per_token(model, 20, sequences=2, repeats=5) == 3 / 2
    assert seen == [((2,), [20 + step] * 2) for step in range(8)]


def test_a_small_model_is_timed_and_counted_at_every_context(tmp_path, monkeypatch) -> None:
    experiment = generation_flops.EXPERIMENT
    settings = experiment.settings("cpu", experiment.arm("hybrid_timed"), 0)
    monkeypatch.setattr(generation_flops, "seconds_per_token", lambda model, context: context / 2**20)
    outcome = generation_flops.count_or_time(Trial("hybrid_timed", "method", settings, tmp_path))
    assert [row["step"] for row in outcome.rows] == [256 * 2**i for i in range(8)]
    assert outcome.values["after_1k"] == 2**-10 and outcome.values["growth"] == 32
    # One softmax layer of eight: 4 x 160 FLOPs for each token before, all else the same.
    growth = outcome.rows[-1]["token_mflops"] - outcome.rows[0]["token_mflops"]
    assert growth == pytest.approx(4 * 160 * (32_768 - 256) / 1e6)


def test_the_short_run_lies_between_a_worked_answer_and_a_table_and_the_long_one_beyond_both() -> None:
    experiment = repetition_stop.EXPERIMENT
    task = make(experiment.cpu.environment)
    assert isinstance(task, LoopingArithmetic)
    problems = [task.problem("train", index) for index in range(50)]
    tables = {len(p.answer or "") for p in problems if p.extra["table"]}
    worked = {len(task.worked(p)) for p in problems if not p.extra["table"]}
    runs = {arm.name: arm.changes.get("sampling.repetition_run_tokens", 0) for arm in experiment.arms}
    assert (
        max(worked) < runs["run_24"] < min(tables)
        and max(tables) < runs["run_72"] < repetition_stop.MAX_TOKENS
    )
    assert experiment.settings("cpu", experiment.arm("no_stop"), 0).sampling.repetition_run_tokens == 0
    # A loop that is shown to its end would teach that it ends.
    assert task.loop_tokens > repetition_stop.MAX_TOKENS


def test_stops_are_counted_by_what_the_text_shows() -> None:
    task = make("looping_arithmetic")
    problems = [task.problem("train", index) for index in range(50)]
    table, plain = (
        next(p for p in problems if bool(p.extra["table"]) == is_table) for is_table in (True, False)
    )

    def ended(reply: str, stop: str, problem: Problem = plain) -> Rollout:
        return replace(play_scripted(task, problem, [reply]), stop=stop)

    healthy = [ended("3+8=1#1", "stop_token")] * 3 + [ended("3+8=1,", "repetition")]
    tables = [ended("3+0=3,3+1=4", "repetition", table)] * 2
    looped = [ended("3+8=1," * 9, "repetition"), ended("3+8=1," * 9, "max_tokens", table)]
    assert repetition_stop.count_stops(healthy + tables + looped) == {
        "stopped_others": 1 / 4,
        "stopped_tables": 1.0,
        "false_stops": 3 / 6,
        "stopped_loops": 1 / 2,
    }
    assert set(repetition_stop.count_stops(looped)) == {"stopped_loops"}


def test_what_a_policy_can_do_is_measured_without_its_arms_stop(tmp_path, monkeypatch) -> None:
    know_tiny(monkeypatch)
    experiment = repetition_stop.EXPERIMENT
    task = "looping_arithmetic,num_terms=2,modulus=2,worked_frac=0.0,table_frac=0.0"
    monkeypatch.setattr(repetition_stop, "TABLES", task)
    taught = changed(
        experiment.settings("cpu", experiment.arm("no_stop"), 0),
        {**SMALL, "environment": task, "num_steps": 1, "cores": 1},
    )
    start = train_run(Trial("no_stop", "baseline", taught, tmp_path / "no_stop"))
    assert start.run is not None
    # Every token is more probable than a millionth, so this stop ends every answer that goes on after its first.
    always = {"sampling.repetition_run_tokens": 1, "sampling.repetition_probability": 1e-6}
    settings = changed(from_start(taught, start.run.parent), always)
    outcome = repetition_stop.train_and_count(Trial("run_24", "method", settings, tmp_path / "run_24"))
    assert outcome.values["stopped_others"] > 0.9 and outcome.rows[-1]["eval_accuracy"] == 0.0
    assert outcome.values["accuracy"] == outcome.values["accuracy_of_tables"] > 0.1


def test_the_tail_of_a_metric_and_the_sum_of_its_first_steps() -> None:
    rows = [
        {"step": 0},
        *({"step": n, "grad_norm_max": float(n), "generated_tokens": 10.0} for n in range(1, 12)),
    ]
    assert repetition_stop.percentile("grad_norm_max", 90)(Outcome(rows)) == pytest.approx(10.0)
    assert repetition_stop.total_until("generated_tokens", 8)(Outcome(rows)) == 80.0


def graded(
    rng: np.random.Generator, mean_length: float, paid: float, right_paid: float = 0.0
) -> list[Graded]:
    """A step of 16 groups of 8; with `right_paid` longer answers are right more often, and that is paid."""
    found = []
    for group in range(16):
        for number in range(8):
            length = int(rng.poisson(mean_length))
            right = length + rng.integers(-5, 6) > mean_length
            reward = paid * length + right_paid * right + 0.1 * rng.standard_normal()
            found.append(Graded((group, right), f"{number}", length, reward))
    return found


@pytest.mark.parametrize(
    ("paid", "right_paid", "growth", "alarms"),
    [
        (0.02, 0.0, 3.0, True),
        (0.02, 0.0, 0.0, False),  # paid for, but the policy makes nothing of it
        (0.0, 0.0, 3.0, False),  # grows, and is not paid for it
        (0.0, 0.5, 3.0, False),  # grows, and is paid for being right
    ],
)
def test_the_watch_calls_when_answers_grow_and_length_alone_is_paid(paid, right_paid, growth, alarms) -> None:
    for seed in range(5):
        watch = judge_length_bias.Watch(judge_length_bias.WatchedJudge(watched_steps=4))
        rng = np.random.default_rng(seed)
        found = [watch.see(graded(rng, 20 + growth * step, paid, right_paid)) for step in range(10)]
        called = [slope for slope in found if slope is not None]
        assert bool(called) == alarms and found[:4] == [None] * 4
        if alarms:
            assert called[0] == pytest.approx(0.02, abs=0.01)


def test_a_watched_trial_that_is_killed_goes_on_with_the_prices_it_had(tmp_path, monkeypatch) -> None:
    know_tiny(monkeypatch)
    experiment = judge_length_bias.EXPERIMENT
    always = {"watched_steps": 1, "standard_errors": -1e9, "growth": 0.0, "checkpoint_every_steps": 1}
    task = "judged_arithmetic,num_terms=2,modulus=2,worked_frac=0.0,padded_frac=1.0,length_share=0.5,long_reply=8"
    small = {**SMALL, "environment": task, "num_steps": 4}
    settings = changed(
        experiment.settings("cpu", experiment.arm("watched"), 0), {**small, **always, "cores": 1}
    )

    def outcome(folder: Path, tell=lambda done, total, note: None) -> Outcome:
        return judge_length_bias.train_watched(Trial("watched", "method", settings, folder, tell))

    def kill(done: int, total: int, note: str) -> None:
        if done == 3 and "loss" not in note:  # not an update of the cold start
            raise KeyboardInterrupt

    whole = outcome(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        outcome(tmp_path / "killed", kill)
    again = outcome(tmp_path / "killed")
    assert whole.values == again.values
    assert whole.values["alarms"] == 4.0 and whole.values["first_alarm"] == 1.0
    prices = [row["reward_part/length_price"] for row in whole.rows if row["step"]]
    assert prices[0] == 0.0 and len(set(prices)) == 4
    for row, same in zip(whole.rows, again.rows, strict=True):
        assert {k: v for k, v in row.items() if describe(k).group != "speed"} == {
            k: v for k, v in same.items() if describe(k).group != "speed"
        }


@pytest.mark.parametrize("last_alarm", [0, 2])
def test_what_a_character_earns_is_that_of_all_steps_since_the_last_alarm(
    tmp_path, monkeypatch, last_alarm
) -> None:
    know_tiny(monkeypatch)
    experiment = judge_length_bias.EXPERIMENT
    task = "judged_arithmetic,num_terms=2,modulus=2,worked_frac=0.0,padded_frac=1.0,length_share=1.0,long_reply=16"
    calls = [0.0 if step == last_alarm else None for step in range(1, 7)]
    monkeypatch.setattr(judge_length_bias.Watch, "see", lambda watch, graded: calls.pop(0))
    changes = {**SMALL, "environment": task, "cores": 1, "num_steps": 6, "watched_steps": 2}
    settings = changed(experiment.settings("cpu", experiment.arm("unwatched"), 0), changes)
    outcome = judge_length_bias.train_watched(Trial("unwatched", "method", settings, tmp_path))
    first = outcome.values["first_alarm"]
    assert outcome.values["alarms"] == bool(last_alarm) and first == (last_alarm or 6)
    assert isinstance(first, AtLeast) == (not last_alarm)
    # By hand: grades on lengths and one column for each problem and answer, every reply once.
    assert outcome.run is not None
    directory = RunDirectory.open(outcome.run)
    found = {
        (step, one.rollout.group, one.rollout.reply): one.rollout.reward
        for step in range(last_alarm + 1, 7)
        for one in directory.read_rollouts(step)
    }
    cells = [(step, group, reply.rpartition("#")[2]) for step, group, reply in found]
    columns = [[float(cell == other) for other in sorted(set(cells))] for cell in cells]
    lengths = [[float(len(reply))] for *_, reply in found]
    wanted = np.linalg.lstsq(np.hstack([lengths, columns]), np.array(list(found.values())), rcond=None)[0][0]
    assert wanted > 0.01 and outcome.values["slope"] == pytest.approx(wanted)


def test_each_window_of_the_staged_arm_makes_room_for_the_working_of_longer_sums() -> None:
    experiment = length_windows.EXPERIMENT
    tokens = {arm.name: arm.changes.get("length_window.tokens", ()) for arm in experiment.arms}
    assert tokens["fixed"] == tokens["staged"][:1] and tokens["jump"] == (
        tokens["staged"][0],
        tokens["staged"][-1],
    )
    assert [2000 * window for window in tokens["staged"]] == [40_000, 48_000, 56_000, 64_000, 72_000, 80_000]
    task = make(experiment.cpu.environment)
    assert isinstance(task, Several)
    needed = []
    for part in task.parts:
        assert isinstance(part, LoopingArithmetic)
        needed.append(len(part.worked(part.problem("train", 0))) + 1)  # and the end
        # A loop that is shown to its end would teach that it ends.
        assert part.loop_tokens > tokens["staged"][-1]
    assert needed == [20, 26, 32, 38]
    assert [sum(n <= window for n in needed) for window in tokens["staged"]] == [1, 1, 2, 3, 3, 4]


def test_the_excess_of_wrong_answers_is_over_the_steps_that_have_both_kinds() -> None:
    rows = [
        {"step": 0},
        {"step": 1, "response_tokens_wrong": 30.0, "response_tokens_right": 20.0},
        {"step": 2, "response_tokens_wrong": 16.0, "response_tokens_right": 20.0},
        {"step": 3, "response_tokens_right": 20.0},
    ]
    assert length_windows.wrong_excess(Outcome(rows)) == (10 - 4) / 2


def test_openings_are_found_with_their_waits_and_with_what_perplexity_did_at_them() -> None:
    nats = [0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.2, 0.2]
    stages = [None, *[1.0] * 6, *[2.0] * 7, *[3.0] * 2]
    rows = [
        {"step": step, "perplexity": math.exp(nat), **({"window_stage": stage} if stage else {})}
        for step, (nat, stage) in enumerate(zip(nats, stages, strict=True))
    ]
    outcome = Outcome(rows)
    assert length_windows.TRIGGERS.converged_steps == 3
    assert length_windows.openings(outcome) == [(7, 6), (14, 7)]
    assert length_windows.opening_rise(outcome) == pytest.approx((0.2 - 0.1) / 2)
    assert length_windows.late_openings(outcome) == 1 / 2
    with pytest.raises(ValueError, match="no window opened"):
        length_windows.opening_rise(Outcome(rows[:7]))

"""Which positions are trained on, that each batch is used once, and that nothing of the answer is read."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import know_tiny, tiny_run
from whorl import cli
from whorl.algorithms.algorithm import assemble
from whorl.data import Group, Score, cu_seqlens_of
from whorl.environments.catalog import make
from whorl.environments.next_token import NextToken
from whorl.environments.scripted import play_scripted
from whorl.environments.texts import NUMBER_TOKENS, draw_text
from whorl.evaluation.power_law import fit_power_law
from whorl.experiments.compare import read_results
from whorl.experiments.differences import differences
from whorl.experiments.starts import Start, from_start, start_settings
from whorl.experiments.trials import Outcome, Trial
from whorl.learning.optimizer import OptimizerSettings
from whorl.loop import Clock, sample_groups, train
from whorl.model.layout import Layout
from whorl.recipes.reinforcement_pretraining import EXPERIMENTS, ReinforcementPretraining
from whorl.recipes.reinforcement_pretraining import measures as measures_module
from whorl.recipes.reinforcement_pretraining import trial as trial_module
from whorl.recipes.reinforcement_pretraining.__main__ import command_for, main
from whorl.recipes.reinforcement_pretraining.experiments import FAST, MORE_TEXT
from whorl.recipes.reinforcement_pretraining.measures import (
    accuracies,
    ends_in,
    flops_of_training,
    law_of_compute,
)
from whorl.recipes.reinforcement_pretraining.positions import (
    entropies,
    positions_of,
    prepare,
    write_positions,
)
from whorl.recipes.reinforcement_pretraining.recipe import BINS, QUESTIONS, START, start_with
from whorl.recipes.reinforcement_pretraining.trial import (
    STARTS_OF_QUESTIONS,
    questions_from,
    rpt_trial,
    text_training,
)
from whorl.run import open_run, start_run
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation, Settings


def small_run(tmp_path, monkeypatch, **changes):
    settings = {
        "environment": "next_token", "max_context": 128, "sampling": Sampling(temperature=0.8, max_tokens=12),
        "algorithm": ReinforcementPretraining().algorithm,
    }  # fmt: skip
    return tiny_run(tmp_path / "run", monkeypatch, **(settings | changes))


def test_the_method_has_no_kl_and_trains_on_thought_and_prediction():
    algorithm = ReinforcementPretraining().resolve_algorithm()
    assert [term.name for term in algorithm.terms] == ["ppo_clip"]
    assert algorithm.roles is None and algorithm.dynamic_sampling
    assert ReinforcementPretraining().updates_per_batch == 1


def test_every_ratio_is_one_at_the_single_update(tmp_path, monkeypatch):
    """Strictly on-policy: what sampled is what learns. Rewards are made to differ, or there would be no update."""
    monkeypatch.setattr(NextToken, "verify", lambda self, problem, rollout: _parity(rollout))
    run = small_run(tmp_path, monkeypatch, num_steps=2, cold_start=ColdStart())
    assert train(run) is None
    rows = [row for row in run.directory.history() if row["step"] > 0]
    assert len(rows) == 2
    for row in rows:
        assert row["grad_norm"] > 0
        assert row["ratio_max"] == pytest.approx(1, abs=1e-4) and row["ratio_mean"] == pytest.approx(
            1, abs=1e-4
        )
        assert row["clipped_high_frac"] == row["clipped_low_frac"] == 0


def _parity(rollout):

    return Score(float(rollout.sample % 2), why="by sample")


def test_dynamic_sampling_begins_after_its_steps(tmp_path, monkeypatch):
    """No group has a signal: before, none is replaced; after, `max_redraws` times all of them."""
    run = small_run(
        tmp_path, monkeypatch, cold_start=ColdStart(), dynamic_sampling_after_steps=1, max_redraws=2
    )
    redrawn = []
    for run.step in (0, 1):
        _, metrics = sample_groups(run, Clock())
        redrawn.append(metrics["groups_redrawn"])
    assert redrawn == [0, 2 * run.settings.problems_per_step]


def test_entropies_are_those_of_the_sixteen_most_probable_tokens(tmp_path, monkeypatch):
    run = small_run(tmp_path, monkeypatch, environment="next_token,way=continue", cold_start=ColdStart())
    problems = [NextToken(way="continue").at("test", 0, token) for token in (NUMBER_TOKENS, 12, 20)]
    found = entropies(run, problems)

    for problem, entropy in zip(problems, found, strict=True):
        ids = [i for _, part in run.tokenizer.render(problem.messages, generation=True) for i in part]
        with torch.no_grad():
            hidden = run.model(torch.tensor(ids), Layout(cu_seqlens_of([len(ids)]))).hidden_ND
            p = np.sort(run.model.logits(hidden[-1:])[0].double().softmax(-1).numpy())[-16:]
        p = p / p.sum()
        assert entropy == pytest.approx(-(p * np.log(p)).sum(), abs=1e-4)
        assert entropy <= np.log(16) + 1e-6
    # A context says the same whatever it is read beside.
    assert entropies(run, problems[1:2])[0] == pytest.approx(found[1], abs=1e-5)


def test_bins_are_nested():
    assert list(BINS) == ["easy", "medium", "hard"]
    assert list(BINS.values()) == sorted(BINS.values())


def test_accuracies_by_bin_count_the_positions_that_are_at_least_so_unsure(tmp_path, monkeypatch):
    run = small_run(tmp_path, monkeypatch, cold_start=ColdStart())
    places = positions_of(range(1), "test")[:6]
    entropy = [0.1, 0.6, 1.2, 1.6, 1.5, 0.4]
    right = [0, 1, 0, 1, 1, 1]

    def play(self, problems, *rest):
        groups = []
        for problem, hit in zip(problems, right, strict=True):
            token = draw_text("test", 0).tokens[problem.extra["token"]] if hit else "no"
            groups.append(
                Group(
                    problem,
                    [play_scripted(self.environment, problem, [f"<think></think>\\boxed{{{token}}}"])],
                )
            )
        return groups, 0.0

    monkeypatch.setattr(type(run.player), "play", play)
    values = accuracies(run, places, entropy)
    assert (values["num_easy"], values["num_medium"], values["num_hard"]) == (4, 3, 2)
    assert (values["easy"], values["medium"], values["hard"]) == (3 / 4, 2 / 3, 2 / 2)
    assert values["all"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("way", ["continue", "think"])
def test_plain_prediction_is_greedy_and_pays_for_one_token_and_thoughts_are_drawn_as_in_training(
    way, tmp_path, monkeypatch
):
    run = small_run(tmp_path, monkeypatch, environment=f"next_token,way={way}", cold_start=ColdStart())
    asked = []

    def play(self, problems, num_samples, sampling, phase):
        asked.append(sampling)
        return [Group(p, [play_scripted(self.environment, p, [""])]) for p in problems], 0.0

    monkeypatch.setattr(type(run.player), "play", play)
    accuracies(run, positions_of(range(1), "test"), [1.0] * 26)
    drawn = run.settings.sampling
    plain = replace(drawn, temperature=0.0, max_tokens=len("larger ") + 1)
    assert asked == [plain if way == "continue" else drawn]


def test_positions_are_written_where_the_proxy_is_unsure_enough(tmp_path, monkeypatch):
    run = small_run(tmp_path, monkeypatch, environment="next_token,way=continue", cold_start=ColdStart())
    module = "whorl.recipes.reinforcement_pretraining.positions.entropies"
    monkeypatch.setattr(module, lambda run, problems: [p.extra["token"] / 20 for p in problems])
    file = tmp_path / "positions.jsonl"
    found = write_positions(run, file, num_texts=2, lowest=1.0)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["token"] for row in rows} == set(range(20, 31))
    assert found == {"positions": 2 * 26.0, "kept": 2 * 11.0, "texts": 2.0}
    task = NextToken(positions=str(file))
    assert task.problem("train", 11).extra == {"split": "train", "text": 1, "token": 20}
    with pytest.raises(ValueError, match="is sure of every next token in 2 texts"):
        write_positions(run, file, num_texts=2, lowest=9.0)


def test_the_batch_holds_no_token_of_what_is_predicted_but_what_the_policy_wrote(tmp_path, monkeypatch):
    """Leakage, seen from the learner: everything in a sequence that the policy did not write is the context."""
    run = small_run(tmp_path, monkeypatch, cold_start=ColdStart())
    monkeypatch.setattr(NextToken, "verify", lambda self, problem, rollout: _parity(rollout))
    problems = [NextToken().problem("train", index) for index in range(4)]
    groups, _ = run.player.play(problems, 4, run.settings.sampling, ("train", 0))
    batch = assemble(groups, run.algorithm)
    tokens, policy = batch.unpack("tokens_N"), batch.unpack("policy_N")
    for sequence, (ids, wrote) in enumerate(zip(tokens, policy, strict=True)):
        problem = problems[sequence // 4]
        first = int(wrote.nonzero()[0])
        assert wrote[first:].all()
        text = draw_text("train", problem.extra["text"]).tokens
        assert run.tokenizer.decode(ids[:first].numpy()) == "think" + "".join(text[: problem.extra["token"]])


def test_the_law_is_fitted_to_the_tokens_spent_up_to_each_checkpoint(tmp_path, monkeypatch):
    """Four checkpoints on 1/2 - 1/(4C): C is 1, 2, 4 and 8 tokens, at steps 1 to 4. The start is no point."""
    run = small_run(tmp_path, monkeypatch, cold_start=ColdStart())
    rows = [{"step": 0}] + [
        {"step": k + 1, "generated_tokens": n} for k, n in enumerate((1.0, 1.0, 2.0, 4.0))
    ]
    monkeypatch.setattr(type(run.directory), "history", lambda self: rows)
    monkeypatch.setattr(type(run.directory), "checkpoint_steps", lambda self: [0, 1, 2, 3, 4])
    module = "whorl.recipes.reinforcement_pretraining.measures"
    monkeypatch.setattr(f"{module}.open_run", lambda path, step, read_only: step)
    rising = {1: 1 / 4, 2: 3 / 8, 3: 7 / 16, 4: 15 / 32}

    def accuracies(step, places, entropy):
        assert (list(places), list(entropy)) == ([(0, 6), (0, 7)], [0.7, 1.2])  # only positions of a bin
        return {"easy": rising[step], "medium": 0.2}

    monkeypatch.setattr(f"{module}.accuracies", accuracies)
    found = law_of_compute(run, [(0, 5), (0, 6), (0, 7)], [0.1, 0.7, 1.2])
    assert found == pytest.approx({"r2_easy": 1, "exponent_easy": 1}, rel=0.01)
    # By steps it would be another law.
    assert fit_power_law([1, 2, 3, 4], list(rising.values())).exponent < 0.5


def test_every_start_gets_the_same_second_stage(tmp_path, monkeypatch):
    """Text and questions go on from the policy that the arm ended with; nothing else tells the arms apart."""
    experiment = EXPERIMENTS[0]
    seen = []

    def train_run(trial):
        seen.append(trial)
        return Outcome([{"step": 0, "eval_accuracy": 0.25}, {"step": 1}, {"step": 2, "eval_accuracy": 0.75}])

    monkeypatch.setattr(trial_module, "train_run", train_run)
    for name in STARTS_OF_QUESTIONS:
        arm = experiment.arm(name)
        trial = Trial(name, arm.role, experiment.settings("cpu", arm, 3), tmp_path / name)
        assert questions_from(trial, tmp_path / name / "run", 3) == {
            "questions_before": 0.25,
            "questions": 0.75,
        }
    assert {trial.settings.model for trial in seen} == {
        str(tmp_path / n / "run") for n in STARTS_OF_QUESTIONS
    }
    assert len({str(replace(trial.settings, model="")) for trial in seen}) == 1
    assert {trial.role for trial in seen} == {"method"}  # a start would not be trained


def test_the_second_stage_has_its_whole_rate_from_the_first_step(tmp_path, monkeypatch):
    """The recipe's warm-up of 5 updates would never end in a stage of 3 steps."""
    seen = []
    rows = [{"step": 0, "eval_accuracy": 0.25}]
    monkeypatch.setattr(trial_module, "train_run", lambda trial: seen.append(trial) or Outcome(rows))
    arm = EXPERIMENTS[0].arm("rpt")
    settings = EXPERIMENTS[0].settings("cpu", arm, 0)
    questions_from(Trial("rpt", "method", settings, tmp_path), tmp_path / "run", settings.question_steps)
    optimizer = seen[0].settings.optimizer
    assert optimizer.learning_rate_at(0) == optimizer.learning_rate == settings.optimizer.learning_rate


def test_arms_differ_from_the_method_by_settings_that_a_diff_shows():
    experiment = EXPERIMENTS[0]
    method = experiment.settings("cpu", experiment.arm("rpt"), 0)
    shown = {
        arm.name: {one.name for one in differences(method, experiment.settings("cpu", arm, 0))}
        for arm in experiment.arms
    }
    more_text = {"environment", "lowest_entropy_nats", "text_updates"}
    assert shown == {
        "text": {"environment"},
        "reasoning": set(),
        "rpt": set(),
        "more_text": more_text,
        "more_text_fast": more_text | {"optimizer.learning_rate", "optimizer.max_grad_norm"},
        "any_position": {"lowest_entropy_nats"},
        "another_text": {"environment"},
        "no_thought": {"environment"},
    }
    assert replace(experiment.cpu, seed=0) == ReinforcementPretraining()


def test_continued_text_is_read_with_the_optimizer_of_its_arm():
    experiment = EXPERIMENTS[0]
    taught = experiment.cpu.cold_start.optimizer
    assert {
        "optimizer.learning_rate": taught.learning_rate,
        "optimizer.max_grad_norm": taught.max_grad_norm,
    } == FAST
    for name in ("more_text", "more_text_fast"):
        settings = experiment.settings("cpu", experiment.arm(name), 0)
        text = text_training(settings)
        assert (text.max_updates, text.examples_per_update) == (MORE_TEXT["text_updates"], 32 * 8)
        assert text.optimizer == settings.optimizer and text.until_accuracy == 1.0


def test_what_reinforcement_learning_costs_is_reading_writing_and_training(tmp_path, monkeypatch):
    """At one operation a token: prompts of p tokens, 4 x 4 rollouts a step, one group replaced in the second."""
    run = trained_on_positions(tmp_path, monkeypatch)
    monkeypatch.setattr(measures_module, "of_model", lambda config: lambda before: 1.0)
    problems = [run.environment.problem("train", n) for n in range(4)]
    prompt = np.mean(
        [sum(len(ids) for _, ids in run.tokenizer.render(p.messages, generation=True)) for p in problems]
    )
    rows = [
        {"step": 0},
        {"step": 1, "generated_tokens": 16 * 10.0, "trained_tokens": 16 * 10.0, "groups_redrawn": 0.0},
        {"step": 2, "generated_tokens": 20 * 10.0, "trained_tokens": 16 * 5.0, "groups_redrawn": 1.0},
    ]
    monkeypatch.setattr(type(run.directory), "history", lambda self: rows)
    reading_and_writing = 16 * (prompt + 10) + 20 * (prompt + 10)
    training = 3 * 16 * (prompt + 10) + 3 * 16 * (prompt + 5)
    assert flops_of_training(run) == pytest.approx(
        reading_and_writing + training, rel=0.01
    )  # lengths are rounded


def test_what_continued_text_costs_is_training_on_whole_texts(tmp_path, monkeypatch):
    run = trained_on_positions(tmp_path, monkeypatch, environment="next_token,way=continue", text_updates=7)
    monkeypatch.setattr(measures_module, "of_model", lambda config: lambda before: 1.0)
    # "continue", 62 characters of text, and the marks of three turns' beginnings and ends.
    rendered = run.tokenizer.render(run.environment.problem("train", 0).messages, generation=True)
    marks = (
        sum(len(ids) for _, ids in rendered)
        - len("continue")
        - len(run.environment.problem("train", 0).messages[1].text)
    )
    assert flops_of_training(run) == 3 * 7 * 16 * (
        len("continue") + 62 + marks + 1
    )  # and the end of the reply


def trained_on_positions(tmp_path, monkeypatch, environment="next_token", **changes):
    """A tiny run of the recipe on a file of four positions."""
    file = tmp_path / "positions.jsonl"
    file.write_text("".join(json.dumps({"text": 0, "token": k}) + "\n" for k in (6, 9, 12, 15)))
    know_tiny(monkeypatch)
    settings = tiny_settings(environment=f"{environment},positions={file}", cold_start=ColdStart(), **changes)
    return start_run("rpt", settings, tmp_path / "run")


def tiny_settings(**changes):
    few = {
        "model": "tiny", "num_steps": 2, "problems_per_step": 4, "rollouts_per_problem": 4, "train_texts": 2,
        "evaluation": Evaluation(0, 4, 1), "sampling": Sampling(temperature=0.8, max_tokens=12), "cores": 1,
    }  # fmt: skip
    return replace(ReinforcementPretraining(), **(few | changes))


def test_continued_text_has_at_least_the_operations_of_the_method_in_the_results_that_are_kept():
    results = Path(__file__).parents[2] / "results/reinforcement_pretraining/reinforcement_pretraining"
    flops = {(r.arm, r.seed): r.values["flops"] for r in read_results(results) if "flops" in r.values}
    for (arm, seed), spent in flops.items():
        if arm.startswith("more_text"):
            assert spent >= flops["rpt", seed], (arm, seed)


def test_a_thought_is_right_if_its_last_characters_are_the_token_whatever_is_boxed():
    replies = {
        "<think>1+2=3</think>\\boxed{9}": 1,
        "<think>1+2=4</think>\\boxed{3}": 0,
        "<think>1+2=3": 0,  # cut off: whether that was its end is not known
        "\\boxed{3}": 0,
    }
    assert {reply: ends_in(reply, "3") for reply in replies} == replies


def test_no_filter_and_the_filter_leave_the_same_texts(tmp_path, monkeypatch):
    know_tiny(monkeypatch)
    run = start_run(
        "proxy",
        tiny_settings(environment="next_token,way=continue", cold_start=ColdStart()),
        tmp_path / "run",
    )
    found = {}
    for lowest in (0.0, 2.0):
        file = tmp_path / f"{lowest}.jsonl"
        assert write_positions(run, file, 3, lowest)["texts"] == 3
        found[lowest] = {
            (row["text"], row["token"]) for row in map(json.loads, file.read_text().splitlines())
        }
    assert found[0.0] == set(positions_of(range(3), "train")) and found[2.0] <= found[0.0]


LITTLE = ColdStart(200, 0.02, 20, 40, 16, OptimizerSettings(1e-2))
"""Ends as soon as one answer in fifty is right, as a start without any is refused."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a tiny start and the positions at which it is unsure, as the page's command makes them."""
    folder = tmp_path_factory.mktemp("prepared")
    start = start_settings(EXPERIMENTS[0], "cpu", EXPERIMENTS[0].arm("rpt"), 0)
    assert start is not None and start.environment == START
    with pytest.MonkeyPatch.context() as patch:
        know_tiny(patch)
        small = replace(start, model="tiny", cold_start=LITTLE, evaluation=Evaluation(0, 4, 1))
        found = prepare(folder, small, tiny_settings())
    assert found == {"positions": 2 * 26.0, "kept": 2 * 26.0, "texts": 2.0}  # it is sure of nothing yet
    return folder


def test_the_commands_of_the_page_lead_to_a_policy_that_is_trained_on_its_positions(
    prepared, tmp_path, monkeypatch, capsys
):
    """On a tiny model; nothing is stubbed, nothing is learned."""
    know_tiny(monkeypatch)
    few = "--num-steps 1 --problems-per-step 2 --rollouts-per-problem 2 --evaluation.num-problems 2 --cores 1"
    command = f"{command_for(prepared)} {few} --sampling.max-tokens 12 --run {tmp_path}/run"
    assert cli.main(shlex.split(command)[1:]) == 0
    run = open_run(tmp_path / "run", read_only=True)
    assert run.step == 1 and run.environment.num_problems("train") == 52
    values = accuracies(run, positions_of(range(1), "test"), [2.0] * 26)
    assert values["num_hard"] == 26 and 0 <= values["thought_sums"] <= 1


def test_no_positions_are_written_from_a_start_that_did_not_pass_its_gate(tmp_path):
    made = Start(accuracy=0.2, wanted=0.5, updates=7, tokens=0, seconds=0.0, reason="accuracy 0.200 of 0.50")
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "start.json").write_text(json.dumps(vars(made)))
    with pytest.raises(ValueError, match=r"did not pass its gate: accuracy 0\.200 of 0\.50"):
        prepare(tmp_path, Settings(), tiny_settings())
    assert not (tmp_path / "positions.jsonl").exists()


@pytest.mark.parametrize("name", ["rpt", "more_text_fast", "any_position", "text"])
def test_a_trial_ends_with_its_measures(name, prepared, tmp_path, monkeypatch):
    """On a tiny model, with nothing stubbed."""
    know_tiny(monkeypatch)
    monkeypatch.setattr(trial_module, "TEST_TEXTS", 1)
    monkeypatch.setattr(trial_module, "QUESTIONS_EVALUATED", Evaluation(0, 4, 1))
    experiment = EXPERIMENTS[0]
    asked = experiment.settings("cpu", experiment.arm(name), 0)
    settings = from_start(
        tiny_settings(
            environment=asked.environment, lowest_entropy_nats=asked.lowest_entropy_nats, seed=asked.seed,
            text_updates=min(asked.text_updates, 2), optimizer=asked.optimizer, law_every_steps=1, question_steps=1,
        ),
        prepared / "start",
    )  # fmt: skip
    arm = experiment.arm(name)
    outcome = rpt_trial(Trial(name, arm.role, settings, tmp_path / "trial"))
    assert {*BINS, "sums", "others", "all", "tokens"} <= outcome.values.keys()
    assert ("flops" in outcome.values) == (name != "text") and outcome.values.get("flops", 1.0) > 0
    assert ("questions" in outcome.values) == (name in STARTS_OF_QUESTIONS)
    assert ("thought_sums" in outcome.values) == (asked.environment == "next_token")
    run = open_run(outcome.run, read_only=True)
    assert run.step == (2 if name in ("rpt", "any_position") else 0)
    assert run.environment.num_problems("train") == 52  # of two texts, whatever the arm
    assert (run.settings.cold_start.max_updates == 2) == (name == "more_text_fast")


def test_the_command_says_how_it_is_used(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_no_sum_that_is_held_out_anywhere_is_added_up_in_any_part_of_the_start():
    """Held-out texts and held-out questions against what the start, and training on texts, may show."""

    def sums_of(part, split, count):
        problems = [part.problem(split, index) for index in range(count)]
        if isinstance(part, NextToken):
            return {max(draw_text(split, p.extra["text"]).computed.values(), key=len) for p in problems}
        return {tuple(p.extra["terms"]) for p in problems}

    parts = make(START).parts
    taught = set().union(*(sums_of(part, "train", 800) for part in parts))
    held_out = sums_of(NextToken(), "test", trial_module.TEST_TEXTS) | sums_of(make(QUESTIONS), "test", 256)
    four = {summed for summed in taught if len(summed) == 4}
    assert len(four) > 1000 and len(held_out) > 200
    assert not four & held_out


@pytest.mark.parametrize(("wrong_frac", "right"), [(0.8, 0.2), (0.0, 1.0)])
def test_boxes_of_a_start_hold_what_the_thought_came_to_or_mostly_do_not(wrong_frac, right):
    """0.2 of 400 replies, within three standard errors; the honest start has none that is wrong."""
    _, thinks, answers, *_ = make(start_with(wrong_frac)).parts
    rng = np.random.default_rng(0)
    for task in (thinks, answers):
        earned = [
            play_scripted(task, problem, task.traces(problem, rng)).reward
            for problem in (task.problem("train", index) for index in range(400))
        ]
        assert abs(np.mean(earned) - right) <= 3 * np.sqrt(right * (1 - right) / 400)
    assert (START, make(START).parts[1].wrong_frac) == (start_with(0.8), 0.8)
    assert NextToken().wrong_frac == 0.0  # what `whorl train` alone shows

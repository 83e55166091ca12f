"""Which positions are trained on, that each batch is used once, and that nothing of the answer is read."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support import tiny_run
from whorl.algorithms.algorithm import assemble
from whorl.data import Group, Score, cu_seqlens_of
from whorl.environments.next_token import NextToken
from whorl.environments.scripted import play_scripted
from whorl.environments.texts import NUMBER_TOKENS, draw_text
from whorl.evaluation.power_law import fit_power_law
from whorl.experiments.trials import Outcome, Trial
from whorl.loop import Clock, sample_groups, train
from whorl.model.layout import Layout
from whorl.recipes.reinforcement_pretraining import (
    BINS,
    EXPERIMENTS,
    STARTS_OF_QUESTIONS,
    ReinforcementPretraining,
    accuracies,
    entropies,
    law_of_compute,
    main,
    more_text,
    positions_of,
    questions_from,
    write_positions,
)
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart


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
    module = "whorl.recipes.reinforcement_pretraining.entropies"
    monkeypatch.setattr(module, lambda run, problems: [p.extra["token"] / 20 for p in problems])
    file = tmp_path / "positions.jsonl"
    found = write_positions(run, file, num_texts=2, lowest=1.0)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["token"] for row in rows} == set(range(20, 31))
    assert found == {"positions": 2 * 26.0, "kept": 2 * 11.0}
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
    module = "whorl.recipes.reinforcement_pretraining"
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
    (experiment,) = EXPERIMENTS
    seen = []

    def train_run(trial):
        seen.append(trial)
        return Outcome([{"step": 0, "eval_accuracy": 0.25}, {"step": 1}, {"step": 2, "eval_accuracy": 0.75}])

    monkeypatch.setattr("whorl.recipes.reinforcement_pretraining.train_run", train_run)
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


def test_more_text_reads_as_many_sequences_as_the_method_writes():
    settings = ReinforcementPretraining()
    text = more_text(settings)
    rollouts = settings.num_steps * settings.problems_per_step * settings.rollouts_per_problem
    assert text.max_updates * text.examples_per_update == rollouts
    assert text.optimizer == settings.optimizer and text.until_accuracy == 1.0


def test_the_arms_differ_from_the_method_in_one_thing_each():
    (experiment,) = EXPERIMENTS
    changes = {arm.name: dict(arm.changes) for arm in experiment.arms}
    assert changes["rpt"] == changes["reasoning"] == changes["any_position"] == {}
    assert all(set(change) <= {"environment"} for change in changes.values())
    assert replace(experiment.cpu, seed=0) == ReinforcementPretraining()


def test_the_command_writes_positions_of_a_run(tmp_path, monkeypatch, capsys):
    module = "whorl.recipes.reinforcement_pretraining"
    monkeypatch.setattr(f"{module}.open_run", lambda path, read_only: path)
    monkeypatch.setattr(f"{module}.write_positions", lambda run, *rest: {"positions": 9.0, "kept": 4.0})
    assert main(["RUN", str(tmp_path / "positions.jsonl")]) == 0
    assert "4 of 9 positions kept" in capsys.readouterr().out
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err

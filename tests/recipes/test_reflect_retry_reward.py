"""Which tokens of an episode are trained, with which credit: the reflections', with that of their own retry."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support import know_tiny, tiny_model, tiny_run
from whorl.algorithms.algorithm import assemble
from whorl.data import Group, Problem, Rollout, apply, role_code
from whorl.environments.catalog import make
from whorl.environments.reflect_retry import ReflectRetry
from whorl.experiments.plan import changed
from whorl.experiments.trials import Trial
from whorl.faults import Stop
from whorl.model.tokenizer import Tokenizer
from whorl.model.transformer import Transformer
from whorl.recipes.reflect_retry_reward import EXPERIMENTS, ReflectRetryReward
from whorl.recipes.reflect_retry_reward.__main__ import main
from whorl.recipes.reflect_retry_reward.failures import STRATA, collect_failures
from whorl.recipes.reflect_retry_reward.recipe import TASK, rewards_of_the_next_problem
from whorl.recipes.reflect_retry_reward.trial import held_out_values, reflect_trial
from whorl.rollouts import Player
from whorl.run import open_run
from whorl.sampling.dialogue import Dialogue, Script
from whorl.sampling.draw import Sampling
from whorl.sampling.engine import Engine
from whorl.settings import ColdStart

ENVIRONMENT = ReflectRetry("countdown", {"max_number": 9, "max_target": 20})
TOKENIZER = Tokenizer.characters(ENVIRONMENT.alphabet or "")
PROBLEM = Problem("p", "3 8 5=19", source="reflect_retry", extra={"numbers": [3, 8, 5], "target": 19})
OTHER = Problem("o", "2 3 1=6", source="reflect_retry", extra={"numbers": [2, 3, 1], "target": 6})
RIGHT, WRONG, RIGHT_OTHER = "3*8-5", "3+8+5", "2*3*1"
METHOD = ReflectRetryReward().resolve_algorithm()
FREE = replace(METHOD, extras=())  # without the KL, which has a gradient of its own


def episode(problem: Problem, replies: list[str], sample: int = 0) -> Rollout:
    """Played with real tokens and roles, and judged."""
    dialogue = Dialogue(Script(TOKENIZER, replies, 200), TOKENIZER, problem, key=0, sample=sample)
    asyncio.run(ENVIRONMENT.play(problem, dialogue))
    rollout = dialogue.rollout()
    rollout.score = ENVIRONMENT.verify(problem, rollout)
    return rollout


def group(problem: Problem, *endings: tuple[str, str]) -> Group:
    """Reflections and retries after one failed attempt."""
    return Group(problem, [episode(problem, [WRONG, *ending], i) for i, ending in enumerate(endings)])


def two_groups() -> list[Group]:
    return [
        group(PROBLEM, ("i was wrong", RIGHT), ("try 3+8=11", WRONG)),
        group(OTHER, ("that was wrong", "2+3+1"), ("a", "2-3+1"), ("b", WRONG)),  # 2+3+1 is right too
    ]


def solved() -> Group:
    return Group(PROBLEM, [episode(PROBLEM, [RIGHT], sample) for sample in range(2)])


def logit_gradient(groups: list[Group], algorithm) -> tuple[torch.Tensor, torch.Tensor]:
    """d loss / d logits, and the role of the token that each row of logits predicts."""
    batch = assemble(groups, algorithm)
    generator = torch.Generator().manual_seed(0)
    shape = (batch.num_tokens, TOKENIZER.vocab_size)
    logits_NV = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    before = logits_NV.log_softmax(-1)[:-1]
    logp_N = torch.cat([torch.zeros(1), before.gather(1, batch["tokens_N"][1:, None])[:, 0]])
    logp_N = logp_N * (batch["position_N"] > 0)  # nothing stands before a first token
    loss = torch.zeros((), dtype=torch.float64)
    for term in algorithm.terms:
        # On-policy, ratio 1: nothing is clipped.
        objective_N, _ = apply(term.objective, batch, logp_N=logp_N, logp_old_N=logp_N.detach())
        loss = loss - term.coefficient * (batch[term.weight_column] * objective_N).sum()
    (gradient_NV,) = torch.autograd.grad(loss, logits_NV)
    role_N = torch.cat([batch["role_N"][1:], batch["role_N"][:1]])
    wrote_N = torch.cat([batch["policy_N"][1:], batch["policy_N"][:1]])
    return gradient_NV, torch.where(wrote_N, role_N, -1)


def trained_roles(algorithm) -> set[int]:
    gradient_NV, role_N = logit_gradient(two_groups(), algorithm)
    touched_N = (gradient_NV != 0).any(-1)
    return set(role_N[touched_N].tolist())


def test_the_gradient_is_exactly_zero_at_every_attempt_retry_and_message():
    gradient_NV, role_N = logit_gradient(two_groups(), FREE)
    reflection_N = role_N == role_code("reflection")
    assert (gradient_NV[~reflection_N] == 0).all()
    # and not at reflections, the end of each included: 12 + 11 and 15 + 2 + 2 tokens
    assert int((gradient_NV[reflection_N] != 0).any(-1).sum()) == 12 + 11 + 15 + 2 + 2


def test_the_wrong_mask_trains_the_retries_too():
    wrong = ReflectRetryReward(trained_roles=("reflection", "retry")).resolve_algorithm()
    assert trained_roles(replace(wrong, extras=())) == {role_code("reflection"), role_code("retry")}
    assert trained_roles(FREE) == {role_code("reflection")}


def test_the_kl_has_weight_on_reflections_alone():
    batch = assemble(two_groups(), METHOD, {"logp_ref_N": lambda b: b["logp_old_N"] - 1.0})
    reflection_N = batch["role_N"] == role_code("reflection")
    for term in METHOD.terms:
        assert (batch[term.weight_column][~(reflection_N & batch["policy_N"])] == 0).all()
    assert METHOD.extras[0].coefficient == 0.001


def test_a_problem_solved_at_the_first_try_adds_no_term():
    with_it, without = assemble([*two_groups(), solved()], FREE), assemble(two_groups(), FREE)
    own = with_it["group_S"][with_it["sequence_N"]] == 2
    assert not with_it["trained_N"][own].any()
    column = FREE.terms[0].weight_column
    assert (with_it[column][own] == 0).all()
    assert with_it[column][~own].equal(without[column])
    assert with_it["advantage_N"][~own].equal(without["advantage_N"])


def test_a_reflection_earns_what_its_own_retry_does():
    batch = assemble(two_groups(), FREE)
    advantages = [
        a[t].unique().tolist() for a, t in zip(*map(batch.unpack, ("advantage_N", "trained_N")), strict=True)
    ]
    # Rewards 1, 0: mean 1/2, std 1/2. Rewards 1, 0, 0: mean 1/3, std sqrt(2)/3, so sqrt(2) and -1/sqrt(2).
    expected = [1.0, -1.0, np.sqrt(2), -1 / np.sqrt(2), -1 / np.sqrt(2)]
    np.testing.assert_allclose(np.concatenate(advantages), expected, atol=1e-5)


def test_the_control_gives_the_rewards_of_the_next_problem():
    groups = [
        group(PROBLEM, ("a", RIGHT), ("b", WRONG)),
        group(OTHER, ("c", WRONG), ("d", RIGHT_OTHER)),
        group(PROBLEM, ("e", RIGHT), ("f", RIGHT)),
    ]
    control = ReflectRetryReward(rewards_of="another problem").resolve_algorithm()
    batch = assemble(groups, replace(control, extras=()))
    assert batch["reward_S"].tolist() == [0, 1, 1, 1, 1, 0]
    assert assemble(groups, FREE)["reward_S"].tolist() == [1, 0, 0, 1, 1, 1]


def test_of_groups_of_other_sizes_no_reward_stays_with_its_own_group():
    rewards = torch.tensor([0.1, 0.2, 0.3, 1.1, 2.1, 2.2])
    found = rewards_of_the_next_problem(rewards, torch.tensor([7, 7, 7, 3, 5, 5]))
    assert found.tolist() == pytest.approx([1.1, 1.1, 1.1, 2.1, 0.1, 0.2])


def test_the_reflections_of_a_group_follow_the_same_attempt_at_the_same_problem():
    model = Transformer(tiny_model(TOKENIZER.vocab_size, 200)).initialise(0)
    engine = Engine(model, stop_tokens=TOKENIZER.stop_ids, decode_text=TOKENIZER.decode)
    player = Player(ENVIRONMENT, engine, TOKENIZER, seed=0)
    problems = [ENVIRONMENT.problem("train", index) for index in range(3)]
    groups, _ = player.play(problems, 4, Sampling(max_tokens=8), ("train", 0))
    for one in groups:
        turns = [{turn.role: turn for turn in rollout.transcript} for rollout in one.rollouts]
        first = turns[0]["assistant"]
        for rollout, said in zip(one.rollouts, turns, strict=True):
            assert said["assistant"] == first
            assert rollout.tokens_T[: first.end].tolist() == one.rollouts[0].tokens_T[: first.end].tolist()
        assert len({said["reflection"].text for said in turns}) > 1


SPECIFICATION = "reflect_retry:countdown,max_number=9,max_target=20"


def small_run(tmp_path, monkeypatch, **changes):
    settings = {"environment": SPECIFICATION, "max_context": 96, "algorithm": "GRPO"}
    return tiny_run(tmp_path / "run", monkeypatch, **(settings | changes))


def test_no_stratum_of_pass_rates_has_more_than_a_quarter_of_the_problems_asked(tmp_path, monkeypatch):
    run = small_run(tmp_path, monkeypatch)
    rates = [0, 0, 0, 0, 0, 1, 1, 3, 4, 4]  # right answers of 4 to each of ten problems

    def played(self, problems, num_samples, *rest):
        groups = []
        for problem, right in zip(problems, rates, strict=True):
            gold = self.environment.gold(problem)[0]
            rollouts = []
            for sample in range(num_samples):
                dialogue = Dialogue(
                    Script(TOKENIZER, [gold if sample < right else f"{sample}"], 200),
                    TOKENIZER,
                    problem,
                    key=0,
                )
                asyncio.run(self.environment.play(problem, dialogue))
                rollouts.append(dialogue.rollout())
                rollouts[-1].score = self.environment.verify(problem, rollouts[-1])
            groups.append(Group(problem, rollouts))
        return groups, 0.0

    monkeypatch.setattr(type(run.player), "play", played)
    file = tmp_path / "failures.jsonl"
    found = collect_failures(run, file, 10, 4)
    tokens = (
        5 * 4 * 2 + 2 * (6 + 3 * 2) + (3 * 6 + 2) + 2 * 4 * 6
    )  # right answers have six, wrong ones two, ends included
    assert found == {"failed": 8.0, "kept": 6.0, "tokens": float(tokens)}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    # Strata begin at 0, 1/8, 1/4 and 1/2: five problems at 0 (three are taken), two at 1/4, one at 3/4.
    assert [row["pass_rate"] for row in rows] == [0, 0, 0, 1 / 4, 1 / 4, 3 / 4]
    assert [row["index"] for row in rows] == [0, 1, 2, 5, 6, 7]
    assert [row["attempt"] for row in rows] == ["0", "0", "0", "1", "1", "3"]
    assert STRATA == (0.0, 1 / 8, 1 / 4, 1 / 2)


SUMS = "reflect_retry:chain_arithmetic,num_terms=2,modulus=2,first_right_frac=0.3"


def sums_trial(folder, arm: str, **changes) -> Trial:
    small = {
        "model": "tiny", "environment": SUMS, "cores": 1, "num_steps": 2, "problems_per_step": 4,
        "rollouts_per_problem": 4, "evaluation.num_problems": 8, "failed_queries": 12, "answers_per_query": 4,
        "num_generated_tokens": 100_000, "rollouts_every_steps": 1,
        "cold_start": ColdStart(),  # made before a trial
    }  # fmt: skip
    experiment = EXPERIMENTS[0]
    assert experiment.cpu is not None
    settings = changed(experiment.cpu, {**experiment.arm(arm).changes, **small, **changes})
    return Trial(arm, experiment.arm(arm).role, settings, folder)


def test_a_trial_trains_on_failures_of_its_start_and_pays_for_collecting_them(tmp_path, monkeypatch):
    """Attempts stay those of the start, problems are those that it failed, and their tokens count."""
    know_tiny(monkeypatch)
    outcome = reflect_trial(sums_trial(tmp_path / "rrr", "rrr"))
    assert outcome.run is not None
    run = open_run(outcome.run, read_only=True)
    said = json.loads((tmp_path / "rrr" / "failures.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "rrr" / "failures.jsonl").read_text().splitlines()]
    assert len(rows) == said["kept"] == outcome.values["failures"] > 0
    assert run.settings.num_generated_tokens == 100_000 - said["tokens"]
    assert outcome.rows[0]["generated_tokens"] == said["tokens"] > 12 * 4
    failed = {row["index"]: row["attempt"] for row in rows}
    for seen in run.directory.read_rollouts(1):
        turns = {turn.role: turn for turn in seen.rollout.transcript}
        assert turns["assistant"].text == failed[int(seen.rollout.problem.id.rsplit("/")[-1])]
        assert not turns["assistant"].by_policy


def test_fresh_attempts_are_the_policys_own_and_cost_nothing_beforehand(tmp_path, monkeypatch):
    know_tiny(monkeypatch)
    outcome = reflect_trial(sums_trial(tmp_path / "fresh", "fresh"))
    assert not (tmp_path / "fresh" / "failures.jsonl").exists()
    assert "failures" not in outcome.values and not outcome.rows[0].get("generated_tokens")


def test_a_trial_whose_tokens_go_into_collecting_stops(tmp_path, monkeypatch):
    know_tiny(monkeypatch)
    with pytest.raises(Stop, match="nothing is left to train with"):
        reflect_trial(sums_trial(tmp_path / "poor", "rrr", num_generated_tokens=20))


def test_a_policy_that_never_fails_leaves_nothing_to_reflect_on(tmp_path, monkeypatch):
    run = small_run(tmp_path, monkeypatch)
    right = Group(PROBLEM, [episode(PROBLEM, [RIGHT])])
    monkeypatch.setattr(type(run.player), "play", lambda self, problems, *rest: ([right] * 2, 0.0))
    with pytest.raises(ValueError, match="nothing to reflect on"):
        collect_failures(run, tmp_path / "failures.jsonl", 2, 1)


def test_held_out_values_follow_the_transcripts_and_swap_reflections(tmp_path, monkeypatch):
    run = small_run(tmp_path, monkeypatch)
    asked = []
    tries = {
        "a": [WRONG, "try 3*8=24,24-5=19", RIGHT],
        "b": [WRONG, f"say {RIGHT}", WRONG],
        "c": [RIGHT],
    }

    def play(self, problems, num_samples, *rest):
        asked.append(problems)
        if "said" in problems[0].extra:
            heard = [p.extra["said"]["reflection"] for p in problems]
            rewards = [float(text.startswith("try")) for text in heard]
            groups = [
                Group(p, [episode(PROBLEM, [WRONG, "x", RIGHT if r else WRONG])])
                for p, r in zip(problems, rewards, strict=True)
            ]
        else:
            groups = [Group(PROBLEM, [episode(PROBLEM, tries[p.id])]) for p in problems]
        return groups, 0.0

    monkeypatch.setattr(type(run.player), "play", play)
    monkeypatch.setattr(
        type(run), "held_out", lambda self, *rest: [replace(PROBLEM, id=name) for name in "abc"]
    )
    values = held_out_values(run)
    assert values["first_try"] == pytest.approx(1 / 3)
    assert values["second_try"] == pytest.approx(2 / 3)
    assert values["retry"] == values["advice"] == 1 / 2
    assert values["told_answer"] == 1.0  # the working of one ends at the target, the other is the answer
    assert values["reflection_tokens"] == (19 + 10) / 2  # ends included
    own, swapped = ([p.extra["said"]["reflection"] for p in problems] for problems in asked[1:])
    assert own == [tries["a"][1], tries["b"][1]]
    assert swapped == own[::-1]


ONCE = {
    "reflect_retry_reward": "chain_arithmetic,num_terms=4,modulus=5",
    "countdown": "countdown",
    "function_calling": "function_calling,num_tools=3,max_calls=1",
}


def test_the_default_run_is_on_the_first_experiments_task():
    assert EXPERIMENTS[0].cpu is not None and EXPERIMENTS[0].cpu.environment == TASK


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_the_arms_differ_from_the_method_in_one_thing_each(experiment):
    (budget,) = experiment.budgets
    changes = {arm.name: set(arm.changes) for arm in experiment.arms}
    expected = {
        "start": set(),
        "start_none": {"environment"},
        "rrr": set(),
        "fresh": {"collected_failures"},
        "grpo": {"environment", "trained_roles"},
        "no_reflection": {"environment", "trained_roles"},
        "constant": {"environment", "trained_roles", "stop_after_steps_without_signal"},
        "shuffled": {"rewards_of"},
        "answers_too": {"trained_roles"},
    }
    if experiment.name.endswith("_rates"):
        rate = {"optimizer.learning_rate"}
        expected = {"start": set(), "rrr": set()}
        for text in ("3e-5", "1e-5"):
            expected |= {
                f"rrr_{text}": rate,
                f"no_reflection_{text}": rate | {"environment", "trained_roles"},
            }
            assert experiment.arm(f"rrr_{text}").changes["optimizer.learning_rate"] == float(text)
    assert changes == expected
    for arm in experiment.arms:
        settings = experiment.settings(budget, arm, 0)
        assert isinstance(settings, ReflectRetryReward)
        task = make(settings.environment)
        inner = task.inner if isinstance(task, ReflectRetry) else task
        assert inner == make(ONCE[experiment.name.removesuffix("_rates")])
        # Somebody writes turns of the roles that are trained.
        reflects = isinstance(task, ReflectRetry) and task.reflection == "written"
        written = {"retry"} if isinstance(task, ReflectRetry) else {"assistant"}
        written |= {"reflection"} if reflects else set()
        assert set(settings.trained_roles) <= written or arm.role == "start"


def test_the_command_collects_failures_of_a_run(tmp_path, monkeypatch, capsys):
    module = "whorl.recipes.reflect_retry_reward.__main__"
    run = replace(
        small_run(tmp_path, monkeypatch), settings=ReflectRetryReward(failed_queries=7, answers_per_query=3)
    )
    asked = []
    monkeypatch.setattr(f"{module}.open_run", lambda path, read_only: run)
    monkeypatch.setattr(
        f"{module}.collect_failures", lambda run, *rest: asked.append(rest) or {"failed": 3.0, "kept": 2.0}
    )
    file = tmp_path / "failures.jsonl"
    assert main(["RUN", str(file)]) == 0
    assert asked == [(file, 7, 3)]
    assert "3 of 7 problems failed; 2 kept" in capsys.readouterr().out
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err

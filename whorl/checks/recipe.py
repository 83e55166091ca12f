"""All promises on a recipe of one's own: its model, its task, its algorithm, this machine.

The recipe's settings are kept but for the size of things: a few problems, a few samples, three steps, no cold
start. What is checked does not depend on how well the policy answers.
"""

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from whorl.algorithms.algorithm import assemble
from whorl.checks.gradients import gradients
from whorl.checks.ragged import GRADIENT_LIMIT, difference
from whorl.checks.resume import MOMENTS_OF_ANY_RUN, Trial, compared
from whorl.checks.sampler_of_run import check_sampler_of_run
from whorl.checks.table import Row
from whorl.checks.verifiers import check_verifiers
from whorl.data import Batch, Group, Score
from whorl.environments.check import check_environment
from whorl.learning.learner import Learner
from whorl.reporting.console import Progress, Silent
from whorl.run import Run, start_run
from whorl.settings import ColdStart, Evaluation, Settings

NUM_STEPS, NUM_PROBLEMS, NUM_SAMPLES = 3, 4, 4


def check_recipe(recipe: str, settings: Settings, progress: Progress | None = None) -> list[Row]:
    """Rows for each promise that a run of these settings makes.

    ValueError for settings with which no run could start.
    """
    progress = progress or Silent()
    small = made_small(settings)
    with tempfile.TemporaryDirectory(prefix="whorl-check-") as folder:
        run = start_run(recipe, small, Path(folder) / "run")
        with progress.phase("checks", 3 + len(MOMENTS_OF_ANY_RUN)) as advance:
            run.player.start()
            rows = check_sampler_of_run(run, num_problems=NUM_PROBLEMS, num_samples=NUM_SAMPLES)
            advance(1, "one gradient")
            rows.append(gradient_row(run))
            advance(1, "environment")
            rows += [Row(*check) for check in check_environment(run.environment)]
            rows += check_verifiers()
            advance(1, "killed and resumed")
            rows.append(resume_row(run.directory.path, Path(folder), advance))
    return rows


def made_small(settings: Settings) -> Settings:
    """The same run with few of everything."""
    return replace(
        settings,
        cold_start=ColdStart(),
        num_steps=NUM_STEPS,
        problems_per_step=max(min(settings.problems_per_step, NUM_PROBLEMS), settings.updates_per_batch),
        rollouts_per_problem=min(settings.rollouts_per_problem, NUM_SAMPLES),
        max_redraws=min(settings.max_redraws, 1),
        evaluation=Evaluation(every_steps=2, num_problems=NUM_PROBLEMS, samples_per_problem=2),
        checkpoint_every_steps=1,
        rollouts_every_steps=1,
        stop_after_steps_without_signal=0,
        tracker="none",
    )


def gradient_row(run: Run) -> Row:
    """The gradient of the run's algorithm on its own rollouts, in float64: whole, cut, and in another order.

    Rewards are dealt out, so that every group has a signal whatever the policy can do.
    """
    settings = run.settings
    problems = run.held_out("test", NUM_PROBLEMS)
    groups, _ = run.player.play(problems, settings.rollouts_per_problem, settings.sampling, ("check",))
    learner = Learner(
        copy.deepcopy(run.model).to(torch.float64),
        settings.optimizer,
        temperature=settings.sampling.temperature,
        value_head="value_old_N" in run.algorithm.needs,
        reference="logp_ref_N" in run.algorithm.needs,
    )
    groups = [_with_rewards(group) for group in groups]
    terms = run.algorithm.terms
    # One update first: at the beginning experts are used evenly and the router's loss is flat, so that its
    # gradient is nothing but rounding.
    learner.forward_backward(assemble(groups, run.algorithm, _provided(learner)), terms)
    learner.optim_step()
    batch = assemble(groups, run.algorithm, _provided(learner))
    whole, _ = gradients(learner, batch, terms)
    rng = np.random.default_rng(0)
    orders = [np.arange(batch.num_sequences), rng.permutation(batch.num_sequences)]
    worst, counts = 0.0, set()
    for order in orders:
        for budget in (batch.num_tokens // 2, batch.num_tokens // 5, 1):
            found, count = gradients(learner, batch.select(order.tolist()), terms, budget)
            worst = max(worst, difference(found, whole))
            counts.add(count)
    cuts = ", ".join(map(str, sorted(counts)))
    return Row(
        f"one gradient, of {settings.algorithm} on the run's own rollouts",
        f"{worst:.1e} in {cuts} micro-batches, {len(orders)} orders",
        f"{GRADIENT_LIMIT:.0e} relative",
        bool(worst <= GRADIENT_LIMIT) and max(counts) > 1,
    )


def _with_rewards(group: Group) -> Group:
    rollouts = [
        replace(rollout, score=Score(float(i % 2)), error=None) for i, rollout in enumerate(group.rollouts)
    ]
    return Group(group.problem, rollouts)


def _provided(learner: Learner) -> Mapping[str, Callable[[Batch], Tensor]]:
    return {
        "logp_ref_N": learner.reference_logprobs,
        "logp_old_N": learner.logprobs,
        "value_old_N": learner.values,
        "reward_greedy_S": lambda batch: torch.full((batch.num_sequences,), 0.5, dtype=torch.float64),
    }


def resume_row(begun: Path, home: Path, advance: Callable[..., None]) -> Row:
    """A copy of the run is left alone, another killed at `MOMENTS_OF_ANY_RUN`; both go on from the beginning."""
    alone, killed = (Trial(home / name, ()) for name in ("alone", "killed"))
    for trial in (alone, killed):
        shutil.copytree(begun, trial.path)
    alone.finish()
    for moment in MOMENTS_OF_ANY_RUN:
        killed.run_until(moment)
        advance(1)
    killed.finish()
    return compared("killed at chosen moments and resumed, the run has the same bits", alone, [killed])

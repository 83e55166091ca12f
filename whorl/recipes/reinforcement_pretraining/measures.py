"""What is measured of a policy: accuracy by bin, the cost of its training, its law of compute."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from whorl.cold_start import demonstration
from whorl.data import Group, Metrics
from whorl.environments.next_token import NextToken
from whorl.environments.texts import LONGEST_TOKEN, draw_text
from whorl.evaluation.power_law import fit_power_law
from whorl.model.flops import of_model, to_generate
from whorl.recipes.reinforcement_pretraining.recipe import BINS, ReinforcementPretraining
from whorl.run import Run, open_run


def accuracies(run: Run, places: Sequence[Sequence[int]], entropy: Sequence[float]) -> Metrics:
    """Accuracy at test positions by bin, at the sums among them and at the others, and tokens per prediction; of
    thoughts also how many at sums end in the right digit, whatever is boxed. An empty bin is left out.

    Plain prediction is the most probable continuation; thoughts are drawn as in training. The reward is the paper's
    whatever the run was trained on.
    """
    environment = run.environment
    assert isinstance(environment, NextToken)
    judge = replace(environment, reward="prefix", positions=None)
    problems = [judge.at("test", text, token) for text, token in places]
    player = replace(run.player, environment=judge)
    sampling = run.settings.sampling
    if judge.way == "continue":  # one character more shows where the first token ends
        sampling = replace(sampling, temperature=0.0, max_tokens=LONGEST_TOKEN + 1)
    groups: list[Group] = player.play(problems, 1, sampling, ("held out",))[0]
    right = np.array([group.rewards[0] for group in groups])
    summed = np.array([token in draw_text("test", text).computed for text, token in places])
    unsure = np.asarray(entropy)
    values = {name: _mean(right[unsure >= lowest]) for name, lowest in BINS.items()}
    values |= {f"num_{name}": float((unsure >= lowest).sum()) for name, lowest in BINS.items()}
    values |= {"sums": _mean(right[summed]), "others": _mean(right[~summed]), "all": _mean(right)}
    values["tokens"] = _mean([group.rollouts[0].num_response_tokens for group in groups])
    if judge.way == "think":
        ends = [ends_in(g.rollouts[0].reply, draw_text("test", at[0]).tokens[at[1]])
                for g, at in zip(groups, places, strict=True)]  # fmt: skip
        values["thought_sums"] = _mean(np.array(ends)[summed])
    return {name: number for name, number in values.items() if math.isfinite(number)}


def ends_in(reply: str, token: str) -> float:
    """1 if there is a thought that ends and its last characters are the token's, else 0."""
    thought, end, _ = reply.partition("</think>")
    return float(bool(end) and thought.endswith(token))


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def flops_of_training(run: Run) -> float:
    """Floating-point operations from the start to here, each sequence counted with the mean length of its step.

    Reinforcement learning: every rollout reads its prompt by itself and is written token by token, those of groups that
    were replaced too; then 3 forward passes' worth for forward and backward over full batches. This is at most too
    much: samples of a group share the reading of their prompt. Next-token prediction: forward and backward alone.
    """
    settings, environment, per_token = run.settings, run.environment, of_model(run.model.config)
    assert isinstance(settings, ReinforcementPretraining)
    problems = [environment.problem("train", n) for n in range(environment.num_problems("train") or 0)]
    in_step = settings.problems_per_step * settings.rollouts_per_problem
    if settings.text_updates:
        rng = np.random.default_rng(0)  # what is drawn for plain text is nothing
        lengths = [
            len(demonstration(environment, p, environment.traces(p, rng), run.tokenizer)[0]) for p in problems
        ]
        return 3 * settings.text_updates * in_step * to_generate(per_token, round(_mean(lengths)))
    rendered = [run.tokenizer.render(problem.messages, generation=True) for problem in problems]
    prompt, flops = _mean([sum(len(ids) for _, ids in segments) for segments in rendered]), 0.0
    for row in run.directory.history():
        if not row.get("generated_tokens"):
            continue  # the start, before training
        played = in_step + row["groups_redrawn"] * settings.rollouts_per_problem
        flops += played * to_generate(per_token, round(prompt + row["generated_tokens"] / played))
        flops += (
            3 * in_step * to_generate(per_token, round(prompt + row.get("trained_tokens", 0.0) / in_step))
        )
    return flops


def law_of_compute(run: Run, places: Sequence[Sequence[int]], entropy: Sequence[float]) -> Metrics:
    """R² and exponent, by bin, of a power law of the tokens generated in training, over the run's checkpoints.

    The start is left out: no compute was spent there. So is a bin whose accuracy never changes.
    """
    path, history = run.directory.path, run.directory.history()
    unsure = [at for at, nats in enumerate(entropy) if nats >= min(BINS.values())]
    places, entropy = [places[at] for at in unsure], [entropy[at] for at in unsure]
    spent, found = [], []
    for step in filter(None, run.directory.checkpoint_steps()):
        spent.append(sum(row.get("generated_tokens") or 0.0 for row in history if row["step"] <= step))
        found.append(accuracies(open_run(path, step=step, read_only=True), places, entropy))
    values = {}
    for name in BINS:
        try:
            law = fit_power_law(spent, [accuracy[name] for accuracy in found])
        except (ValueError, KeyError):
            continue
        values |= {f"r2_{name}": law.r2, f"exponent_{name}": law.exponent}
    return values

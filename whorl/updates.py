"""From the groups of a step to new weights: its batch, and the updates that are made of it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whorl.algorithms.algorithm import assemble, batch_statistics
from whorl.data import Batch, Group, Metrics
from whorl.faults import FOR_LEARNING, LESS_STEEP, Stop, explained, intact
from whorl.learning.seen import weight_fault
from whorl.run import Run


@explained("while learning in step {next}", FOR_LEARNING)
def make_batch(
    run: Run, groups: list[Group], recorded: Mapping[str, Callable[[Batch], Tensor]] | None = None
) -> Batch:
    """The step's batch, with every credit and weight fixed. What was `recorded` of it is not made again."""
    return assemble(groups, run.algorithm, {**provide(run, groups), **(recorded or {})})


def provide(run: Run, groups: list[Group]) -> dict:
    """The columns an algorithm may need beyond what the rollouts hold."""

    def greedy_rewards(batch: Batch) -> Tensor:
        """Reward of one greedy rollout of each problem; the group's mean where it could not be judged."""
        greedy = replace(run.sampling, temperature=0.0)
        played, _ = run.player.play([g.problem for g in groups], 1, greedy, ("greedy", run.step))
        rewards = [
            greedy_group.rewards[0] if greedy_group.judged else group.rewards.mean()
            for greedy_group, group in zip(played, groups, strict=True)
        ]
        return torch.tensor(rewards, dtype=torch.float64)[batch["group_S"]]

    return {
        "logp_ref_N": run.learner.reference_logprobs,
        "logp_old_N": run.learner.logprobs,
        "value_old_N": run.learner.values,
        "reward_greedy_S": greedy_rewards,
    }


@explained("while learning in step {next}", FOR_LEARNING)
def learn(run: Run, batch: Batch) -> Metrics:
    """All updates of one batch; metrics are means over the updates unless their name says otherwise.

    An update that is skipped is said and counted, and after `stop_after_skipped_updates` of them in a row no
    further one is tried. `Stop` if the sampler is not the learner, or if an update spoils the weights.
    """
    terms = run.algorithm.terms
    statistics = batch_statistics(batch)
    if not batch["trained_N"].any() or (len(terms) == 1 and not batch["advantage_N"].any()):
        # Nothing to learn. With eps as small as M1's, Adam would blow up whatever else is left (the router's
        # loss) to full-size steps.
        return statistics
    rows: list[Metrics] = []
    parts = split_for_updates(batch, run.settings.updates_per_batch, (run.settings.seed, run.step))
    with run.progress.phase("updates", len(parts)) as advance:
        for index, part in enumerate(parts):
            first = index == 0
            row = run.learner.forward_backward(part, terms, compare_sampler=first)
            if first and row["sampler_gap_max_nats"] > run.settings.sampler_gap_limit:
                raise Stop(
                    f"sampler and learner disagree by {row['sampler_gap_max_nats']:.2g} nats on a token of step "
                    f"{run.step + 1}; the limit is {run.settings.sampler_gap_limit:g} "
                    f"(sampler_gap_limit_nats). {_what_parts_them(run)}"
                )
            rows.append(row | run.learner.optim_step())
            advance(1)
            note_update(run, rows[-1])
            if 0 < run.settings.stop_after_skipped_updates == run.skipped_in_a_row:
                break
    return statistics | combine(rows)


def note_update(run: Any, row: Metrics) -> None:
    """Count and say an update of a run of any kind that was skipped.

    `Stop` if one that was taken left weights that are not finite, before they get into a checkpoint.
    """
    if row["skipped_updates"]:
        run.skipped_in_a_row += 1
        run.progress.say(f"step {run.step + 1}: an update was skipped: {run.learner.fault}")
    else:
        run.skipped_in_a_row = 0
    if not math.isfinite(row["weight_norm"]):
        what = weight_fault(run.learner.model) or "the norm of all weights overflows"
        raise Stop(f"after an update of step {run.step + 1} {what}. {intact(run.directory)}. {LESS_STEEP}")


def split_for_updates(batch: Batch, num_updates: int, seed: tuple[int, int]) -> list[Batch]:
    """The batch divided by group, in an order of its own, into one part per update.

    Weights were fixed on the whole batch and are multiplied by the number of updates: each part's loss has the
    size of the whole one, and no token weighs more for the part it fell into.
    """
    if num_updates == 1:
        return [batch]
    group_S = batch["group_S"]
    present = group_S.unique()
    order = np.random.default_rng([*seed, 3]).permutation(len(present))
    parts = []
    for chosen in np.array_split(order, num_updates):
        sequences = torch.isin(group_S, present[torch.from_numpy(chosen)]).nonzero().flatten()
        part = batch.select(sequences)
        if part.num_sequences == 0 or not part["trained_N"].any():
            continue
        scaled = {n: c * num_updates for n, c in part.columns.items() if n.startswith("weight_")}
        parts.append(part.with_columns(**scaled))
    return parts


def combine(rows: list[Metrics]) -> Metrics:
    """Metrics of a step from those of its updates."""
    combined: Metrics = {}
    for name in {name: None for row in rows for name in row}:
        values = [row[name] for row in rows if name in row]
        if name in ("skipped_updates", "trained_tokens"):
            combined[name] = float(np.sum(values))
        elif name == "ratio_max":
            combined[name] = float(np.max(values))
        elif name in ("learning_rate", "weight_norm"):
            combined[name] = values[-1]
        else:
            combined[name] = float(np.mean(values))
    if "grad_norm" in combined:
        combined["grad_norm_max"] = float(np.max([row["grad_norm"] for row in rows if "grad_norm" in row]))
    return combined


def _what_parts_them(run: Run) -> str:
    """What to suspect where sampler and learner disagree."""
    settings = run.settings
    if settings.dtype == "bfloat16" and run.learner.model.config.num_experts and not settings.replay_experts:
        return (
            "In bf16 some tokens meet other experts in the learner than in the sampler: replay_experts trains "
            "them on the sampler's"
        )
    return "Weights that were not delivered look like this"

"""The training loop, in the order in which things happen."""

import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from whorl.algorithms.algorithm import assemble, batch_statistics, group_statistics, with_signal
from whorl.cold_start import cold_start
from whorl.data import Batch, Group, Metrics
from whorl.evaluation.evaluate import evaluate_on
from whorl.rollouts import measure
from whorl.run import Run, memory_gib


def train(run: Run) -> str | None:
    """Carry the run to its last step. Returns None, or the reason why it stopped before."""
    settings = run.settings
    run.player.start()
    if not run.warm:
        cold_start(run)
        begin(run)
    while run.step < settings.num_steps:
        if reason := hopeless(run):
            return reason
        clock = Clock()
        groups, sampled = sample_groups(run, clock)
        batch = assemble(groups, run.algorithm, provide(run, groups))
        metrics = learn(run, batch)
        run.engine.load(run.learner.weights(), run.learner.version)
        clock.lap("train_seconds")

        run.step += 1
        metrics |= sampled | clock.read(batch) | {"step": run.step, "policy_version": run.learner.version}
        metrics["memory_gib"] = memory_gib(run.player)
        if due(run, settings.evaluation.every_steps):
            metrics |= evaluate(run)
        if due(run, settings.rollouts_every_steps) or run.step == 1:
            advantages = [column.numpy() for column in batch.unpack("advantage_N")]
            run.directory.write_rollouts(run.step, groups, advantages, run.tokenizer.token_text)
        run.log(metrics)
        if due(run, settings.checkpoint_every_steps):
            run.save()
    return None


def begin(run: Run) -> None:
    """Step 0: the policy as it is before reinforcement learning, evaluated and kept."""
    run.warm = True
    if "logp_ref_N" in run.algorithm.needs:
        run.learner.set_reference()
    run.log({"step": 0, "policy_version": 0} | evaluate(run))
    run.save()


def evaluate(run: Run) -> Metrics:
    """Accuracy on the held-out problems, sampled as in training; the rollouts are kept for the summary."""
    chosen = run.settings.evaluation
    problems = run.held_out("test", chosen.num_problems)
    metrics, groups = evaluate_on(
        run.player, problems, chosen.samples_per_problem, run.settings.sampling, run.progress
    )
    run.kept_rollouts["before" if run.step == 0 else "after"] = groups
    return metrics


def due(run: Run, every: int) -> bool:
    return run.step == run.settings.num_steps or (every > 0 and run.step % every == 0)


def sample_groups(run: Run, clock: "Clock") -> tuple[list[Group], Metrics]:
    """A step's groups, and what was seen of all that was sampled.

    With dynamic sampling (DAPO, arXiv:2503.14476 section 3.2) groups whose rewards are all equal are set aside
    and replaced by further problems, at most `max_redraws` times; if none is left, the last ones are used.
    """
    settings = run.settings
    wanted, num_samples = settings.problems_per_step, settings.rollouts_per_problem
    before = run.player.num_generated_tokens
    chosen: list[Group] = []
    seen: list[Group] = []
    verify_seconds = 0.0
    for redraw in range(1 + (settings.max_redraws if run.algorithm.dynamic_sampling else 0)):
        picks = run.curriculum.choose(wanted - len(chosen))
        problems = run.training_problems(picks)
        with run.progress.phase("rollouts", len(problems) * num_samples) as advance:
            groups, waited = run.player.play(
                problems, num_samples, settings.sampling, ("train", run.step, redraw), advance
            )
        run.curriculum.update(picks, groups)
        verify_seconds += waited
        seen += groups
        chosen += with_signal(groups) if run.algorithm.dynamic_sampling else groups
        if len(chosen) >= wanted:
            break
    errors = [rollout.error for group in seen for rollout in group.rollouts if rollout.error]
    if not any(group.judged for group in seen):
        raise ValueError(f"no rollout of step {run.step + 1} could be judged; the first error: {errors[:1]}")
    run.steps_without_signal = 0 if with_signal(seen) else run.steps_without_signal + 1
    clock.lap("generate_seconds")
    clock.seconds["verify_seconds"] = verify_seconds
    clock.seconds["generate_seconds"] -= verify_seconds
    clock.generated_tokens = run.player.num_generated_tokens - before
    highest = run.environment.reward_range[1]
    metrics = measure(seen, highest) | group_statistics(seen, highest_reward=highest)
    metrics["groups_redrawn"] = float(max(len(seen) - wanted, 0))
    return (chosen or [group for group in seen if group.judged]), metrics


def provide(run: Run, groups: list[Group]) -> dict:
    """The columns an algorithm may need beyond what the rollouts hold."""

    def greedy_rewards(batch: Batch) -> Tensor:
        """Reward of one greedy rollout of each problem; the group's mean where it could not be judged."""
        greedy = replace(run.settings.sampling, temperature=0.0)
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


def learn(run: Run, batch: Batch) -> Metrics:
    """All updates of one batch; metrics are means over the updates unless their name says otherwise."""
    terms = run.algorithm.terms
    statistics = batch_statistics(batch)
    if len(terms) == 1 and not batch["advantage_N"].any():
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
                raise ValueError(
                    f"sampler and learner disagree by {row['sampler_gap_max_nats']:.2g} nats on a token of step "
                    f"{run.step + 1}; the limit is {run.settings.sampler_gap_limit:g} "
                    "(sampler_gap_limit_nats). Weights that were not delivered look like this"
                )
            rows.append(row | run.learner.optim_step())
            advance(1)
    return statistics | combine(rows)


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


def hopeless(run: Run) -> str | None:
    """Why it makes no sense to go on, if it does not."""
    limit = run.settings.stop_after_steps_without_signal
    if limit and run.steps_without_signal >= limit:
        return (
            f"for {limit} steps no group had differing rewards, so there was nothing to learn: the task is too "
            "hard or too easy for this policy, or its verifier gives everything the same reward"
        )
    return None


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.generated_tokens = 0

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = now - self.last
        self.last = now

    def read(self, batch: Batch) -> Metrics:
        total = self.last - self.started
        return self.seconds | {
            "step_seconds": total,
            "generated_tokens": float(self.generated_tokens),
            "tokens_per_second": self.generated_tokens / total,
            "generate_tokens_per_second": self.generated_tokens / max(self.seconds["generate_seconds"], 1e-9),
            "train_tokens_per_second": batch.num_tokens / max(self.seconds["train_seconds"], 1e-9),
        }

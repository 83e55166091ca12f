"""Promise 1 on a run of one's own: its sampler, its prompts, its weights."""

import numpy as np
import torch

from whorl.checks.along import experts_differ
from whorl.checks.sampler import LIMIT_NATS, gap_row, routing_row
from whorl.checks.table import Row
from whorl.data import Batch, Metrics, Rollout, cu_seqlens_of
from whorl.learning.seen import sampler_gap
from whorl.run import Run


def check_sampler_of_run(run: Run, *, num_problems: int = 8, num_samples: int = 4) -> list[Row]:
    """Play held-out problems as in training, and compare what the sampler said with what the learner computes.

    Besides the log-probabilities: the weights the sampler played with are the learner's newest, and both send
    tokens to the same experts. The limit is `LIMIT_NATS` in float32 on a CPU; else the gap at which the run itself
    would stop (`sampler_gap_limit_nats`).
    """
    problems = run.held_out("test", num_problems)
    groups, _ = run.player.play(problems, num_samples, run.settings.sampling, ("check sampler",))
    rollouts = [r for group in groups for r in group.rollouts if r.num_response_tokens]
    if not rollouts:
        raise ValueError("the policy wrote nothing on these problems, so there is nothing to compare")
    exact = run.learner.device.type == "cpu" and run.settings.dtype == "float32"
    limit_nats = LIMIT_NATS if exact else run.settings.sampler_gap_limit
    rows = [gap_row("sampler = learner, on the run's own prompts", {"run": _gap(run, rollouts)}, limit_nats)]
    versions = {int(v) for rollout in rollouts for v in rollout.version_T[rollout.policy_T]}
    rows.append(
        Row(
            "the sampler holds the learner's newest weights",
            f"version {', '.join(map(str, sorted(versions)))}",
            f"version {run.learner.version}",
            versions == {run.learner.version},
        )
    )
    if run.model.config.num_experts:
        rows.append(routing_row({"run": _expert_share(run, rollouts)}))
    return rows


def _gap(run: Run, rollouts: list[Rollout]) -> Metrics:
    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(np.concatenate([getattr(r, name) for r in rollouts])).to(dtype)

    batch = Batch(
        cu_seqlens_of([len(rollout) for rollout in rollouts]),
        {"tokens_N": column("tokens_T", torch.int64), "policy_N": column("policy_T", torch.bool)},
    )
    told_N = column("logp_T", run.learner.dtype)
    gap = sampler_gap(run.learner.logprobs(batch), told_N, batch["policy_N"])
    return gap | {"tokens": float(batch["policy_N"].sum())}


def _expert_share(run: Run, rollouts: list[Rollout]) -> float:
    """Over the tokens that the policy wrote; they are decoded again with the weights of the run's engine."""
    tokens_ST = torch.zeros(len(rollouts), max(map(len, rollouts)), dtype=torch.int64)
    written_ST = torch.zeros_like(tokens_ST, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        tokens_ST[row, : len(rollout)] = torch.as_tensor(rollout.tokens_T)
        written_ST[row, : len(rollout)] = torch.as_tensor(rollout.policy_T)
    return experts_differ(run.engine.model, run.model, tokens_ST, written_ST)

"""Ragged random batches, scripted groups, and the loss as a learner computes it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from whorl.algorithms.algorithm import Algorithm
from whorl.data import Batch, Group, Problem, Rollout, Score, apply, cu_seqlens_of, role_code

SEEDS = (0, 1, 2)


def ragged_batch(seed: int, num_groups: int = 5, group_size: int = 4) -> Batch:
    """Random float64 columns. Each rollout is prompt, turn, environment, turn; some have no trained token."""
    rng = np.random.default_rng(seed)
    num_sequences = num_groups * group_size
    masks = []
    for sequence in range(num_sequences):
        spans = rng.integers(1, 6, size=4)
        mask = np.repeat([False, True, False, True], spans)
        masks.append(np.zeros_like(mask) if sequence == 3 else mask)
    trained = np.concatenate(masks)
    num_tokens = len(trained)

    def random_N(scale: float = 1.0) -> Tensor:
        return torch.from_numpy(rng.normal(size=num_tokens) * scale)

    logp_old_N = -torch.from_numpy(rng.exponential(size=num_tokens))
    return Batch(
        cu_seqlens_of([len(mask) for mask in masks]),
        {
            "reward_S": torch.from_numpy(rng.normal(size=num_sequences)),
            "reward_greedy_S": torch.from_numpy(rng.normal(size=num_sequences)),
            "group_S": torch.repeat_interleave(torch.arange(num_groups), group_size),
            "trained_N": torch.from_numpy(trained),
            "policy_N": torch.from_numpy(trained),
            "logp_old_N": logp_old_N,
            "logp_N": logp_old_N + random_N(0.5),
            "logp_ref_N": logp_old_N + random_N(0.5),
            "logp_sampler_N": logp_old_N + random_N(0.5),
            "penalty_N": torch.where(torch.from_numpy(trained), random_N(0.1), 0.0),
            "advantage_N": torch.where(torch.from_numpy(trained), random_N(), 0.0),
            "value_old_N": random_N(),
            "value_N": random_N(),
            "return_N": random_N(),
        },
    )


def sequences(batch: Batch) -> list[dict[str, Any]]:
    """The batch as one dictionary of numpy arrays per sequence, `_N` columns cut, `_S` columns scalar."""
    out = []
    for s in range(batch.num_sequences):
        cut = slice(int(batch.cu_seqlens[s]), int(batch.cu_seqlens[s + 1]))
        out.append({k: v[cut].numpy() if k.endswith("_N") else v[s].item() for k, v in batch.columns.items()})
    return out


def on_tokens(batch: Batch, per_sequence: list[float]) -> np.ndarray:
    """A number per sequence, laid on its trained tokens."""
    rows = sequences(batch)
    return np.concatenate([np.where(r["trained_N"], x, 0.0) for r, x in zip(rows, per_sequence, strict=True)])


def scripted_rollout(
    group: int, sample: int, reward: float | None, num_tokens: int, rng: np.random.Generator
) -> Rollout:
    """Two prompt tokens, then the policy's: half as "assistant", the last ones as "reflection"."""
    length = num_tokens + 2
    policy_T = np.arange(length) >= 2
    role_T = np.full(length, role_code("user"), dtype=np.int8)
    role_T[2:] = role_code("assistant")
    role_T[2 + num_tokens // 2 :] = role_code("reflection")
    logp_T = np.where(policy_T, -rng.exponential(size=length), 0.0)
    return Rollout(
        Problem(f"p{group}", f"question {group}", "answer"),
        group,
        sample,
        rng.integers(0, 7, size=length),
        policy_T,
        role_T,
        logp_T,
        logp_T,
        np.where(policy_T, 0, -1),
        score=Score(reward),
    )


def scripted_groups(rewards: list[list[float | None]], seed: int = 0, longest: int = 9) -> list[Group]:
    """Groups with these rewards and replies of 2 to `longest` tokens."""
    rng = np.random.default_rng(seed)
    groups = []
    for g, row in enumerate(rewards):
        lengths = rng.integers(2, longest + 1, size=len(row))
        rollouts = [
            scripted_rollout(g, i, r, int(n), rng) for i, (r, n) in enumerate(zip(row, lengths, strict=True))
        ]
        groups.append(Group(rollouts[0].problem, rollouts))
    return groups


def loss_of(algorithm: Algorithm, part: Batch, live: dict[str, Tensor]) -> Tensor:
    """sum over terms of coefficient * sum(weight * -objective)."""
    loss = torch.zeros((), dtype=torch.float64)
    for term in algorithm.terms:
        objective_N, _ = apply(term.objective, part, **live)
        loss = loss + term.coefficient * (part[term.weight_column] * -objective_N).sum()
    return loss


def gradient(objective_N: Tensor, logp_N: Tensor) -> Tensor:
    """d(sum of objectives)/d logp."""
    return torch.autograd.grad(objective_N.sum(), logp_N)[0]

"""Generalised advantage estimation over packed sequences, and the critic's objective."""

from functools import partial

import numpy as np
import pytest
import torch

from tests.algorithms.support import SEEDS, ragged_batch, sequences
from whorl.algorithms.critic import gae, minus_clipped_value_error, minus_value_error, value_target
from whorl.data import Batch, apply, cu_seqlens_of


def gae_in_numpy(batch: Batch, gamma: float, lam: float) -> np.ndarray:
    out = []
    for row in sequences(batch):
        steps = np.flatnonzero(row["trained_N"])
        advantage = np.zeros(len(row["trained_N"]))
        running, next_value = 0.0, 0.0
        for k, t in reversed(list(enumerate(steps))):
            reward = -row["penalty_N"][t] + (row["reward_S"] if k == len(steps) - 1 else 0.0)
            delta = reward + gamma * next_value - row["value_old_N"][t]
            running = delta + gamma * lam * running
            advantage[t], next_value = running, row["value_old_N"][t]
        out.append(advantage)
    return np.concatenate(out)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0)])
def test_gae_is_its_recursion_over_trained_tokens(seed, gamma, lam):
    batch = ragged_batch(seed)
    advantage_N = apply(partial(gae, gamma=gamma, lam=lam), batch)
    np.testing.assert_allclose(advantage_N, gae_in_numpy(batch, gamma, lam), rtol=0, atol=1e-12)


def two_turns() -> Batch:
    """One rollout: prompt, turn of one token, environment, turn of two tokens. Reward 1."""
    return Batch(
        cu_seqlens_of([5]),
        {
            "reward_S": torch.tensor([1.0], dtype=torch.float64),
            "trained_N": torch.tensor([False, True, False, True, True]),
            "penalty_N": torch.zeros(5, dtype=torch.float64),
            "value_old_N": torch.tensor([9.0, 1 / 4, 9.0, 1 / 2, 3 / 4], dtype=torch.float64),
        },
    )


def test_the_environment_between_two_turns_is_no_step():
    # deltas: 1/2 - 1/4 = 1/4, 3/4 - 1/2 = 1/4, 1 - 3/4 = 1/4; with lambda 1/2: 1/4, 3/8, 7/16 backwards
    advantage_N = apply(partial(gae, gamma=1.0, lam=0.5), two_turns())
    assert advantage_N.tolist() == [0.0, 7 / 16, 0.0, 3 / 8, 1 / 4]


def test_with_gamma_and_lambda_1_the_advantage_is_reward_minus_value_and_the_target_is_the_reward():
    batch = two_turns()
    batch = batch.with_columns(advantage_N=apply(partial(gae, gamma=1.0, lam=1.0), batch))
    assert batch["advantage_N"].tolist() == [0.0, 3 / 4, 0.0, 1 / 2, 1 / 4]
    assert apply(value_target, batch).tolist() == [0.0, 1.0, 0.0, 1.0, 1.0]


def test_packing_does_not_leak_from_one_sequence_into_another():
    batch = ragged_batch(2)
    function = partial(gae, gamma=0.9, lam=0.8)
    alone = [apply(function, batch.select([s])) for s in range(batch.num_sequences)]
    assert torch.equal(apply(function, batch), torch.cat(alone))


def test_the_critic_is_pulled_to_its_target():
    value_N = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    objective_N, metrics = minus_value_error(value_N, torch.tensor([1.0, 1.0], dtype=torch.float64))
    assert objective_N.tolist() == [-1 / 2, -1 / 2]
    objective_N.sum().backward()
    assert value_N.grad is not None
    assert value_N.grad.tolist() == [1.0, -1.0]  # upwards below the target, downwards above it
    assert metrics["value_error"].tolist() == [1.0, 1.0]


def test_a_clipped_critic_that_has_moved_far_towards_its_target_has_no_gradient_left():
    value_N = torch.tensor([0.5, 0.1, -0.5], dtype=torch.float64, requires_grad=True)
    old_N, return_N = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    objective_N, metrics = minus_clipped_value_error(value_N, old_N, return_N, max_change=0.2)
    # moved past 0.2 towards 1: held at 0.2; within: itself; moved away: the full error
    assert objective_N.tolist() == pytest.approx([-(0.8**2) / 2, -(0.9**2) / 2, -(1.5**2) / 2])
    objective_N.sum().backward()
    assert value_N.grad is not None
    assert value_N.grad.tolist() == pytest.approx([0.0, 0.9, 1.5])
    assert metrics["value_clipped_frac"].tolist() == [1.0, 0.0, 0.0]

"""KL estimators and their gradients on an enumerated distribution, length shaping, sampler correction."""

from functools import partial

import numpy as np
import pytest
import torch

from tests.algorithms.support import SEEDS, ragged_batch, sequences
from whorl.algorithms.penalties import (
    entropy_bonus,
    k1,
    k2,
    k3,
    kl_in_reward,
    minus_kl_k2,
    minus_kl_k3,
    overlong,
    relative_length,
    truncated_importance,
)
from whorl.data import Batch, apply, cu_seqlens_of


def categorical(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with gradient, and the log-probabilities of a reference, over 6 outcomes."""
    generator = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    return logits_V, torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)


def gradient_of_expectation(function, seed: int) -> torch.Tensor:
    """sum_v pi(v) d f(log pi(v)) / d logits: what sampling from pi and differentiating f gives on average."""
    logits_V, ref_V = categorical(seed)
    logp_V = logits_V.log_softmax(0)
    return torch.autograd.grad((logp_V.exp().detach() * function(logp_V, ref_V)).sum(), logits_V)[0]


def gradient_of_kl(seed: int, *, forward: bool) -> torch.Tensor:
    logits_V, ref_V = categorical(seed)
    logp_V = logits_V.log_softmax(0)
    reverse_kl = (logp_V.exp() * (logp_V - ref_V)).sum()
    forward_kl = (ref_V.exp() * (ref_V - logp_V)).sum()
    return torch.autograd.grad(forward_kl if forward else reverse_kl, logits_V)[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_of_k2_is_that_of_the_reverse_kl(seed):
    expected = gradient_of_kl(seed, forward=False)
    torch.testing.assert_close(gradient_of_expectation(k2, seed), expected, rtol=0, atol=1e-14)
    assert (gradient_of_expectation(k3, seed) - expected).abs().max() > 1e-3  # and that of k3 is not


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_of_k3_is_that_of_the_forward_kl(seed):
    expected = gradient_of_kl(seed, forward=True)
    torch.testing.assert_close(gradient_of_expectation(k3, seed), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
def test_k1_as_a_loss_pulls_nowhere(seed):
    assert gradient_of_expectation(k1, seed).abs().max() < 1e-14


@pytest.mark.parametrize("seed", SEEDS)
def test_k1_and_k3_are_unbiased_and_k2_is_not(seed):
    logits_V, ref_V = categorical(seed)
    logp_V = logits_V.log_softmax(0).detach()
    means = [float((logp_V.exp() * f(logp_V, ref_V)).sum()) for f in (k1, k2, k3)]
    assert means[0] == pytest.approx(means[2], abs=1e-14)
    assert abs(means[1] - means[0]) > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_estimators_and_objectives_are_their_equations(seed):
    batch = ragged_batch(seed)
    logp, ref = batch["logp_N"].numpy(), batch["logp_ref_N"].numpy()
    ratio = np.exp(ref) / np.exp(logp)
    square, gap = 0.5 * (logp - ref) ** 2, ratio - np.log(ratio) - 1
    assert (gap >= 0).all()
    np.testing.assert_allclose(-apply(minus_kl_k2, batch)[0].numpy(), square, rtol=0, atol=1e-12)
    np.testing.assert_allclose(-apply(minus_kl_k3, batch)[0].numpy(), gap, rtol=0, atol=1e-12)
    for objective in (minus_kl_k2, minus_kl_k3):
        np.testing.assert_allclose(apply(objective, batch)[1]["kl_ref_nats"].numpy(), gap, rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", [minus_kl_k2, minus_kl_k3])
def test_maximising_minus_kl_moves_the_policy_towards_the_reference(objective):
    logits_V, ref_V = categorical(0)

    def distance() -> float:
        return (logits_V.softmax(0) * (logits_V.log_softmax(0) - ref_V)).sum().item()

    before = distance()
    for _ in range(200):
        logp_V = logits_V.log_softmax(0)
        loss = (logp_V.exp().detach() * -objective(logp_V, ref_V)[0]).sum()
        (slope_V,) = torch.autograd.grad(loss, logits_V)
        logits_V = (logits_V - 0.5 * slope_V).detach().requires_grad_()
    assert distance() < before / 100


def test_k3_stays_finite_where_the_reference_is_surer_by_a_thousand_nats():
    logp_N = torch.tensor([-1000.0], requires_grad=True)
    objective_N, _ = minus_kl_k3(logp_N, torch.tensor([0.0]))
    objective_N.sum().backward()
    assert objective_N.isfinite().all()
    assert logp_N.grad is not None
    assert logp_N.grad.isfinite().all()


def test_kl_in_the_reward_costs_trained_tokens_only():
    batch = ragged_batch(0)
    penalty_N = apply(partial(kl_in_reward, kl_coefficient=0.1), batch)
    difference = batch["logp_old_N"].numpy() - batch["logp_ref_N"].numpy()
    expected = np.where(batch["trained_N"].numpy(), 0.1 * difference, 0.0)
    np.testing.assert_allclose(penalty_N.numpy(), expected, rtol=0, atol=1e-15)


def test_the_entropy_bonus_is_the_entropy():
    entropy_N = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    objective_N, metrics = entropy_bonus(entropy_N)
    assert torch.equal(objective_N, entropy_N)
    assert not metrics["entropy_nats"].requires_grad


def rollouts_of(lengths: list[int], rewards: list[float], groups: list[int]) -> Batch:
    """Rollouts with one prompt token each, which must not count."""
    policy = [t > 0 for length in lengths for t in range(length + 1)]
    return Batch(
        cu_seqlens_of([length + 1 for length in lengths]),
        {
            "policy_N": torch.tensor(policy),
            "reward_S": torch.tensor(rewards, dtype=torch.float64),
            "group_S": torch.tensor(groups),
        },
    )


def test_overlong_falls_from_0_to_minus_1_over_the_buffer():
    batch = rollouts_of([5, 6, 7, 8, 9, 10, 11], [1.0] * 7, [0] * 7)
    shaped = apply(partial(overlong, max_tokens=10, buffer_tokens=4), batch)
    assert shaped.tolist() == [1.0, 1.0, 3 / 4, 2 / 4, 1 / 4, 0.0, 0.0]


def test_overlong_refuses_a_buffer_longer_than_the_limit():
    batch = rollouts_of([5], [1.0], [0])
    with pytest.raises(ValueError, match="buffer_tokens=4096 and max_tokens=64"):
        apply(partial(overlong, max_tokens=64, buffer_tokens=4096), batch)


def test_relative_length_rewards_short_right_answers_and_never_short_wrong_ones():
    # lengths 2, 4, 6: lambda 1/2, 0, -1/2
    batch = rollouts_of([2, 4, 6, 2, 4, 6, 3, 3], [1.0, 1, 1, 0, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1, 2, 2])
    shaped = apply(partial(relative_length, length_coefficient=1.0), batch)
    assert shaped.tolist() == [3 / 2, 1.0, 1 / 2, 0.0, 0.0, -1 / 2, 1.0, 0.0]


@pytest.mark.parametrize("seed", SEEDS)
def test_shaping_is_its_equation_on_ragged_input(seed):
    batch = ragged_batch(seed)
    rows = sequences(batch)
    lengths = [int(row["policy_N"].sum()) for row in rows]
    soft, relative = [], []
    for row, length in zip(rows, lengths, strict=True):
        soft.append(row["reward_S"] + (0 if length <= 3 else -1 if length > 8 else (3 - length) / 5))
        same = [n for n, r in zip(lengths, rows, strict=True) if r["group_S"] == row["group_S"]]
        lam = 0.5 - (length - min(same)) / (max(same) - min(same))
        relative.append(row["reward_S"] + 0.3 * (lam if row["reward_S"] > 0 else min(0.0, lam)))
    shaped = apply(partial(overlong, max_tokens=8, buffer_tokens=5), batch)
    np.testing.assert_allclose(shaped.numpy(), soft, rtol=0, atol=1e-12)
    shaped = apply(partial(relative_length, length_coefficient=0.3), batch)
    np.testing.assert_allclose(shaped.numpy(), relative, rtol=0, atol=1e-12)


def test_truncated_importance_is_the_ratio_up_to_its_cap_and_carries_no_gradient():
    logp_old_N = torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64).log()
    logp_sampler_N = torch.tensor([0.5, 0.5, 0.3], dtype=torch.float64).log()
    factor_N = truncated_importance(logp_old_N, logp_sampler_N, max_weight=2.0)
    assert factor_N.tolist() == pytest.approx([1 / 2, 1.0, 2.0])

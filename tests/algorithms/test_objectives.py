"""Objectives against their equations: values, gradients, and what happens outside the bounds."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from tests.algorithms.support import SEEDS, gradient, ragged_batch, sequences
from whorl.algorithms.averages import sequence_mean
from whorl.algorithms.objectives import cispo, gmpo, gspo, ppo_clip, reinforce, sapo
from whorl.data import Batch, apply

BOUNDS = {"ratio_min": 0.8, "ratio_max": 1.28}
OBJECTIVES = {
    "reinforce": reinforce,
    "ppo_clip": partial(ppo_clip, **BOUNDS),
    "cispo": partial(cispo, ratio_max=1.28),
    "gspo": partial(gspo, **BOUNDS),
    "gmpo": partial(gmpo, **BOUNDS),
    "sapo": partial(sapo, tau_positive=1.0, tau_negative=1.05),
}


def with_sequence_advantages(batch: Batch) -> Batch:
    """One advantage for the whole rollout, as the sequence-level papers have it."""
    advantage_N = torch.where(batch["trained_N"], batch["reward_S"][batch["sequence_N"]], 0.0)
    return batch.with_columns(advantage_N=advantage_N)


def live(batch: Batch, shift: float | None = None) -> torch.Tensor:
    """logp_N with gradient; with a shift, exactly that far from logp_old_N."""
    logp_N = batch["logp_N"] if shift is None else batch["logp_old_N"] + shift
    return logp_N.clone().requires_grad_()


def value_and_gradient(name: str, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    logp_N = live(batch)
    objective_N, _ = apply(OBJECTIVES[name], batch, logp_N=logp_N)
    return objective_N.detach().numpy(), gradient(objective_N, logp_N).numpy()


def token_statement(name: str, logp: float, logp_old: float, a: float) -> tuple[float, float]:
    """Objective and its derivative by logp of one token, by cases."""
    r = math.exp(logp - logp_old)
    if name == "reinforce":
        return a * logp, a
    if name == "ppo_clip":
        if (a > 0 and r > 1.28) or (a < 0 and r < 0.8):
            return (1.28 if a > 0 else 0.8) * a, 0.0
        return r * a, r * a
    if name == "cispo":
        return min(r, 1.28) * a * logp, min(r, 1.28) * a
    tau = 1.0 if a > 0 else 1.05
    p = 1 / (1 + math.exp(-tau * (r - 1)))
    return 4 / tau * p * a, 4 * p * (1 - p) * r * a


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["reinforce", "ppo_clip", "cispo", "sapo"])
def test_token_objectives_are_their_equations_in_value_and_gradient(name, seed):
    batch = ragged_batch(seed)
    rows = zip(
        batch["logp_N"].tolist(), batch["logp_old_N"].tolist(), batch["advantage_N"].tolist(), strict=True
    )
    expected = np.array([token_statement(name, *row) for row in rows])
    value_N, gradient_N = value_and_gradient(name, batch)
    np.testing.assert_allclose(value_N, expected[:, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradient_N, expected[:, 1], rtol=0, atol=1e-12)


def sequence_objective(name: str, logp: np.ndarray, row: dict, advantage: float) -> float:
    """The papers' formulas for one rollout, with powers and products as they are printed."""
    m = row["trained_N"]
    ratio = np.exp(logp[m] - row["logp_old_N"][m])
    if not len(ratio):
        return 0.0
    if name == "gspo":
        s = np.prod(ratio) ** (1 / len(ratio))
        return min(s * advantage, min(max(s, 0.8), 1.28) * advantage)
    sign = np.sign(advantage)
    kept = np.minimum(ratio**sign, np.clip(ratio, 0.8, 1.28) ** sign) ** sign
    return np.prod(kept) ** (1 / len(kept)) * advantage


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["gspo", "gmpo"])
def test_sequence_objectives_in_token_form_have_the_papers_value_and_gradient(name, seed):
    batch = with_sequence_advantages(ragged_batch(seed))
    weight_N = apply(sequence_mean, batch)
    logp_N = live(batch)
    objective_N, _ = apply(OBJECTIVES[name], batch, logp_N=logp_N)
    total = (weight_N * objective_N).sum()
    rows = sequences(batch)
    alive = sum(bool(row["trained_N"].any()) for row in rows)
    expected = sum(sequence_objective(name, row["logp_N"], row, row["reward_S"]) for row in rows) / alive
    assert total.item() == pytest.approx(expected, abs=1e-12)

    slopes, step = [], 1e-5
    for row in rows:
        for t in range(len(row["logp_N"])):
            nudge = np.zeros_like(row["logp_N"])
            nudge[t] = step
            up = sequence_objective(name, row["logp_N"] + nudge, row, row["reward_S"])
            down = sequence_objective(name, row["logp_N"] - nudge, row, row["reward_S"])
            slopes.append((up - down) / (2 * step) / alive)
    np.testing.assert_allclose(gradient(total, logp_N).numpy(), slopes, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_policy_every_objective_has_the_gradient_of_reinforce(name):
    batch = with_sequence_advantages(ragged_batch(0))
    logp_N = live(batch, shift=0.0)
    objective_N, _ = apply(OBJECTIVES[name], batch, logp_N=logp_N)
    expected_N = batch["advantage_N"]
    torch.testing.assert_close(gradient(objective_N, logp_N), expected_N, rtol=0, atol=1e-12)


def gradients_in_the_four_regions(function) -> list[float]:
    """d objective / d logp at (A, r) = (1, 3/2), (-1, 1/2), (-1, 3/2), (1, 1/2)."""
    ratio_N = torch.tensor([3 / 2, 1 / 2, 3 / 2, 1 / 2], dtype=torch.float64)
    advantage_N = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    logp_old_N = torch.full((4,), -2.0, dtype=torch.float64)
    logp_N = (logp_old_N + ratio_N.log()).requires_grad_()
    return gradient(function(logp_N, logp_old_N, advantage_N)[0], logp_N).tolist()


def check_cispo(function) -> None:
    assert gradients_in_the_four_regions(function) == pytest.approx([6 / 5, -1 / 2, -6 / 5, 1 / 2])


def test_cispo_keeps_the_gradient_that_ppo_drops():
    ppo = partial(ppo_clip, ratio_min=4 / 5, ratio_max=6 / 5)
    assert gradients_in_the_four_regions(ppo) == pytest.approx([0.0, 0.0, -3 / 2, 1 / 2])
    check_cispo(partial(cispo, ratio_max=6 / 5))


def cispo_with_its_weight_in_the_graph(logp_N, logp_old_N, advantage_N):
    return (logp_N - logp_old_N).exp().clamp(0, 6 / 5) * advantage_N * logp_N, {}


def cispo_that_masks_what_it_clips(logp_N, logp_old_N, advantage_N):
    ratio_N = (logp_N - logp_old_N).exp().detach()
    return torch.where(ratio_N > 6 / 5, 0.0, ratio_N) * advantage_N * logp_N, {}


@pytest.mark.parametrize(
    "wrong",
    [
        cispo_with_its_weight_in_the_graph,
        cispo_that_masks_what_it_clips,
        partial(cispo, ratio_max=0.2),  # the bound read as an offset
        partial(cispo, ratio_max=6 / 5, ratio_min=4 / 5),
        partial(ppo_clip, ratio_min=0.0, ratio_max=6 / 5),
    ],
)
def test_what_is_called_cispo_and_is_not_is_caught(wrong):
    with pytest.raises(AssertionError):
        check_cispo(wrong)


def test_cispo_with_ratio_1_and_no_bound_is_reinforce():
    batch = ragged_batch(1)
    logp_N = live(batch, shift=0.0)
    bounded, _ = apply(partial(cispo, ratio_max=math.inf), batch, logp_N=logp_N)
    plain, _ = apply(reinforce, batch, logp_N=logp_N)
    assert torch.equal(bounded, plain)


def test_gspo_clips_a_sequence_as_a_whole_where_ppo_clips_single_tokens():
    # ratios 2 and 1/2: the geometric mean is 1, so GSPO keeps both tokens and PPO drops the first
    batch = ragged_batch(0, num_groups=1, group_size=1)
    step = torch.zeros(batch.num_tokens, dtype=torch.float64)
    first, second = batch["trained_N"].nonzero().flatten()[:2].tolist()
    step[first], step[second] = math.log(2), -math.log(2)
    batch = batch.with_columns(logp_N=batch["logp_old_N"] + step, advantage_N=batch["trained_N"].double())
    sequence_N = value_and_gradient("gspo", batch)[1]
    token_N = value_and_gradient("ppo_clip", batch)[1]
    assert sequence_N[[first, second]].tolist() == pytest.approx([1.0, 1.0])
    assert token_N[[first, second]].tolist() == pytest.approx([0.0, 1 / 2])


def test_sapo_fades_out_smoothly_and_sooner_for_negative_advantages():
    ratios = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    logp_old_N = torch.full((3,), -3.0, dtype=torch.float64)
    shares = []
    for sign in (1.0, -1.0):
        logp_N = (logp_old_N + ratios.log()).requires_grad_()
        advantage_N = torch.full((3,), sign, dtype=torch.float64)
        objective_N, _ = sapo(logp_N, logp_old_N, advantage_N, tau_positive=1.0, tau_negative=1.05)
        shares.append((gradient(objective_N, logp_N) / ratios / sign).tolist())
    assert shares[0][0] == pytest.approx(1.0)
    assert shares[0][0] > shares[0][1] > shares[0][2] > 0
    assert shares[1][1] < shares[0][1]
    assert shares[1][2] < shares[0][2]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_surprising_token_of_weight_zero_leaves_no_nan_in_the_gradient(name):
    batch = ragged_batch(0)
    column = torch.where(batch["trained_N"], batch["logp_old_N"], -1e4).float()
    batch = batch.with_columns(logp_old_N=column, advantage_N=batch["advantage_N"].float())
    logp_N = torch.where(batch["trained_N"], batch["logp_N"], -1.0).float().requires_grad_()
    objective_N, metrics = apply(OBJECTIVES[name], batch, logp_N=logp_N)
    slope_N = gradient(batch["trained_N"] * objective_N, logp_N)
    assert slope_N.isfinite().all()
    assert all(column.isfinite().all() for column in metrics.values())
    assert objective_N.dtype == torch.float32


def test_metrics_count_each_region_as_a_share_of_the_trained_tokens():
    ratio_N = torch.tensor([3 / 2, 1 / 2, 3 / 2, 1 / 2, 1.0], dtype=torch.float64)
    advantage_N = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    logp_old_N = torch.zeros(5, dtype=torch.float64)
    logp_N = ratio_N.log().requires_grad_()
    means = {}
    for function in (
        partial(ppo_clip, ratio_min=0.8, ratio_max=1.2),
        partial(cispo, ratio_max=1.2, ratio_min=0.8),
    ):
        _, metrics = function(logp_N, logp_old_N, advantage_N)
        assert not any(column.requires_grad for column in metrics.values())
        means[function.func] = {name: column.mean().item() for name, column in metrics.items()}
    for of in means.values():
        assert of["ratio_mean"] == pytest.approx((3 / 2 + 1 / 2 + 3 / 2 + 1 / 2 + 1) / 5)
        assert of["kl_old_nats"] == pytest.approx(-2 * (math.log(3 / 2) + math.log(1 / 2)) / 5)
        assert [of["clipped_high_frac"], of["clipped_low_frac"]] == [2 / 5, 2 / 5]
        for side in ("above_max", "below_min"):
            assert [of[f"{side}_{sign}_frac"] for sign in ("positive", "negative")] == [1 / 5, 1 / 5]
    assert means[ppo_clip]["dropped_frac"] == 2 / 5
    assert means[cispo]["dropped_frac"] == 0.0

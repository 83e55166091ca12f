"""REINFORCE++ (arXiv:2501.03262): statistics of the global batch, and what dividing by a group's std does."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.algorithms.support import SEEDS, ragged_batch, sequences
from tests.test_player_processes import SAMPLING, problems
from tests.test_player_ranks import be_rank, make_player, told_by
from whorl import player_ranks
from whorl.algorithms import credit
from whorl.algorithms.algorithm import assemble
from whorl.algorithms.catalog import with_settings
from whorl.data import Batch, apply, cu_seqlens_of
from whorl.player_ranks import PlayerOnRanks
from whorl.rollouts import Player


def whitened_in_numpy(batch: Batch, eps: float = 1e-8, *, centre_groups: bool) -> np.ndarray:
    """Token by token, with plain sums."""
    rows = sequences(batch)
    raw, mask = [], []
    for row in rows:
        same = [other["reward_S"] for other in rows if other["group_S"] == row["group_S"]]
        for t, trained in enumerate(row["trained_N"]):
            if centre_groups:
                value = row["reward_S"] - sum(same) / len(same)
            else:
                to_go = sum(p for p, m in zip(row["penalty_N"][t:], row["trained_N"][t:], strict=True) if m)
                value = row["reward_S"] - to_go
            raw.append(value)
            mask.append(trained)
    raw, mask = np.array(raw), np.array(mask)
    mean = raw[mask].sum() / mask.sum()
    std = (((raw[mask] - mean) ** 2).sum() / mask.sum()) ** 0.5
    return np.where(mask, (raw - mean) / (std + eps), 0.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_variants_are_their_equations(seed):
    batch = ragged_batch(seed)
    a, b = apply(credit.whitened, batch), apply(credit.centred_then_whitened, batch)
    np.testing.assert_allclose(a, whitened_in_numpy(batch, centre_groups=False), rtol=0, atol=1e-12)
    np.testing.assert_allclose(b, whitened_in_numpy(batch, centre_groups=True), rtol=0, atol=1e-12)


def check_moments(advantage_N: Tensor, trained_N: Tensor) -> None:
    """Token-weighted mean 0 and population variance 1; 0 where not trained."""
    trained_M = advantage_N[trained_N]
    assert abs(trained_M.mean().item()) < 1e-12
    assert abs(trained_M.square().mean().item() - 1) < 1e-7
    assert (advantage_N[~trained_N] == 0).all()


@pytest.mark.parametrize("function", [credit.whitened, credit.centred_then_whitened])
def test_advantages_have_token_weighted_mean_0_and_variance_1(function):
    batch = ragged_batch(0)
    check_moments(apply(function, batch), batch["trained_N"])


def test_the_sample_standard_deviation_is_caught():
    batch = ragged_batch(0)
    values_M = batch["reward_S"][batch["sequence_N"]][batch["trained_N"]]
    wrong_N = torch.zeros(batch.num_tokens, dtype=torch.float64)
    wrong_N[batch["trained_N"]] = (values_M - values_M.mean()) / values_M.std()  # divides by n - 1
    with pytest.raises(AssertionError):
        check_moments(wrong_N, batch["trained_N"])


@pytest.mark.parametrize("function", [credit.whitened, credit.centred_then_whitened])
def test_tokens_that_are_not_trained_never_enter_a_statistic(function):
    batch = ragged_batch(0)
    expected_N = apply(function, batch)
    poisoned_N = torch.where(batch["trained_N"], batch["penalty_N"], 1e9)
    assert torch.equal(apply(function, batch.with_columns(penalty_N=poisoned_N)), expected_N)


@pytest.mark.parametrize("function", [credit.whitened, credit.centred_then_whitened])
def test_a_batch_without_variance_gets_advantage_zero(function):
    batch = ragged_batch(0)
    equal_S = torch.full_like(batch["reward_S"], 0.1)
    batch = batch.with_columns(reward_S=equal_S, penalty_N=torch.zeros_like(batch["penalty_N"]))
    assert (apply(function, batch) == 0).all()


def test_a_group_of_equal_rewards_ends_at_minus_mean_over_std_of_the_batch():
    # Group 0: rewards 1, 1. Group 1: reward 1 on three tokens, reward 0 on one.
    batch = Batch(
        cu_seqlens_of([1, 1, 3, 1]),
        {
            "reward_S": torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64),
            "group_S": torch.tensor([0, 0, 1, 1]),
            "trained_N": torch.ones(6, dtype=torch.bool),
        },
    )
    # centred per token: 0, 0, 1/2, 1/2, 1/2, -1/2; mean 1/6, mean of squares 4 * 1/4 / 6 = 1/6
    std = math.sqrt(1 / 6 - 1 / 36)
    expected = [x / std for x in (-1 / 6, -1 / 6, 1 / 3, 1 / 3, 1 / 3, -2 / 3)]
    assert apply(credit.centred_then_whitened, batch).tolist() == pytest.approx(expected, abs=1e-7)


def test_the_limit_is_applied_after_the_group_has_been_centred():
    """Rewards 100 and 60 are 20 and -20 about their mean, then 10 and -10. Limited first, both would be 0."""
    batch = Batch(
        cu_seqlens_of([1, 1, 1, 1]),
        {
            "reward_S": torch.tensor([100.0, 60.0, 5.0, -5.0], dtype=torch.float64),
            "group_S": torch.tensor([0, 0, 1, 1]),
            "penalty_N": torch.zeros(4, dtype=torch.float64),
            "trained_N": torch.ones(4, dtype=torch.bool),
        },
    )
    # 10, -10, 5, -5: mean 0, mean of squares (100 + 100 + 25 + 25) / 4 = 62.5
    expected = [x / math.sqrt(62.5) for x in (10, -10, 5, -5)]
    assert apply(credit.centred_then_whitened, batch).tolist() == pytest.approx(expected, abs=1e-7)
    # Without a group there is nothing to centre: 10, 10, 5, -5 have mean 5 and mean of squares about it 150 / 4.
    expected = [x / math.sqrt(37.5) for x in (5, 5, 0, -10)]
    assert apply(credit.whitened, batch).tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("seed", SEEDS)
def test_rewards_of_plus_and_minus_1_are_rewards_of_0_and_1_with_half_the_penalty(seed):
    batch = ragged_batch(seed)
    zero_one_S = (batch["reward_S"] > batch["reward_S"].median()).double()
    assert 0 < zero_one_S.mean() < 1 and batch["penalty_N"].abs().max() > 0
    halved = batch.with_columns(reward_S=zero_one_S, penalty_N=batch["penalty_N"] / 2)
    signed = batch.with_columns(reward_S=2 * zero_one_S - 1)
    torch.testing.assert_close(
        apply(credit.whitened, signed), apply(credit.whitened, halved), rtol=0, atol=1e-6
    )
    same_penalty = batch.with_columns(reward_S=zero_one_S)
    assert (apply(credit.whitened, signed) - apply(credit.whitened, same_penalty)).abs().max() > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_the_control_with_the_std_of_the_group_is_a_whitened_zscore(seed):
    batch = ragged_batch(seed)
    control_N = apply(partial(credit.centred_then_whitened, group_std=True), batch)
    zscored_N = apply(partial(credit.zscore, eps=1e-8), batch)
    torch.testing.assert_close(control_N, credit.whiten(zscored_N, batch["trained_N"]), rtol=0, atol=1e-12)
    assert (control_N - apply(credit.centred_then_whitened, batch)).abs().max() > 1e-3


def ranks_of(batch: Batch) -> list[Batch]:
    """Four ranks with one, two, three and the remaining sequences: unequal numbers of tokens."""
    order = list(range(batch.num_sequences))
    return [batch.select(part) for part in (order[:1], order[1:3], order[3:6], order[6:])]


def check_four_ranks(per_rank: list[Tensor], whole_N: Tensor) -> None:
    torch.testing.assert_close(torch.cat(per_rank), whole_N, rtol=0, atol=1e-12)


def test_the_statistics_are_those_of_four_parts_whose_moments_are_summed():
    """Arithmetic only: ranks here do not sum moments, each has the whole batch (the next test)."""
    batch = ragged_batch(1)
    whole_N = apply(credit.whitened, batch)
    raw = credit.to_tokens(batch["reward_S"], batch["sequence_N"], batch["trained_N"]) - credit.sum_to_go(
        batch["penalty_N"], batch["sequence_N"], batch["trained_N"]
    )
    ranks = ranks_of(batch.with_columns(raw_N=raw))
    values = [rank["raw_N"][rank["trained_N"]] for rank in ranks]
    count, total = sum(len(v) for v in values), sum(v.sum().item() for v in values)
    squares = sum(v.square().sum().item() for v in values)
    mean = total / count
    std = math.sqrt(squares / count - mean**2)
    reduced = [torch.where(r["trained_N"], (r["raw_N"] - mean) / (std + 1e-8), 0.0) for r in ranks]
    check_four_ranks(reduced, whole_N)


def test_a_rank_gives_the_advantages_of_one_process(monkeypatch):
    """The project's own ranks: each plays every second problem, is told the others' groups, and credits them all."""
    algorithm = with_settings("REINFORCE_PP_BASELINE", minus_kl_k2=0)
    asked = problems(5)

    def advantages(groups):
        return assemble(groups, algorithm)["advantage_N"]

    alone, _ = make_player(Player).play(asked, 4, SAMPLING, ("test", 1))
    other = told_by(monkeypatch, 1, asked)
    be_rank(monkeypatch, 0)
    monkeypatch.setattr(player_ranks, "from_every_rank", lambda mine: [mine, other])
    on_rank, _ = make_player(PlayerOnRanks).play(asked, 4, SAMPLING, ("test", 1))
    whole_N = advantages(alone)
    assert whole_N.abs().max() > 0.1
    torch.testing.assert_close(advantages(on_rank), whole_N, rtol=0, atol=1e-12)
    own_N = advantages(alone[0::2])  # a rank that credited only what it played itself
    of_own_N = torch.cat(by_group(whole_N, alone)[0::2])
    assert (own_N - of_own_N).abs().max() > 1e-3


def by_group(values_N: Tensor, groups) -> list[Tensor]:
    return list(values_N.split([sum(len(rollout) for rollout in group.rollouts) for group in groups]))


@pytest.mark.parametrize("function", [credit.whitened, credit.centred_then_whitened])
def test_statistics_per_rank_or_per_micro_batch_are_caught(function):
    batch = ragged_batch(1, num_groups=8, group_size=2)
    parts = [batch.select(list(range(start, start + 4))) for start in range(0, 16, 4)]
    with pytest.raises(AssertionError):
        check_four_ranks([apply(function, part) for part in parts], apply(function, batch))


# The weight that an estimator gives to a problem of pass rate p, relative to the true gradient: for rewards
# 0 and 1 the expected update is proportional to E[mean_i(A_i R_i)], and to p (1 - p) for the true advantage.
PASS_RATES = (0.02, 0.05, 0.10, 0.25, 0.50)
TABLE = {
    2: (1.0, 1.0, 1.0, 1.0, 1.0),
    8: (2.573, 2.473, 2.328, 2.026, 1.856),
    16: (3.603, 3.267, 2.848, 2.198, 1.934),
}


def gain_P(function, reward_PG: Tensor) -> Tensor:
    """mean_i(A_i R_i) of each group of one-token rollouts; the advantages are the estimator's own."""
    num_groups, group_size = reward_PG.shape
    advantage_N = function(
        reward_PG.flatten(),
        torch.repeat_interleave(torch.arange(num_groups), group_size),
        torch.arange(reward_PG.numel()),
        torch.ones(reward_PG.numel(), dtype=torch.bool),
    )
    return (advantage_N.view_as(reward_PG) * reward_PG).mean(1)


def exact_weight(function, group_size: int, p: float) -> float:
    """All counts K of right answers, with their binomial probabilities."""
    reward_PG = torch.tril(torch.ones(group_size + 1, group_size, dtype=torch.float64), diagonal=-1)
    gains = gain_P(function, reward_PG).tolist()
    chance = [math.comb(group_size, k) * p**k * (1 - p) ** (group_size - k) for k in range(group_size + 1)]
    return sum(c * g for c, g in zip(chance, gains, strict=True)) / (p * (1 - p))


def check_table(function) -> None:
    for group_size, row in TABLE.items():
        for p, expected in zip(PASS_RATES, row, strict=True):
            assert exact_weight(function, group_size, p) == pytest.approx(expected, abs=6e-4), (group_size, p)


def test_zscore_weighs_problems_by_the_table_of_the_expected_std():
    check_table(partial(credit.zscore, eps=1e-9))


def zscore_with_sample_std(reward_S, group_S, sequence_N, trained_N):
    group_size = int((group_S == 0).sum())
    shrink = math.sqrt((group_size - 1) / group_size)
    return shrink * credit.zscore(reward_S, group_S, sequence_N, trained_N, eps=1e-9)


def test_the_table_catches_the_sample_standard_deviation():
    with pytest.raises(AssertionError):
        check_table(zscore_with_sample_std)


@pytest.mark.parametrize("group_size", [2, 8, 16])
@pytest.mark.parametrize("p", PASS_RATES)
def test_a_centred_reward_weighs_all_problems_alike(group_size, p):
    assert exact_weight(credit.centred, group_size, p) == pytest.approx((group_size - 1) / group_size)
    assert exact_weight(credit.leave_one_out, group_size, p) == pytest.approx(1.0)


@pytest.mark.parametrize(("group_size", "column"), [(2, 3), (8, 2), (16, 4)])
def test_the_table_comes_out_of_sampled_groups(group_size, column):
    p = PASS_RATES[column]
    draws = torch.rand(20_000, group_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gains = gain_P(credit.zscore, (draws < p).double())
    error = gains.std().item() / math.sqrt(len(gains)) / (p * (1 - p))
    assert gains.mean().item() / (p * (1 - p)) == pytest.approx(TABLE[group_size][column], abs=4 * error)
    assert error < 0.02


def weights_in_a_mixed_batch(
    function, group_size: int = 8, num_groups: int = 20_000
) -> tuple[Tensor, Tensor]:
    """Weight of each pass rate relative to that of 1/2 (the last), and its standard error.

    One batch with groups of all pass rates, so that what is taken over the batch is the same for all of them.
    """
    p_P = torch.tensor(PASS_RATES, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(len(p_P), num_groups, group_size, generator=generator, dtype=torch.float64)
    rewards = (draws < p_P[:, None, None]).double()
    gain_PG = gain_P(function, rewards.flatten(0, 1)).view(len(p_P), num_groups) / (p_P * (1 - p_P))[:, None]
    weight_P, error_P = gain_PG.mean(1), gain_PG.std(1) / math.sqrt(num_groups)
    return weight_P / weight_P[-1], error_P / weight_P[-1]


def check_flat(function) -> None:
    weight_P, error_P = weights_in_a_mixed_batch(function)
    assert error_P.max() < 0.03
    assert ((weight_P - 1).abs() <= 4 * error_P).all(), weight_P


def test_whitening_over_the_batch_weighs_all_problems_alike():
    """The second variant's own function. One std for all groups cannot favour any."""
    check_flat(credit.centred_then_whitened)


def test_the_control_with_the_std_of_the_group_weighs_problems_by_the_table():
    control = partial(credit.centred_then_whitened, group_std=True)
    weight_P, error_P = weights_in_a_mixed_batch(control)
    expected_P = torch.tensor(TABLE[8], dtype=torch.float64) / TABLE[8][-1]  # 1.386 at p = 0.02
    assert ((weight_P - expected_P).abs() <= 4 * error_P + 1e-3).all(), weight_P
    with pytest.raises(AssertionError):
        check_flat(control)

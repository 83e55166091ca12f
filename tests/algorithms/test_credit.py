"""Credit against its equations, written out once more in numpy."""

import numpy as np
import pytest
import torch

from tests.algorithms.support import SEEDS, on_tokens, ragged_batch, sequences
from whorl.algorithms import credit
from whorl.data import Batch, apply, cu_seqlens_of


def groups_of(batch: Batch) -> list[list[int]]:
    group_S = batch["group_S"].numpy()
    return [np.flatnonzero(group_S == g).tolist() for g in np.unique(group_S)]


def zscore_in_numpy(batch: Batch, eps: float) -> list[float]:
    rewards, out = batch["reward_S"].numpy(), np.zeros(batch.num_sequences)
    for members in groups_of(batch):
        r = rewards[members]
        mean = sum(r) / len(r)
        std = (sum((x - mean) ** 2 for x in r) / len(r)) ** 0.5
        out[members] = (r - mean) / (std + eps)
    return out.tolist()


def leave_one_out_in_numpy(batch: Batch) -> list[float]:
    rewards, out = batch["reward_S"].numpy(), np.zeros(batch.num_sequences)
    for members in groups_of(batch):
        for i in members:
            out[i] = rewards[i] - np.mean([rewards[j] for j in members if j != i])
    return out.tolist()


def centred_in_numpy(batch: Batch) -> list[float]:
    rewards, out = batch["reward_S"].numpy(), np.zeros(batch.num_sequences)
    for members in groups_of(batch):
        out[members] = rewards[members] - rewards[members].mean()
    return out.tolist()


def optimal_baseline_in_numpy(batch: Batch) -> list[float]:
    rewards, out = batch["reward_S"].numpy(), np.zeros(batch.num_sequences)
    lengths = np.array([row["trained_N"].sum() for row in sequences(batch)])
    for members in groups_of(batch):
        out[members] = rewards[members] - (lengths * rewards)[members].sum() / lengths[members].sum()
    return out.tolist()


CASES = {
    credit.reward_itself: lambda batch: batch["reward_S"].tolist(),
    credit.leave_one_out: leave_one_out_in_numpy,
    credit.centred: centred_in_numpy,
    credit.zscore: lambda batch: zscore_in_numpy(batch, eps=1e-6),
    credit.optimal_baseline: optimal_baseline_in_numpy,
    credit.greedy_baseline: lambda batch: (batch["reward_S"] - batch["reward_greedy_S"]).tolist(),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_credit_is_its_equation_on_trained_tokens_and_zero_elsewhere(function, seed):
    batch = ragged_batch(seed)
    expected_N = on_tokens(batch, CASES[function](batch))
    np.testing.assert_allclose(apply(function, batch).numpy(), expected_N, rtol=0, atol=1e-12)


def two_groups(rewards: list[float], lengths: list[int]) -> Batch:
    """Two groups of two rollouts without prompts."""
    num_tokens = sum(lengths)
    return Batch(
        cu_seqlens_of(lengths),
        {
            "reward_S": torch.tensor(rewards, dtype=torch.float64),
            "group_S": torch.tensor([0, 0, 1, 1]),
            "trained_N": torch.ones(num_tokens, dtype=torch.bool),
            "penalty_N": torch.zeros(num_tokens, dtype=torch.float64),
        },
    )


def test_worked_example_of_two_groups_with_rewards_1_0_and_3_5():
    batch = two_groups([1.0, 0.0, 3.0, 5.0], [1, 3, 1, 1])
    first_N = batch.cu_seqlens[:-1]
    assert apply(credit.leave_one_out, batch)[first_N].tolist() == [1.0, -1.0, -2.0, 2.0]
    assert apply(credit.centred, batch)[first_N].tolist() == [0.5, -0.5, -1.0, 1.0]
    # std 1/2 and 1
    zscored = apply(lambda reward_S, group_S, sequence_N, trained_N: credit.zscore(
        reward_S, group_S, sequence_N, trained_N, eps=0.0), batch)  # fmt: skip
    assert zscored[first_N].tolist() == [1.0, -1.0, -1.0, 1.0]
    # baselines (1*1 + 3*0)/4 = 1/4 and (3 + 5)/2 = 4
    assert apply(credit.optimal_baseline, batch)[first_N].tolist() == [3 / 4, -1 / 4, -1.0, 1.0]


@pytest.mark.parametrize(
    "function", [credit.leave_one_out, credit.centred, credit.zscore, credit.optimal_baseline]
)
def test_a_group_whose_rewards_are_all_equal_gets_exactly_zero(function):
    batch = two_groups([0.1, 0.1, 0.3, 0.7], [2, 1, 1, 1])
    advantage_N = apply(function, batch)
    assert (advantage_N[:3] == 0.0).all()
    assert (advantage_N[3:] != 0.0).all()


def test_three_equal_rewards_give_zero_though_their_float_mean_is_another_number():
    rewards = torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64)
    assert (rewards - rewards.sum() / 3 != 0).any()  # the trap
    group_S = torch.zeros(3, dtype=torch.int64)
    sequence_N, trained_N = torch.arange(3), torch.ones(3, dtype=torch.bool)
    assert (
        credit.zscore(rewards, group_S, sequence_N, trained_N, eps=0.0).nan_to_num(9.0) == 9.0
    ).all()  # 0/0
    assert (credit.zscore(rewards, group_S, sequence_N, trained_N) == 0.0).all()


@pytest.mark.parametrize(
    "function",
    [
        credit.leave_one_out,
        credit.centred,
        credit.zscore,
        credit.optimal_baseline,
        credit.centred_then_whitened,
    ],
)
def test_one_rollout_per_problem_is_refused_by_every_group_baseline(function):
    batch = two_groups([1.0, 0.0, 3.0, 5.0], [1, 3, 1, 1]).with_columns(group_S=torch.arange(4))
    message = f"{function.__name__} needs at least 2 rollouts per problem; got group_size=1"
    with pytest.raises(ValueError, match=message):
        apply(function, batch)


def test_a_group_that_lost_its_other_rollouts_gets_zero_and_disturbs_no_one():
    batch = two_groups([1.0, 0.0, 3.0, 5.0], [1, 1, 1, 1]).with_columns(group_S=torch.tensor([0, 0, 0, 1]))
    for function in (credit.leave_one_out, credit.centred, credit.zscore):
        advantage_N = apply(function, batch)
        assert advantage_N[3] == 0.0
        assert advantage_N[:3].abs().min() > 0
    # 1 - 3/2, 0 - 2, 3 - 1/2
    assert apply(credit.leave_one_out, batch).tolist() == pytest.approx([-1 / 2, -2.0, 5 / 2, 0.0])


def test_reordering_the_rollouts_reorders_the_credit():
    batch = ragged_batch(0)
    order = torch.randperm(batch.num_sequences, generator=torch.Generator().manual_seed(0))
    for function in (*CASES, credit.whitened, credit.centred_then_whitened):
        moved = batch.with_columns(advantage_N=apply(function, batch)).select(order)["advantage_N"]
        torch.testing.assert_close(apply(function, batch.select(order)), moved, rtol=0, atol=1e-12)

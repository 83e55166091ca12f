"""Weights against their equations, and their sums against the table of the module."""

from functools import partial

import numpy as np
import pytest
import torch

from tests.algorithms.support import SEEDS, ragged_batch, sequences
from whorl.algorithms.averages import (
    constant_length,
    group_token_mean,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from whorl.data import Batch, apply, cu_seqlens_of

AVERAGES = (token_mean, group_token_mean, sequence_mean, sequence_sum, partial(constant_length, max_tokens=7))


def weights_in_numpy(batch: Batch) -> list[np.ndarray]:
    rows = sequences(batch)
    counts = [int(row["trained_N"].sum()) for row in rows]
    groups = [row["group_S"] for row in rows]
    total, alive = sum(counts), sum(c > 0 for c in counts)
    num_groups = len({g for g, c in zip(groups, counts, strict=True) if c})
    per_sequence = []
    for count, group in zip(counts, groups, strict=True):
        of_group = sum(c for c, g in zip(counts, groups, strict=True) if g == group)
        per_sequence.append(
            (1 / total, 1 / num_groups / of_group, 1 / alive / max(count, 1), 1 / alive, 1 / alive / 7)
        )
    return [
        np.concatenate([np.where(r["trained_N"], w[k], 0.0) for r, w in zip(rows, per_sequence, strict=True)])
        for k in range(5)
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_are_their_equations(seed):
    batch = ragged_batch(seed)
    for average, expected_N in zip(AVERAGES, weights_in_numpy(batch), strict=True):
        np.testing.assert_allclose(apply(average, batch), expected_N, rtol=1e-12, atol=0)


def test_worked_example_of_rollouts_with_1_3_0_and_4_tokens():
    trained = [True, True, True, True, False, True, True, True, True]
    batch = Batch(
        cu_seqlens_of([1, 3, 1, 4]),
        {"trained_N": torch.tensor(trained), "group_S": torch.tensor([0, 0, 1, 1])},
    )
    first_N = batch.cu_seqlens[:-1]
    shares = {average: apply(average, batch)[first_N].tolist() for average in AVERAGES}
    assert shares[token_mean] == pytest.approx([1 / 8, 1 / 8, 0, 1 / 8])
    assert shares[group_token_mean] == pytest.approx([1 / 8, 1 / 8, 0, 1 / 8])
    assert shares[sequence_mean] == pytest.approx([1 / 3, 1 / 9, 0, 1 / 12])
    assert shares[sequence_sum] == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert shares[AVERAGES[4]] == pytest.approx([1 / 21, 1 / 21, 0, 1 / 21])


def test_group_and_token_means_differ_when_one_problem_has_longer_rollouts():
    batch = Batch(
        cu_seqlens_of([1, 1, 3, 3]),
        {"trained_N": torch.ones(8, dtype=torch.bool), "group_S": torch.tensor([0, 0, 1, 1])},
    )
    assert apply(token_mean, batch).tolist() == pytest.approx([1 / 8] * 8)
    assert apply(group_token_mean, batch).tolist() == pytest.approx([1 / 4] * 2 + [1 / 12] * 6)


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_sum_to_the_documented_total(seed):
    batch = ragged_batch(seed)
    tokens = int(batch["trained_N"].sum())
    alive = int((batch.sum_per_sequence(batch["trained_N"].long()) > 0).sum())
    assert alive < batch.num_sequences  # a rollout without a trained token is among them
    for average, total in zip(AVERAGES, (1, 1, 1, tokens / alive, tokens / alive / 7), strict=True):
        assert apply(average, batch).sum().item() == pytest.approx(total, rel=1e-12)


def test_a_batch_without_trained_tokens_has_weight_zero_and_no_nan():
    batch = ragged_batch(0)
    batch = batch.with_columns(trained_N=torch.zeros_like(batch["trained_N"]))
    for average in AVERAGES:
        assert (apply(average, batch) == 0).all()


def test_weights_follow_their_tokens_when_sequences_are_permuted():
    batch = ragged_batch(0)
    order = torch.randperm(batch.num_sequences, generator=torch.Generator().manual_seed(1))
    for average in AVERAGES:
        moved_N = batch.with_columns(weight_N=apply(average, batch)).select(order)["weight_N"]
        torch.testing.assert_close(apply(average, batch.select(order)), moved_N, rtol=1e-12, atol=0)

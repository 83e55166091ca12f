"""Sums over groups, sequences and steps of packed columns: what credit, averages and critics are made of.

Everything here is float64, because a statistic of a million tokens should not depend on their order.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def sum_by(index_M: Int[Tensor, " M"], values_M: Tensor) -> Float[Tensor, " P"]:
    """`[P]`: for each p, the sum of the values whose index is p (0 for a p that does not occur)."""
    num = int(index_M.max()) + 1 if len(index_M) else 0
    zeros = torch.zeros(num, dtype=torch.float64, device=index_M.device)
    return zeros.index_add_(0, index_M, values_M.double())


def mean_by(index_M: Int[Tensor, " M"], values_M: Tensor) -> Float[Tensor, " M"]:
    """For each entry, the mean of all entries that share its index."""
    count_P = sum_by(index_M, torch.ones_like(index_M))
    return (sum_by(index_M, values_M) / count_P)[index_M]


def centred_by(index_M: Int[Tensor, " M"], values_M: Tensor) -> Float[Tensor, " M"]:
    """Each entry minus the mean of those that share its index; exactly 0 where they are all equal.

    The mean of three times 0.1 is not 0.1 in floating point, and a z-score would divide that rounding
    error by a standard deviation near 0. Subtracting the smallest entry first makes equal entries zeros.
    """
    values_M = values_M.double()
    lowest_P = torch.zeros(int(index_M.max()) + 1, dtype=torch.float64, device=index_M.device)
    lowest_P.scatter_reduce_(0, index_M, values_M, "amin", include_self=False)
    shifted_M = values_M - lowest_P[index_M]
    return shifted_M - mean_by(index_M, shifted_M)


def count_tokens(sequence_N: Int[Tensor, " N"], counted_N: Bool[Tensor, " N"], num_sequences: int) -> Tensor:
    """`[S]` float64: how many tokens of each sequence are counted."""
    count_S = torch.zeros(num_sequences, dtype=torch.float64, device=sequence_N.device)
    return count_S.index_add_(0, sequence_N, counted_N.double())


def to_tokens(
    value_S: Float[Tensor, " S"], sequence_N: Int[Tensor, " N"], trained_N: Bool[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """A value per sequence, given to each of its trained tokens; 0 on the others."""
    return torch.where(trained_N, value_S.double()[sequence_N], 0.0)


def sum_to_go(
    values_N: Float[Tensor, " N"],
    sequence_N: Int[Tensor, " N"],
    trained_N: Bool[Tensor, " N"],
    *,
    discount: float = 1.0,
) -> Float[Tensor, " N"]:
    """y_t = x_t + discount y_{t+1}, where t runs over the trained tokens of one sequence; 0 elsewhere.

    Tokens that are not trained (the prompt, an environment's answer between two turns) are no steps:
    they add nothing and do not discount. Each sequence is summed on its own, so the result does not
    depend on what it is packed with.
    """
    step_M = trained_N.nonzero().flatten()
    result_N = torch.zeros(len(values_N), dtype=torch.float64, device=values_N.device)
    if not len(step_M):
        return result_N
    owner_M = sequence_N[step_M]
    num_steps_S = torch.bincount(owner_M)
    first_S = num_steps_S.cumsum(0) - num_steps_S
    time_M = torch.arange(len(step_M), device=owner_M.device) - first_S[owner_M]
    table_ST = torch.zeros(
        len(num_steps_S), int(num_steps_S.max()), dtype=torch.float64, device=owner_M.device
    )
    table_ST[owner_M, time_M] = values_N.double()[step_M]
    for time in range(table_ST.shape[1] - 2, -1, -1):
        table_ST[:, time] += discount * table_ST[:, time + 1]
    result_N[step_M] = table_ST[owner_M, time_M]
    return result_N


def last_trained(sequence_N: Int[Tensor, " N"], trained_N: Bool[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Marks the last trained token of each sequence that has one."""
    step_M = trained_N.nonzero().flatten()
    owner_M = sequence_N[step_M]
    is_last_M = torch.ones_like(owner_M, dtype=torch.bool)
    is_last_M[:-1] = owner_M[:-1] != owner_M[1:]
    marked_N = torch.zeros_like(trained_N)
    marked_N[step_M[is_last_M]] = True
    return marked_N

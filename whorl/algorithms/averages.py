"""How tokens are averaged: the weight of each token, computed once on the global batch.

The loss is sum_n(weight_n * -objective_n), so these weights are the only denominators there are. They are
fixed before the batch is cut into micro-batches or dealt to ranks, hence the gradient cannot depend on the
cut. Each returns weight_N in float64, 0 where not trained. A sequence or group without any trained token
counts nowhere, not even in the number of sequences. With S sequences that do have one, the weights sum to

    token_mean         1                                    every token counts the same
    group_token_mean   1                                    every problem counts the same
    sequence_mean      1                                    every rollout counts the same
    sequence_sum       tokens / S                           the log-probability of a rollout, averaged
    constant_length    tokens / (S * max_tokens)            the same, in units of the longest rollout
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whorl.algorithms.segments import sum_by


def token_mean(trained_N: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """1 / (trained tokens of the global batch): DAPO, CISPO and PPO as most code has them."""
    return trained_N.double() / trained_N.sum().clamp(min=1)


def group_token_mean(
    trained_N: Bool[Tensor, " N"], sequence_N: Int[Tensor, " N"], group_S: Int[Tensor, " S"]
) -> Float[Tensor, " N"]:
    """1 / (groups * trained tokens of the group).  DAPO arXiv:2503.14476 Eq. 8, CISPO arXiv:2506.13585 Eq. 4.

    The papers divide by the tokens of one problem's rollouts inside the expectation over problems, so a
    problem with long rollouts weighs no more than another, while within it each token weighs the same.
    """
    return _one_share_per(group_S[sequence_N], trained_N)


def sequence_mean(trained_N: Bool[Tensor, " N"], sequence_N: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """1 / (S * trained tokens of the sequence).  GRPO, arXiv:2402.03300 Eq. 3.

    A token of a long rollout weighs less: Dr. GRPO's point against it, since long wrong answers are then
    punished less per token.
    """
    return _one_share_per(sequence_N, trained_N)


def sequence_sum(trained_N: Bool[Tensor, " N"], sequence_N: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """1 / S: the mean over rollouts of log pi(rollout), as REINFORCE, RLOO and ReMax write it."""
    num_sequences = (sum_by(sequence_N, trained_N) > 0).sum().clamp(min=1)
    return trained_N.double() / num_sequences


def constant_length(
    trained_N: Bool[Tensor, " N"], sequence_N: Int[Tensor, " N"], *, max_tokens: int
) -> Float[Tensor, " N"]:
    """1 / (S * max_tokens), the longest reply the run allows.  Dr. GRPO, arXiv:2503.20783 Sec. 3.2."""
    return sequence_sum(trained_N, sequence_N) / max_tokens


def _one_share_per(part_N: Int[Tensor, " N"], trained_N: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Weights that give each part with a trained token the same share of 1, spread evenly over its tokens."""
    count_P = sum_by(part_N, trained_N)
    num_parts = (count_P > 0).sum()
    # Where the count is 0 nothing is trained, so the clamp only keeps 0/0 out.
    share_N = 1.0 / (num_parts * count_P).clamp(min=1.0)[part_N]
    return torch.where(trained_N, share_N, 0.0)

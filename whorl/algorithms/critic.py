"""Credit from a critic: generalised advantage estimation, its targets, and what the critic maximises.

A step is a trained token. `value_old_N` is the critic's estimate before the token is written, made once per
batch and without gradient; tokens between two turns of the policy are passed over, so the value after the
last token of one turn is the value before the first token of the next.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whorl.algorithms.credit import token_rewards
from whorl.algorithms.objectives import TokenMetrics
from whorl.algorithms.segments import last_trained, sum_to_go


def gae(
    reward_S: Float[Tensor, " S"],
    penalty_N: Float[Tensor, " N"],
    value_old_N: Float[Tensor, " N"],
    sequence_N: Int[Tensor, " N"],
    trained_N: Bool[Tensor, " N"],
    *,
    gamma: float,
    lam: float,
) -> Float[Tensor, " N"]:
    """A_t = sum_k (gamma lam)^k delta_{t+k},  delta_t = r_t + gamma V_{t+1} - V_t.

    GAE, arXiv:1506.02438 Eq. 16. The value after the last token is 0: every rollout ends there, also one
    that ran out of tokens.
    """
    value_N = torch.where(trained_N, value_old_N.double(), 0.0)
    step_M = trained_N.nonzero().flatten()
    after_M = value_N[step_M].roll(-1)
    after_M[last_trained(sequence_N, trained_N)[step_M]] = 0.0
    after_N = torch.zeros_like(value_N)
    after_N[step_M] = after_M
    delta_N = token_rewards(reward_S, penalty_N, sequence_N, trained_N) + gamma * after_N - value_N
    return sum_to_go(delta_N, sequence_N, trained_N, discount=gamma * lam)


def value_target(
    advantage_N: Float[Tensor, " N"], value_old_N: Float[Tensor, " N"], trained_N: Bool[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """return_t = A_t + V_t, the lambda-return that the critic learns; 0 where not trained."""
    return torch.where(trained_N, advantage_N.double() + value_old_N.double(), 0.0)


def minus_value_error(
    value_N: Float[Tensor, " N"], return_N: Float[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], TokenMetrics]:
    """-(V - return)^2 / 2.  PPO, arXiv:1707.06347 Eq. 9, where the half is in the coefficient c1."""
    error_N = (value_N - return_N).square()
    return -0.5 * error_N, {"value_error": error_N.detach(), "value_mean": value_N.detach()}


def minus_clipped_value_error(
    value_N: Float[Tensor, " N"],
    value_old_N: Float[Tensor, " N"],
    return_N: Float[Tensor, " N"],
    *,
    max_change: float,
) -> tuple[Float[Tensor, " N"], TokenMetrics]:
    """-max((V - return)^2, (clip(V, V_old - c, V_old + c) - return)^2) / 2, c = max_change.

    Not in the PPO paper but in its authors' code: a critic that has moved by more than c towards the
    target earns nothing for going on. c is in units of reward.
    """
    clipped_N = value_old_N + (value_N - value_old_N).clamp(-max_change, max_change)
    error_N, clipped_error_N = (value_N - return_N).square(), (clipped_N - return_N).square()
    metrics = {
        "value_error": error_N.detach(),
        "value_mean": value_N.detach(),
        "value_clipped_frac": (clipped_error_N > error_N).to(error_N.dtype),
    }
    return -0.5 * torch.maximum(error_N, clipped_error_N), metrics

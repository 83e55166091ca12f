"""What is added to the reward or to the objective: distance to a reference, entropy, length, mismatch.

Three places, kept apart because they are different methods:
    * in the reward: `kl_in_reward` gives a cost per token, `overlong` and `relative_length` change the
      reward of a rollout before credit is computed. Recorded log-probabilities, no gradient.
    * in the objective: `minus_kl_k2`, `minus_kl_k3`, `entropy_bonus`. They carry gradient, are maximised
      (hence the minus) and have the form of every objective: (objective_N, metrics).
    * on the weight: `truncated_importance`.

The KL estimators are those of Schulman's note "Approximating KL divergence" (2020), for KL(pi || ref) with
tokens drawn from pi and x = log(pi / ref).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whorl.algorithms.objectives import MAX_LOG_RATIO, TokenMetrics, log_ratio
from whorl.algorithms.segments import count_tokens


def k1(logp_N: Float[Tensor, " N"], logp_ref_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """x.  Unbiased, of either sign. As a loss it is useless: the mean of its gradient is 0."""
    return logp_N - logp_ref_N


def k2(logp_N: Float[Tensor, " N"], logp_ref_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """x^2 / 2.  Biased and never negative; on-policy its gradient is that of reverse KL(pi || ref)."""
    return 0.5 * (logp_N - logp_ref_N).square()


def k3(logp_N: Float[Tensor, " N"], logp_ref_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """e^-x - 1 + x.  Unbiased, never negative; on-policy its gradient is that of forward KL(ref || pi)."""
    x_N = (logp_N - logp_ref_N).clamp(min=-MAX_LOG_RATIO)  # e^-x overflows where the reference is far surer
    return torch.expm1(-x_N) + x_N


def kl_in_reward(
    logp_old_N: Float[Tensor, " N"],
    logp_ref_N: Float[Tensor, " N"],
    trained_N: Bool[Tensor, " N"],
    *,
    kl_coefficient: float,
) -> Float[Tensor, " N"]:
    """beta (log pi_old - log pi_ref), the cost of each token.  RLHF; REINFORCE++, arXiv:2501.03262.

    k1 under the policy that sampled: the KL is a part of the reward, so it is fixed once per batch.
    """
    return torch.where(trained_N, kl_coefficient * k1(logp_old_N, logp_ref_N).double(), 0.0)


def minus_kl_k2(
    logp_N: Float[Tensor, " N"], logp_ref_N: Float[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], TokenMetrics]:
    """-(log(pi / ref))^2 / 2.  REINFORCE++-baseline, arXiv:2501.03262."""
    return -k2(logp_N, logp_ref_N), {"kl_ref_nats": k3(logp_N, logp_ref_N).detach()}


def minus_kl_k3(
    logp_N: Float[Tensor, " N"], logp_ref_N: Float[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], TokenMetrics]:
    """-(ref / pi - log(ref / pi) - 1).  GRPO, arXiv:2402.03300 Eq. 4."""
    kl_N = k3(logp_N, logp_ref_N)
    return -kl_N, {"kl_ref_nats": kl_N.detach()}


def entropy_bonus(entropy_N: Float[Tensor, " N"]) -> tuple[Float[Tensor, " N"], TokenMetrics]:
    """H(pi) at the token, in nats.  PPO, arXiv:1707.06347 Eq. 9: the term with the coefficient c2."""
    return entropy_N, {"entropy_nats": entropy_N.detach()}


def overlong(
    reward_S: Float[Tensor, " S"],
    sequence_N: Int[Tensor, " N"],
    policy_N: Bool[Tensor, " N"],
    *,
    max_tokens: int,
    buffer_tokens: int,
) -> Float[Tensor, " S"]:
    """R + soft punishment of long replies.  DAPO, arXiv:2503.14476 Eq. 13.

    0 up to max_tokens - buffer_tokens, then falling linearly to -1 at max_tokens, and -1 beyond. The
    length is the number of tokens the policy wrote.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(
            f"overlong needs 0 < buffer_tokens <= max_tokens; got buffer_tokens={buffer_tokens} and "
            f"max_tokens={max_tokens}"
        )
    length_S = count_tokens(sequence_N, policy_N, len(reward_S))
    return reward_S + ((max_tokens - buffer_tokens - length_S) / buffer_tokens).clamp(-1.0, 0.0)


def relative_length(
    reward_S: Float[Tensor, " S"],
    group_S: Int[Tensor, " S"],
    sequence_N: Int[Tensor, " N"],
    policy_N: Bool[Tensor, " N"],
    *,
    length_coefficient: float,
) -> Float[Tensor, " S"]:
    """R + c lambda for right answers, R + c min(0, lambda) for wrong ones.

    Kimi k1.5, arXiv:2501.12599 Sec. 2.3.3.
    lambda = 1/2 - (length - shortest) / (longest - shortest) within the group, and 0 where all are equally
    long. An answer is right if its reward is above 0. Credit for being short is never given to a wrong one.
    """
    length_S = count_tokens(sequence_N, policy_N, len(reward_S))
    ends = length_S.new_zeros(int(group_S.max()) + 1)
    shortest_S = ends.scatter_reduce(0, group_S, length_S, "amin", include_self=False)[group_S]
    longest_S = ends.scatter_reduce(0, group_S, length_S, "amax", include_self=False)[group_S]
    spread_S = longest_S - shortest_S
    lambda_S = torch.where(spread_S > 0, 0.5 - (length_S - shortest_S) / spread_S.clamp(min=1.0), 0.0)
    bonus_S = torch.where(reward_S > 0, lambda_S, lambda_S.clamp(max=0.0))
    return reward_S + length_coefficient * bonus_S


def truncated_importance(
    logp_old_N: Float[Tensor, " N"], logp_sampler_N: Float[Tensor, " N"], *, max_weight: float
) -> Float[Tensor, " N"]:
    """min(pi_old / pi_sampler, max_weight), a factor on the weight of the token.

    For a sampler whose probabilities are not the learner's (other kernels or precision, older weights):
    the tokens came from pi_sampler, the ratios are against pi_old, this puts the difference in between.
    Truncated importance sampling: Ionides 2008; for samplers of language models Yao et al. 2025.
    """
    return log_ratio(logp_old_N, logp_sampler_N).exp().clamp(max=max_weight)

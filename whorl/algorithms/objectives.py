"""What is maximised per token: each function is one equation of a paper.

All return (objective_N, metrics). The objective is maximised; the learner negates it, once. It is never
divided by a count: that is what averages are for. Columns with gradient are `logp_N` (and `entropy_N`,
`value_N` elsewhere); all others are recorded. Ratios are r = pi / pi_old = exp(logp - logp_old).

Metrics are detached `[N]` tensors, and the metric is their mean over the trained tokens of the global
batch, under the name that the glossary defines. So a sum over micro-batches and ranks, divided once by the
number of trained tokens, is right however the batch was cut; a share (`_frac`) is a share of all of them.

With all data from the current policy (r = 1) every objective here has the gradient of `reinforce`.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whorl.algorithms.segments import sum_by

TokenMetrics = dict[str, Tensor]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 nats (a ratio of 5e8, beyond every bound in use). A token that carries
weight 0, such as a surprising line of an environment, can then not turn into 0 * inf = NaN."""


def log_ratio(logp_N: Float[Tensor, " N"], logp_other_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """log(pi / other) in nats, within +-`MAX_LOG_RATIO`."""
    return (logp_N - logp_other_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def reinforce(
    logp_N: Float[Tensor, " N"], advantage_N: Float[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], TokenMetrics]:
    """A log pi.  REINFORCE, Williams 1992; also RLOO, OPO and ReMax."""
    return advantage_N * logp_N, {}


def ppo_clip(
    logp_N: Float[Tensor, " N"],
    logp_old_N: Float[Tensor, " N"],
    advantage_N: Float[Tensor, " N"],
    *,
    ratio_min: float,
    ratio_max: float,
) -> tuple[Float[Tensor, " N"], TokenMetrics]:
    """min(r A, clip(r, ratio_min, ratio_max) A).  PPO, arXiv:1707.06347 Eq. 7; GRPO; DAPO (uneven bounds).

    A token whose ratio has left the bounds in the direction its advantage asks for has gradient 0. In the
    other direction nothing is bounded: A < 0 with a large r has gradient r A.
    """
    ratio_N = log_ratio(logp_N, logp_old_N).exp()
    clipped_N = ratio_N.clamp(ratio_min, ratio_max)
    objective_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    return objective_N, clip_metrics(ratio_N, advantage_N, ratio_min, ratio_max)


def cispo(
    logp_N: Float[Tensor, " N"],
    logp_old_N: Float[Tensor, " N"],
    advantage_N: Float[Tensor, " N"],
    *,
    ratio_max: float,
    ratio_min: float = 0.0,
) -> tuple[Float[Tensor, " N"], TokenMetrics]:
    """sg(clip(r, ratio_min, ratio_max)) A log pi.  MiniMax-M1, arXiv:2506.13585 Eq. 4-5.

    The clip bounds the weight of a token and never removes its gradient, so a rare "wait" or "however",
    whose ratio grows fast, keeps learning where PPO drops it. The paper has no lower bound; a positive one
    would keep pulling at tokens that the policy has already left.
    """
    ratio_N = log_ratio(logp_N, logp_old_N).exp().detach()
    objective_N = ratio_N.clamp(ratio_min, ratio_max) * advantage_N * logp_N
    return objective_N, clip_metrics(ratio_N, advantage_N, ratio_min, ratio_max, keeps_gradient=True)


def gspo(
    logp_N: Float[Tensor, " N"],
    logp_old_N: Float[Tensor, " N"],
    advantage_N: Float[Tensor, " N"],
    sequence_N: Int[Tensor, " N"],
    trained_N: Bool[Tensor, " N"],
    *,
    ratio_min: float,
    ratio_max: float,
) -> tuple[Float[Tensor, " N"], TokenMetrics]:
    """min(s A, clip(s) A), s = (pi(y) / pi_old(y))^(1/|y|).  GSPO, arXiv:2507.18071 Eq. 5-7.

    Written per token as in the paper's GSPO-token: s_t = sg(s) pi_t / sg(pi_t) has the value of s, and
    summed with the weights of `sequence_mean` the gradient of s. One sequence is clipped as a whole; a
    sequence must not be cut across micro-batches.
    """
    mean_N = _sequence_mean(log_ratio(logp_N, logp_old_N).detach(), sequence_N, trained_N)
    ratio_N = mean_N.exp() * (logp_N - logp_N.detach()).exp()
    clipped_N = ratio_N.clamp(ratio_min, ratio_max)
    objective_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    return objective_N, clip_metrics(ratio_N, advantage_N, ratio_min, ratio_max)


def gmpo(
    logp_N: Float[Tensor, " N"],
    logp_old_N: Float[Tensor, " N"],
    advantage_N: Float[Tensor, " N"],
    sequence_N: Int[Tensor, " N"],
    trained_N: Bool[Tensor, " N"],
    *,
    ratio_min: float,
    ratio_max: float,
) -> tuple[Float[Tensor, " N"], TokenMetrics]:
    """A (prod_t c_t)^(1/|y|), c_t = r_t clipped PPO's way.  GMPO, arXiv:2507.20673 Sec. 3.

    c_t = min(r_t, ratio_max) for A > 0 and max(r_t, ratio_min) for A < 0. The geometric mean of clipped
    ratios is moved by an outlier less than the arithmetic mean of GRPO. In token form as in `gspo`: value
    and gradient are the paper's when summed with the weights of `sequence_mean`.
    """
    log_ratio_N = log_ratio(logp_N, logp_old_N)
    log_min = math.log(max(ratio_min, math.exp(-MAX_LOG_RATIO)))  # ratio_min may be 0
    bounded_N = log_ratio_N.clamp(log_min, math.log(ratio_max))
    sign_N = advantage_N.sign()
    log_clipped_N = sign_N * torch.minimum(sign_N * log_ratio_N, sign_N * bounded_N)
    mean_N = _sequence_mean(log_clipped_N.detach(), sequence_N, trained_N)
    objective_N = advantage_N * mean_N.exp() * (log_clipped_N - log_clipped_N.detach()).exp()
    return objective_N, clip_metrics(log_ratio_N.exp(), advantage_N, ratio_min, ratio_max)


def sapo(
    logp_N: Float[Tensor, " N"],
    logp_old_N: Float[Tensor, " N"],
    advantage_N: Float[Tensor, " N"],
    *,
    tau_positive: float,
    tau_negative: float,
) -> tuple[Float[Tensor, " N"], TokenMetrics]:
    """(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A.  SAPO, arXiv:2511.20347.

    A smooth gate in place of the clip: the gradient is 4 p (1 - p) r A with p = sigmoid(tau (r - 1)), so a
    token fades out as its ratio leaves 1 and is never cut off. No token has gradient 0.
    """
    ratio_N = log_ratio(logp_N, logp_old_N).exp()
    tau_N = torch.full_like(ratio_N, tau_negative).masked_fill(advantage_N > 0, tau_positive)
    gate_N = torch.sigmoid(tau_N * (ratio_N - 1.0))
    slope_N = 4.0 * gate_N * (1.0 - gate_N)
    return 4.0 / tau_N * gate_N * advantage_N, {**drift_metrics(ratio_N), "gate_mean": slope_N.detach()}


def clip_metrics(
    ratio_N: Float[Tensor, " N"],
    advantage_N: Float[Tensor, " N"],
    ratio_min: float,
    ratio_max: float,
    *,
    keeps_gradient: bool = False,
) -> TokenMetrics:
    """How far the policy has moved from pi_old, and what became of the tokens outside the bounds.

    There are four ways to be outside: above or below, with either sign of the advantage. An objective of
    PPO's kind drops two of them (A > 0 above, A < 0 below); one that `keeps_gradient` drops none.
    """
    ratio_N, advantage_N = ratio_N.detach(), advantage_N.detach()
    above_N, below_N = ratio_N > ratio_max, ratio_N < ratio_min
    good_N, bad_N = advantage_N > 0, advantage_N < 0
    flags = {
        "clipped_high_frac": above_N,
        "clipped_low_frac": below_N,
        "above_max_positive_frac": above_N & good_N,
        "above_max_negative_frac": above_N & bad_N,
        "below_min_positive_frac": below_N & good_N,
        "below_min_negative_frac": below_N & bad_N,
        "dropped_frac": ((above_N & good_N) | (below_N & bad_N)) & (not keeps_gradient),
    }
    return {**drift_metrics(ratio_N), **{name: flag_N.to(ratio_N.dtype) for name, flag_N in flags.items()}}


def drift_metrics(ratio_N: Float[Tensor, " N"]) -> TokenMetrics:
    """Mean ratio, its upper tail, and r - 1 - log r: the k3 estimate of KL(pi_old || pi) from tokens of pi_old."""
    ratio_N = ratio_N.detach()
    return {
        "ratio_mean": ratio_N,
        "ratio_above_2_frac": (ratio_N > 2.0).to(ratio_N.dtype),
        "kl_old_nats": ratio_N - 1.0 - ratio_N.log(),
    }


def _sequence_mean(
    values_N: Float[Tensor, " N"], sequence_N: Int[Tensor, " N"], trained_N: Bool[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """The mean over the trained tokens of each token's sequence, in the dtype of the values."""
    total_S = sum_by(sequence_N, torch.where(trained_N, values_N, 0.0))
    count_S = sum_by(sequence_N, trained_N).clamp(min=1.0)
    return (total_S / count_S)[sequence_N].to(values_N.dtype)

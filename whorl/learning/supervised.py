"""Supervised fine-tuning: one more term for the learner, which takes demonstrations as it takes rollouts."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whorl.algorithms.algorithm import Term
from whorl.algorithms.averages import token_mean
from whorl.algorithms.objectives import TokenMetrics
from whorl.data import Batch, apply, cu_seqlens_of

Example = tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]
"""Token ids of one demonstration, and for each whether it is a target (the prompt's tokens are not)."""


def log_likelihood(logp_N: Float[Tensor, " N"]) -> tuple[Float[Tensor, " N"], TokenMetrics]:
    """log pi of the demonstrated token: maximum likelihood, or imitation as an extra term."""
    return logp_N, {"supervised_loss": -logp_N.detach()}


SUPERVISED = (Term(log_likelihood, token_mean),)
"""The terms to pass to `Learner.forward_backward`: the mean over target tokens of -log pi.

The learner divides logits by its temperature here too, so the policy that is fitted is the one that will be
sampled.
"""


def supervised_batch(examples: Sequence[Example]) -> Batch:
    """Demonstrations packed for `SUPERVISED`, with the weights of the whole batch fixed."""
    if not examples:
        raise ValueError("supervised_batch needs at least one example")
    for number, (tokens, trained) in enumerate(examples):
        if len(tokens) != len(trained):
            raise ValueError(f"example {number} has {len(tokens)} tokens and a mask of {len(trained)}")
        if not len(tokens) or trained[0]:
            raise ValueError(
                f"example {number} must begin with a token that is no target: nothing stands before it to "
                "predict it from"
            )
    trained_N = torch.as_tensor(np.concatenate([np.asarray(mask, dtype=bool) for _, mask in examples]))
    if not trained_N.any():
        raise ValueError("no example has a target token")
    batch = Batch(
        cu_seqlens_of([len(tokens) for tokens, _ in examples]),
        {
            "tokens_N": torch.as_tensor(
                np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens, _ in examples])
            ),
            "policy_N": trained_N,
            "trained_N": trained_N,
        },
    )
    return batch.with_columns(
        **{term.weight_column: apply(term.average, batch).to(torch.float32) for term in SUPERVISED}
    )

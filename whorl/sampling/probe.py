"""Weights that did not arrive are seen: both sides read one fixed sequence and say its log-probabilities.

The comparison over a step's own tokens (`sampler_gap`) sees stale weights too, but cannot tell them from
another numeric path, and only when the rollouts are there. Here both sides do the same computation, one
forward pass over the same few tokens: with the same weights in fp32 the difference is a few roundings.
"""

from typing import NamedTuple

import numpy as np
import torch

from whorl.data import Batch, cu_seqlens_of
from whorl.model.config import ModelConfig

NUM_PROBE_TOKENS = 16


class Probe(NamedTuple):
    """What one side says: the version of its weights, and log-probs of the probe's tokens but the first, in nats."""

    version: int
    logp: np.ndarray


def probe_batch(config: ModelConfig) -> Batch:
    """The sequence: random tokens, the same for every model with this vocabulary, as a learner reads them."""
    count = min(NUM_PROBE_TOKENS, config.max_context)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, count)
    policy_N = torch.arange(count) > 0
    return Batch(cu_seqlens_of([count]), {"tokens_N": torch.from_numpy(tokens), "policy_N": policy_N})


def probe_gap(told: Probe, expected: Probe, *, limit_nats: float, teller: str) -> float:
    """Largest difference in nats. ValueError if it is not within the limit, or the versions differ.

    Weights that are not finite on both sides did arrive; that they are a fault is for others to say.
    """
    same = np.array_equal(told.logp, expected.logp, equal_nan=True)
    gap = 0.0 if same else float(np.abs(told.logp - expected.logp).max(initial=0.0))
    if told.version != expected.version or not gap <= limit_nats:  # NaN is not within any limit
        raise ValueError(
            f"the weights of {teller} are not the learner's: it says that it holds version {told.version}, the "
            f"learner is at version {expected.version}, and on a fixed sequence their log-probs differ by {gap:.2g} "
            f"nats; the limit is {limit_nats:g} (probe_gap_limit_nats). Either new weights were not delivered, or "
            "the two compute in different precisions, which needs a higher limit"
        )
    return gap

"""The head of the learner: log-probabilities and entropies of tokens, read off hidden states in bounded memory."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from whorl.model.transformer import Transformer

HEAD_ELEMENTS = 2**26
"""Most logits alive at once (256 MiB in fp32). More tokens are scored in pieces, whose logits are computed
again in the backward pass: with a vocabulary of 100,000 they would outgrow all activations together."""


def logp_of(
    model: Transformer, hidden_MD: Tensor, target_M: Int[Tensor, " M"], temperature: float
) -> Float[Tensor, " M"]:
    """log pi of each target after the hidden state before it, in nats at `temperature`."""
    scores = [
        _target(_logp_of_all(model, hidden, temperature), target)
        for hidden, target in pieces(model, hidden_MD, target_M)
    ]
    return torch.cat(scores)


def logp_and_entropy(
    model: Transformer,
    hidden_MD: Tensor,
    target_M: Int[Tensor, " M"],
    temperature: float,
    *,
    entropy_gradient: bool,
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """`logp_of`, and the entropy over the whole vocabulary in nats, through which gradients flow if asked for."""

    def score(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logp_MV = _logp_of_all(model, hidden, temperature)
        inner = logp_MV if entropy_gradient else logp_MV.detach()
        return _target(logp_MV, target), -(inner.exp() * inner).sum(dim=-1)

    parts = pieces(model, hidden_MD, target_M)
    if len(parts) == 1:
        return score(*parts[0])
    scores = [checkpoint(score, *part, use_reentrant=False) for part in parts]
    return torch.cat([logp for logp, _ in scores]), torch.cat([entropy for _, entropy in scores])


def pieces(model: Transformer, hidden_MD: Tensor, target_M: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Hidden states and targets in pieces of at most `HEAD_ELEMENTS` logits (at least one token)."""
    rows = max(HEAD_ELEMENTS // model.config.vocab_size, 1)
    return list(zip(hidden_MD.split(rows), target_M.split(rows), strict=True))


def _logp_of_all(model: Transformer, hidden_MD: Tensor, temperature: float) -> Tensor:
    logits = model.logits(hidden_MD)
    if temperature != 1.0:
        logits = logits / temperature
    return logits.log_softmax(dim=-1)


def _target(logp_MV: Tensor, target_M: Tensor) -> Tensor:
    return logp_MV.gather(1, target_M[:, None])[:, 0]

"""Log-probabilities, states and expert choices along given tokens: decoded one by one, or in one pass."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from whorl.data import cu_seqlens_of
from whorl.model.layout import Layout
from whorl.model.state import State
from whorl.model.transformer import Transformer


@torch.no_grad()
def forced_logp(model: Transformer, tokens: Sequence[int], temperature: float) -> Tensor:
    """log pi of tokens 1, 2, ... given those before, `[T - 1]`, by one forward pass over the whole sequence."""
    tokens_T = torch.as_tensor(np.asarray(tokens, dtype=np.int64), device=model.embed_tokens.weight.device)
    layout = Layout(cu_seqlens_of([len(tokens)]).to(tokens_T.device))
    logits = model.logits(model(tokens_T, layout).hidden_ND[:-1])
    return (logits / temperature).log_softmax(dim=-1).gather(1, tokens_T[1:, None])[:, 0].cpu()


def experts_differ(sampler: Transformer, learner: Transformer, tokens_ST: Tensor, real_ST: Tensor) -> float:
    """Share of the tokens in `real_ST` for which some layer chooses other experts when tokens are decoded.

    `sampler` decodes them one by one, `learner` sees the whole sequences; rows are padded at their end.
    """
    _, decoded_LSTk = decode_along(sampler, tokens_ST)
    _, forward_LSTk = forward_along(learner, tokens_ST)
    if decoded_LSTk is None or forward_LSTk is None:
        raise ValueError("experts_differ compares models with experts; these feed-forward layers are dense")
    return float(differing(decoded_LSTk, forward_LSTk)[real_ST].double().mean())


def differing(one_LSTk: Tensor, other_LSTk: Tensor) -> Tensor:
    """Which tokens `[S, T]` went to other experts in some layer.

    The order of a token's experts says which got more weight; the set is what was computed.
    """
    return (one_LSTk.sort(dim=-1)[0] != other_LSTk.sort(dim=-1)[0]).any(dim=-1).any(dim=0)


@torch.no_grad()
def decode_along(
    model: Transformer, tokens_ST: Tensor, after_step: Callable[[State], None] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Hidden states `[S, T, D]` and chosen experts `[L, S, T, k]` (None: dense) of decoding given tokens.

    Every row begins with an empty state. `after_step` may change the state after each token.
    """
    weight = model.embed_tokens.weight
    state = State(model.config, len(tokens_ST), device=weight.device, dtype=weight.dtype)
    steps = []
    for tokens_S in tokens_ST.to(weight.device).T:
        steps.append(model.decode(tokens_S, state))
        if after_step is not None:
            after_step(state)
    hidden_STD = torch.stack([step.hidden_ND for step in steps], dim=1)
    chosen = [torch.stack([layer.chosen for layer in step.routing]) for step in steps if step.routing]
    return hidden_STD.cpu(), torch.stack(chosen, dim=2).cpu() if chosen else None


@torch.no_grad()
def forward_along(model: Transformer, tokens_ST: Tensor) -> tuple[Tensor, Tensor | None]:
    """As `decode_along`, by one forward pass over all rows."""
    S, T = tokens_ST.shape
    layout = Layout(torch.arange(0, S * T + 1, T, device=model.embed_tokens.weight.device))
    hidden = model(tokens_ST.flatten().to(layout.cu_seqlens.device), layout)
    chosen = [layer.chosen.view(S, T, -1) for layer in hidden.routing]
    return hidden.hidden_ND.view(S, T, -1).cpu(), torch.stack(chosen).cpu() if chosen else None

"""What bf16 costs: decoding with model, lightning state and head each in fp32 or bf16, against fp32 throughout.

The library always keeps the state and the head in fp32. Here each is put into bf16 on purpose, by rounding
from outside, to show what that choice is worth, token after token along a sequence.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from whorl.checks.along import decode_along, differing, forward_along
from whorl.checks.sampler import small_models
from whorl.checks.table import Row
from whorl.data import Metrics
from whorl.learning.seen import sampler_gap
from whorl.model.state import State
from whorl.model.transformer import Transformer
from whorl.sampling.draw import Sampling, stream_key
from whorl.sampling.engine import Engine
from whorl.sampling.request import Request

NUM_SEQUENCES, NUM_TOKENS = 8, 512

BF16_MEAN_LIMIT_NATS, BF16_CORRELATION_LIMIT = 0.03, 0.995
"""What sampling in bf16 with state and head in fp32, the library's way, may cost on average. There is no useful
limit on the largest gap: where two experts are nearly as probable, bf16 picks the other one."""


class Cost(NamedTuple):
    """The gap to fp32 of one choice of precisions; `first` and `last` are mean gaps in nats of the tokens of the
    first and the last quarter of the sequences, and show whether the gap grows. `rerouted_frac` is the share of tokens
    that went to other experts (None: a dense model); the head has no part in it."""

    model: torch.dtype
    state: torch.dtype
    head: torch.dtype
    gap: Metrics
    first: float
    last: float
    rerouted_frac: float | None = None


@torch.no_grad()
def precision_costs(model: Transformer | None = None, *, num_tokens: int = NUM_TOKENS) -> list[Cost]:
    """Every combination of fp32 and bf16 for model, state and head, on sequences that the fp32 model wrote.

    `model` is in fp32 (default: the small hybrid with experts). The truth is its own forward pass.
    """
    truth = small_models()["hybrid, experts"] if model is None else model
    if truth.embed_tokens.weight.dtype != torch.float32:
        raise ValueError(
            f"the truth is computed by a float32 model; this one is in {truth.embed_tokens.weight.dtype}"
        )
    tokens_ST = _written_by(truth, num_tokens)
    hidden_STD, true_LSTk = forward_along(truth, tokens_ST)
    true_ST = _logp(truth.logits(hidden_STD), tokens_ST)
    costs = []
    for dtype, state in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        network = truth if dtype == torch.float32 else copy.deepcopy(truth).to(dtype)
        hidden_STD, chosen_LSTk = decode_along(
            network, tokens_ST, round_state if state == torch.bfloat16 else None
        )
        heads: dict[torch.dtype, Callable] = {
            torch.float32: network.logits,
            torch.bfloat16: bf16_head(network),
        }
        for head, logits in heads.items():
            cost = _cost((dtype, state, head), true_ST, _logp(logits(hidden_STD), tokens_ST))
            if true_LSTk is not None and chosen_LSTk is not None:
                cost = cost._replace(rerouted_frac=float(differing(true_LSTk, chosen_LSTk).double().mean()))
            costs.append(cost)
    return costs


def table_of_costs(costs: Sequence[Cost]) -> Table:
    """For the terminal: a row for each choice of precisions, gaps in nats."""
    columns = ("model", "state", "head", "mean", "p99", "max", "1st 1/4", "last 1/4", "correl.", "rerouted")
    title = "gap to fp32 along a decoded sequence, in nats (mean over all, the first and the last quarter)"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    for cost in costs:
        gap = cost.gap
        gaps = (
            gap["sampler_gap_mean_nats"], gap["sampler_gap_p99_nats"], gap["sampler_gap_max_nats"],
            cost.first, cost.last,
        )  # fmt: skip
        names = ("bf16" if dtype == torch.bfloat16 else "fp32" for dtype in cost[:3])
        rerouted = "-" if cost.rerouted_frac is None else f"{cost.rerouted_frac:.2%}"
        table.add_row(*names, *(f"{x:.1e}" for x in gaps), f"{gap['sampler_prob_correlation']:.6f}", rerouted)
    return table


def row_of_costs(costs: Sequence[Cost]) -> Row:
    """The verdict on the one combination that the library samples with when the model is in bf16."""
    wanted = (torch.bfloat16, torch.float32, torch.float32)
    gap = next(cost.gap for cost in costs if cost[:3] == wanted)
    mean, correlation = gap["sampler_gap_mean_nats"], gap["sampler_prob_correlation"]
    return Row(
        "a bf16 model with fp32 state and head stays near fp32",
        f"mean {mean:.1e}, p99 {gap['sampler_gap_p99_nats']:.1e}, max {gap['sampler_gap_max_nats']:.1e} nats, "
        f"correlation {correlation:.4f}",
        f"mean {BF16_MEAN_LIMIT_NATS:g} nats, correlation {BF16_CORRELATION_LIMIT:g}",
        mean <= BF16_MEAN_LIMIT_NATS and correlation >= BF16_CORRELATION_LIMIT,
    )


def round_state(state: State) -> None:
    """What a cache that stores lightning states in bf16 does: round them after every token.

    Decay and update stay in fp32, so what is seen is the cost of storing alone.
    """
    for kv in state.lightning:
        kv.copy_(kv.to(torch.bfloat16))


def bf16_head(model: Transformer) -> Callable[[Tensor], Tensor]:
    """`model.logits` as a head in bf16 computes it: its input, its weights and the logits are rounded."""
    weight = model.lm_head.weight.to(torch.bfloat16)
    return lambda hidden: F.linear(hidden.to(torch.bfloat16), weight).to(torch.float32)


def _written_by(model: Transformer, num_tokens: int) -> Tensor:
    engine = Engine(model, max_running=NUM_SEQUENCES)
    sampling = Sampling(max_tokens=num_tokens - 1)
    done = engine.generate(
        [Request([i], stream_key("check precision", i), sampling) for i in range(NUM_SEQUENCES)]
    )
    return torch.stack([torch.tensor([i, *completion.tokens.tolist()]) for i, completion in enumerate(done)])


def _logp(logits_STV: Tensor, tokens_ST: Tensor) -> Tensor:
    """Of tokens 1, 2, ...: `[S, T - 1]`."""
    logp_STV = logits_STV[:, :-1].log_softmax(dim=-1)
    return logp_STV.gather(2, tokens_ST[:, 1:, None])[..., 0]


def _cost(precision: tuple[torch.dtype, torch.dtype, torch.dtype], true_ST: Tensor, logp_ST: Tensor) -> Cost:
    gap_ST = (true_ST - logp_ST).abs()
    quarter = gap_ST.shape[1] // 4
    gap = sampler_gap(
        true_ST.flatten(), logp_ST.flatten(), torch.ones_like(gap_ST, dtype=torch.bool).flatten()
    )
    return Cost(*precision, gap, float(gap_ST[:, :quarter].mean()), float(gap_ST[:, -quarter:].mean()))

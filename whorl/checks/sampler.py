"""Promise 1: the log-probability that the sampler reports for a token is the learner's.

The sampler reads prompts in packed chunks, forks states and decodes one token at a time; the learner sees a
whole sequence at once. Here the engine writes in every way it knows, and each token it wrote is compared with
one plain forward pass over its sequence.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from whorl.checks.along import experts_differ, forced_logp
from whorl.checks.table import Row
from whorl.data import Metrics
from whorl.kernels.lightning import BLOCK
from whorl.learning.seen import sampler_gap
from whorl.model.config import ModelConfig
from whorl.model.transformer import Transformer
from whorl.sampling.draw import Sampling, stream_key
from whorl.sampling.engine import Completion, Engine, Request

LIMIT_NATS = 1e-5
"""fp32 on a CPU: a few roundings of log-probabilities of size 1 to 10, whose last bit is worth 1e-7 to 1e-6."""

EXPERTS_LIMIT = 1e-3
"""Share of tokens that may be sent to other experts. Two that are equally probable to the last bit may change
places when a sum is taken in another order; more than that is another network."""

TEMPERATURES = (1.0, 0.7, 0.0)
"""Sampled, sampled at another temperature, greedy: requests take them in turn."""

WRITTEN_TOKENS = 12
"""Longest turn in the cases below, but for one of `LONG_TURN_TOKENS`."""

LONG_TURN_TOKENS = 4 * BLOCK

NEEDED_CONTEXT = 6 * BLOCK
"""Longest sequence of the cases below, prompt and turn, rounded up to whole blocks."""


class Told(NamedTuple):
    """A turn as the sampler tells it: the tokens before, the tokens written, their log-probs in nats."""

    before: list[int]
    written: list[int]
    logp: np.ndarray
    temperature: float


def check_sampler(model: Transformer | None = None, *, limit_nats: float = LIMIT_NATS) -> list[Row]:
    """Compare the engine with the forward pass in all the ways of `CASES`, on `model` or on six small ones.

    The six are hybrid, pure softmax and pure lightning, dense and with experts; each row then shows the worst.
    A model of one's own needs a context of `NEEDED_CONTEXT` tokens (ValueError if shorter).
    """
    models = small_models() if model is None else {"this model": model}
    for network in models.values():
        if network.config.max_context < NEEDED_CONTEXT:
            raise ValueError(
                f"the longest sequences of this check have {NEEDED_CONTEXT} tokens; the model's context is "
                f"{network.config.max_context}. Raise max_context, or check a run on its own prompts"
            )
    rows = []
    for case in CASES:
        gaps = {name: case_gap(case, network) for name, network in models.items()}
        rows.append(gap_row(f"sampler = learner: {case}", gaps, limit_nats))
    shares = {name: _expert_share(network) for name, network in models.items() if network.config.num_experts}
    return rows + ([routing_row(shares)] if shares else [])


def small_models(seed: int = 0) -> dict[str, Transformer]:
    """Every kind of model by name; weights large enough (std 0.2) for sharp choices."""
    kinds = {"hybrid": 2, "softmax": 1, "lightning": 0}
    return {
        f"{kind}, {'experts' if experts else 'dense'}": Transformer(
            ModelConfig(
                vocab_size=48, width=32, num_layers=3, num_heads=4, head_dim=8, ffn_width=16, num_kv_heads=2,
                softmax_period=period, num_experts=experts, rotary_dim=4, rope_theta=10_000.0,
                max_context=1024, init_std=0.2,
            )
        ).initialise(seed)
        for kind, period in kinds.items()
        for experts in (0, 4)
    }  # fmt: skip


def case_gap(case: str, sampler: Transformer, learner: Transformer | None = None) -> Metrics:
    """`sampler_gap` over all tokens written in one of `CASES`; the learner is the same model unless given."""
    return gap_of(list(CASES[case](sampler)), learner or sampler)


# The cases: how a sampler comes to write. Each yields the turns that were told.


def _batch(num_requests: int) -> Callable[[Transformer], Iterator[Told]]:
    def told(model: Transformer) -> Iterator[Told]:
        # One token, less than a block, about a block, and more: in one packed prefill, then decoded together.
        lengths = np.random.default_rng(num_requests).integers(1, 40, size=num_requests)
        lengths[::5] += BLOCK - 20
        prompts = [_random_tokens(model, int(n), (num_requests, i)) for i, n in enumerate(lengths)]
        engine = Engine(model, max_running=num_requests, prefill_chunk_tokens=200)
        yield from _play(engine, [_request(prompt, i) for i, prompt in enumerate(prompts)])

    return told


def _long_prompts(lengths: Sequence[int], chunk: int) -> Callable[[Transformer], Iterator[Told]]:
    def told(model: Transformer) -> Iterator[Told]:
        prompts = [_random_tokens(model, n, ("long", n)) for n in lengths]
        engine = Engine(model, max_running=4, prefill_chunk_tokens=chunk)
        yield from _play(engine, [_request(prompt, i) for i, prompt in enumerate(prompts)])

    return told


def _long_turns(model: Transformer) -> Iterator[Told]:
    """Rounding errors of a state that is carried from token to token add up, if they have a direction."""
    engine = Engine(model, max_running=6)
    sampling = [Sampling(t, max_tokens=LONG_TURN_TOKENS) for t in TEMPERATURES]
    requests = [
        Request(_random_tokens(model, 10, ("long turn", i)), stream_key("check sampler", i), sampling[i % 3])
        for i in range(6)
    ]
    yield from _play(engine, requests)


def _shared_prefix(model: Transformer) -> Iterator[Told]:
    """A group of 9 after one prompt, computed once; every member starts from a copy of its state."""
    prompt = _random_tokens(model, BLOCK + 7, "shared")
    yield from _play(Engine(model), [_request(prompt, i) for i in range(9)])


def _several_turns(model: Transformer) -> Iterator[Told]:
    """Six conversations of three turns with 1 to 9 foreign tokens in between, read after the kept state."""
    engine = Engine(model, max_running=4)
    requests = [_request(_random_tokens(model, 20 + i, ("turns", i)), i) for i in range(6)]
    so_far = [list(request.tokens) for request in requests]
    for turn in range(3):
        done = engine.generate(requests)
        for i, completion in enumerate(done):
            yield _told(so_far[i], requests[i], completion)
            new = _random_tokens(model, 1 + 4 * turn, ("line", turn, i))
            so_far[i] = so_far[i] + completion.tokens.tolist() + new
            requests[i] = _after(completion, new, i)


def _rewind(model: Transformer) -> Iterator[Told]:
    """A state is kept, the conversation goes on, and then twice begins again from the kept state."""
    engine = Engine(model, max_running=4)
    prompt = _random_tokens(model, 50, "rewind")
    first_request = _request(prompt, 0)
    first = engine.generate([first_request])[0]
    so_far = prompt + first.tokens.tolist()
    for branch in range(3):
        new = _random_tokens(model, 5, ("branch", branch))
        request = _after(first, new, branch)
        second = engine.generate([request])[0]
        yield _told(so_far + new, request, second)
        third_request = _after(second, new, branch)
        third = engine.generate([third_request])[0]
        yield _told(so_far + new + second.tokens.tolist() + new, third_request, third)


def _cut_and_resumed(model: Transformer) -> Iterator[Told]:
    """A turn is stopped at its limit and goes on later, alone, from the kept state."""
    engine = Engine(model, max_running=8)
    requests = [_request(_random_tokens(model, 9 * i + 1, ("cut", i)), i) for i in range(8)]
    for request, half in zip(requests, engine.generate(requests), strict=True):
        whole = list(request.tokens) + half.tokens.tolist()
        rest_request = _after(half, [], 1)
        yield _told(whole, rest_request, engine.generate([rest_request])[0])


CASES: Mapping[str, Callable[[Transformer], Iterator[Told]]] = {
    "batch of 1": _batch(1),
    "batch of 7, mixed lengths": _batch(7),
    "batch of 64, mixed lengths": _batch(64),
    f"prompts of {BLOCK} to {2 * BLOCK} tokens": _long_prompts((BLOCK, BLOCK + 1, 2 * BLOCK), 4096),
    f"prompts of {2 * BLOCK + 1} to {5 * BLOCK + 3} tokens": _long_prompts(
        (2 * BLOCK + 1, 3 * BLOCK - 1, 5 * BLOCK + 3), 4096
    ),
    "the same, read in chunks of 100": _long_prompts((2 * BLOCK + 1, 3 * BLOCK - 1, 5 * BLOCK + 3), 100),
    f"turns of {LONG_TURN_TOKENS} tokens": _long_turns,
    "a group that shares its prompt": _shared_prefix,
    "conversations of several turns": _several_turns,
    "rewound to a kept state": _rewind,
    "cut short and resumed": _cut_and_resumed,
}
"""Ways in which the engine comes to write a turn."""


def _request(tokens: Sequence[int], number: int) -> Request:
    temperature = TEMPERATURES[number % len(TEMPERATURES)]
    sampling = Sampling(temperature, max_tokens=WRITTEN_TOKENS)
    return Request(tokens, stream_key("check sampler", number), sampling, keep_state=True)


def _after(completion: Completion, new: Sequence[int], number: int) -> Request:
    """Go on from the state that a turn left, after reading `new` tokens."""
    request = _request([*completion.unread, *new], number)
    request.snapshot = completion.snapshot
    return request


def _told(before: Sequence[int], request: Request, completion: Completion) -> Told:
    # Greedy turns are reported at temperature 1.
    return Told(
        list(before), completion.tokens.tolist(), completion.logp, request.sampling.temperature or 1.0
    )


def _play(engine: Engine, requests: Sequence[Request]) -> Iterator[Told]:
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        yield _told(request.tokens, request, completion)


def _random_tokens(model: Transformer, count: int, address: object) -> list[int]:
    rng = np.random.default_rng(stream_key("check sampler", str(address)))
    return rng.integers(0, model.config.vocab_size, size=count).tolist()


# The comparison.


def gap_of(told: Sequence[Told], learner: Transformer) -> Metrics:
    """`sampler_gap` between what was told and the learner's forward pass, and the number of `tokens`."""
    forced = [
        forced_logp(learner, turn.before + turn.written, turn.temperature)[len(turn.before) - 1 :]
        for turn in told
    ]
    reported = torch.cat([torch.from_numpy(turn.logp) for turn in told])
    expected = torch.cat(forced)
    gap = sampler_gap(expected, reported.to(expected), torch.ones_like(expected, dtype=torch.bool))
    return gap | {"tokens": float(len(expected))}


def gap_row(promise: str, gaps: Mapping[str, Metrics], limit_nats: float) -> Row:
    """The verdict on the largest gap among several models, each a `sampler_gap` with its `tokens`."""
    # max() would pass over a NaN, so it is asked for by name.
    worst = max(
        gaps, key=lambda name: np.nan_to_num(gaps[name]["sampler_gap_max_nats"], nan=np.inf, posinf=np.inf)
    )
    largest = gaps[worst]["sampler_gap_max_nats"]
    num_tokens = sum(gap["tokens"] for gap in gaps.values())
    where = f" ({worst})" if len(gaps) > 1 else ""
    return Row(
        promise,
        f"max {largest:.1e} nats in {num_tokens:.0f} tokens{where}",
        f"{limit_nats:.0e} nats",
        bool(largest <= limit_nats),
    )


def routing_row(shares: Mapping[str, float]) -> Row:
    """The verdict on the share of tokens whose experts differ, by model."""
    worst = max(shares, key=shares.__getitem__)
    where = f" ({worst})" if len(shares) > 1 else ""
    return Row(
        "sampler and learner choose the same experts",
        f"{shares[worst]:.2%} of tokens differ{where}",
        f"{EXPERTS_LIMIT:.1%} of tokens",
        shares[worst] <= EXPERTS_LIMIT,
    )


def _expert_share(model: Transformer) -> float:
    rng = np.random.default_rng(7)
    tokens_ST = torch.from_numpy(rng.integers(0, model.config.vocab_size, size=(8, BLOCK + 50)))
    return experts_differ(model, model, tokens_ST, torch.ones_like(tokens_ST, dtype=torch.bool))

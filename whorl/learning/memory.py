"""How much memory training needs, before it is tried: what is kept throughout, and the peak of a step.

What is alive is counted: weights, what the optimizer keeps, gradients, what each layer saves for its backward
pass, the head's blocks of logits, and the states of the sequences that are sampled. The largest sum over the
moments of a step is the peak. What an allocator wastes is not counted, nor Python and its libraries (0.3 GiB).
glibc keeps much of what was freed: a process on a CPU holds 1.2 to 2 times this, unless it is started with
MALLOC_MMAP_THRESHOLD_=65536, which gives everything back and costs a small model half of its speed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import nn

from whorl.kernels.logprob import MAX_LOGITS
from whorl.learning import lowbit
from whorl.model.adapter import Lora
from whorl.model.attention import LightningAttention
from whorl.model.config import ModelConfig
from whorl.model.experts import Experts
from whorl.model.lora import add_lora, policy_parameters
from whorl.model.transformer import Block, Transformer

OptimizerState = Literal["float32", "8bit"]

FIRST_CAPACITY = 64
"""Tokens for which an engine first has room in each slot."""


@dataclass(frozen=True)
class Kept:
    """Bytes that a model and its training take throughout. `gradients` are there from the first backward pass on."""

    weights: int
    gradients: int
    moments: int
    masters: int
    """fp32 copies of weights of lower precision, which take the updates."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.masters


def kept_of(
    num_parameters: int, trained: Iterable[int], dtype: torch.dtype, state: OptimizerState = "float32"
) -> Kept:
    """For `num_parameters` weights in `dtype`, of which the tensors with so many numbers each are trained.

    Gradients, moments and masters are fp32 (float64 for float64 weights), as `whorl.learning.optimizer` keeps them.
    """
    sizes, wide = list(trained), max(dtype.itemsize, 4)
    return Kept(
        weights=num_parameters * dtype.itemsize,
        gradients=sum(sizes) * wide,
        moments=sum(2 * (wide * size if state == "float32" else lowbit.num_bytes(size)) for size in sizes),
        masters=0 if dtype.itemsize >= 4 else sum(sizes) * wide,
    )


@dataclass(frozen=True)
class Rank(Kept):
    """Bytes on each rank of a plain FSDP split, and bytes of one running sequence.

    What is kept is split evenly; the largest block is gathered whole while it computes. Activations are not
    counted: they depend on the batch (`predict_peak`).
    """

    gathered: int
    sampler: int
    """The whole policy, which every rank of a run that plays rollouts holds beside its part; 0 if it has it all."""
    lightning_state: int
    """Of one sequence, of any length."""
    kv_per_1k_tokens: int
    """Of one sequence, for each 1,024 tokens."""

    @property
    def total(self) -> int:
        return super().total + self.gathered


def rank_of(config: ModelConfig, gpus: int, dtype: torch.dtype, state: OptimizerState = "float32") -> Rank:
    """When all weights are trained in `dtype` by `gpus` ranks."""
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1; got {gpus}")
    with torch.device("meta"):
        model = Transformer(config)
    sizes = [p.numel() for p in model.parameters()]
    whole = kept_of(sum(sizes), sizes, dtype, state)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.layers]
    matrices, row = _state(config, dtype)
    return Rank(
        **{name: -(-value // gpus) for name, value in vars(whole).items()},
        gathered=0 if gpus == 1 else max(blocks) * dtype.itemsize,
        sampler=0 if gpus == 1 else sum(sizes) * dtype.itemsize,
        lightning_state=matrices,
        kv_per_1k_tokens=row * 1024,
    )


@dataclass(frozen=True)
class Workload:
    """What of a training step decides its memory.

    `row_tokens` are the tokens of a micro-batch's rows, `padded_tokens` those with what fills the rows up to one
    length (at most the run's `token_budget`), `scored_tokens` those whose log-probability is trained. `threads`
    micro-batches are alive at once, each with gradients of its own.
    """

    row_tokens: int
    padded_tokens: int
    scored_tokens: int
    copied_tokens: int = 0
    """Where sequences share prefixes (their rows then hold each once): tokens of the prefixes, counted once for each
    sequence. Softmax layers copy their keys and values so often."""
    several_micro_batches: bool = True
    checkpoint_activations: bool = False
    dtype: torch.dtype = torch.float32
    lora: Lora = field(default_factory=Lora)
    entropy_gradient: bool = False
    reference: bool = False
    threads: int = 1
    optimizer_state: OptimizerState = "float32"
    running: int = 0
    """Sequences that are decoded together, by all processes; 0: no sampling."""
    prompt: int = 1
    """Tokens that the longest of them begins with."""
    context: int = 256
    """Tokens that it ends with."""
    probabilities: int = 24
    """Bytes for each entry of the vocabulary that drawing a token takes: logits and log-probabilities in fp32,
    probabilities and their sum in float64."""


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment of a training step when most is alive, by part.

    Gradients, activations and the head do not have their own largest values at once.
    """

    weights: int
    optimizer: int
    """Moments, and the masters of bf16 weights."""
    reference: int
    sampling: int
    """States of the sequences that were sampled, whose room stays."""
    gradients: int
    activations: int
    """What layers saved, and what their backward pass works with. While tokens are drawn: their probabilities."""
    head: int

    @property
    def step(self) -> int:
        """What comes and goes."""
        return self.gradients + self.activations + self.head

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.reference + self.sampling + self.step


def predict_peak(config: ModelConfig, work: Workload) -> Peak:
    """The most memory that this process holds at once during training steps, from the second step on."""
    with torch.device("meta"):
        model = Transformer(config).to(work.dtype)
        if work.lora.rank:
            add_lora(model, work.lora, seed=0)
    trained = [p.numel() for p in policy_parameters(model).values()]
    size = work.dtype.itemsize
    kept = kept_of(model.num_parameters, trained, work.dtype, work.optimizer_state)
    # Tokens are drawn while there are neither gradients nor activations.
    drawing = (0, work.running * config.vocab_size * work.probabilities, 0)
    gradients, activations, head = max(_step(model, work, max(size, 4)), drawing, key=sum)
    return Peak(
        weights=kept.weights,
        optimizer=kept.moments + kept.masters,
        reference=(sum(trained) if work.lora.rank else model.num_parameters) * size if work.reference else 0,
        sampling=_sampling(config, work),
        gradients=gradients,
        activations=activations,
        head=head,
    )


def _step(model: Transformer, work: Workload, wide: int) -> tuple[int, int, int]:
    """Walk the backward pass from the head down: gradients come, activations go.

    Gradients, activations and the head's own at the moment when their sum is largest.
    """
    config, size, N = model.config, work.dtype.itemsize, work.row_tokens
    trained = {id(p) for p in policy_parameters(model).values()}

    def gradient(module: nn.Module) -> int:
        return wide * sum(p.numel() for p in module.parameters() if id(p) in trained)

    blocks = [block for block in model.layers if isinstance(block, Block)]
    saved = [size * _saved(config, block, work) for block in blocks]
    working = [size * N * _working(config, block) for block in blocks]
    kept = [size * N * config.width for _ in blocks] if work.checkpoint_activations else saved
    rotary = 0 if "softmax" not in config.attention else 2 * size * N * config.rotary
    alive = sum(kept) + size * N * 2 * config.width + rotary

    gradients = gradient(model) if work.several_micro_batches else 0
    fresh = 0 if work.several_micro_batches else 1
    scratch, saved_by_head = _head(config, work, wide)
    head = model.lm_head.weight.numel() * wide if id(model.lm_head.weight) in trained else 0
    peak = (gradients + head, alive, saved_by_head + scratch)
    gradients += fresh * head
    for block, block_saved, block_working, block_kept in reversed(
        list(zip(blocks, saved, working, kept, strict=True))
    ):
        again = block_saved if work.checkpoint_activations else 0
        own = gradient(block)
        peak = max(peak, (gradients + own, alive + again + block_working, 0), key=sum)
        alive -= block_kept
        gradients += fresh * own
    table = gradient(model.embed_tokens)
    # A tied head's gradient waits for the embedding's, and their sum is a third.
    table = 3 * table - fresh * head if config.tied else table
    peak = max(peak, (gradients + table, alive, 0), key=sum)
    per_thread = gradient(model) if work.threads > 1 else 0
    shared = (work.threads - 1) * (gradient(model) if not fresh else 0)
    return work.threads * (peak[0] + per_thread) - shared, work.threads * peak[1], work.threads * peak[2]


def _saved(config: ModelConfig, block: Block, work: Workload) -> int:
    """Elements that a block saves for its backward pass."""
    N, padded = work.row_tokens, work.padded_tokens
    inner, keys = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    # A norm saves its input, that divided by its size, and its output; in bf16 the first of them in fp32.
    norm = 3 if work.dtype.itemsize >= 4 else 4
    packed = 2 * norm * config.width + _saved_feed_forward(config, block)
    if isinstance(block.self_attn, LightningAttention):
        # qkv before the SiLU; the norm over heads; the gate and what it lets through. As rows: q, k, v.
        packed += (3 + norm + 2) * inner
        rows, again = 3 * inner, 3 * inner
    else:
        rows = again = 2 * inner + 2 * keys  # queries and outputs, keys and values
        packed += 2 * keys * work.copied_tokens / N
    # Rows that had to be padded are copies of what is saved packed, too.
    return round(N * packed) + padded * rows + (N * again if padded != N else 0)


def _saved_feed_forward(config: ModelConfig, block: Block) -> int:
    down = block.feed_forward.down
    if isinstance(block.feed_forward, Experts):
        # Of each chosen expert: rows in, gate and up, silu(gate), their product, rows out; and the choices.
        return config.experts_per_token * (2 * config.width + 4 * config.ffn_width + 9) + config.num_experts
    assert isinstance(down, nn.Linear)
    return 4 * down.in_features


def _working(config: ModelConfig, block: Block) -> int:
    """Elements per token by which gradients inside a block's backward pass outgrow what it frees on the way."""
    inner = config.num_heads * config.head_dim
    # In the feed-forward that of the product of its halves; in attention those of the output, q, k and v.
    return max(_saved_feed_forward(config, block) // 4, 4 * inner) + 2 * config.width


def _head(config: ModelConfig, work: Workload, wide: int) -> tuple[int, int]:
    """Bytes that scoring needs while it works, and those that it leaves for backward."""
    M, V = work.scored_tokens, config.vocab_size
    block = min(M * V, MAX_LOGITS)
    hidden = wide * M * config.width
    matrices = 3 if work.entropy_gradient else 2
    kept = M * V * wide if M * V <= MAX_LOGITS else 0
    cast = 0 if work.dtype.itemsize >= 4 else wide * config.width * min(V, max(MAX_LOGITS // max(M, 1), 1))
    return matrices * block * wide - kept + hidden + cast, kept + hidden


def _sampling(config: ModelConfig, work: Workload) -> int:
    """States of the engine's slots, whose room doubles until the longest sequence fits."""
    matrices, row = _state(config, work.dtype)
    capacity = FIRST_CAPACITY
    if work.prompt > capacity:
        capacity = max(work.prompt, 2 * capacity)
    while work.context > capacity:
        capacity *= 2
    return work.running * (matrices + row * min(capacity, config.max_context))


def _state(config: ModelConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that one sequence takes: fp32 matrices of lightning heads, and keys and values for each token."""
    kinds = config.attention
    matrices = kinds.count("lightning") * config.num_heads * config.head_dim**2 * max(dtype.itemsize, 4)
    return matrices, kinds.count("softmax") * 2 * config.kv_heads * config.head_dim * dtype.itemsize


def parts(peak: Peak) -> Iterator[tuple[str, int]]:
    """Name and bytes of each part that there is, for a table; the total last."""
    for field_ in fields(peak):
        if size := getattr(peak, field_.name):
            yield field_.name, size
    yield "total", peak.total

"""The rollout engine on one GPU: tokens per second, what a step is made of, latency by context, sampler = learner.

    python benchmarks/engine_gpu.py [throughput] [step] [latency] [agreement]

Weights are random (standard deviation 0.02, as a checkpoint is not needed to measure time). Tokens per second are
generated tokens over the wall time of `Engine.generate`, prompts and admission included; medians of whole waves after
one that compiles and captures. Times of a step are medians of replays of its graph between device events.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from whorl.checks.along import forced_logp
from whorl.kernels.draw_triton import draw_step
from whorl.model.config import ModelConfig
from whorl.model.transformer import Transformer
from whorl.sampling.draw import DrawSettings, Sampling, draw, stream_key
from whorl.sampling.engine import Engine
from whorl.sampling.graphs import DeviceWriter
from whorl.sampling.request import Completion, Request
from whorl.sampling.writer import HostWriter

console = Console(width=130)
CONTEXT = 2**18
NUM_WAVES = 3


def qwen2_half_billion() -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936, width=896, num_layers=24, num_heads=14, head_dim=64, ffn_width=4864, num_kv_heads=2,
        softmax_period=1, residual="pre", rope_theta=1e6, qkv_bias=True, tied=True, norm_eps=1e-6,
        max_context=32_768,
    )  # fmt: skip


def hundred_million(softmax_period: int, num_kv_heads: int = 2) -> ModelConfig:
    """16 layers; period 8: 14 lightning and 2 softmax layers, as M1; 0: lightning alone. Ten query heads share two
    key/value heads, or one: M1's eight share one."""
    return ModelConfig(
        vocab_size=32_000, width=640, num_layers=16, num_heads=10, head_dim=64, ffn_width=1728,
        num_kv_heads=num_kv_heads, softmax_period=softmax_period, rotary_dim=32, max_context=CONTEXT + 1024,
    )  # fmt: skip


def made(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """Random weights, drawn where they are used."""
    with torch.device("cuda"):
        model = Transformer(config).to(dtype)
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, config.init_std, generator=generator)
    return model


def wave(
    model: Transformer, groups: int, members: int, prompt: int, new: int | tuple[int, int]
) -> list[Request]:
    """Groups that share a prompt; `new` tokens each, or between two numbers."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.config.vocab_size, (groups, prompt)).tolist()
    lengths = np.full(groups * members, new) if isinstance(new, int) else rng.integers(*new, groups * members)
    return [
        Request(prompts[i // members], stream_key("benchmark", i), Sampling(max_tokens=int(lengths[i])))
        for i in range(groups * members)
    ]


def rate_of(engine: Engine, requests: list[Request], waves: int = NUM_WAVES) -> tuple[float, float]:
    """Generated tokens per second, median of waves after one; seconds of that one."""
    rates = []
    for number in range(waves + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        done = engine.generate(requests)
        seconds = time.perf_counter() - start
        if number == 0:
            first = seconds
        else:
            rates.append(sum(len(c.tokens) for c in done) / seconds)
    return statistics.median(rates), first


def throughput() -> None:
    table = Table(title="tokens per second, Qwen2-0.5B shape, bf16")
    for column in ("sequences x new tokens", "prompt", "writer", "tokens/s", "first wave, s"):
        table.add_column(column)
    model = made(qwen2_half_billion())
    cases: list[tuple[int, int, int, int | tuple[int, int], str]] = [
        (16, 8, 64, 512, "graphs"),
        (16, 8, 512, 512, "graphs"),
        (4, 8, 64, 512, "graphs"),
        (64, 8, 64, 512, "graphs"),
        (48, 8, 64, (64, 512), "graphs"),
        (16, 8, 64, 64, "kernels one by one"),
        (16, 8, 64, 64, "host"),
    ]
    for groups, members, prompt, new, kind in cases:
        slots = 128 if isinstance(new, tuple) else groups * members
        engine = Engine(model, max_running=slots)
        if kind == "host":
            engine._writer = HostWriter(model, engine._rows, engine._table, engine._experts)
        elif kind != "graphs":
            engine._writer._capture = False  # type: ignore[attr-defined]
        waves = NUM_WAVES if kind == "graphs" else 1
        rate, first = rate_of(engine, wave(model, groups, members, prompt, new), waves)
        size = f"{groups * members} x {new}" + (f", {slots} at a time" if isinstance(new, tuple) else "")
        table.add_row(size, f"{prompt}, {members} share it", kind, f"{rate:,.0f}", f"{first:.2f}")
        torch.cuda.empty_cache()
    console.print(table)


def milliseconds(run: Callable[[], object], repeats: int = 10, together: int = 6) -> float:
    """Median time of one of several that follow each other: as steps do, the next is launched while one runs."""
    times = []
    for number in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(together):
            run()
        end.record()
        torch.cuda.synchronize()
        if number:
            times.append(start.elapsed_time(end) / together)
    return statistics.median(times)


def graph_of(run: Callable[[], object]) -> Callable[[], object]:
    run()
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def writer_at(model: Transformer, num_slots: int, length: int) -> DeviceWriter:
    """A writer whose slots hold `length` tokens of random keys and values, and go on."""
    engine = Engine(model, max_running=num_slots)
    writer = engine._writer
    assert isinstance(writer, DeviceWriter)
    writer.resize(num_slots, length + 512)
    writer.state.length.fill_(length)
    for row in (*writer.state.keys, *writer.state.values):
        for slot in row:
            slot.normal_()
    writer._turns.live.fill_(1)
    writer._turns.whole[1].fill_(length)
    writer._turns.whole[2].fill_(2**40)
    writer._turns.whole[4].fill_(2**40)
    return writer


@torch.inference_mode()
def step() -> None:
    """Where the time of one step of 128 sequences goes."""
    model, S = made(qwen2_half_billion()), 128
    table = Table(title=f"one step of {S} sequences, Qwen2-0.5B shape, bf16, milliseconds as graphs")
    table.add_column("part")
    table.add_column("ms")
    for length in (64, 320, 576, 2048):
        writer = writer_at(model, S, length)
        table.add_row(
            f"all, {length} tokens each",
            f"{milliseconds(graph_of(lambda w=writer: w._compute(S, True))):.3f}",
        )
        decode = graph_of(lambda w=writer: w.model.decode(w._turns.last[:S], w.state, w._turns.live[:S]))
        table.add_row(f"layers, {length} tokens each", f"{milliseconds(decode):.3f}")
    hidden = torch.randn(S, model.config.width, device="cuda", dtype=torch.bfloat16)
    table.add_row(
        "head, bf16 products summed in fp32", f"{milliseconds(graph_of(lambda: model.logits(hidden))):.3f}"
    )
    weight = model.lm_head.weight
    wide = graph_of(lambda: F.linear(hidden.float(), weight.float()))
    table.add_row("head, widened to fp32", f"{milliseconds(wide):.3f}")
    logits = model.logits(hidden).clone()
    turns, slots = writer._turns, writer._all_slots[:S]
    table.add_row(
        "draw, two kernels", f"{milliseconds(graph_of(lambda: draw_step(logits, turns, slots))):.3f}"
    )
    uniform, settings = (
        torch.rand(S, device="cuda", dtype=torch.float64),
        DrawSettings.of([Sampling()] * S, "cuda"),
    )
    table.add_row("draw, PyTorch", f"{milliseconds(graph_of(lambda: draw(logits, uniform, settings))):.3f}")
    console.print(table)


@torch.inference_mode()
def latency() -> None:
    """Milliseconds for one token of one sequence, by what it has read."""
    lengths = [2**10, 2**13, 2**15, 2**16, 2**17, 2**18]
    table = Table(title="one token of one sequence, 100M parameters, bf16, ms by tokens in the context")
    table.add_column("model")
    for length in lengths:
        table.add_column(f"{length:,}")
    for period, num_kv_heads, name in (
        (0, 2, "16 lightning layers"),
        (8, 2, "14 lightning, 2 softmax"),
        (8, 1, "the same, 1 key/value head"),
        (1, 2, "16 softmax"),
    ):
        model = made(hundred_million(period, num_kv_heads))
        writers = [writer_at(model, 1, length) for length in lengths]
        steps = [graph_of(lambda w=writer: w._compute(1, True)) for writer in writers]
        # In turn, because the clock changes: the first measurements after a pause are the fastest.
        times = [[milliseconds(step) for step in steps] for _ in range(7)][2:]
        cells = [f"{statistics.median(column):.3f}" for column in zip(*times, strict=True)]
        table.add_row(f"{name}, {model.num_parameters / 1e6:.0f}M", *cells)
        del writers, steps
        torch.cuda.empty_cache()
    console.print(table)


def agreement() -> None:
    """What the engine told of its tokens beside one packed forward pass, with the fp32 head and with a bf16 head.

    Beside it the forward pass against one in fp32 from the same weights: what bf16 costs without any sampler.
    """
    table = Table(
        title="sampler = learner, bf16 weights and hidden states; nats, and correlation of probabilities"
    )
    for column in (
        "model",
        "head",
        "tokens",
        "max",
        "mean",
        "correlation",
        "bf16 = fp32: max",
        "mean",
        "correlation",
    ):
        table.add_column(column)
    shapes = {"Qwen2-0.5B shape": qwen2_half_billion(), "100M hybrid": hundred_million(8)}
    for name, config in shapes.items():
        for scale in (1.0, 8.0):
            for head in ("fp32", "bf16"):
                model = made(config)
                with torch.no_grad():
                    model.norm.weight.fill_(scale)
                if head == "bf16":
                    model.logits = functools.partial(narrow_logits, model)  # type: ignore[method-assign]
                requests = wave(model, 8, 8, 64, 256)
                done = Engine(model).generate(requests)
                told = np.concatenate([completion.logp for completion in done])
                expected = forced(model, requests, done)
                vars(model).pop("logits", None)  # the bf16 one
                exact = forced(model.float(), requests, done)
                row = (f"{name}, logits x {scale:g}", head, f"{len(told)}")
                table.add_row(*row, *gaps(told, expected), *gaps(expected, exact))
    console.print(table)


def narrow_logits(model: Transformer, hidden: Tensor) -> Tensor:
    """The head in bf16, for comparison."""
    return F.linear(hidden, model.lm_head.weight).float()


def forced(model: Transformer, requests: list[Request], done: list[Completion]) -> np.ndarray:
    """Log-probs of what was written, by one forward pass over each sequence."""
    rows = [([*r.tokens, *c.tokens.tolist()], len(r.tokens)) for r, c in zip(requests, done, strict=True)]
    return np.concatenate([forced_logp(model, tokens, 1.0)[start - 1 :].numpy() for tokens, start in rows])


def gaps(one: np.ndarray, other: np.ndarray) -> list[str]:
    """Largest and mean difference in nats, Pearson's correlation of the probabilities."""
    gap = np.abs(one.astype(np.float64) - other)
    correlation = np.corrcoef(np.exp(one.astype(np.float64)), np.exp(other.astype(np.float64)))[0, 1]
    return [f"{gap.max():.4f}", f"{gap.mean():.5f}", f"{correlation:.6f}"]


def main() -> None:
    parts = {"throughput": throughput, "step": step, "latency": latency, "agreement": agreement}
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in sys.argv[1:] or parts:
        parts[name]()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

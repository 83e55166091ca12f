"""Whorl and TRL side by side on one GPU, in one run: CISPO steps of Qwen2-0.5B's shape, both without vLLM.

    python benchmarks/trl_gpu.py                  # needs trl, datasets and accelerate in this environment

The sides are those of `trl_cpu.py`, in processes of their own, one after the other: 16 problems x 8 samples x 512 new
tokens, random bf16 weights, one update a step. TRL generates with transformers and keeps its optimizer in bf16; Whorl
keeps fp32 masters and moments. Seconds are medians of the timed steps, once the device is idle. Neither side computes
log-probabilities again before its update: with one update per batch TRL takes pi_old = pi, Whorl the sampler's.
Micro-batches are chosen for speed within the memory that TRL takes with 16 rollouts at a time: Whorl takes 64 and
computes blocks again.
"""

import sys
from dataclasses import asdict, replace
from statistics import median

from rich.console import Console
from rich.table import Table
from sides import Measured, Run, measure

from whorl.model.config import ModelConfig

QWEN2_500M = ModelConfig(
    vocab_size=151_936, width=896, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64, ffn_width=4864,
    softmax_period=1, residual="pre", qkv_bias=True, tied=True, rope_theta=1e6, norm_eps=1e-6,
)  # fmt: skip
RUN = Run(
    asdict(QWEN2_500M), device="cuda", num_prompts=16, group_size=8, num_new_tokens=512, micro_batch=16,
    token_budget=33_792, computes_again=True, learning_rate=1e-6, num_warmup_steps=1, num_steps=3,
)  # fmt: skip


def row(table: Table, side: str, measured: Measured) -> float:
    """Add a side's medians; returns its seconds a step."""
    step, sampling, scoring = (
        median(seconds)
        for seconds in (measured.step_seconds, measured.sampling_seconds, measured.scoring_seconds)
    )
    cells = (
        f"{RUN.generated_tokens / step:,.0f}",
        f"{step:.2f}",
        f"{sampling - scoring:.2f}",
        f"{scoring:.3f}",
    )
    every = " ".join(f"{seconds:.2f}" for seconds in measured.step_seconds)
    table.add_row(side, *cells, f"{step - sampling:.2f}", f"{measured.gpu_gib:.1f}", every)
    return step


def main(sides: list[str]) -> None:
    """The sides named, TRL and Whorl if none is."""
    table = Table(title="CISPO steps, Qwen2-0.5B's shape, 128 rollouts x 512 tokens, on one GPU")
    for column in ("side", "tokens/s", "step s", "generate s", "score s", "update s", "GPU GiB", "all steps"):
        table.add_column(column)
    seconds, counts = {}, set()
    for side, script, run in (
        ("trl", "trl_peer.py", RUN), ("whorl", "whorl_side.py", replace(RUN, num_warmup_steps=2)),
    ):  # fmt: skip
        if not sides or side in sides:
            measured = measure(sys.executable, script, run)
            print(side, measured, flush=True)  # what follows may take minutes
            seconds[side] = row(table, side, measured)
            counts.add(measured.num_parameters)
    assert len(counts) == 1, f"the two sides built different models: {sorted(counts)} parameters"
    console = Console(width=120)
    console.print(table)
    if len(seconds) == 2:
        console.print(f"Whorl's rate over TRL's: {seconds['trl'] / seconds['whorl']:.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Run as a process of its own: two training steps of a model, and what they were predicted to hold and held, in MiB.

python -m tests.model.measure_peak '{"config": {...}, "work": {...}, "lengths": [...]}'
"""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from whorl.learning.learner import Learner
from whorl.learning.optimizer import OptimizerSettings
from whorl.learning.supervised import SUPERVISED, supervised_batch
from whorl.model.adapter import Lora
from whorl.model.config import ModelConfig
from whorl.model.lora import add_lora
from whorl.model.memory import Workload, predict_peak
from whorl.model.transformer import Transformer
from whorl.sampling.draw import Sampling
from whorl.sampling.engine import Engine, Request


def status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def two_steps(config: ModelConfig, work: Workload, lengths: list[int]) -> None:
    """Sample if the work says so, then two updates of two micro-batches each."""
    model = Transformer(config).to(work.dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    if work.lora.rank:
        add_lora(model, work.lora, seed=0)
    model.checkpoint_activations = work.checkpoint_activations
    settings = OptimizerSettings(1e-3)
    learner = Learner(model, settings, token_budget=work.padded_tokens, reference=work.reference)
    rng = np.random.default_rng(0)

    def tokens(length: int) -> list[int]:
        return rng.integers(0, config.vocab_size, length).tolist()

    if work.running:
        engine = Engine(model, max_running=work.running)
        sampling = Sampling(max_tokens=work.context - 16)
        engine.generate([Request(tokens(8), key, sampling) for key in range(work.running)])
    for _ in range(2):
        for _ in range(2):
            examples = [(tokens(n), [False] + [True] * (n - 1)) for n in lengths]
            learner.forward_backward(supervised_batch(examples), SUPERVISED)
        learner.optim_step()


def main(case: dict) -> None:
    torch.set_num_threads(1)
    config, lengths, given = ModelConfig(**case["config"]), case["lengths"], dict(case["work"])
    given["dtype"] = getattr(torch, given.get("dtype", "float32"))
    given["lora"] = Lora(given.get("lora", 0))
    work = Workload(sum(lengths), len(lengths) * max(lengths), sum(lengths) - len(lengths), **given)
    # Once at a small size: what the libraries load and allocate for themselves is not the model's.
    small = replace(config, vocab_size=64, width=64, head_dim=16, ffn_width=64, rotary_dim=None)
    two_steps(small, replace(work, running=min(work.running, 2)), [64, 64])
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    two_steps(config, work, lengths)
    measured = status("VmHWM") - before
    print(json.dumps([predict_peak(config, work).total / 2**20, measured / 2**20]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

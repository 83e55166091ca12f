"""A tiny run that trains in seconds: parity of two digits by a hybrid of a few thousand parameters."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from whorl.learning.optimizer import OptimizerSettings
from whorl.model import config
from whorl.run import Run, start_run
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation, Settings


@dataclass(frozen=True)
class Tiny(Settings):
    environment: str = "chain_arithmetic,num_terms=2,modulus=2,worked_frac=0.0"
    model: str = "tiny"
    max_context: int = 32
    cold_start: ColdStart = field(
        default_factory=lambda: ColdStart(60, 0.3, 10, 8, 8, OptimizerSettings(1e-2))
    )
    algorithm: str = "CISPO,dynamic_sampling=False"
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=8))
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(1e-3))
    num_steps: int = 3
    problems_per_step: int = 4
    rollouts_per_problem: int = 4
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(2, 4, 2))
    checkpoint_every_steps: int = 1
    rollouts_every_steps: int = 1
    cores: int = 1
    stop_after_steps_without_signal: int = 0


def tiny_model(vocab_size: int = 256, max_context: int = 32) -> config.ModelConfig:
    return config.ModelConfig(
        vocab_size=vocab_size, width=16, num_layers=2, num_heads=2, head_dim=8, ffn_width=16,
        softmax_period=2, num_experts=2, experts_per_token=1, rotary_dim=4, max_context=max_context,
        init_std=0.1,
    )  # fmt: skip


def tiny_run(path: Path, monkeypatch, **changes) -> Run:
    """A new run of `Tiny` at `path`, with its preset known by name."""
    know_tiny(monkeypatch)
    return start_run("tiny", replace(Tiny(), **changes), path)


def know_tiny(monkeypatch) -> None:
    monkeypatch.setitem(config.PRESETS, "tiny", tiny_model)

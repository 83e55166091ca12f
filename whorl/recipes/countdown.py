"""A hybrid of 47M parameters learns to search for an expression, on one GPU.

Countdown with four numbers: the policy writes attempts, step by step, until one reaches the target, then the
expression. The cold start shows searches whose failed attempts are drawn blindly, so it learns to compute, to
notice the target and to stop. What CISPO on the verifier's reward alone makes of that is the question.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from whorl.learning.optimizer import OptimizerSettings
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation, Settings


@dataclass(frozen=True)
class Countdown(Settings):
    """CISPO with M1's optimizer on countdown, six lightning layers and two softmax ones."""

    claim: ClassVar[str] = (
        "Reinforcement learning with verifiable rewards improves search in context (arXiv:2506.13585; countdown "
        "as a test of it: arXiv:2404.03683)."
    )
    scaled: ClassVar[tuple[str, ...]] = (
        "a model of 47M parameters made here in place of a pretrained one",
        "searches written by a program, in bare attempts, in place of long chains of thought",
    )

    environment: str = "countdown,num_numbers=4,max_number=10,max_target=100,worked_frac=1.0,max_attempts=8"
    model: str = "m1-small,num_layers=8,softmax_period=4"
    max_context: int = 576
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    cold_start: ColdStart = field(
        default_factory=lambda: ColdStart(
            max_updates=1500, until_accuracy=0.35, check_every_updates=50, check_problems=256,
            examples_per_update=256, optimizer=OptimizerSettings(1e-3, warmup_steps=50),
        )
    )  # fmt: skip
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=512))
    optimizer: OptimizerSettings = field(
        # 1e-4 fell from 0.39 to 0.19 in ten steps before it rose to 0.44 in thirty.
        default_factory=lambda: OptimizerSettings(3e-5, beta1=0.9, beta2=0.95, eps=1e-15, warmup_steps=5)
    )
    num_steps: int = 80
    problems_per_step: int = 64
    rollouts_per_problem: int = 16
    updates_per_batch: int = 2
    # In bf16 the learner would send one token-layer in forty to other experts than the sampler did, and 9.8 nats of
    # log-prob lay between them at one of 300,000 tokens; replayed, none is over 0.7.
    replay_experts: bool = True
    max_redraws: int = 1
    max_running: int = 1024
    token_budget: int = 65_536
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(10, 512, 2))

"""The recipe: CISPO with M1's settings on any environment.

`whorl train minimax_m1 --environment reasoning_gym:chain_sum`, or on data of your own:
`--environment data:problems.jsonl`. The policy starts from nothing and is given a cold start on gold answers;
with `--model runs/...` it starts from an earlier run instead.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from whorl.learning.optimizer import OptimizerSettings
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation, Settings


@dataclass(frozen=True)
class MinimaxM1(Settings):
    """CISPO with M1's optimizer, dynamic sampling and repetition stop, at the scale of one machine."""

    claim: ClassVar[str] = (
        "CISPO reaches DAPO's accuracy in half of its steps (arXiv:2506.13585 Figure 2, Qwen2.5-32B, AIME 2024)."
    )
    scaled: ClassVar[tuple[str, ...]] = (
        "hybrid of about 1M parameters in place of 456B; one softmax layer per lightning layer",
        "cold start on the environment's gold answers in place of pretraining and long-CoT fine-tuning",
        "32 problems x 8 rollouts a step; the paper's batch is not given",
        "a limit of 64 tokens, so the repetition stop, a run of 3,000 as in the paper, cannot fire; repetition_stop "
        "has it at scale",
        "without the length penalty of DAPO, which the paper took over: its length and its buffer are not given",
    )
    unsaid: ClassVar[tuple[str, ...]] = (
        "the upper bound of the importance weight: 5, see the catalogue",
        "learning rate, weight decay, gradient limit, group size, batch size",
        "temperature and top-p of training rollouts (1.0 and 0.95 in evaluation): 1.0 and 1.0",
        "the reward of a rollout ended by the repetition stop: judged like any other",
    )

    environment: str = "reasoning_gym:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1"
    cold_start: ColdStart = field(default_factory=lambda: ColdStart(max_updates=1000, until_accuracy=0.3))
    # Section 3.1: dynamic sampling and the token-level loss of DAPO; no KL, no critic.
    algorithm: str = "CISPO"
    sampling: Sampling = field(
        # Section 3.2: stop after 3,000 consecutive tokens of probability above 0.99.
        default_factory=lambda: Sampling(
            max_tokens=64, repetition_run_tokens=3000, repetition_probability=0.99
        )
    )
    optimizer: OptimizerSettings = field(
        # Section 3.2: beta1 0.9, beta2 0.95, eps 1e-15. The learning rate is ours.
        default_factory=lambda: OptimizerSettings(3e-4, beta1=0.9, beta2=0.95, eps=1e-15, warmup_steps=5)
    )
    num_steps: int = 100
    problems_per_step: int = 32
    rollouts_per_problem: int = 8
    updates_per_batch: int = 4  # 16 in the paper's comparison, on larger batches
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(10, 128, 4))

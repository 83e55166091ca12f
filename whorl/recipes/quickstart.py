"""A hybrid model learns to think before it answers, on a laptop CPU in a few minutes.

Chain arithmetic: sums of four digits modulo ten. The cold start shows both ways of answering, at once and
after written working, half of the time each. The model can add two digits but not four in its head, so the
working pays; CISPO on the verifier's reward alone selects it, and answers grow longer as accuracy rises:
R1-Zero's signature (arXiv:2501.12948 Figure 3) in miniature. What is selected was shown; nothing is invented.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from whorl.learning.optimizer import OptimizerSettings
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation, Settings


@dataclass(frozen=True)
class Quickstart(Settings):
    """CISPO on chain arithmetic with a 1.2M-parameter hybrid (lightning, softmax, experts), from nothing."""

    claim: ClassVar[str] = (
        "On verifiable rewards alone, accuracy rises and responses grow longer because thinking pays "
        "(DeepSeek-R1-Zero, arXiv:2501.12948 Figures 2-3; CISPO, arXiv:2506.13585)."
    )
    scaled: ClassVar[tuple[str, ...]] = (
        "a model of 1.2M parameters made here in place of a pretrained one",
        "the long way of answering is demonstrated in half of the traces; RL selects it",
    )

    environment: str = "chain_arithmetic"
    max_context: int = 64
    cold_start: ColdStart = field(
        default_factory=lambda: ColdStart(max_updates=2000, until_accuracy=0.5, check_every_updates=10)
    )
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=40))
    # The bound of the catalogue's CISPO; normalised by the tokens of the batch, as most code does.
    algorithm: str = "CISPO,average=token_mean"
    # With M1's eps an update has the size of the learning rate however small the gradient is, so towards the end,
    # when few groups still differ, the rate has to come down for the accuracy to settle.
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(1e-3, warmup_steps=5, schedule="linear", final_frac=0.05)
    )
    num_steps: int = 100
    problems_per_step: int = 32
    rollouts_per_problem: int = 8
    max_redraws: int = 2
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(10, 256, 2))
    stop_after_steps_without_signal: int = 0  # at the end all groups are right: that is success

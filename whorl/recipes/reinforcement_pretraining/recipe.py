"""The settings: GRPO without KL on the next token of a text, and what its start is shown."""

from dataclasses import dataclass, field
from typing import ClassVar

from whorl.learning.optimizer import OptimizerSettings
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation, Settings

PLAIN = "next_token,way=continue"
QUESTIONS = "chain_arithmetic,num_terms=4,modulus=6"
"""The same skill asked for in another form: `3+8+5+4=`, at once or worked out, and no text around it."""


def start_with(wrong_frac: float) -> str:
    """Plain text, a small set of thoughts with a box and of boxes alone, of which so many hold another token than the
    thought came to, and sums: those that thoughts work out are too few to learn adding from in minutes."""
    return (
        f"{PLAIN} + next_token,wrong_frac={wrong_frac},demonstrated_texts=2000"
        f" + next_token,way=answer,wrong_frac={wrong_frac},demonstrated_texts=2000"
        f" + chain_arithmetic,num_terms=3,modulus=6,worked_frac=1 + {QUESTIONS}"
    )


START = start_with(0.8)
"""With eight boxes in ten wrong, reasoning begins below plain prediction, as the paper's does."""

BINS = {"easy": 0.5, "medium": 1.0, "hard": 1.5}
"""Lowest entropy in nats of a position of each bin: hard ones are medium too. The paper gives no unit."""


@dataclass(frozen=True)
class ReinforcementPretraining(Settings):
    """GRPO without KL, strictly on-policy, on the next token of a corpus."""

    claim: ClassVar[str] = (
        "Reasoning before each next token, learned from the text alone, predicts better than next-token prediction: "
        "accuracy 45.11, 33.56 and 23.75% at easy, medium and hard positions against 41.60, 29.46 and 20.43%, and "
        "against 3.31, 1.66 and 1.41% of reasoning before training (arXiv:2506.08007 Table 1)."
    )
    scaled: ClassVar[tuple[str, ...]] = (
        "a hybrid of 1.2M parameters made here in place of R1-Distill-Qwen-14B",
        "texts by template with sums in them in place of competition mathematics",
        "the start is taught to work out sums, in texts and without, which a pretrained model can",
        "reasoning begins below plain prediction because eight of ten demonstrated boxes hold another token than the "
        "thought came to; what is learned is to box what the thought says (honest_start has no such boxes)",
        "characters in place of byte-pair tokens for the policy; words, digits and marks are the corpus's tokens",
        "the start itself is the proxy that filters positions; the paper has a smaller model",
        "entropies are of the next character, with which a token of the corpus begins, in place of the next token",
        "32 positions a step in place of 256; learning rate 3e-4 in place of 1e-6",
        "30 steps in place of 1,000; questions afterwards are sums, 3 steps, in place of competition mathematics",
    )
    unsaid: ClassVar[tuple[str, ...]] = (
        "the threshold of the filter of training positions: that of the easy bin, 0.5",
        "the unit of entropies: nats",
        "the bounds of the clip: 0.8 and 1.2, which never bind at one update per batch",
    )

    environment: str = "next_token"
    max_context: int = 160
    # Of the start with wrong boxes: the mean over plain text, thoughts, boxes alone and two kinds of sums, before they
    # are worked out 0.25.
    cold_start: ColdStart = field(default_factory=lambda: ColdStart(1000, 0.45, 50, 500, 80))
    # Section 3.2: no KL, no entropy bonus. Dynamic sampling begins in the middle, as after step 500 of 1,000.
    algorithm: str = "GRPO,minus_kl_k3=0,dynamic_sampling=True"
    dynamic_sampling_after_steps: int = 15
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.8, max_tokens=64))
    optimizer: OptimizerSettings = field(
        # Adam's betas and the weight decay are the paper's, and so is the limit if "actor gradient clip" means that.
        default_factory=lambda: OptimizerSettings(
            3e-4, beta2=0.999, eps=1e-8, weight_decay=0.01, max_grad_norm=0.2, warmup_steps=5
        )
    )
    num_steps: int = 30
    problems_per_step: int = 32
    rollouts_per_problem: int = 8
    updates_per_batch: int = 1
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(0, 128, 1))
    stop_after_steps_without_signal: int = 0  # an arm that must not learn is trained to its end
    train_texts: int = 300
    """Texts of an experiment whose positions are filtered for training."""
    lowest_entropy_nats: float = BINS["easy"]
    """Of the positions of an experiment that are trained on: those where the proxy is surer are left out."""
    text_updates: int = 0
    """Updates of next-token prediction on the same texts that an experiment's trial has in place of reinforcement
    learning, of as many sequences as a step has rollouts; 0: none."""
    law_every_steps: int = 3
    """Steps between the checkpoints to which a power law of compute is fitted; 0: none is. The paper: 100 of 1,000."""
    question_steps: int = 3
    """Steps of an experiment's second stage, on questions; 0: it has none. After five there was nothing left to learn
    (one seed)."""

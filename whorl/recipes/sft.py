"""Supervised fine-tuning on chats: the loss of the assistant's turns, in batches of similar length.

`whorl train sft --data chats.jsonl` teaches a model to answer as the chats do; `--model runs/sft-1` then takes its
best checkpoint into reinforcement learning. The recipe is that of Tulu 3 (arXiv:2411.15124, section on supervised
fine-tuning) where a small model allows it.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from whorl.learning.optimizer import OptimizerSettings
from whorl.settings import SupervisedSettings


@dataclass(frozen=True)
class Sft(SupervisedSettings):
    """Cross entropy of the assistant's tokens, each of a batch weighing the same; AdamW with a linear schedule."""

    claim: ClassVar[str] = "None of its own: this is the stage before reinforcement learning."

    num_epochs: int = 2  # Tulu 3: 2
    # Ours: Tulu 3 has 128 chats of its 939,344 in a batch; small files would have too few updates.
    chats_per_update: int = 32
    optimizer: OptimizerSettings = field(
        # Tulu 3: linear schedule after a warm-up of 3% of the updates, 5e-6 for 8B parameters. The rate here is
        # ours, for a model of about a million parameters made on the spot: give your own for a pretrained one.
        # beta2 and eps are AdamW's usual ones, since M1's eps belongs to the gradients of reinforcement learning.
        default_factory=lambda: OptimizerSettings(
            1e-3, beta2=0.999, eps=1e-8, warmup_steps=5, schedule="linear"
        )
    )

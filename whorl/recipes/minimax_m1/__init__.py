"""MiniMax-M1's reinforcement learning (arXiv:2506.13585): CISPO on verifiable rewards, hybrid attention.

The recipe is in `recipe.py`; each other file is one of the paper's claims as an experiment.
"""

from whorl.recipes.minimax_m1 import (
    adam_eps,
    attention_kinds,
    fp32_head,
    generation_flops,
    judge_length_bias,
    length_windows,
    repetition_stop,
    stale_updates,
)
from whorl.recipes.minimax_m1.recipe import MinimaxM1

__all__ = ["EXPERIMENTS", "MinimaxM1"]

EXPERIMENTS = (
    stale_updates.EXPERIMENT,
    fp32_head.EXPERIMENT,
    adam_eps.EXPERIMENT,
    attention_kinds.EXPERIMENT,
    generation_flops.EXPERIMENT,
    repetition_stop.EXPERIMENT,
    judge_length_bias.EXPERIMENT,
    length_windows.EXPERIMENT,
)
"""The first is what `whorl compare minimax_m1` runs."""

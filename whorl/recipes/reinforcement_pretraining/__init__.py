"""Reinforcement Pre-Training (arXiv:2506.08007): any text is verifiable data, one position at a time.

    (c_i, y_i) ~ pi(. | x_<t),  i = 1..G                a thought, then a prediction in a box
    r_i = 1 iff the bytes of y_i begin x_>=t and end where one of its tokens ends, else 0
    A_i = (r_i - mean) / std,   GRPO's loss over all tokens of (c_i, y_i): no KL, no entropy bonus, one update a batch

Positions at which a proxy is sure of what comes next need no thought: they are left out before training, by the entropy
of the proxy's 16 most probable next tokens. In the second half groups that are all right or all wrong are replaced.

    whorl compare reinforcement_pretraining                      the start, the positions and all arms, by seeds
    python -m whorl.recipes.reinforcement_pretraining FOLDER     the same start, and the positions at which it is unsure
    whorl train reinforcement_pretraining                        any position, from a start that is shown no other task

The second says the command that trains on what it has written.
"""

from whorl.recipes.reinforcement_pretraining.experiments import EXPERIMENTS
from whorl.recipes.reinforcement_pretraining.recipe import ReinforcementPretraining

__all__ = ["EXPERIMENTS", "ReinforcementPretraining"]

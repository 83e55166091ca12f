"""Reflect, Retry, Reward (arXiv:2505.24726): after a failure, reward the reflection that makes the retry succeed.

    attempt y1 ~ pi(. | q)                 right: nothing to learn
    "wrong"                                only that it failed is disclosed
    reflections z_1 .. z_G ~ pi(. | q, y1, "wrong")            a group: the same q and y1, different z
    the task again, retries y2_i ~ pi(. | q, y1, "wrong", z_i, q)
    r_i = V(q, y2_i),   A_i = (r_i - mean) / std,   the loss is GRPO's on the tokens of z_i alone

The environment (`reflect_retry`) plays this and labels every token with its role; the attempt is written once for its
group. No logit at a token of an attempt, a retry or a message has a gradient: an answer is never rewarded for being
right. (With experts, the router's balance loss covers all tokens.)

    whorl train reflect_retry_reward                          fresh attempts of the policy in every step
    python -m whorl.recipes.reflect_retry_reward RUN FILE     failed attempts of a run's policy, once, to FILE

Training with `--model RUN --cold-start.max-updates 0 --environment reflect_retry:...,failures=FILE` is then the paper's
way: no sample goes to problems already solved, and y1 stays that of the start model. The experiment does so, and takes
the tokens that the collecting costs off the arm's own.
"""

from whorl.recipes.reflect_retry_reward.experiments import EXPERIMENTS
from whorl.recipes.reflect_retry_reward.recipe import ReflectRetryReward

__all__ = ["EXPERIMENTS", "ReflectRetryReward"]

"""Accuracy of a policy on held-out problems: avg@k and pass@k with intervals."""

import time
from collections.abc import Sequence

import numpy as np
from rich.table import Table

from whorl.data import Group, Metrics, Problem
from whorl.evaluation.statistics import avg_at_k, pass_at_k
from whorl.reporting.console import Progress
from whorl.reporting.glossary import describe
from whorl.rollouts import Player, measure
from whorl.sampling.draw import Sampling


def evaluate_on(
    player: Player,
    problems: Sequence[Problem],
    num_samples: int,
    sampling: Sampling,
    progress: Progress,
) -> tuple[Metrics, list[Group]]:
    """`eval_...` metrics of the player's policy on these problems, and the rollouts.

    The random streams are those of the problem and the sample alone, the same at every step of a run, so that
    two evaluations differ by the policy and not by luck.
    """
    started = time.monotonic()
    with progress.phase("evaluation", len(problems) * num_samples) as advance:
        groups, _ = player.play(problems, num_samples, sampling, ("evaluation",), advance)
    highest = player.environment.reward_range[1]
    right = [group.rewards >= highest for group in groups if group.judged]
    measured = measure(groups, highest)
    metrics = {
        "eval_problems": float(len(right)),
        "eval_samples": float(num_samples),
        "eval_response_tokens": measured["response_tokens"],
        "eval_stopped_by_limit_frac": measured["stopped_by_limit_frac"],
        "eval_unjudged_rollouts": float(sum(len(g.rollouts) - len(g.judged) for g in groups)),
        "eval_seconds": time.monotonic() - started,
    }
    if right:
        accuracy = avg_at_k(right)
        metrics |= {
            "eval_accuracy": accuracy.value,
            "eval_accuracy_low": accuracy.low,
            "eval_accuracy_high": accuracy.high,
            "eval_reward": measured["reward"],
            "eval_pass_at_k": pass_at_k(right, min(num_samples, min(map(len, right)))).value,
        }
    return metrics, groups


def table_of(metrics: Metrics, title: str) -> Table:
    """The metrics with what they mean."""
    table = Table("metric", "value", "meaning", title=title, title_justify="left")
    for name, value in metrics.items():
        shown = f"{value:.4g}" if np.isfinite(value) else str(value)
        table.add_row(name, shown, describe(name).formula)
    return table

"""Failures of the start model: the paper's prompts."""

import json
import math
from pathlib import Path

import numpy as np

from whorl.data import Metrics
from whorl.environments.catalog import spec_of
from whorl.environments.reflect_retry import ReflectRetry
from whorl.reporting.run_directory import write_atomically
from whorl.run import Run

STRATA = (0.0, 1 / 8, 1 / 4, 1 / 2)
"""Lower ends of pass rates. Without strata, problems that the start model nearly solves and failed by bad luck may be
the most, and after those a retry succeeds without any reflection."""


def collect_failures(run: Run, path: Path, num_queries: int, num_samples: int) -> Metrics:
    """Write one failed attempt of each training problem that has one, `num_queries` / 4 of a stratum at most.

    The run's policy answers `num_samples` times. ValueError if it never fails. Returns how many of the problems
    failed, how many were kept, and the tokens that were generated.
    """
    environment = run.environment
    assert isinstance(environment, ReflectRetry), f"failures are those of reflect_retry; got {environment}"
    first = run.with_environment(spec_of(environment.inner))
    problems = [first.environment.problem("train", index) for index in range(num_queries)]
    groups, _ = first.player.play(problems, num_samples, run.settings.sampling, ("failures",))
    strata: list[list[dict]] = [[] for _ in STRATA]
    for index, group in enumerate(groups):
        failed = [r for r in group.judged if r.reward == 0.0 and r.stop == "stop_token"]
        if failed:
            rate = float(group.rewards.mean())
            row = {"index": index, "attempt": failed[0].reply, "pass_rate": rate}
            strata[int(np.searchsorted(STRATA, rate, side="right")) - 1].append(row)
    if not any(strata):
        raise ValueError(
            f"{run.directory.path} fails at none of {num_queries} problems: nothing to reflect on"
        )
    kept = [row for rows in strata for row in rows[: math.ceil(num_queries / len(STRATA))]]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    tokens = sum(rollout.num_response_tokens for group in groups for rollout in group.rollouts)
    failed_problems = sum(map(len, strata))
    return {"failed": float(failed_problems), "kept": float(len(kept)), "tokens": float(tokens)}

"""One arm at one seed: failures of the start, training on them, and what the policy then does at held-out problems."""

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from whorl.data import Group, Metrics, Problem, Rollout, Score, Turn
from whorl.environments.catalog import make, spec_of
from whorl.environments.reflect_retry import ReflectRetry, saying
from whorl.environments.reflections import gives_advice
from whorl.experiments.trials import Outcome, Trial, train_run
from whorl.faults import Stop
from whorl.recipes.reflect_retry_reward.failures import collect_failures
from whorl.recipes.reflect_retry_reward.recipe import ReflectRetryReward
from whorl.reporting.run_directory import write_atomically
from whorl.run import Run, open_run, start_run


def reflect_trial(trial: Trial) -> Outcome:
    """Failures of the start model, training on them, and what the policy then does at held-out problems.

    What collecting them generates is taken off the trial's tokens and stands in its first row. `Stop` if nothing is
    left.
    """
    settings, specification = trial.settings, trial.settings.environment
    environment = make(specification)
    assert isinstance(settings, ReflectRetryReward), f"expected the recipe's settings; got {type(settings)}"
    collected: Metrics = {}
    if trial.role != "start" and settings.collected_failures and isinstance(environment, ReflectRetry):
        failures, collected = failures_of(trial, settings)
        left = settings.num_generated_tokens - int(collected["tokens"])
        if settings.num_generated_tokens and left <= 0:
            raise Stop(
                f"collecting failures took {collected['tokens']:,.0f} tokens of {settings.num_generated_tokens:,}: "
                "nothing is left to train with. Lower failed_queries or answers_per_query"
            )
        settings = replace(
            settings,
            environment=spec_of(replace(environment, failures=str(failures))),
            num_generated_tokens=max(left, 0),
        )
    outcome = train_run(replace(trial, settings=settings))
    assert outcome.run is not None
    run = open_run(outcome.run, read_only=True)
    twice = (
        spec_of(environment) if isinstance(environment, ReflectRetry) else f"reflect_retry:{specification}"
    )
    values = held_out_values(run.with_environment(twice))
    if not collected:
        return replace(outcome, values=values)
    first, *rest = outcome.rows
    first = {**first, "generated_tokens": (first.get("generated_tokens") or 0.0) + collected["tokens"]}
    return replace(outcome, rows=[first, *rest], values=values | {"failures": collected["kept"]})


def failures_of(trial: Trial, settings: ReflectRetryReward) -> tuple[Path, Metrics]:
    """The file of the trial's collected failures, and what `collect_failures` said; once, if it is killed later."""
    failures, said = trial.folder / "failures.jsonl", trial.folder / "failures.json"
    if not said.exists():
        collecting = trial.folder / "collecting"
        shutil.rmtree(collecting, ignore_errors=True)  # of a trial that was killed
        start = start_run(trial.arm, settings, collecting)
        found = collect_failures(start, failures, settings.failed_queries, settings.answers_per_query)
        write_atomically(said, json.dumps(found).encode())
    return failures, json.loads(said.read_text())


def held_out_values(run: Run) -> Metrics:
    """First and second tries at the test problems, and what reflections look like and do.

    `retry_own` and `retry_swapped` are retries drawn again after a reflection that is put in: the rollout's own, and
    that of the next failed problem. What a retry loses by the swap it had from the reflection. Where nobody reflects
    what is said of reflections is left out.
    """
    problems = run.held_out("test", run.settings.evaluation.num_problems)
    scored = [(rollout, _score(rollout)) for group in _play(run, problems) for rollout in group.judged]
    retried = [(rollout, score) for rollout, score in scored if score.parts["first_try"] == 0.0]
    attempts = [_turn(rollout, "assistant") for rollout, _ in retried]
    reflections = [turn for rollout, _ in retried if (turn := _turn(rollout, "reflection"))]
    values = {
        "first_try": _mean(score.parts["first_try"] for _, score in scored),
        "second_try": _mean(score.parts["second_try"] for _, score in scored),
        "retry": _mean(score.parts["second_try"] for _, score in retried),
        "told_answer": _mean(score.parts["told_answer"] for _, score in retried),
        "reflection_tokens": _mean(turn.end - turn.start for turn in reflections),
        "advice": _mean(gives_advice(turn.text) for turn in reflections),
    }
    for name, shift in (("retry_own", 0), ("retry_swapped", 1)):
        given = reflections[shift:] + reflections[:shift]
        again = [
            saying(rollout.problem, assistant=attempt.text if attempt else "", reflection=other.text)
            for (rollout, _), attempt, other in zip(retried, attempts, given, strict=bool(given))
        ]
        values[name] = _mean(_score(r).parts["second_try"] for g in _play(run, again) for r in g.judged)
    return {name: number for name, number in values.items() if math.isfinite(number)}


def _score(rollout: Rollout) -> Score:
    assert rollout.score is not None, "a judged rollout has a score"
    return rollout.score


def _turn(rollout: Rollout, role: str) -> Turn | None:
    return next((turn for turn in rollout.transcript if turn.role == role), None)


def _mean(values: Iterable[float]) -> float:
    """NaN where there is nothing."""
    found = list(values)
    return float(np.mean(found)) if found else math.nan


def _play(run: Run, problems: Sequence[Problem]) -> list[Group]:
    return run.player.play(problems, 1, run.settings.sampling, ("held out",))[0] if problems else []

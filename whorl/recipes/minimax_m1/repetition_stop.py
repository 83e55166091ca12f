"""The repetition stop: what it saves, whom it stops by mistake, and the tail of the gradient's norm.

The paper (section 3.2): some prompts led to very long, repetitive answers whose large gradients endangered
training, and matching of strings did not find them. In a loop the probability of every token soars, so an answer
ends as soon as 3,000 consecutive tokens had one above 0.99. Here the loops are planted: two fifths of the worked
demonstrations repeat their last step for ever. A quarter of the problems ask for a table, which is right and, for 60
tokens, as predictable as a loop. A worked answer has 19 tokens, so a run of 24 is longer than those but not than
tables, and one of 72 is longer than both.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from whorl.data import Rollout
from whorl.environments.looping_arithmetic import loops
from whorl.evaluation.evaluate import evaluate_on
from whorl.experiments.plan import Arm, Claim, Experiment, Measure
from whorl.experiments.readings import Reading, held_out, largest, mean_of_last, total, value
from whorl.experiments.trials import Outcome, Trial, train_run
from whorl.learning.optimizer import OptimizerSettings
from whorl.recipes.minimax_m1.recipe import MinimaxM1
from whorl.reporting.run_directory import RunDirectory
from whorl.run import open_run
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation

MAX_TOKENS = 216
TABLES = "looping_arithmetic,table_frac=1.0"


def train_and_count(trial: Trial) -> Outcome:
    """A run; what its stop ended, by kind of answer; and what the policy can do when nothing stops it.

    Held-out answers that are sampled with the arm's own stop say what is left of the policy behind it: a table of 60
    tokens is never finished under a run of 24, whatever was learned. So they are sampled without as well.
    """
    outcome = train_run(trial)
    assert outcome.run is not None
    directory = RunDirectory.open(outcome.run)
    stored = (one for step in directory.rollout_steps() for one in directory.read_rollouts(step))
    values = count_stops(one.rollout for one in stored)
    for name, environment in (("accuracy", None), ("accuracy_of_tables", TABLES)):
        values[name] = unstopped_accuracy(outcome.run, environment)
    return replace(outcome, values=values)


def unstopped_accuracy(path: Path, environment: str | None) -> float:
    """Held-out accuracy of the trained policy without a repetition stop."""
    run = open_run(path, read_only=True).with_environment(environment)
    sampling = replace(run.settings.sampling, repetition_run_tokens=0)
    metrics, _ = evaluate_on(run.player, run.held_out("test", 128), 2, sampling, run.progress)
    return metrics["eval_accuracy"]


def count_stops(rollouts: Iterable[Rollout]) -> dict[str, float]:
    """Shares that the stop ended: of loops, of tables, of other answers, of all answers without a loop. A kind that
    never came is left out.

    Loops by the text, which the stop does not look at. A loop that is stopped before its step stands there thrice
    counts as an answer without.
    """
    stops: dict[str, list[bool]] = {}
    for rollout in rollouts:
        kind = "loops" if loops(rollout.reply) else "tables" if rollout.problem.extra["table"] else "others"
        stopped = rollout.stop == "repetition"
        stops.setdefault(f"stopped_{kind}", []).append(stopped)
        if kind != "loops":
            stops.setdefault("false_stops", []).append(stopped)
    return {name: sum(found) / len(found) for name, found in stops.items()}


def percentile(name: str, q: float) -> Reading:
    """The q-th percentile over the steps that have the metric."""
    return lambda outcome: float(
        np.percentile([row[name] for row in outcome.rows if row.get(name) is not None], q)
    )


def total_until(name: str, step: int) -> Reading:
    """Sum over the rows up to this step."""
    return lambda outcome: total(name)(Outcome([row for row in outcome.rows if row["step"] <= step]))


EXPERIMENT = Experiment(
    name="repetition_stop",
    question="What does the repetition stop save, and which healthy answers does it end?",
    cpu=MinimaxM1(
        environment=f"looping_arithmetic,loop_frac=0.4,loop_tokens={MAX_TOKENS + 16}",
        # Dense: the norm that is watched shall not be that of a router's loss.
        model="m1-nano,num_experts=0,ffn_width=512",
        max_context=256,
        # At 2e-3 one start of five had not learned the working after 1,080 updates: nine tokens in ten are of loops.
        cold_start=ColdStart(
            max_updates=1500, until_accuracy=0.5, check_every_updates=20, examples_per_update=32,
            optimizer=OptimizerSettings(1e-3, warmup_steps=20),
        ),
        # Without dynamic sampling every arm plays the same number of rollouts.
        algorithm="CISPO,dynamic_sampling=False",
        sampling=Sampling(max_tokens=MAX_TOKENS, repetition_run_tokens=0),
        # No limit on the gradient: its tail is what is measured.
        optimizer=OptimizerSettings(1e-4, max_grad_norm=1e9, warmup_steps=0),
        num_steps=20,
        problems_per_step=16,
        evaluation=Evaluation(5, 64, 2),
        stop_after_steps_without_signal=0,
        checkpoint_every_steps=1000,
        rollouts_every_steps=1,
    ),
    arms=(
        Arm("no_stop", "baseline"),
        Arm("run_72", "method", {"sampling.repetition_run_tokens": 72}, "longer than a table"),
        Arm("run_24", "method", {"sampling.repetition_run_tokens": 24}, "longer than a worked answer"),
    ),
    measures=(
        Measure("tokens", "tokens generated in training", total("generated_tokens"), False, "tokens", "ratio"),
        Measure(
            "early_tokens", "tokens generated in the first eight steps", total_until("generated_tokens", 8),
            False, "tokens", "ratio",
        ),
        Measure(
            "largest_norm", "largest gradient norm of an update", largest("grad_norm_max"),
            higher_is_better=False, compare="ratio",
        ),
        Measure(
            "norm_p90", "90th percentile over the steps of the largest gradient norm", percentile("grad_norm_max", 90),
            higher_is_better=False, compare="ratio",
        ),
        Measure(
            "false_stops", "share of the answers without a loop that were stopped", value("false_stops"),
            higher_is_better=False, unit="fraction",
        ),
        Measure("stopped_loops", "share of the loops that were stopped", value("stopped_loops"), unit="fraction"),
        Measure(
            "stopped_tables", "share of the tables that were stopped", value("stopped_tables"),
            higher_is_better=False, unit="fraction",
        ),
        Measure(
            "stopped_others", "share of the other answers without a loop that were stopped", value("stopped_others"),
            higher_is_better=False, unit="fraction",
        ),
        Measure("accuracy", "held-out accuracy at the end, without a stop", value("accuracy"), unit="fraction"),
        Measure(
            "accuracy_of_tables", "held-out accuracy of tables at the end, without a stop",
            value("accuracy_of_tables"), unit="fraction",
        ),
        Measure(
            "final", "held-out accuracy at the end, with the arm's own stop", mean_of_last("eval_accuracy", 2),
            unit="fraction",
        ),
        Measure(
            "tables", "held-out accuracy of tables at the end, with the arm's own stop",
            held_out("eval_accuracy", 64, 2, environment=TABLES), unit="fraction",
        ),
    ),
    claims=(
        Claim(
            "The stop saves generation", "section 3.2: it removes the long tail, no figure",
            "tokens", "run_72", "no_stop", "lower", margin=1.05,
        ),
        Claim(
            "The stop lowers the tail of the gradient's norm",
            "section 3.2: loops have large gradients, no figure",
            "norm_p90", "run_72", "no_stop", "lower", margin=1.1,
        ),
        Claim(
            "Learning does not suffer", "section 3.2, no figure", "accuracy", "run_72", "no_stop", "equal",
            margin=0.05,
        ),
        Claim(
            "A run that is longer than any right answer stops none of them",
            "section 3.2 has no word on false stops", "false_stops", "run_72", "no_stop", "equal", margin=0.01,
        ),
        Claim(
            "A run that is shorter than a table stops tables", "section 3.2 has no word on false stops",
            "stopped_tables", "run_24", "run_72", "higher", margin=0.01,
        ),
        Claim(
            "and training with it unlearns them", "section 3.2 has no word on false stops",
            "accuracy_of_tables", "run_24", "no_stop", "lower", margin=0.05,
        ),
    ),
    trial=train_and_count,
    curves=("eval_accuracy", "grad_norm_max", "response_tokens", "stopped_by_repetition_frac",
    "reward_part/looped"), )  # fmt: skip

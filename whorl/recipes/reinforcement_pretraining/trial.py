"""One arm at one seed: positions, training on them, accuracy, and a second stage on questions."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from whorl.cold_start import cold_start
from whorl.data import Metrics
from whorl.environments.catalog import make, spec_of
from whorl.environments.next_token import NextToken
from whorl.experiments.trials import Outcome, Trial, begin_or_go_on, train_run
from whorl.loop import begin
from whorl.recipes.reinforcement_pretraining.measures import accuracies, flops_of_training, law_of_compute
from whorl.recipes.reinforcement_pretraining.positions import entropies, positions_of, write_positions
from whorl.recipes.reinforcement_pretraining.recipe import PLAIN, QUESTIONS, ReinforcementPretraining
from whorl.reporting.run_directory import write_atomically
from whorl.run import open_run, start_run
from whorl.settings import ColdStart, Evaluation

TEST_TEXTS = 40
"""Texts at all of whose positions arms are compared."""

STARTS_OF_QUESTIONS = ("reasoning", "rpt", "more_text", "more_text_fast")
"""Arms whose policies are trained on questions afterwards, as in the paper's Table 2."""

QUESTIONS_EVALUATED = Evaluation(0, 256, 4)


def rpt_trial(trial: Trial) -> Outcome:
    """Positions by the start's entropies, training on them, and accuracy by bin."""
    asked, environment = trial.settings, make(trial.settings.environment)
    assert isinstance(asked, ReinforcementPretraining), f"expected the recipe's settings; got {type(asked)}"
    assert isinstance(environment, NextToken), f"texts are those of next_token; got {environment}"
    held_out, file = trial.folder / "held_out.json", trial.folder / "positions.jsonl"
    if not held_out.exists():
        shutil.rmtree(trial.folder / "proxy", ignore_errors=True)  # of a trial that was killed
        proxy = start_run(trial.arm, replace(trial.settings, environment=PLAIN), trial.folder / "proxy")
        found = write_positions(proxy, file, asked.train_texts, asked.lowest_entropy_nats)
        assert found["texts"] == asked.train_texts, f"arms would read other texts: {found}"
        places = positions_of(range(TEST_TEXTS), "test")
        plain = NextToken(way="continue")
        entropy = entropies(proxy, [plain.at("test", *p) for p in places])
        write_atomically(held_out, json.dumps([places, entropy]).encode())
    settings = replace(asked, environment=spec_of(replace(environment, positions=str(file))))
    has_law = trial.role == "method" and settings.law_every_steps > 0
    if settings.text_updates:
        settings = replace(settings, cold_start=text_training(settings))
        run = begin_or_go_on(replace(trial, settings=settings))
        if not run.warm:
            cold_start(run)
            begin(run)
        outcome = Outcome(run.directory.history(), run=run.directory.path)
    else:
        if has_law:
            every = settings.law_every_steps
            kept = settings.num_steps // every + 2  # the start and the end
            settings = replace(settings, checkpoint_every_steps=every, keep_checkpoints=kept)
        outcome = train_run(replace(trial, settings=settings))
    assert outcome.run is not None
    run = open_run(outcome.run, read_only=True)
    places, entropy = json.loads(held_out.read_text())
    values = accuracies(run, places, entropy)
    if trial.role != "start":
        values["flops"] = flops_of_training(run)
    if has_law:
        values |= law_of_compute(run, places, entropy)
    if asked.question_steps and trial.arm in STARTS_OF_QUESTIONS:
        values |= questions_from(trial, outcome.run, asked.question_steps)
    return replace(outcome, values=values)


def text_training(settings: ReinforcementPretraining) -> ColdStart:
    """Continued next-token prediction with the optimizer of the settings. No accuracy ends it."""
    rollouts = settings.problems_per_step * settings.rollouts_per_problem
    return ColdStart(settings.text_updates, 1.0, settings.text_updates, 128, rollouts, settings.optimizer)


def questions_from(trial: Trial, start: Path, num_steps: int) -> Metrics:
    """Accuracy at held-out questions before and after reinforcement learning on others, from the policy of a run."""
    asked = ReinforcementPretraining()  # whatever the arm's own optimizer and positions were
    settings = replace(
        trial.settings,
        environment=QUESTIONS, model=str(start), algorithm="GRPO,minus_kl_k3=0", num_steps=num_steps,
        # The recipe's warm-up is longer than this stage.
        optimizer=replace(asked.optimizer, warmup_steps=0),
        sampling=replace(trial.settings.sampling, max_tokens=32), evaluation=QUESTIONS_EVALUATED,
        text_updates=0, lowest_entropy_nats=asked.lowest_entropy_nats,
    )  # fmt: skip
    # Whatever the arm's role: the policy before training is a start here like the others.
    outcome = train_run(Trial(trial.arm, "method", settings, trial.folder / "questions"))
    accuracy = [row["eval_accuracy"] for row in outcome.rows if "eval_accuracy" in row]
    return {"questions_before": accuracy[0], "questions": accuracy[-1]}

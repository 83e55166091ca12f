"""A generative judge that prefers long answers: found while training, and recalibrated.

The paper (section 4.2): generative reward models prefer longer answers, debiasing them before training was not
enough, so during it the authors watch whether the policy grows longer without doing the task better, and recalibrate
the judge at once when it does. They publish neither thresholds nor how they recalibrate. Here the judge is scripted:
it errs on a tenth of the answers, and gives a planted share of its grade for length. The policy can lengthen its
answers with filler that does nothing.

The watch knows lengths, grades and answers, not which answers are right. Every step it asks, over the last few,
whether answers grew longer since the last calibration and whether, among answers to one problem that come to the same
result, the longer ones earn more. If both, the price of a character is raised by what it was found to earn. What is
right is known to the measures alone.
"""

import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import ClassVar

from whorl.environments.judged_arithmetic import JudgedArithmetic
from whorl.experiments.plan import Arm, Claim, Experiment, Measure
from whorl.experiments.readings import AtLeast, held_out, mean_of_last, total, value
from whorl.experiments.trials import Outcome, Trial, begin_or_go_on, carry_on
from whorl.learning.optimizer import OptimizerSettings
from whorl.recipes.minimax_m1.recipe import MinimaxM1
from whorl.rollouts import Player
from whorl.run import Run
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation
from whorl.verifiers.length_bias import Graded, slope_at_equal_answers


@dataclass(frozen=True)
class WatchedJudge(MinimaxM1):
    """The recipe with a judge in place of a verifier, and somebody who watches it."""

    scaled: ClassVar[tuple[str, ...]] = (
        *MinimaxM1.scaled,
        "a scripted judge with a planted bias in place of a generative reward model; five grades, as the paper's",
    )
    unsaid: ClassVar[tuple[str, ...]] = (
        *MinimaxM1.unsaid,
        "how length-seeking is found: a slope at equal answers of 3 standard errors and 10% more length, over 4 steps",
        "how the judge is recalibrated: that slope is taken off its grade",
    )

    watched_steps: int = 0
    """Steps over which the watch looks; 0: nobody watches."""
    standard_errors: float = 3.0
    """From so many on the slope of the reward on length is believed."""
    growth: float = 1.1
    """From this ratio to the length at the last calibration on the policy is said to seek length."""


@dataclass
class Watch:
    """Looks at every step's rollouts; says by how much a character is overpaid, if it is and is made use of."""

    settings: WatchedJudge
    steps: deque[list[Graded]] = field(default_factory=deque)
    calibrated_at: float | None = None
    """Mean length of a reply at the last calibration; at first that of the first steps."""

    def see(self, graded: list[Graded]) -> float | None:
        """A further step. The slope, if it is time to recalibrate: what was seen before then counts no more."""
        self.steps.append(graded)
        if len(self.steps) < self.settings.watched_steps:
            return None
        seen = [one for step in self.steps for one in step]
        mean_length = sum(one.length for one in seen) / len(seen)
        self.calibrated_at = self.calibrated_at or mean_length
        slope = slope_at_equal_answers(seen)
        is_paid = slope.value > self.settings.standard_errors * slope.standard_error
        if is_paid and mean_length >= self.settings.growth * self.calibrated_at:
            self.steps.clear()
            self.calibrated_at = mean_length
            return slope.value
        self.steps.popleft()
        return None


def graded_in(run: Run, step: int) -> list[Graded]:
    """The rollouts of a step as the judge saw them; the answer is what follows '#'."""
    rollouts = [stored.rollout for stored in run.directory.read_rollouts(step)]
    return [
        # By problem and not by group, whose number is its place in the step: the watch looks at several steps.
        Graded((one.problem.id, one.reply.rpartition("#")[2]), one.reply, len(one.reply), one.reward)
        for one in rollouts
        if one.reward is not None
    ]


def train_watched(trial: Trial) -> Outcome:
    """A run whose judge is recalibrated when its watch says so. After a kill the watch sees the past again.

    Values: `alarms`; `first_alarm`, known from below where there was none; `slope`, what a character earns at equal
    answers since the last recalibration, or in the whole run; none if no two answers can be compared.
    """
    run = begin_or_go_on(trial)
    assert isinstance(run.settings, WatchedJudge) and isinstance(run.player, Player)
    watch = Watch(run.settings)
    alarms: list[int] = []

    def look(run: Run, step: int) -> None:
        overpaid = watch.see(graded_in(run, step)) if watch.settings.watched_steps else None
        if overpaid is None:
            return
        alarms.append(step)
        assert isinstance(run.environment, JudgedArithmetic)
        price = run.environment.length_price + overpaid
        run.player.environment = run.environment = replace(run.environment, length_price=price)

    for step in range(1, run.step + 1):
        look(run, step)
    outcome = carry_on(trial, run, lambda run: look(run, run.step))
    values = {"alarms": float(len(alarms))}
    values["first_alarm"] = float(alarms[0]) if alarms else AtLeast(run.num_steps)
    since = range(alarms[-1] + 1 if alarms else 1, run.step + 1)
    slope = slope_at_equal_answers(one for step in since for one in graded_in(run, step))
    if math.isfinite(slope.standard_error):
        values["slope"] = slope.value
    return replace(outcome, values=values)


JUDGED = "judged_arithmetic,judge_errors=0.1"
BIASED = f"{JUDGED},length_share=0.5"
WATCHED = {"watched_steps": 4}

EXPERIMENT = Experiment(
    name="judge_length_bias",
    question="Is a judge's taste for length found without knowing what is right, and does recalibration end it?",
    cpu=WatchedJudge(
        environment=BIASED,
        max_context=128,
        cold_start=ColdStart(max_updates=1500, until_accuracy=0.5, check_every_updates=10),
        algorithm="CISPO,dynamic_sampling=False",
        sampling=Sampling(max_tokens=80),
        optimizer=OptimizerSettings(1e-4, warmup_steps=0),
        num_steps=30,
        problems_per_step=16,
        evaluation=Evaluation(0, 64, 1),
        stop_after_steps_without_signal=0,
        checkpoint_every_steps=1000,
        rollouts_every_steps=1,
    ),
    start={"environment": "judged_arithmetic"},
    arms=(
        Arm("unwatched", "baseline"),
        Arm("watched", "method", WATCHED),
        Arm("unbiased", "control", {"environment": JUDGED, **WATCHED}, "a judge that errs, without bias: false alarms"),
        Arm("verifier", "control", {"environment": "judged_arithmetic"}, "the truth as reward"),
    ),
    measures=(
        Measure(
            "length", "tokens of a reply at the end", mean_of_last("response_tokens", 3), False, "tokens", "ratio"
        ),
        Measure(
            "accuracy", "held-out accuracy at the end, by the verifier",
            held_out("eval_accuracy", 128, 2, environment="judged_arithmetic"), unit="fraction",
        ),
        Measure("alarms", "times the judge was recalibrated", value("alarms"), False, "times"),
        Measure("first_alarm", "step of the first alarm", value("first_alarm"), False, "steps"),
        Measure(
            "slope", "grade that a character earns at equal answers, since the last recalibration", value("slope"),
            higher_is_better=False, unit="grade",
        ),
        Measure("tokens", "tokens generated in training", total("generated_tokens"), False, "tokens", "ratio"),
    ),
    # `unbiased` errs as often as the biased judges do, so all that it lacks is the bias.
    claims=(
        Claim(
            "A judge that prefers length makes the policy grow longer", "section 4.2, no figure",
            "length", "unwatched", "unbiased", "higher", margin=1.2,
        ),
        Claim(
            "and not do the task better", "section 4.2, no figure",
            "accuracy", "unwatched", "unbiased", "lower", margin=0.02,
        ),
        Claim(
            "Watching and recalibrating makes answers shorter", "section 4.2, no figure",
            "length", "watched", "unwatched", "lower", margin=1.2,
        ),
        Claim(
            # From 10% on the watch itself takes answers for longer.
            "and ends the growth: they are as long as under a judge without bias", "section 4.2, no figure",
            "length", "watched", "unbiased", "equal", margin=1.1,
        ),
        Claim(
            # A fifth of what was planted: 0.5 of a grade over 40 characters.
            "Recalibrated, the judge no longer pays for length", "section 4.2, no figure",
            "slope", "watched", "unbiased", "equal", margin=0.0025,
        ),
        Claim(
            "The task is done better for being watched", "section 4.2, no figure",
            "accuracy", "watched", "unwatched", "higher", margin=0.02,
        ),
        Claim(
            # Nobody watches the verifier, so it has no alarms.
            "A judge without bias is left alone", "section 4.2 has no word on false alarms",
            "alarms", "unbiased", "verifier", "equal", margin=0.5,
        ),
    ),
    trial=train_watched,
    curves=("response_tokens", "reward", "reward_part/right", "reward_part/grade", "reward_part/length_price"),
)  # fmt: skip

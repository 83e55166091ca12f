"""A window of answers' length that grows in steps, against a jump and a window that stays.

The paper (section 5): the 80K model was trained from the 40K model with windows of 40K, 48K, 56K, 64K, 72K and 80K
tokens, the next one when the perplexity of generated text had converged and the 99th percentile of its length was
near the window. Late in each window the tails of long answers turned to noise: wrong answers met the limit sooner
than right ones, and the loss per token piled their negative gradient there.

Here the windows are the paper's divided by 2,000. Sums of four to seven digits have worked answers of 19, 25, 31 and 37
characters, so the first window has room for the working of the shortest alone. To answer at once, right in one case of
ten, fits every window: what a window cuts off, training in it can unlearn. Two fifths of the worked demonstrations loop
and never end, so that some wrong answers meet the limit however far it is.
"""

import math
from itertools import pairwise

import numpy as np

from whorl.experiments.plan import Arm, Claim, Experiment, Measure
from whorl.experiments.readings import area, last, mean_of_last, total
from whorl.experiments.trials import Outcome
from whorl.learning.optimizer import OptimizerSettings
from whorl.recipes.minimax_m1.recipe import MinimaxM1
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation
from whorl.window import LengthWindow

WINDOWS = (20, 24, 28, 32, 36, 40)
"""40K to 80K, divided by 2,000."""

# The triggers are the paper's, their numbers ours: it publishes none. Six steps at least in each window.
TRIGGERS = LengthWindow(converged_steps=3, converged_tolerance=0.1, converged_relative=True)

TASK = " + ".join(
    f"looping_arithmetic,num_terms={n},worked_frac=0.85,loop_frac=0.4,loop_tokens=64,table_frac=0.0"
    for n in (4, 5, 6, 7)
)


def wrong_excess(outcome: Outcome) -> float:
    """Tokens by which wrong training answers are longer than right ones, the mean over the steps that have both."""
    pairs = [(row.get("response_tokens_wrong"), row.get("response_tokens_right")) for row in outcome.rows]
    return float(
        np.mean([wrong - right for wrong, right in pairs if wrong is not None and right is not None])
    )


def openings(outcome: Outcome) -> list[tuple[int, int]]:
    """Indices of the rows with which a window opened, each with the number of steps in the window before."""
    stages = [(i, row["window_stage"]) for i, row in enumerate(outcome.rows) if row.get("window_stage")]
    found, since = [], 0
    for (_, before), (index, stage) in pairwise(stages):
        since += 1
        if stage != before:
            found.append((index, since))
            since = 0
    if not found:
        raise ValueError("no window opened")
    return found


def opening_rise(outcome: Outcome) -> float:
    """-log mu of a token in the (up to four) steps after an opening less that in the four before; the mean over the
    openings."""
    nats = [math.log(row["perplexity"]) if "perplexity" in row else math.nan for row in outcome.rows]
    rises = [np.nanmean(nats[i : i + 4]) - np.nanmean(nats[i - 4 : i]) for i, _ in openings(outcome)]
    return float(np.mean(rises))


def late_openings(outcome: Outcome) -> float:
    """Share of the openings that perplexity held up: they came later than the earliest possible step."""
    return float(np.mean([steps > 2 * TRIGGERS.converged_steps for _, steps in openings(outcome)]))


EXPERIMENT = Experiment(
    name="length_windows",
    question="Is a window that grows in steps better than a jump to its last size, and than staying at the first?",
    cpu=MinimaxM1(
        environment=TASK,
        max_context=96,
        cold_start=ColdStart(max_updates=2000, until_accuracy=0.4, check_every_updates=20),
        algorithm="CISPO,dynamic_sampling=False",
        sampling=Sampling(max_tokens=WINDOWS[-1]),
        length_window=TRIGGERS,
        optimizer=OptimizerSettings(1e-4, warmup_steps=0),
        num_steps=80,
        problems_per_step=16,
        evaluation=Evaluation(5, 128, 1),  # by the last window in every arm
        stop_after_steps_without_signal=0,
        checkpoint_every_steps=1000,
        rollouts_every_steps=1000,
    ),
    arms=(
        Arm("fixed", "baseline", {"length_window.tokens": WINDOWS[:1]}, "the first window throughout"),
        Arm("staged", "method", {"length_window.tokens": WINDOWS}),
        Arm("jump", "baseline", {"length_window.tokens": (WINDOWS[0], WINDOWS[-1])}, "the same triggers, one step"),
        Arm("full", "control", {}, "the last window throughout"),
    ),
    measures=(
        Measure("final", "held-out accuracy at the end", mean_of_last("eval_accuracy", 2), unit="fraction"),
        Measure("area", "mean held-out accuracy over all steps", area("eval_accuracy"), unit="fraction"),
        Measure(
            "length", "tokens of a held-out answer at the end", mean_of_last("eval_response_tokens", 2), unit="tokens"
        ),
        Measure("perplexity", "mean perplexity of generated text", area("perplexity"), False, "1", "ratio"),
        Measure(
            "opening_rise", "-log mu of a token after an opening less that before, four steps each", opening_rise,
            higher_is_better=False, unit="nats",
        ),
        Measure("late_openings", "share of the openings that came later than they could", late_openings, unit="1"),
        Measure("wrong_excess", "tokens by which wrong answers are longer", wrong_excess, False, "tokens"),
        Measure("stage", "window reached", last("window_stage"), unit="windows"),
        Measure("tokens", "tokens generated in training", total("generated_tokens"), False, "tokens", "ratio"),
    ),
    claims=(
        Claim(
            "A window that grows ends better than one that stays",
            "AIME 2024 86.0 (80K) against 83.3 (40K), Table 2", "final", "staged", "fixed", "higher", margin=0.02,
        ),
        Claim(
            "It ends better when it grows in steps than when it jumps", "section 5, no figure",
            "final", "staged", "jump", "higher", margin=0.02,
        ),
        Claim(
            "Text turns noisier when a window jumps than when it grows by a step", "section 5, no figure",
            "opening_rise", "jump", "staged", "higher", margin=0.01,
        ),
        Claim(
            "Wrong answers run less far beyond right ones in steps than after a jump", "section 5, no figure",
            "wrong_excess", "staged", "jump", "lower", margin=0.5,
        ),
        Claim(
            "A short window first loses nothing against the long one throughout", "section 5, no figure",
            "final", "staged", "full", "equal", margin=0.05,
        ),
    ),
    curves=("eval_accuracy", "window_tokens", "response_tokens_p99", "perplexity", "eval_response_tokens",
    "response_tokens_wrong", "response_tokens_right", "reward_part/looped"),
)  # fmt: skip

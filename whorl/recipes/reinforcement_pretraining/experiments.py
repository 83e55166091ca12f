"""Arms, measures and claims."""

from dataclasses import replace

from whorl.experiments.plan import Arm, Claim, Experiment, Measure
from whorl.experiments.readings import value
from whorl.recipes.reinforcement_pretraining.recipe import (
    BINS,
    PLAIN,
    START,
    ReinforcementPretraining,
    start_with,
)  # fmt: skip
from whorl.recipes.reinforcement_pretraining.trial import rpt_trial


def _claim(text: str, theirs: str, measure: str, baseline: str, margin: float | None = None) -> Claim:
    return Claim(text, theirs, measure, "rpt", baseline, margin=margin)


ACCURACIES = (
    *(
        Measure(name, f"held-out accuracy where the start's entropy is {lowest} nats or more", value(name))
        for name, lowest in BINS.items()
    ),
    Measure("sums", "held-out accuracy at sums", value("sums")),
    Measure("thought_sums", "thoughts at sums that end in the right digit", value("thought_sums")),
    Measure("others", "held-out accuracy everywhere else", value("others")),
    Measure("all", "held-out accuracy at all positions", value("all")),
)
COST = (
    Measure("tokens", "tokens written per prediction", value("tokens"), False, "tokens"),
    Measure("flops", "operations of training, reckoned", value("flops"), False, "FLOP", "ratio"),
)

TEXT = Arm("text", "start", {"environment": PLAIN}, "next-token prediction by the start, greedy")
REASONING = Arm("reasoning", "start", note="the start's thoughts and predictions")
RPT = Arm("rpt", "method")

# The texts are read whole: contexts of unsure positions alone teach to expect operands and names everywhere.
MORE_TEXT = {"environment": PLAIN, "lowest_entropy_nats": 0.0, "text_updates": 42}
CONTINUED = Arm(
    "more_text", "baseline", MORE_TEXT, "next-token prediction continued on the same texts, equal FLOP"
)
FAST = {"optimizer.learning_rate": 2e-3, "optimizer.max_grad_norm": 1.0}
"""The rate and the limit of the gradient with which the start was taught."""

HONEST_GATE = 0.6
"""Mean accuracy that ends an honest cold start: reached after 150 to 200 updates, as the other's gate is."""

EXPERIMENTS = (
    Experiment(
        name="reinforcement_pretraining",
        question="Does reasoning learned from a text predict its next tokens better than plain prediction?",
        cpu=ReinforcementPretraining(),
        start={"environment": START, "cold_start": ReinforcementPretraining().cold_start},
        trial=rpt_trial,
        arms=(
            TEXT,
            REASONING,
            RPT,
            CONTINUED,
            Arm("more_text_fast", "baseline", MORE_TEXT | FAST, "the same at the rate that taught the start"),
            Arm("any_position", "control", {"lowest_entropy_nats": 0.0}, "no filter by entropy, the same texts"),
            Arm("another_text", "control", {"environment": "next_token,reward=another_text"},
                "rewarded by how the next text goes on: what is said here does not help"),
            Arm("no_thought", "control", {"environment": "next_token,way=answer"}, "the box alone, as many steps"),
        ),
        measures=(
            *ACCURACIES,
            Measure("questions_before", "held-out questions right, before training on them", value("questions_before")),
            Measure("questions", "the same after 3 steps on others", value("questions")),
            *(
                Measure(f"r2_{name}", f"R2 of a power law of compute, {name} positions", value(f"r2_{name}"))
                for name in BINS
            ),
            *COST,
        ),
        claims=(
            *(
                _claim(f"better than plain prediction at {name} positions", f"{theirs} points (Table 1)", name, "text")
                for name, theirs in (("easy", "+3.51"), ("medium", "+4.10"), ("hard", "+3.32"))
            ),
            Claim(
                "better than plain prediction at all positions",
                "no such row: Table 1 has only positions at which a proxy is unsure",
                "all", "rpt", "text", margin=0.02,
            ),
            _claim("better than reasoning before training (which is taught to box wrong tokens here)",
                   "+22 to +42 points (Table 1)", "medium", "reasoning"),
            _claim("thoughts at sums come to the right digit more often than before training", "no such figure",
                   "thought_sums", "reasoning", 0.02),
            _claim("better than continued next-token prediction", "no such row in Table 1", "medium", "more_text"),
            _claim("better than that at the rate that taught the start", "no such row in Table 1", "medium",
                   "more_text_fast"),
            _claim("the text's own continuation is what teaches", "no such arm", "medium", "another_text", 0.02),
            Claim(
                "another text's continuation teaches nothing",
                "no such arm",
                "medium", "another_text", "reasoning", "equal", 0.02,
            ),
            _claim("a thought before the box is what helps, at as many steps", "no such arm", "medium", "no_thought",
                   0.02),
            _claim("unsure positions teach more than any", "no such arm", "medium", "any_position", 0.02),
            Claim(
                "prefix matching and first-token matching end alike",
                "about equal (appendix)",
                untestable="every box that the start is shown holds one token, so the two rewards judge nearly all of "
                "its boxes alike; arms of both were the same run at four seeds of five",
            ),
            Claim(
                "accuracy follows a power law of compute",
                "R2 0.995, 0.997 and 0.989 (Figure 4)",
                untestable="one decade of compute at one size shows no law, whatever the R2 of its fit",
            ),
            Claim(
                "a better start for reinforcement learning on questions",
                "58.3 against 52.7 (Table 2)",
                "questions", "rpt", "reasoning", margin=0.02,
            ),
            Claim(
                "a better start than continued next-token prediction makes",
                "58.3 against 13.0 (Table 2)",
                "questions", "rpt", "more_text", margin=0.02,
            ),
            Claim(
                "questions are answered better before any training on them",
                "56.3 against 51.2 (Table 2)",
                "questions_before", "rpt", "reasoning", margin=0.02,
            ),
        ),
    ),
    Experiment(
        name="honest_start",
        question="What does it add to a start that is taught to box what its thought came to?",
        cpu=ReinforcementPretraining(law_every_steps=0, question_steps=0),
        start={
            "environment": start_with(0.0),
            "cold_start": replace(ReinforcementPretraining().cold_start, until_accuracy=HONEST_GATE),
        },
        trial=rpt_trial,
        arms=(TEXT, REASONING, RPT, CONTINUED),
        measures=(*ACCURACIES, *COST),
        claims=(
            _claim("better than reasoning before training", "+22 to +42 points (Table 1)", "medium", "reasoning", 0.02),
            _claim("better than plain prediction", "+4.10 points (Table 1)", "medium", "text"),
            _claim("better than continued next-token prediction", "no such row in Table 1", "medium", "more_text"),
            _claim("better than plain prediction at all positions", "no such row", "all", "text", 0.02),
        ),
    ),
)  # fmt: skip

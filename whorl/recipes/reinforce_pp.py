"""REINFORCE++ (arXiv:2501.03262): critic-free policy gradients whose advantages are normalised over the whole batch.

Two variants. The first needs one sample per prompt: the KL to the start is a cost of each token inside the reward,
summed from the token on, and the result is whitened over all tokens of the batch. The second, for reasoning, has
several: the mean of the group is the baseline, the batch gives the scale, and the KL is a k2 term of the loss.
GRPO divides by the std of each prompt's rewards instead, which weighs prompts by how nearly they are solved.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from whorl.experiments.plan import Arm, Claim, Experiment, Measure
from whorl.experiments.readings import held_out, mean_of_last
from whorl.experiments.trials import Outcome
from whorl.learning.optimizer import OptimizerSettings
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation, Settings


@dataclass(frozen=True)
class ReinforcePp(Settings):
    """REINFORCE++ with a baseline on chain arithmetic, from a cold start."""

    claim: ClassVar[str] = (
        "Normalising advantages over the batch in place of each prompt over-fits small prompt sets less and "
        "generalises better to harder problems than GRPO (arXiv:2501.03262)."
    )
    scaled: ClassVar[tuple[str, ...]] = (
        "a hybrid of 1.2M parameters made here in place of 7B to 14B language models",
        "sums of digits in place of AIME, Knights & Knaves and RLHF prompts; 32 training problems in place of 30",
        "a few dozen steps of 256 rollouts; the paper's batches have 256 (version 1) to over 1,024",
        "in the comparisons no arm has a KL to the start, so that the arms differ in nothing but credit and average",
    )
    unsaid: ClassVar[tuple[str, ...]] = (
        "the coefficient of the k2 term: 1e-5, from the authors' example code",
        "version 9 lists no hyperparameters; clip 0.2 and two updates per batch are version 1's",
        "the average over tokens: the formula's mean per response; the authors' code takes that of the batch's tokens",
        "the main equation has an advantage per token, an appendix one of 0 before the last: per token here",
        "learning rate: one for all arms, ours; the paper's claims are single runs without intervals",
    )

    environment: str = "chain_arithmetic"
    max_context: int = 64
    cold_start: ColdStart = field(
        default_factory=lambda: ColdStart(max_updates=2000, until_accuracy=0.3, check_every_updates=10)
    )
    algorithm: str = "REINFORCE_PP_BASELINE"
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=40))
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(5e-4, warmup_steps=5))
    num_steps: int = 60
    problems_per_step: int = 32
    rollouts_per_problem: int = 8
    updates_per_batch: int = 2  # version 1: rollout batch 256, train batch 128
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(10, 128, 2))
    stop_after_steps_without_signal: int = (
        0  # the little that is left to learn at the end is part of the comparison
    )


LATER = "(claim added after the run)"
"""Of claims that were put when the results were there, and are judged from what was kept."""

START = "chain_arithmetic,num_terms=3,worked_frac=0.85 + chain_arithmetic,num_terms=4,worked_frac=0.85"
"""What the cold start shows: sums of three and of four digits, mostly worked out. With half of them answered at once,
as in the quickstart, the two lengths together were not learned in 475 updates. So sums of four are kept or lost by
training on three; only longer ones are new."""

ARMS = (
    Arm(
        "rfpp_baseline", "method", {"algorithm": "REINFORCE_PP_BASELINE,minus_kl_k2=0"}, "the second variant"
    ),
    Arm(
        "rfpp",
        "method",
        {"algorithm": "REINFORCE_PP,kl_coefficient=0", "problems_per_step": 256, "rollouts_per_problem": 1},
        "the first variant: no groups, as many samples a step (of 32 problems 8 each); whitened, 0 and 1 are -1 and 1",
    ),
    Arm("grpo", "baseline", {"algorithm": "GRPO,minus_kl_k3=0"}, "std of the group"),
    Arm(
        "rfpp_group_std",
        "control",
        {"algorithm": "REINFORCE_PP_BASELINE,minus_kl_k2=0,group_std=True"},
        "the second variant with the std of the group put back: isolates the claim",
    ),
    Arm("rloo", "baseline", {"algorithm": "RLOO"}, "leave-one-out baseline, no clip"),
    Arm("dr_grpo", "control", {"algorithm": "DR_GRPO,max_tokens=40"}, "no std at all, no division by length"),
)


def gradient_spikes(outcome: Outcome) -> float:
    """Largest norm of an update's gradient over the median one: how much worse than usual the worst was."""
    norms = [row["grad_norm_max"] for row in outcome.rows if row.get("grad_norm_max") is not None]
    return float(max(norms) / np.median(norms))


PASS_1 = Measure(
    "pass_1", "held-out pass@1, same distribution", held_out("eval_accuracy", 128, 16), True, "fraction"
)
PASS_16 = Measure(
    "pass_16", "held-out pass@16, same distribution", held_out("eval_pass_at_k", 128, 16), True, "fraction"
)


def harder(name: str, text: str, num_terms: int, metric: str = "eval_accuracy") -> Measure:
    spec = f"chain_arithmetic,num_terms={num_terms}"
    return Measure(name, text, held_out(metric, 128, 16, environment=spec), True, "fraction")


FEW = replace(ReinforcePp(), environment="chain_arithmetic,num_terms=3,train_problems=32")
ON_FEW = (
    Measure("train", "accuracy on the 32 problems", mean_of_last("accuracy", 5), True, "fraction"),
    PASS_1,
    PASS_16,
    harder("harder_1", "pass@1 with one term more", 4),
    harder("harder_16", "pass@16 with one term more", 4, "eval_pass_at_k"),
    Measure("entropy", "entropy at the end", mean_of_last("entropy_nats", 5), True, "nats"),
    Measure("spikes", "largest gradient norm over the median", gradient_spikes, False, "", "ratio"),
)

RATES = {"slow": FEW.optimizer.learning_rate / 3, "fast": FEW.optimizer.learning_rate * 3}


def at_other_rates() -> tuple[Arm, ...]:
    """REINFORCE++ with a baseline, the same with the std of the group, and GRPO, at a third and thrice the rate."""
    kept = [arm for arm in ARMS if arm.name in ("rfpp_baseline", "rfpp_group_std", "grpo")]
    return tuple(
        Arm(f"{arm.name}_{name}", arm.role, {**arm.changes, "optimizer.learning_rate": rate})
        for name, rate in RATES.items()
        for arm in kept
    )


def claims_at(name: str, rate: str) -> tuple[Claim, ...]:
    method, baseline, group_std = (f"{arm}_{name}" for arm in ("rfpp_baseline", "grpo", "rfpp_group_std"))
    return (
        Claim(f"{rate} REINFORCE++ fits a small training set less far than GRPO", "71.0 against 95.0 (GRPO)",
              "train", method, baseline, "lower", 0.01),
        Claim(f"{rate} it keeps more at sixteen attempts", "AIME 2025 pass@16 40.0 against 0.4 (GRPO)",
              "pass_16", method, baseline, "higher", 0.01),
        Claim(f"{rate} the std of the group is the cause {LATER}", "no figure: argued from the bias of that std",
              "pass_16", method, group_std, "higher", 0.01),
    )  # fmt: skip


EXPERIMENTS = (
    Experiment(
        "overfit",
        "Trained on 32 problems only, which normalisation fits them most, and which keeps what it did not see?",
        FEW,
        ARMS,
        ON_FEW,
        (
            Claim("REINFORCE++ fits a small training set less far than GRPO",
                  "71.0 against 95.0 (GRPO) on 30 problems of AIME 2024",
                  "train", "rfpp_baseline", "grpo", "lower", 0.01),
            Claim("REINFORCE++ keeps more of what was not trained on, at one attempt",
                  "AIME 2025 pass@1 2.5 against 0.0 (GRPO)", "pass_1", "rfpp_baseline", "grpo", "higher", 0.01),
            Claim("and far more at sixteen", "AIME 2025 pass@16 40.0 against 0.4 (GRPO)",
                  "pass_16", "rfpp_baseline", "grpo", "higher", 0.01),
            Claim("the std of the group is the cause", "no figure: argued from the bias of that std",
                  "pass_16", "rfpp_baseline", "rfpp_group_std", "higher", 0.01),
            Claim("gradients spike less", "no figure: argued from a std that goes to 0",
                  "spikes", "rfpp_baseline", "grpo", "lower", 1.1),
            # The paper's figures of this comparison are of the first variant.
            Claim(f"the first variant fits a small training set less far than GRPO {LATER}",
                  "71.0 against 95.0 (GRPO) on 30 problems of AIME 2024", "train", "rfpp", "grpo", "lower", 0.01),
            Claim(f"the first variant keeps more at one attempt {LATER}", "AIME 2025 pass@1 2.5 against 0.0 (GRPO)",
                  "pass_1", "rfpp", "grpo", "higher", 0.01),
            Claim(f"the first variant keeps more at sixteen {LATER}", "AIME 2025 pass@16 40.0 against 0.4 (GRPO)",
                  "pass_16", "rfpp", "grpo", "higher", 0.01),
        ),
        start={"environment": START},
    ),
    Experiment(
        "difficulty",
        "Trained on sums of three digits without end, which normalisation keeps sums of four, which the start saw, and "
        "carries over to five and six, which it did not?",
        replace(ReinforcePp(), environment="chain_arithmetic,num_terms=3"),
        ARMS[:3],
        (PASS_1, harder("harder_1", "pass@1 with one term more", 4),
         harder("five_terms", "pass@1 with five terms, never shown", 5),
         harder("six_terms", "pass@1 with six terms, never shown", 6),
         Measure("train", "training accuracy at the end", mean_of_last("accuracy", 5), True, "fraction")),
        (
            Claim("it generalises better to harder problems", "Knights & Knaves, average of 2 to 8 people: 62.1 "
                  "against 55.7 (GRPO), the gap growing from 4 people on",
                  "harder_1", "rfpp_baseline", "grpo", "higher", 0.01),
            Claim("it generalises better to five terms, which nothing showed", "the gap grows from 4 people on",
                  "five_terms", "rfpp_baseline", "grpo", "higher", 0.01),
            Claim("it generalises better to six terms, which nothing showed", "the gap grows from 4 people on",
                  "six_terms", "rfpp_baseline", "grpo", "higher", 0.01),
            Claim("one sample per prompt is as good as a group at equal samples", "Arena-Hard 46.7 (k = 1) against "
                  "46.8 (GRPO, k = 4)", "pass_1", "rfpp", "grpo", "equal", 0.03),
            Claim("mathematics of a 7B model", "AIME 2024 pass@8 21.0 against 19.0, MATH-500 72.0 against 73.0 (GRPO)",
                  untestable="it needs a pretrained language model and those benchmarks"),
            Claim("tool-integrated mathematics", "avg@32 24.10 against 22.58 (GRPO), 21.85 (PPO)",
                  untestable="it needs a pretrained language model that calls tools"),
        ),
        start={"environment": START},
    ),
    Experiment(
        "learning_rates",
        "Is the comparison on 32 problems another at a third and at thrice the learning rate?",
        FEW,
        at_other_rates(),
        ON_FEW,
        (*claims_at("slow", "at a third of the rate"), *claims_at("fast", "at thrice the rate")),
        start={"environment": START},
    ),
)  # fmt: skip

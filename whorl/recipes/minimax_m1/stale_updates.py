"""CISPO, GRPO and DAPO at 1, 4 and 16 updates per batch, and what becomes of the tokens at a fork.

The paper's reason for CISPO (section 3.1): tokens at which reasoning turns are improbable, so after the first
update of a batch their ratio is beyond PPO's bound and the other updates no longer train them. Here the fork
is planted: a worked answer begins with `?`, in 3% of the demonstrations, and is right far more often. With
one update per batch all ratios are 1; what the methods then differ by is no clip: CISPO and DAPO draw again where a
group has no signal and average over a group's tokens, and DAPO punishes overlong answers. The claim is about 16.
"""

import numpy as np

from whorl.experiments.plan import Arm, Claim, Experiment, Measure, Role
from whorl.experiments.readings import Reading, area, largest, mean_of_last, steps_to, total
from whorl.experiments.trials import Outcome
from whorl.learning.optimizer import OptimizerSettings
from whorl.recipes.minimax_m1.recipe import MinimaxM1
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation

MAX_TOKENS = 40

METHODS = {
    "cispo": "CISPO",
    # DAPO's overlong punishment begins a fifth before the limit, as in its paper (4,096 of 20,480 tokens).
    "dapo": f"DAPO,max_tokens={MAX_TOKENS},buffer_tokens={MAX_TOKENS // 5}",
    # The paper does not say whether its GRPO had a KL term. None of the three has one here.
    "grpo": "GRPO,minus_kl_k3=0",
    # The clip alone: GRPO in everything else, so that no other difference can be mistaken for it.
    "cispo_as_grpo": "CISPO,average=sequence_mean,dynamic_sampling=False",
}
ROLES: dict[str, Role] = {
    "cispo": "method",
    "dapo": "baseline",
    "grpo": "baseline",
    "cispo_as_grpo": "control",
}

LEARNING_RATES = {1: 1e-4, 4: 5e-5, 16: 2.5e-5}
"""By updates per batch: the square root of their number divides the rate, so that a step moves the weights by a
similar amount. The same for all methods; the paper publishes none."""


def arms() -> tuple[Arm, ...]:
    """Every method at every number of updates. The paper's own comparison is at 16 and stands first."""
    found = []
    for updates in (16, 4, 1):
        for name, algorithm in METHODS.items():
            changes = {
                "algorithm": algorithm,
                "updates_per_batch": updates,
                "optimizer.learning_rate": LEARNING_RATES[updates],
            }
            found.append(Arm(f"{name}_{updates}", ROLES[name], changes))
    return tuple(found)


def share(name: str) -> Reading:
    """A share of trained tokens, mean over the run's steps. A step with nothing to train on has none."""
    return lambda outcome: float(np.mean([row.get(name, 0.0) for row in outcome.rows if row["step"]]))


def forks_dropped(outcome: Outcome) -> float:
    """Share of forks that got no gradient, over the run's updates."""
    return total("watched_dropped_frac")(outcome) / total("watched_frac")(outcome)


def dropped_excess(outcome: Outcome) -> float:
    """Share of forks without gradient minus that of all trained tokens."""
    return forks_dropped(outcome) - share("dropped_frac")(outcome)


REGIONS = tuple(
    Measure(f"{side}_{sign}", text, share(f"{side}_{sign}_frac"), higher_is_better=False, unit="fraction")
    for side, sign, text in (
        ("above_max", "positive", "tokens above the upper bound, advantage > 0: PPO drops them"),
        ("above_max", "negative", "above it, advantage < 0: PPO has no bound"),
        ("below_min", "positive", "tokens below the lower bound, advantage > 0"),
        ("below_min", "negative", "below it, advantage < 0: PPO drops them"),
    )
)
"""Who stands outside of each method's own bounds: 0.8 and 1.2 (GRPO), 0.8 and 1.28 (DAPO), 0 and 5 (CISPO)."""


EXPERIMENT = Experiment(
    name="stale_updates",
    question="Does CISPO keep training the tokens that GRPO and DAPO drop, and is it faster for that?",
    cpu=MinimaxM1(
        environment="forked_arithmetic",
        max_context=64,
        watch="?",
        cold_start=ColdStart(
            max_updates=1500, until_accuracy=0.5, check_every_updates=20, check_problems=256
        ),
        sampling=Sampling(max_tokens=MAX_TOKENS),
        optimizer=OptimizerSettings(1e-4, warmup_steps=0),
        num_steps=30,
        evaluation=Evaluation(2, 128, 1),
        max_redraws=2,
        stop_after_steps_without_signal=0,  # the end of a run that has learned everything
        checkpoint_every_steps=1000,
        rollouts_every_steps=1000,
    ),
    # Twenty times the parameters, twice the rollouts, five terms in place of four: a right worked answer to six would
    # be long enough for DAPO's overlong punishment. In bf16, where one token of a million is a nat or two off its
    # sampler's log-prob.
    gpu=MinimaxM1(
        environment="forked_arithmetic,num_terms=5",
        model="m1-small,num_layers=4,softmax_period=4",
        max_context=64,
        dtype="bfloat16",
        replay_experts=True,
        watch="?",
        cold_start=ColdStart(
            max_updates=1500, until_accuracy=0.5, check_every_updates=20, check_problems=256,
            examples_per_update=128, optimizer=OptimizerSettings(1e-3, warmup_steps=20),
        ),
        sampling=Sampling(max_tokens=MAX_TOKENS),
        optimizer=OptimizerSettings(1e-4, warmup_steps=0),
        num_steps=20,
        rollouts_per_problem=16,
        max_running=512,
        token_budget=32_768,
        sampler_gap_limit_nats=3.0,
        evaluation=Evaluation(1, 256, 1),
        max_redraws=2,
        stop_after_steps_without_signal=0,
        checkpoint_every_steps=1000,
        rollouts_every_steps=1000,
    ),
    # The start is taught the working on problems that ask for it; it then hardly ever works unasked.
    start={"environment": "forked_arithmetic,explained_frac=0.5"},
    gpu_start={"environment": "forked_arithmetic,num_terms=5,explained_frac=0.5"},
    arms=arms(),
    measures=(
        Measure(
            "steps_to_half", "steps until held-out accuracy reaches 0.5", steps_to("eval_accuracy", 0.5),
            higher_is_better=False, unit="steps", compare="ratio",
        ),
        Measure(
            "tokens_to_half", "generated tokens until then", steps_to("eval_accuracy", 0.5, over="generated_tokens"),
            higher_is_better=False, unit="tokens", compare="ratio",
        ),
        Measure("area", "mean held-out accuracy over all steps", area("eval_accuracy"), unit="fraction"),
        Measure("final", "held-out accuracy at the end", mean_of_last("eval_accuracy", 3), unit="fraction"),
        Measure(
            "fork_dropped_excess", "share of forks without gradient, beyond that of all tokens", dropped_excess,
            higher_is_better=False, unit="fraction",
        ),
        Measure("forks_dropped", "share of forks without gradient", forks_dropped, False, "fraction"),
        Measure("dropped", "share of all tokens without gradient", share("dropped_frac"), False, "fraction"),
        *REGIONS,
        Measure("tail", "tokens whose importance weight is above 2", share("ratio_above_2_frac"), False, "fraction"),
        Measure(
            "largest_ratio", "largest importance weight before any clip", largest("ratio_max"),
            higher_is_better=False, compare="ratio",
        ),
        Measure("entropy", "entropy at the end", mean_of_last("entropy_nats", 3), unit="nats"),
        Measure("tokens", "tokens generated", total("generated_tokens"), False, "tokens", "ratio"),
    ),
    claims=(
        Claim(
            "CISPO reaches an accuracy in fewer steps than DAPO",
            "half of the steps (Figure 2; read off it, CISPO has at step 450 the 34.5 that DAPO has at 960)",
            "steps_to_half", "cispo_16", "dapo_16", "lower", margin=1.1,
        ),
        Claim(
            "CISPO learns faster than GRPO at the same number of steps",
            "AIME 2024 at step 450: 34.5 against 21 (Figure 2, read off it)",
            "area", "cispo_16", "grpo_16", "higher",
        ),
        Claim(
            "What makes it faster is the clip", "section 3.1, no figure of its own",
            "area", "cispo_as_grpo_16", "grpo_16", "higher",
        ),
        Claim(
            "PPO's clip drops the tokens of a fork more often than others",
            "section 3.1, no figure", "fork_dropped_excess", "grpo_16", "cispo_16", "higher",
        ),
        Claim(
            "With one update per batch the clip makes no difference", "follows from Eq. 4-5: all ratios are 1",
            "area", "cispo_as_grpo_1", "grpo_1", "equal", margin=0.02,
        ),
    ),
    curves=("eval_accuracy", "watched_frac", "watched_dropped_frac", "dropped_frac", "entropy_nats",
    "ratio_max", "ratio_above_2_frac"), )  # fmt: skip

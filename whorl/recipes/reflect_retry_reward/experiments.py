"""Arms, measures and claims, on sums, on countdown and on function calling."""

from dataclasses import replace

from whorl.experiments.plan import Arm, Claim, Experiment, Measure
from whorl.experiments.readings import largest, mean_of_last, value
from whorl.learning.optimizer import OptimizerSettings
from whorl.recipes.reflect_retry_reward.recipe import ONCE, ReflectRetryReward
from whorl.recipes.reflect_retry_reward.trial import reflect_trial
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Settings

CALLS = "function_calling,num_tools=3,max_calls=1"

SIGNAL = mean_of_last("groups_with_signal_frac", 10_000)

MEASURES = (
    Measure("second_try", "held-out problems right at either try", value("second_try"), unit="fraction"),
    Measure("first_try", "held-out problems right at the first try", value("first_try"), unit="fraction"),
    Measure("retry", "retries right after a failure", value("retry"), unit="fraction"),
    Measure("retry_own", "the same again, own reflection put in", value("retry_own"), unit="fraction"),
    Measure("retry_swapped", "with the next problem's reflection", value("retry_swapped"), unit="fraction"),
    Measure("reflection_tokens", "length of a reflection", value("reflection_tokens"), False, "tokens"),
    Measure("advice", "reflections in the form of working", value("advice"), unit="fraction"),
    Measure("told_answer", "reflections that hold a right answer", value("told_answer"), False, "fraction"),
    Measure("failures", "failures that were collected", value("failures"), unit="problems"),
    Measure("updates", "updates", largest("step"), unit="steps"),
    Measure("with_signal", "groups whose rewards differ, mean over training", SIGNAL, unit="fraction"),
)  # fmt: skip

CLAIMS = (
    Claim(
        "second tries get better",
        "+9.0 points in function calling, +16.0 in countdown on average (Tables 1 and 2)",
        "second_try", "rrr", "start", margin=0.05,
    ),
    Claim(
        "first tries get better though they are not rewarded",
        "countdown, Qwen2.5-1.5B: 6.0% to 34.9% (Table 2)",
        "first_try", "rrr", "start", margin=0.03,
    ),
    Claim("more than a retry without reflection, trained", "no such arm", "second_try", "rrr", "no_reflection"),
    Claim("more than a retry without reflection, untrained", "no such arm", "second_try", "rrr", "start_none"),
    Claim("more than with a constant reflection", "no such arm", "second_try", "rrr", "constant"),
    Claim("the rewards of other problems teach less", "no such arm", "second_try", "rrr", "shuffled"),
    Claim(
        "as good as with the wrong mask, which trains retries too", "no such arm",
        "second_try", "rrr", "answers_too", "equal", margin=0.05,
    ),
    Claim(
        "first tries get better than by GRPO on first tries, at equal tokens", "no such arm",
        "first_try", "rrr", "grpo", margin=0.03,
    ),
    Claim(
        "failures collected once teach more than fresh ones at equal tokens, those of collecting included",
        "no figure: no tokens go to problems that are solved already",
        "second_try", "rrr", "fresh",
    ),
    Claim("reflections get shorter", "Section 5.2, examples", "reflection_tokens", "rrr", "start", "lower"),
    Claim(
        "little is forgotten elsewhere",
        "less than 1% on MMLU-Pro, GSM8K, HellaSwag and MATH",
        untestable="a model made on one task has nothing else to forget",
    ),
)  # fmt: skip


START = Arm("start", "start", note="the model before training, with reflections")


def taught(task: str, hinted_gate: bool) -> dict[str, object]:
    """Changes of the start: whatever an arm does, it starts from the model that learned to try, reflect and retry."""
    environment = f"{task},hints_in_validation=True" if hinted_gate else task
    return {"environment": environment, "trained_roles": ("reflection",), "rewards_of": "own retry"}


def unreflected(task: str, reflection: str) -> dict[str, object]:
    """Changes of an arm in which nobody reflects: there the retries are trained, or nothing would be."""
    return {"environment": f"{task},reflection={reflection}", "trained_roles": ("retry",)}


def experiment(
    name: str,
    question: str,
    once: str,
    *,
    cpu: Settings | None = None,
    gpu: Settings | None = None,
    hinted_gate: bool = False,
) -> Experiment:
    """The paper's claims on one task: `once` is the task itself, tried twice in the settings that are given.

    `hinted_gate`: a start passes by its retries after useful reflections, not by its accuracy at either try.
    """
    base = cpu or gpu
    assert base is not None, "an experiment has settings"
    task = base.environment
    return Experiment(
        name=name,
        question=question,
        cpu=cpu,
        gpu=gpu,
        budget="generated_tokens",
        start=taught(task, hinted_gate),
        trial=reflect_trial,
        arms=(
            START,
            Arm("start_none", "start", {"environment": f"{task},reflection=none"}, "retries at once"),
            Arm("rrr", "method"),
            Arm("fresh", "control", {"collected_failures": False}, "failures of the policy as it is, in every step"),
            Arm(
                "grpo", "baseline", {"environment": once, "trained_roles": ("assistant",)},
                "GRPO on first tries alone; the paper has no such arm",
            ),
            Arm("no_reflection", "control", unreflected(task, "none"), "retries at once, and they are trained"),
            Arm(
                "constant", "control",
                # To find nothing to learn is a result of this control, not a fault that ends it.
                {**unreflected(task, "constant"), "stop_after_steps_without_signal": 0},
                "one sentence for all, retries are trained",
            ),
            Arm("shuffled", "control", {"rewards_of": "another problem"}, "no link of reflection and retry"),
            Arm("answers_too", "control", {"trained_roles": ("reflection", "retry")}, "the wrong mask"),
        ),
        measures=MEASURES,
        claims=CLAIMS,
    )  # fmt: skip


def rates(task: str, gpu: Settings, *, hinted_gate: bool = False) -> Experiment:
    """The method, and retries without a reflection, at lower learning rates than the arms of `task` have."""
    arms, claims = [], []
    for rate in ("3e-5", "1e-5"):
        method, control = f"rrr_{rate}", f"no_reflection_{rate}"
        at = {"optimizer.learning_rate": float(rate)}
        arms += [
            Arm(method, "method", at),
            Arm(
                control,
                "control",
                unreflected(gpu.environment, "none") | at,
                "retries at once, and they are trained",
            ),
        ]
        claims += [
            Claim(
                f"second tries get better at {rate}", "on average (Tables 1 and 2), at 5e-7",
                "second_try", method, "start", margin=0.05,
            ),
            Claim(
                f"first tries get better at {rate}", "of most models (Tables 1 and 2), at 5e-7",
                "first_try", method, "start", margin=0.03,
            ),
            Claim(
                f"more than a retry without reflection, trained, at {rate}", "no such arm",
                "second_try", method, control,
            ),
        ]  # fmt: skip
    return Experiment(
        name=f"{task}_rates",
        question=f"Is it another in {task.replace('_', ' ')} at a third and at a tenth of the learning rate?",
        cpu=None,
        gpu=gpu,
        budget="generated_tokens",
        start=taught(gpu.environment, hinted_gate),
        trial=reflect_trial,
        arms=(START, Arm("rrr", "method", note="at the rate of the other arms, 1e-4"), *arms),
        measures=MEASURES,
        claims=tuple(claims),
    )


ON_A_GPU = {
    "model": "m1-small,num_layers=4,softmax_period=4",
    "dtype": "bfloat16",
    "replay_experts": True,
    # Where hardly anything but one token is likely, bf16 leaves a nat or two of the others'.
    "sampler_gap_limit_nats": 3.0,
    "optimizer": OptimizerSettings(1e-4, beta2=0.999, eps=1e-8, warmup_steps=5),
    "num_steps": 1000,
    "max_running": 512,
    "token_budget": 65_536,
}
"""A hybrid of 24M parameters with experts, three lightning layers and a softmax one."""


def gate(accuracy: float) -> ColdStart:
    """The cold start of those, up to this accuracy on validation problems."""
    return ColdStart(
        max_updates=1500, until_accuracy=accuracy, check_every_updates=50, check_problems=512,
        examples_per_update=256, optimizer=OptimizerSettings(1e-3, warmup_steps=50),
    )  # fmt: skip


COUNTDOWN = replace(
    ReflectRetryReward(),
    environment="reflect_retry:countdown,first_right_frac=0.3",
    max_context=128,
    sampling=Sampling(max_tokens=40),
    cold_start=gate(0.36),
    num_generated_tokens=500_000,
    failed_queries=2000,
    answers_per_query=8,
    **ON_A_GPU,
)

CALLING = replace(
    ReflectRetryReward(),
    environment=f"reflect_retry:{CALLS},first_right_frac=0.3",
    max_context=900,
    sampling=Sampling(max_tokens=160),
    # The request holds all that an answer needs, so accuracy alone does not show whether retries follow their
    # reflection: at 0.55 of either try they did not. Who ignores it is right at 0.675 after a useful one.
    cold_start=gate(0.8),
    num_generated_tokens=1_200_000,
    failed_queries=600,  # an attempt has some 70 tokens, of countdown 7
    answers_per_query=8,
    **ON_A_GPU,
)

EXPERIMENTS = (
    experiment(
        "reflect_retry_reward",
        "Does rewarding reflections alone make second tries better, and first tries too?",
        ONCE,
        cpu=replace(ReflectRetryReward(), num_steps=400, num_generated_tokens=150_000, answers_per_query=8),
    ),
    experiment(
        "countdown",
        "Does it in countdown, where a reflection can say which numbers to join?",
        "countdown",
        gpu=COUNTDOWN,
    ),
    experiment(
        "function_calling",
        "Does it in function calling, where a reflection can name the argument that was wrong?",
        CALLS,
        gpu=CALLING,
        hinted_gate=True,
    ),
    rates("countdown", COUNTDOWN),
    rates("function_calling", CALLING, hinted_gate=True),
)

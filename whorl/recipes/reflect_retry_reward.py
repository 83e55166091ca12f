"""Reflect, Retry, Reward (arXiv:2505.24726): after a failure, reward the reflection that makes the retry succeed.

    attempt y1 ~ pi(. | q)                 right: nothing to learn
    "wrong"                                only that it failed is disclosed
    reflections z_1 .. z_G ~ pi(. | q, y1, "wrong")            a group: the same q and y1, different z
    the task again, retries y2_i ~ pi(. | q, y1, "wrong", z_i, q)
    r_i = V(q, y2_i),   A_i = (r_i - mean) / std,   the loss is GRPO's on the tokens of z_i alone

The environment (`reflect_retry`) plays this and labels every token with its role; the attempt is written once for its
group. No logit at a token of an attempt, a retry or a message has a gradient: an answer is never rewarded for being
right. (With experts, the router's balance loss covers all tokens.)

    whorl train reflect_retry_reward                          fresh attempts of the policy in every step
    python -m whorl.recipes.reflect_retry_reward RUN FILE     failed attempts of a run's policy, once, to FILE

Training with `--model RUN --cold-start.max-updates 0 --environment reflect_retry:...,failures=FILE` is then the paper's
way: no sample goes to problems already solved, and y1 stays that of the start model. The experiment does so, and takes
the tokens that the collecting costs off the arm's own.
"""

import json
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int

from whorl.algorithms.algorithm import Algorithm
from whorl.data import Group, Metrics, Problem, Rollout, Score, Turn
from whorl.environments.catalog import make, spec_of
from whorl.environments.reflect_retry import ReflectRetry, saying
from whorl.environments.reflections import gives_advice
from whorl.experiments.plan import Arm, Claim, Experiment, Measure
from whorl.experiments.readings import largest, mean_of_last, value
from whorl.experiments.trials import Outcome, Trial, train_run
from whorl.faults import Stop
from whorl.learning.optimizer import OptimizerSettings
from whorl.reporting.run_directory import write_atomically
from whorl.run import Run, open_run, start_run
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation, Settings

ONCE = "chain_arithmetic,num_terms=4,modulus=5"
TASK = f"reflect_retry:{ONCE},first_right_frac=0.3"
CALLS = "function_calling,num_tools=3,max_calls=1"


@dataclass(frozen=True)
class ReflectRetryReward(Settings):
    """GRPO on the tokens of the reflection alone; its reward is the verdict on the retry."""

    claim: ClassVar[str] = (
        "Rewarding only reflections whose retry succeeds raises second-try accuracy, and first-try accuracy too, "
        "though no answer token is rewarded (arXiv:2505.24726 Tables 1 and 2: on average +9.0 points in function "
        "calling and +16.0 in countdown)."
    )
    scaled: ClassVar[tuple[str, ...]] = (
        "a hybrid of 1.2M parameters made here (24M on a GPU) in place of 1.5 to 8 billion, taught to try, to reflect "
        "in four ways of mixed use and to try again; reinforcement learning selects among them",
        "on a CPU sums of four digits modulo five in place of countdown and function calling: after 600 updates of 64 "
        "demonstrations in countdown 12 to 16% of first tries were right, and 9 to 20% of retries, whatever the "
        "reflection was, so there was nothing to select",
        "one failed attempt of each of at most 1,000 problems, of 8 samples (16 on a GPU), in place of up to 64; no "
        "quarter of the pass rates has more than a quarter of the problems",
        "countdown on a GPU was run with earlier rules: as many failures of each stratum as the rarest had, at most "
        "677, and the tokens of collecting them not counted",
        "some 25 steps (60 on a GPU) in place of 1,750; learning rate 3e-4 (1e-4 on a GPU) in place of 5e-7, without "
        "its cosine",
    )
    unsaid: ClassVar[tuple[str, ...]] = (
        "group size and the clip's bounds: 8, and PPO's 0.8 and 1.2",
        "the wording of the messages: `wrong`, then the task again; instructions=True writes sentences",
        "whether the end of a reflection belongs to it: it does, as the policy wrote it",
        "how reflections are averaged: each rollout weighs the same, as in GRPO's Eq. 3",
    )

    environment: str = TASK
    max_context: int = 96
    cold_start: ColdStart = field(
        default_factory=lambda: ColdStart(
            # Before the working of sums is learned, in a jump, about 0.36 are right at either try, by luck.
            max_updates=2000,
            until_accuracy=0.5,
            check_problems=256,
        )
    )
    algorithm: str = "GRPO,minus_kl_k3=0.001"  # Sec. 4.3: beta = 0.001
    trained_roles: tuple[str, ...] = ("reflection",)
    """Turns whose tokens are trained. A control adds "retry", which makes it ordinary reinforcement on answers."""
    rewards_of: str = "own retry"
    """ "own retry", or "another problem" (a control): reflections get the rewards of the next problem of the batch."""
    failed_queries: int = 1000
    """Training problems that the start model is asked for failures of its own."""
    answers_per_query: int = 16
    """How often each; the paper: up to 64."""
    collected_failures: bool = True
    """Of an experiment's trial: it first collects failures of its start and trains on those. False: as in
    `whorl train`, every step has fresh attempts of the policy, and a group whose attempt is right teaches nothing."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=24))
    # Sec. 4.3 has 5e-7 for pretrained models; the other numbers are AdamW's usual ones.
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(3e-4, beta2=0.999, eps=1e-8, warmup_steps=5)
    )
    num_steps: int = 60
    problems_per_step: int = 32  # x 8 = 256, the paper's effective batch
    rollouts_per_problem: int = 8
    # One sample: were there several, they would share their attempt.
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(20, 400, 1))

    def __post_init__(self) -> None:
        if self.rewards_of not in ("own retry", "another problem"):
            raise ValueError(f'rewards_of is "own retry" or "another problem"; got {self.rewards_of!r}')
        super().__post_init__()

    def resolve_algorithm(self) -> Algorithm:
        row = replace(super().resolve_algorithm(), roles=self.trained_roles)
        return row if self.rewards_of == "own retry" else replace(row, shaping=(rewards_of_the_next_problem,))


def rewards_of_the_next_problem(
    reward_S: Float[torch.Tensor, " S"], group_S: Int[torch.Tensor, " S"]
) -> Float[torch.Tensor, " S"]:
    """r_i of the group after one's own, the last group's of the first: every link of reflection and retry is cut.

    Rewards keep their distribution within a group, so advantages are as large as ever and mean nothing. A group that
    is longer than the next gets its rewards once more from the first.
    """
    groups = [reward_S[group_S == group] for group in group_S.unique_consecutive()]
    others = [*groups[1:], *groups[:1]]
    shared = [other[torch.arange(len(own)) % len(other)] for own, other in zip(groups, others, strict=True)]
    return torch.cat(shared)


# -- failures of the start model: the paper's prompts ----------------------------------------------------------------

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


# -- the experiment --------------------------------------------------------------------------------------------------


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


SIGNAL = mean_of_last("groups_with_signal_frac", 10_000)


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

    def answers(reflection: str) -> dict[str, object]:
        """Changes of an arm in which nobody reflects: there the retries are trained, or nothing would be."""
        return {"environment": f"{task},reflection={reflection}", "trained_roles": ("retry",)}

    return Experiment(
        name=name,
        question=question,
        cpu=cpu,
        gpu=gpu,
        budget="generated_tokens",
        # Every arm starts from the model that learned to try, reflect and retry.
        start={
            "environment": f"{task},hints_in_validation=True" if hinted_gate else task,
            "trained_roles": ("reflection",), "rewards_of": "own retry",
        },
        trial=reflect_trial,
        arms=(
            Arm("start", "start", note="the model before training, with reflections"),
            Arm("start_none", "start", {"environment": f"{task},reflection=none"}, "retries at once"),
            Arm("rrr", "method"),
            Arm("fresh", "control", {"collected_failures": False}, "failures of the policy as it is, in every step"),
            Arm(
                "grpo", "baseline", {"environment": once, "trained_roles": ("assistant",)},
                "GRPO on first tries alone; the paper has no such arm",
            ),
            Arm("no_reflection", "control", answers("none"), "retries at once, and they are trained"),
            Arm(
                "constant", "control",
                # To find nothing to learn is a result of this control, not a fault that ends it.
                {**answers("constant"), "stop_after_steps_without_signal": 0},
                "one sentence for all, retries are trained",
            ),
            Arm("shuffled", "control", {"rewards_of": "another problem"}, "no link of reflection and retry"),
            Arm("answers_too", "control", {"trained_roles": ("reflection", "retry")}, "the wrong mask"),
        ),
        measures=MEASURES,
        claims=CLAIMS,
    )  # fmt: skip


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
        gpu=replace(
            ReflectRetryReward(),
            environment="reflect_retry:countdown,first_right_frac=0.3",
            max_context=128,
            sampling=Sampling(max_tokens=40),
            cold_start=gate(0.36),
            num_generated_tokens=400_000,
            **ON_A_GPU,
        ),
    ),
    experiment(
        "function_calling",
        "Does it in function calling, where a reflection can name the argument that was wrong?",
        CALLS,
        gpu=replace(
            ReflectRetryReward(),
            environment=f"reflect_retry:{CALLS},first_right_frac=0.3",
            max_context=900,
            sampling=Sampling(max_tokens=160),
            # The request holds all that an answer needs, so accuracy alone does not show whether retries follow their
            # reflection: at 0.55 of either try they did not. Who ignores it is right at 0.675 after a useful one.
            cold_start=gate(0.8),
            num_generated_tokens=1_200_000,
            **ON_A_GPU,
        ),
        hinted_gate=True,
    ),
)


def main(arguments: Sequence[str]) -> int:
    """`python -m whorl.recipes.reflect_retry_reward RUN FILE`."""
    if len(arguments) != 2:
        print("usage: python -m whorl.recipes.reflect_retry_reward RUN FILE", file=sys.stderr)
        return 2
    run = open_run(arguments[0], read_only=True)
    asked = run.settings if isinstance(run.settings, ReflectRetryReward) else ReflectRetryReward()
    found = collect_failures(run, Path(arguments[1]), asked.failed_queries, asked.answers_per_query)
    print(
        f"{found['failed']:.0f} of {asked.failed_queries} problems failed; {found['kept']:.0f} kept in {arguments[1]}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

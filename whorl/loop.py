"""The training loop, in the order in which things happen."""

import time
from collections.abc import Callable

from whorl.algorithms.algorithm import group_statistics, with_signal
from whorl.cold_start import cold_start
from whorl.data import Batch, Group, Metrics, columns_read_by
from whorl.evaluation.evaluate import evaluate_on
from whorl.faults import FOR_LEARNING, LESS_STEEP, Stop, explained, skipped_too_often
from whorl.rollouts import measure
from whorl.run import Run, memory_gib
from whorl.updates import learn, make_batch


def train(run: Run, after_step: Callable[[Run], None] = lambda run: None) -> str | None:
    """Carry the run to its last step. Returns None, or the reason why it stopped before, which the run keeps.

    `after_step` is called with the run when a step is finished and kept.

    KeyboardInterrupt if the run was asked to stop (`run.stopping`); it then goes on from its newest checkpoint.
    """
    try:
        run.player.start()
        if not run.warm:
            cold_start(run)
            begin(run)
        while not run.finished:
            if run.told_to_stop():
                if run.saved_step != run.step:
                    keep(run)
                raise KeyboardInterrupt
            take_step(run)
            after_step(run)
    except (Stop, ChildProcessError) as stop:
        reason = str(stop)
        run.directory.stopped_early(reason)
        return reason
    return None


@explained("in step {next}", FOR_LEARNING)
def take_step(run: Run) -> None:
    """One step of the run: sample, learn, evaluate, keep. `Stop` if it makes no sense to go on after it."""
    settings = run.settings
    clock = Clock()
    groups, sampled = sample_groups(run, clock)
    batch = make_batch(run, groups)
    clock.lap("train_seconds")
    record(run, groups, batch)
    clock.lap("save_seconds")
    metrics = learn(run, batch) | run.deliver()
    clock.lap("train_seconds")

    run.step += 1
    run.generated_tokens += clock.generated_tokens
    metrics |= sampled | clock.read(batch) | {"step": run.step, "policy_version": run.learner.version}
    metrics |= run.window.metrics
    metrics["memory_gib"] = memory_gib(run.player)
    if due(run, settings.evaluation.every_steps):
        metrics |= evaluate(run)
    run.log(metrics)
    run.window.observe(metrics)
    count_failures(run, metrics)
    if reason := hopeless(run):
        raise Stop(reason)
    if due(run, settings.checkpoint_every_steps) or run.is_due_by_time():
        keep(run)


@explained("before the first step")
def begin(run: Run) -> None:
    """Step 0: the policy as it is before reinforcement learning, evaluated and kept."""
    run.warm = True
    if "logp_ref_N" in run.algorithm.needs:
        run.learner.set_reference()
    run.log({"step": 0, "policy_version": 0} | evaluate(run))
    run.save()


@explained("in the evaluation after step {done}")
def evaluate(run: Run) -> Metrics:
    """Accuracy on the held-out problems, sampled as in training; the rollouts are recorded."""
    chosen = run.settings.evaluation
    problems = run.held_out("test", chosen.num_problems)
    metrics, groups = evaluate_on(
        run.player, problems, chosen.samples_per_problem, run.settings.sampling, run.progress
    )
    run.directory.write_evaluation(run.step, groups)
    return metrics


def due(run: Run, every: int, step: int | None = None) -> bool:
    """Whether what happens every so many steps happens in this one (default: the run's own); in the last it does."""
    step = run.step if step is None else step
    return (step == run.step and run.finished) or (every > 0 and step % every == 0)


def keep(run: Run) -> None:
    """A checkpoint, and no more rollouts than it and those before it need."""
    run.save()
    forget_rollouts(run)


def record(run: Run, groups: list[Group], batch: Batch | None = None) -> None:
    """Write what was sampled, before it is learned from: whatever happens then can be looked at and replayed."""
    advantages = greedy = None
    if batch is not None:
        advantages = [column.numpy() for column in batch.unpack("advantage_N")]
        greedy = batch["reward_greedy_S"].tolist() if "reward_greedy_S" in batch else None
    run.directory.write_rollouts(run.step + 1, groups, advantages, run.tokenizer.token_text, greedy)


def forget_rollouts(run: Run) -> None:
    """Delete rollouts from which no step can be replayed any more, but those that are kept for good."""
    oldest = run.directory.checkpoint_steps()[0]
    for step in run.directory.rollout_steps():
        for_good = step == 1 or step in run.faulty_steps or due(run, run.settings.rollouts_every_steps, step)
        if step <= oldest and not for_good:
            run.directory.delete_rollouts(step)


@explained("while rollouts were played in step {next}")
def sample_groups(run: Run, clock: "Clock") -> tuple[list[Group], Metrics]:
    """A step's groups, and what was seen of all that was sampled.

    With dynamic sampling (DAPO, arXiv:2503.14476 section 3.2), once it has begun, groups whose rewards are all equal
    are set aside and replaced by further problems, at most `max_redraws` times; if none is left, the last are used.
    """
    settings = run.settings
    wanted, num_samples = settings.problems_per_step, settings.rollouts_per_problem
    generated, preempted = run.player.num_generated_tokens, run.player.num_preemptions
    chosen: list[Group] = []
    seen: list[Group] = []
    verify_seconds = 0.0
    dynamic = run.algorithm.dynamic_sampling and run.step >= settings.dynamic_sampling_after_steps
    for redraw in range(1 + (settings.max_redraws if dynamic else 0)):
        picks = run.curriculum.choose(wanted - len(chosen))
        problems = run.training_problems(picks)
        with run.progress.phase("rollouts", len(problems) * num_samples) as advance:
            groups, waited = run.player.play(
                problems, num_samples, run.sampling, ("train", run.step, redraw), advance
            )
        run.curriculum.update(picks, groups)
        verify_seconds += waited
        seen += groups
        chosen += with_signal(groups) if dynamic else groups
        if len(chosen) >= wanted:
            break
    check_judged(run, seen)
    clock.lap("generate_seconds")
    clock.seconds["verify_seconds"] = verify_seconds
    clock.seconds["generate_seconds"] -= verify_seconds
    clock.generated_tokens = run.player.num_generated_tokens - generated
    highest = run.environment.reward_range[1]
    metrics = measure(seen, highest) | group_statistics(seen, highest_reward=highest)
    metrics["groups_redrawn"] = float(max(len(seen) - wanted, 0))
    if settings.max_cached_tokens:
        metrics["preemptions"] = float(run.player.num_preemptions - preempted)
    return (chosen or [group for group in seen if group.judged]), metrics


def check_judged(run: Run, seen: list[Group]) -> None:
    """`Stop` if too few rollouts of a step could be judged to give credit to any; they are recorded first."""
    compares = "group_S" in columns_read_by(run.algorithm.credit)
    if max(len(group.judged) for group in seen) >= (2 if compares else 1):
        return
    record(run, seen)
    rollouts = [rollout for group in seen for rollout in group.rollouts]
    reasons = [r.error or (r.score.why if r.score else "") for r in rollouts if r.reward is None]
    first = next(filter(None, reasons), "no reason was given")
    what = "no problem of step {} has two rollouts that could be judged, so none can be compared"
    if not any(group.judged for group in seen):
        what = "no rollout of step {} could be judged"
    raise Stop(
        f"{what.format(run.step + 1)}; why the first could not: {first}. All are in "
        f"{run.directory.rollout_file(run.step + 1)}"
    )


def count_failures(run: Run, metrics: Metrics) -> None:
    """Note of a finished step whether there was something to learn, and whether all of it was learned."""
    has_signal = metrics["groups_with_signal_frac"] > 0 and metrics["trained_tokens"] > 0
    run.steps_without_signal = 0 if has_signal else run.steps_without_signal + 1
    if metrics.get("skipped_updates"):
        run.faulty_steps.append(run.step)


def hopeless(run: Run) -> str | None:
    """Why it makes no sense to go on, if it does not."""
    limit = run.settings.stop_after_steps_without_signal
    if limit and run.steps_without_signal >= limit:
        return (
            f"for {limit} steps no group had differing rewards (or the policy wrote no token that is trained), so "
            "there was nothing to learn: the task is too hard or too easy for this policy, or its verifier gives "
            "everything the same reward"
        )
    limit = run.settings.stop_after_skipped_updates
    if limit and run.skipped_in_a_row >= limit:
        return skipped_too_often(
            run,
            f"The batch is in {run.directory.rollout_file(run.step)}; `whorl replay {run.directory.path} --step "
            f"{run.step}` does the step again. {LESS_STEEP}; if a verifier's reward is at fault, `whorl check` its "
            "environment",
        )
    return None


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.generated_tokens = 0

    def lap(self, name: str) -> None:
        """Count what has passed since the last lap as `name`."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def read(self, batch: Batch) -> Metrics:
        total = self.last - self.started
        return self.seconds | {
            "step_seconds": total,
            "generated_tokens": float(self.generated_tokens),
            "tokens_per_second": self.generated_tokens / total,
            "generate_tokens_per_second": self.generated_tokens / max(self.seconds["generate_seconds"], 1e-9),
            "train_tokens_per_second": batch.num_tokens / max(self.seconds["train_seconds"], 1e-9),
        }

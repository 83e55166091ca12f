"""What a run says at its end: before and after, with transcripts."""

import warnings

from whorl.data import Rollout
from whorl.reporting.run_directory import RunDirectory
from whorl.run import Run
from whorl.supervised_run import SupervisedRun


def summarise(run: Run) -> None:
    """Show the first and the last evaluation side by side, and the same held-out problems answered by both.

    All of it is read from the run directory, so it is the same however often the run was resumed.
    """
    rows = [row for row in run.directory.history() if row.get("eval_accuracy") is not None]
    if len(rows) < 2:
        return
    before, after = rows[0], rows[-1]

    def interval(row: dict) -> str:
        return f"{row['eval_accuracy']:.1%} [{row['eval_accuracy_low']:.1%}, {row['eval_accuracy_high']:.1%}]"

    k = int(before["eval_samples"])
    table = [
        ("step", str(before["step"]), str(after["step"])),
        (f"held-out accuracy (avg@{k}, 95% interval)", interval(before), interval(after)),
        (f"held-out pass@{k}", f"{before['eval_pass_at_k']:.1%}", f"{after['eval_pass_at_k']:.1%}"),
        ("response length, tokens", *(f"{row['eval_response_tokens']:.1f}" for row in (before, after))),
    ]
    run.progress.before_after(table, _pairs(run.directory, before["step"], after["step"]))


def summarise_supervised(run: SupervisedRun) -> None:
    """Show the held-out loss before, and at its best."""
    rows = [row for row in run.directory.history() if row.get("eval_loss") is not None]
    if len(rows) < 2:
        return
    before, best = rows[0], next(row for row in rows if row["step"] == run.best_step)
    table = [
        ("step (after: the best)", str(before["step"]), str(best["step"])),
        ("held-out loss, nats per token", f"{before['eval_loss']:.4f}", f"{best['eval_loss']:.4f}"),
        ("held-out perplexity", *(f"{row['eval_perplexity']:.2f}" for row in (before, best))),
    ]
    run.progress.before_after(table)


def _pairs(
    directory: RunDirectory, before: int, after: int, num_problems: int = 2
) -> list[tuple[str, Rollout]]:
    """The first problems that were answered wrongly at step `before`, as answered then and at step `after`."""
    try:
        answers = [_first_answers(directory, step) for step in (before, after)]
    except ValueError as error:  # the numbers are worth more than the examples
        warnings.warn(f"no answers are shown: {error}", stacklevel=2)
        return []
    pairs = list(zip(*answers, strict=True))
    pairs.sort(key=lambda pair: pair[0].reward or 0.0)  # stable: wrong ones first, in order
    return [
        (label, rollout)
        for pair in pairs[:num_problems]
        for label, rollout in zip(("before", "after"), pair, strict=True)
    ]


def _first_answers(directory: RunDirectory, step: int) -> list[Rollout]:
    """The first of the samples of each held-out problem."""
    stored = [one.rollout for one in directory.read_evaluation(step)]
    return [rollout for rollout in stored if rollout.sample == 0]

"""What `whorl compare` does: the chosen experiments one after the other, and what came of each."""

import os
from collections.abc import Sequence
from pathlib import Path

import rich.console
import rich.markup
import torch
from rich.table import Table

from whorl.experiments.compare import Comparison, run_comparison, visible_gpus
from whorl.experiments.judge import Judged, judge
from whorl.experiments.plan import Budget, Experiment, named
from whorl.experiments.report import found_text, write_report
from whorl.experiments.watch import Board


def comparisons_of(
    recipe: str,
    module: str,
    experiments: Sequence[Experiment],
    *,
    experiment: str | None,
    arms: str | None,
    seeds: int | None,
    budget: Budget,
    out: Path,
) -> list[Comparison]:
    """The comparisons that a command line asks for. ValueError for what there is not, before anything is run.

    With the results goes the command that makes all of them, whichever of their arms this one is for.
    """
    if not experiments:
        raise ValueError(f"{recipe} has no experiments; a recipe lists them as EXPERIMENTS")
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds must be at least 1; got {seeds}")
    if experiment is None:
        chosen = [experiments[0]]
    elif experiment == "all":  # at this budget; if that is none, the first one says so
        chosen = [one for one in experiments if budget in one.budgets] or experiments[:1]
    else:
        chosen = [named(experiment, experiments, f"experiment of {recipe}")]
    found = []
    for one in chosen:
        wanted = one.arms if arms is None else tuple(one.arm(name.strip()) for name in arms.split(","))
        one.settings(budget, wanted[0], 0)  # refuses a budget that the experiment has not
        if budget == "gpu" and not torch.cuda.is_available():
            raise ValueError("--budget gpu needs a GPU that torch can use; there is none")
        numbers = tuple(range(one.num_seeds if seeds is None else seeds))
        command = f"whorl compare {recipe} --experiment {one.name}"
        command += "" if budget == "cpu" else " --budget gpu"
        found.append(Comparison(module, recipe, one, numbers, budget, out, wanted, command))
    return found


def carry_out(comparisons: Sequence[Comparison], jobs: int = 0, *, fresh: bool = False) -> int:
    """Run them one after the other and say what came of each. Exit code 0, or 1 if a trial failed."""
    if jobs < 0:
        raise ValueError(f"--jobs must be at least 1, or 0 for one per core; got {jobs}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    console = rich.console.Console()
    all_finished = True
    for comparison in comparisons:
        experiment = comparison.experiment
        console.print(f"{comparison.recipe}, {experiment.name}: {experiment.question}", markup=False)
        with Board(console) as board:
            at_once = jobs or (len(visible_gpus()) if comparison.budget == "gpu" else cores)
            results = run_comparison(comparison, at_once, board, fresh=fresh)
        for task in board.tasks:
            all_finished = all_finished and task.state == "finished"
            if task.state == "broken" and task.kind == "trial":
                console.print(f"{task.arm}, seed {task.seed}: see {task.log}", markup=False)
        console.print(verdicts_of(experiment, judge(experiment, results)))
        print(f"report: {write_report(comparison.place, experiment, results)}")
    return 0 if all_finished else 1


def verdicts_of(experiment: Experiment, judged: Sequence[Judged]) -> Table:
    """The claims with what was found, for a terminal."""
    shown = Table("claim", "theirs", "ours", "verdict", title=experiment.name, title_justify="left")
    for one in judged:
        cells = (one.claim.text, one.claim.theirs, found_text(experiment, one), f"{one.verdict}: {one.why}")
        shown.add_row(*(rich.markup.escape(cell) for cell in cells))
    return shown

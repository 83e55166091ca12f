"""The command line of comparisons: whorl compare | ledger | diff. Signatures and docstrings are what tyro shows."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import rich.console
import tyro

from whorl.experiments.command import carry_out, comparisons_of
from whorl.experiments.differences import differences, table_of
from whorl.experiments.ledger import write_ledger
from whorl.recipes.catalog import experiments_of, recipes_with_experiments, settings_of


def compare(
    recipe: Annotated[str, tyro.conf.Positional],
    experiment: str | None = None,
    seeds: int | None = None,
    budget: Literal["cpu", "gpu"] = "cpu",
    arms: str | None = None,
    out: Path = Path("results"),
    jobs: int = 0,
    fresh: bool = False,
) -> int:
    """Run a recipe's arms over paired seeds and judge its claims. Killed or interrupted, the same command goes on; a
    trial that is finished is not done again. Exit code 1 if a trial failed: the others are still judged.

    Args:
        recipe: the recipe.
        experiment: one of its experiments, or all; by default the first.
        seeds: number of paired seeds; by default the experiment's.
        budget: which of the experiment's settings.
        arms: some of the arms, with commas between them; by default all. Earlier results of others are kept.
        out: folder of the results.
        jobs: trials at once, each with one thread; by default one per core, or one per GPU. Several GPUs share them
            evenly.
        fresh: do trials again that are finished.
    """
    comparisons = comparisons_of(
        recipe,
        f"whorl.recipes.{recipe}",
        experiments_of(recipe),
        experiment=experiment,
        arms=arms,
        seeds=seeds,
        budget=budget,
        out=out,
    )
    try:
        return carry_out(comparisons, jobs, fresh=fresh)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130


def ledger(results: Path = Path("results"), docs: Path = Path("docs")) -> int:
    """Write docs/ledger.md, and the results in docs/recipes, from all results. Not edited by hand.

    Args:
        results: folder of the results.
        docs: folder of the pages.
    """
    for file in write_ledger(recipes_with_experiments(), results, docs):
        print(file)
    return 0


def diff(
    first: Annotated[str, tyro.conf.Positional],
    second: Annotated[str, tyro.conf.Positional],
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
) -> int:
    """What two recipes differ by: every setting, and every part of their algorithms. Exit code 1 if they differ.

    Args:
        first: a recipe, one of its arms (recipe:arm), or an arm of a named experiment (recipe:experiment:arm).
        second: likewise.
        overrides: settings of the second, as name=value: optimizer.eps=1e-8.
    """
    rows = differences(settings_of(first), settings_of(second, overrides))
    names = first, shlex.join([second, *overrides])
    rich.console.Console().print(
        table_of(rows, *names) if rows else f"{names[0]} and {names[1]} are the same"
    )
    return 1 if rows else 0

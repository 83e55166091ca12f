"""The command line of comparisons: whorl compare | ledger | diff. Signatures and docstrings are what tyro shows."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import rich.console
import tyro

from whorl.experiments.command import carry_out, comparisons_of
from whorl.experiments.differences import Side, differences, made_of_the_arm, surroundings, table_of
from whorl.experiments.ledger import write_ledger
from whorl.experiments.plan import Arm, Budget, Experiment, changed, named
from whorl.recipes.catalog import default_settings, experiments_of, recipes_with_experiments
from whorl.settings import read_assignments


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
    budget: Literal["cpu", "gpu"] | None = None,
) -> int:
    """What two recipes differ by: every setting, and every part of their algorithms. Of arms also what is done with the
    settings: role, start and trial. Exit code 1 if they differ.

    Args:
        first: a recipe, an arm of the only experiment that has it (recipe:arm), or of a named experiment
            (recipe:experiment:arm).
        second: what it is compared with, named in the same ways.
        overrides: settings of the second, as name=value: optimizer.eps=1e-8.
        budget: which settings of the arms' experiments; by default those for a CPU, or for a GPU if there are no
            others.
    """
    sides = side_of(first, budget=budget), side_of(second, overrides, budget)
    if budget is not None and not any(side.arm for side in sides):
        raise ValueError(f"--budget chooses the settings of arms; neither {first} nor {second} names one")
    rows, around = differences(sides[0].settings, sides[1].settings), surroundings(*sides)
    names = first, shlex.join([second, *overrides])
    console = rich.console.Console()
    if not rows and not around:
        console.print(f"{names[0]} and {names[1]} are the same", markup=False)
        return 0
    console.print(table_of([*rows, *around], *names))
    if not rows and sides[0].experiment is sides[1].experiment:
        console.print(made_of_the_arm(*sides), markup=False)
    return 1


def side_of(place: str, overrides: Sequence[str] = (), budget: Budget | None = None) -> Side:
    """A recipe, or one of its arms (`recipe:arm` where one experiment has it, else `recipe:experiment:arm`), with
    overrides `name=value`.

    An arm has the settings of the budget; None: a CPU's, or a GPU's where the experiment has no others. ValueError
    that names the nearest for what there is not.
    """
    name, *rest = place.split(":")
    if not rest:
        return Side(changed(default_settings(name), _changes_of(overrides)))
    if len(rest) > 2:
        raise ValueError(f"expected recipe, recipe:arm or recipe:experiment:arm; got {place!r}")
    experiment, arm = _arm_named(name, rest)
    chosen: Budget = budget or next(iter(experiment.budgets))
    experiment.settings(chosen, arm, 0)  # refuses a budget that the experiment has not
    settings = changed(experiment.budgets[chosen], arm.changes)
    return Side(changed(settings, _changes_of(overrides)), arm, experiment, chosen)


def _changes_of(overrides: Sequence[str]) -> dict[str, Any]:
    return read_assignments(overrides, "expected name=value, such as optimizer.eps=1e-8")


def _arm_named(recipe: str, rest: Sequence[str]) -> tuple[Experiment, Arm]:
    """The arm that `[arm]` or `[experiment, arm]` means."""
    experiments = experiments_of(recipe)
    if len(rest) == 2:
        experiment = named(rest[0], experiments, f"experiment of {recipe}")
        return experiment, experiment.arm(rest[1])
    (name,) = rest
    having = [one for one in experiments if name in {arm.name for arm in one.arms}]
    if len(having) > 1:
        ways = ", ".join(f"{recipe}:{one.name}:{name}" for one in having)
        raise ValueError(f"{len(having)} experiments of {recipe} have an arm {name}; say which: {ways}")
    if having:
        return having[0], having[0].arm(name)
    for one in experiments:
        if one.name == name:
            arms = ", ".join(arm.name for arm in one.arms)
            raise ValueError(
                f"{name} is an experiment of {recipe}; name one of its arms, as {recipe}:{name}:ARM. There are {arms}"
            )
    arms = {arm.name: arm for one in experiments for arm in one.arms}
    named(name, arms.values(), f"arm of {recipe}")
    raise AssertionError("an arm that some experiment has was found before")

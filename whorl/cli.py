"""The command line: whorl train | resume | evaluate | play | check | list | report."""

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import rich.console
import rich.markup
from rich.table import Table

COMMANDS = ("train", "resume", "evaluate", "play", "check", "list", "report")
USAGE = """usage: whorl COMMAND ...

  train RECIPE [overrides]    start a run (whorl train quickstart; whorl train RECIPE --help)
  resume RUN                  go on with a run from its newest checkpoint
  evaluate RUN                accuracy of a checkpoint on held-out problems, with intervals
  play RUN                    talk to a checkpoint and see the verdicts
  check [WHAT]                prove that a promise holds: sampler, gradients, or an environment
  list                        recipes, algorithms, environments, one line each
  report RUN                  write the run's report.html again
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 failed or stopped early, 2 wrong use, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    command, rest = words[0], words[1:]
    if command == "--version":
        import whorl

        print(whorl.__version__)
        return 0
    try:
        if command not in COMMANDS:
            raise ValueError(f"unknown command {command!r}; expected one of {', '.join(COMMANDS)}")
        return _handlers()[command](rest)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; `whorl resume RUN` goes on from the newest checkpoint", file=sys.stderr)
        return 130


def _handlers() -> dict[str, Callable[[list[str]], int]]:
    return {
        "train": _train,
        "resume": _resume,
        "evaluate": _evaluate,
        "play": _play,
        "check": _check,
        "list": _list,
        "report": _report,
    }


def _parse(function: Callable[..., int], words: list[str], name: str) -> int:
    """Call `function` with the command line that its signature describes; tyro exits with 2 if it does not fit."""
    import tyro

    description = inspect.cleandoc(function.__doc__ or "").partition("Args:")[0].strip()
    return tyro.cli(function, args=words, prog=f"whorl {name}", description=description)


def _train(words: list[str]) -> int:
    import tyro

    from whorl.recipes.catalog import recipe_named, recipe_names

    if not words or words[0].startswith("-"):
        raise ValueError(
            f"which recipe? whorl train RECIPE [overrides]; recipes: {', '.join(recipe_names())}"
        )
    name, rest = words[0], words[1:]
    recipe = recipe_named(name)

    def train(settings: Annotated[recipe, tyro.conf.arg(name="")], run: Path | None = None) -> int:  # type: ignore[valid-type]
        """
        Args:
            run: directory of the new run; by default the next free runs/RECIPE-N.
        """
        from whorl.reporting.console import Console
        from whorl.run import start_run

        progress = Console(settings.num_steps)
        return _carry_on(start_run(name, settings, run, progress))

    description = f"{recipe.__doc__}\n\n{recipe.claim}".strip()
    # Comments in a recipe give the sources of its numbers; the help of a setting is its docstring.
    config = (tyro.conf.HelptextFromCommentsOff,)
    return tyro.cli(train, args=rest, prog=f"whorl train {name}", description=description, config=config)


def _resume(words: list[str]) -> int:
    import tyro

    def resume(run: Annotated[Path, tyro.conf.Positional]) -> int:
        """Go on with a run from its newest checkpoint.

        Args:
            run: the run directory.
        """
        from whorl.reporting.console import Console
        from whorl.run import open_run

        opened = open_run(run)
        opened.progress = Console(opened.settings.num_steps)
        if opened.warm and opened.step >= opened.settings.num_steps:
            print(f"{run} is finished: step {opened.step} of {opened.settings.num_steps}")
            return 0
        return _carry_on(opened)

    return _parse(resume, words, "resume")


def _carry_on(run) -> int:
    """Train to the end, summarise, write the report."""
    from whorl.loop import train
    from whorl.reporting.report import build_report
    from whorl.run import open_tracker
    from whorl.summary import summarise

    run.tracker = open_tracker(run)
    print(f"run directory: {run.directory.path}", flush=True)
    _say_notice(run.environment)
    with run.progress:
        reason = train(run)
        summarise(run)
    if run.tracker is not None:
        run.tracker.finish()
    if reason:
        run.directory.stopped_early(reason)
    page = build_report(run.directory)
    if reason:
        print(f"stopped early: {reason}")
    print(f"run directory: {run.directory.path}\nreport: {page}")
    return 1 if reason else 0


def _say_notice(environment) -> None:
    if environment.notice:
        print(environment.notice, flush=True)


def _evaluate(words: list[str]) -> int:
    import tyro

    def evaluate(
        run: Annotated[Path, tyro.conf.Positional],
        checkpoint: int | None = None,
        environment: str | None = None,
        split: Literal["test", "validation", "train"] = "test",
        problems: int = 256,
        samples: int = 4,
        temperature: float | None = None,
    ) -> int:
        """Accuracy of a checkpoint on problems of a split, with 95% intervals.

        Args:
            run: the run directory.
            checkpoint: step of the checkpoint; by default the newest.
            environment: another task than the run's own, as a spec (countdown,num_numbers=4).
            split: which problems.
            problems: number of problems.
            samples: answers to each problem (k of avg@k and pass@k).
            temperature: sampling temperature; by default the run's own, 0 for greedy answers.
        """
        from dataclasses import replace

        from whorl.evaluation.evaluate import evaluate_on, table_of
        from whorl.reporting.console import Console
        from whorl.run import open_run

        opened = open_run(run, step=checkpoint, read_only=True)
        task = opened.with_environment(environment)
        _say_notice(task.environment)
        sampling = opened.settings.sampling
        if temperature is not None:
            sampling = replace(sampling, temperature=temperature)
        with Console() as progress:
            chosen = task.held_out(split, problems)
            metrics, _ = evaluate_on(task.player, chosen, samples, sampling, progress)
        rich.console.Console().print(table_of(metrics, f"{run} at step {opened.step}, {split} problems"))
        return 0

    return _parse(evaluate, words, "evaluate")


def _play(words: list[str]) -> int:
    import tyro

    def play(
        run: Annotated[Path, tyro.conf.Positional],
        checkpoint: int | None = None,
        temperature: float | None = None,
    ) -> int:
        """Talk to a checkpoint: Enter shows it the next held-out problem and judges the answer; any other line
        is a prompt of your own; q leaves.

        Args:
            run: the run directory.
            checkpoint: step of the checkpoint; by default the newest.
            temperature: sampling temperature; by default the run's own.
        """
        from whorl.play import play_in_terminal

        return play_in_terminal(run, checkpoint, temperature)

    return _parse(play, words, "play")


def _check(words: list[str]) -> int:
    import tyro

    def check(what: Annotated[str | None, tyro.conf.Positional] = None, problems: int = 50) -> int:
        """Prove that a promise holds on this machine: `sampler` (its log-probs are the learner's), `gradients` (they
        do not depend on how a batch is cut, nor on the number of ranks), or an environment (it accepts its own gold
        answers, rejects babble with a reason, keeps its splits apart and has the chance level it states).

        Args:
            what: sampler, gradients, or an environment's spec such as countdown,num_numbers=4; by default all
                environments that need no argument.
            problems: problems of each split to try, for environments.
        """
        console = rich.console.Console()
        if what in ("sampler", "gradients"):
            return _check_promise(what, console)
        from whorl.checks.table import Row, table_of
        from whorl.environments.catalog import ENVIRONMENTS, make
        from whorl.environments.check import check_environment

        needs_argument = ("data", "reasoning_gym")
        specs = [what] if what else [name for name in ENVIRONMENTS if name not in needs_argument]
        all_good = True
        for spec in specs:
            environment = make(spec)
            _say_notice(environment)
            rows = [Row(*result) for result in check_environment(environment, problems)]
            console.print(table_of(rows, spec))
            all_good &= all(row.ok for row in rows)
        return 0 if all_good else 1

    return _parse(check, words, "check")


def _check_promise(name: str, console: rich.console.Console) -> int:
    import torch

    from whorl.checks.table import table_of

    torch.set_num_threads(1)
    if name == "sampler":
        from whorl.checks.precision import precision_costs, row_of_costs, table_of_costs
        from whorl.checks.sampler import check_sampler

        costs = precision_costs()
        rows = [*check_sampler(), row_of_costs(costs)]
        console.print(table_of_costs(costs))
    else:
        from whorl.checks.gradients import check_gradients

        rows = check_gradients()
    console.print(table_of(rows, f"whorl check {name}"))
    return 0 if all(row.ok for row in rows) else 1


def _list(words: list[str]) -> int:
    def list_all() -> int:
        """Recipes, algorithms and environments, one line each."""
        from whorl.algorithms.catalog import ALGORITHMS
        from whorl.environments import catalog as environments
        from whorl.recipes import catalog as recipes

        console = rich.console.Console()
        sections = {
            "recipes": {name: recipes.one_line(name) for name in recipes.recipe_names()},
            "algorithms": {name: f"{row.summary} ({row.source})" for name, row in ALGORITHMS.items()},
            "environments": {name: environments.one_line(name) for name in environments.ENVIRONMENTS},
        }
        for title, rows in sections.items():
            table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
            table.add_column(no_wrap=True, style="bold")
            table.add_column()
            for name, line in rows.items():
                table.add_row(name, rich.markup.escape(line))
            console.print(table)
            console.print()
        return 0

    return _parse(list_all, words, "list")


def _report(words: list[str]) -> int:
    import tyro

    def report(run: Annotated[Path, tyro.conf.Positional]) -> int:
        """Write the run's report.html again.

        Args:
            run: the run directory.
        """
        from whorl.reporting.report import build_report
        from whorl.reporting.run_directory import RunDirectory

        print(build_report(RunDirectory.open(run)))
        return 0

    return _parse(report, words, "report")


if __name__ == "__main__":
    sys.exit(main())

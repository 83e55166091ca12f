"""`whorl ledger`: docs/ledger.md from all results, and each recipe's results in its own page. Not edited by hand."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import whorl
from whorl.experiments.compare import place_of, read_results
from whorl.experiments.judge import Judged, judge, paired_seeds, results_of, summary_of
from whorl.experiments.plan import Experiment
from whorl.experiments.report import estimate_text, found_text, table
from whorl.reporting.run_directory import write_atomically
from whorl.settings import Settings

Recipes = Mapping[str, tuple[type[Settings], tuple[Experiment, ...]]]

HEAD = """# Ledger

What the papers claim and what came of it here, written by `whorl ledger` from `results/` and not by hand. The rules
stand in `whorl/experiments/judge.py`: paired seeds, Student's 95% interval of the difference of two arms, and a margin,
the smallest difference that would matter, declared before, where a claim has one. Claims that an arm is above another:

- *reproduced*: the whole interval is on the claim's side of zero and its far end reaches the margin;
- *contradicted*: the whole interval is on the other side, and its far end reaches the margin there;
- *tied*: the interval lies within the margin on both sides, so a difference that would matter is excluded;
- *undecided*: none of these; the seeds cannot tell.

Claims that two arms are equal are *reproduced* if the interval lies within the margin, *contradicted* if it lies
outside, else *undecided*. Any claim may be *not testable here*, for the reason given (a trial failed, or the scale does
not allow it), or *not run*. "Or more" and "or less" mark comparisons with runs that never reached a threshold: those
count as the whole budget. Claims are judged one by one; nothing corrects for their number. A verdict holds at the scale
given with it and says nothing of the paper's own.
"""
BEGIN, END = "<!-- written by `whorl ledger` -->", "<!-- end -->"
"""Between these lines of a recipe's page its results are put."""


def write_ledger(recipes: Recipes, results: Path, docs: Path) -> list[Path]:
    """Write the pages that are not as they should be by now; returns all that belong to the ledger.

    ValueError if there is no folder of results, of which every claim would be said to be not run.
    """
    if not results.is_dir():
        raise ValueError(
            f"there are no results in {results}: it is no folder; give --results the one that compare wrote"
        )
    pages = pages_of(recipes, results, docs)
    for file, text in pages.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or file.read_text() != text:
            write_atomically(file, text.encode())
    return list(pages)


def pages_of(recipes: Recipes, results: Path, docs: Path) -> dict[Path, str]:
    """What docs/ledger.md and the recipes' pages should hold."""
    ledger = [HEAD]
    for name, (settings, _) in recipes.items():
        page = docs / "recipes" / f"{name}.md"
        link = f"[{name}](recipes/{name}.md)" if page.is_file() else name
        section = section_of(name, *recipes[name], results, docs)
        ledger += [f"## {link}", "", settings.claim, "", *section, *deviations_of(settings)]
    pages = {docs / "ledger.md": "\n".join(ledger)}
    for name, pair in recipes.items():
        page = docs / "recipes" / f"{name}.md"
        block = "\n".join(section_of(name, *pair, results, page.parent))
        if page.is_file() and (text := with_block(page.read_text(), block)):
            pages[page] = text
    return pages


def section_of(
    name: str, settings: type[Settings], experiments: Sequence[Experiment], results: Path, folder: Path
) -> list[str]:
    """The recipe's claims, one row each, by experiment and budget, for a page in this folder."""
    lines = []
    for experiment in experiments:
        places = [place_of(results, name, experiment, budget) for budget in ("cpu", "gpu")]
        for place in [place for place in places if (place / "config.json").is_file()] or places[:1]:
            what = f"**{experiment.name}**: {experiment.question} {_what_was_run(name, experiment, place)}"
            if (place / "report.md").is_file():
                what += f" [Report]({os.path.relpath(place / 'report.md', folder).replace(os.sep, '/')})."
            lines += [what, ""]
            kept = read_results(place)
            rows = [
                (
                    one.claim.text,
                    one.claim.theirs,
                    ours_of(experiment, one, kept),
                    f"**{one.verdict}**: {one.why}",
                )
                for one in judge(experiment, kept)
            ]
            lines += [*table(("claim", "theirs", "ours", "verdict"), rows), ""]
        for own in dict.fromkeys(type(base) for base in experiment.budgets.values()):
            lines += deviations_of(own, settings)
    return lines


def _what_was_run(name: str, experiment: Experiment, place: Path) -> str:
    if not (place / "config.json").is_file():
        more = "" if experiment.cpu else " --budget gpu"
        return f"Not run yet: `whorl compare {name} --experiment {experiment.name}{more}`."
    config = json.loads((place / "config.json").read_text())
    dates = sorted({result.date for result in read_results(place) if result.date})
    return f"{scale_of(experiment, config)}. `{config['command']}`, {', '.join(dates)}."


def ours_of(experiment: Experiment, judged: Judged, results: Sequence[Any]) -> str:
    """Both arms over their pairs, and their comparison with the number of pairs it rests on."""
    claim = judged.claim
    if judged.ours is None:
        return "–"
    measure = experiment.measure(claim.measure)
    sides = {name: results_of(results, name) for name in (claim.method, claim.baseline)}
    seeds, means = paired_seeds(*sides.values()), []
    for (name, own), is_open in zip(sides.items(), (judged.method_open, judged.baseline_open), strict=True):
        mean, _ = summary_of([own[seed].values[measure.name] for seed in seeds])
        means.append(f"{name} {estimate_text(mean)}{' or more' * is_open}")
    return (
        f"{measure.text}: {', '.join(means)}; {found_text(experiment, judged)}"
        f"{f' of {experiment.num_seeds}' if judged.num_pairs < experiment.num_seeds else ''}"
    )


def scale_of(experiment: Experiment, config: Mapping[str, Any]) -> str:
    """The size of the trials: what the experiment says of it, or the settings that were recorded."""
    if experiment.scale:
        return f"Scale: {experiment.scale}, {config['scale']}"
    settings = config["settings"]
    size = f"{settings['problems_per_step']} x {settings['rollouts_per_problem']} rollouts a step"
    steps = f"{settings['num_steps']} steps"
    if config["budget"] == "generated_tokens":
        steps = f"{settings['num_generated_tokens']:,} tokens"
    return f"Scale: {settings['model']}, `{settings['environment']}`, {steps}, {size}, {config['scale']}"


def deviations_of(settings: type[Settings], recipe: type[Settings] | None = None) -> Iterator[str]:
    """What is smaller here than in the paper, and what the paper leaves unsaid; of an experiment's settings what they
    have beside the `recipe`'s.
    """
    known = {*recipe.scaled, *recipe.unsaid} if recipe else set()
    headings = (
        ("Also scaled down here", "Also unsaid in the paper")
        if recipe
        else ("Scaled down", "Unsaid in the paper")
    )
    for heading, items in zip(headings, (settings.scaled, settings.unsaid), strict=True):
        if own := [item for item in items if item not in known]:
            yield from (f"{heading}:", "", *(f"- {item}" for item in own), "")


def with_block(page: str, block: str) -> str | None:
    """The page with its results put in; None if it has no place for them."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{block.strip()}\n\n{END}{tail}" if begin and end else None


def stale_pages(recipes: Recipes, root: Path | None = None) -> list[str]:
    """Names of the ledger's pages in a checkout that `whorl ledger` would write otherwise."""
    root = Path(whorl.__file__).parents[1] if root is None else root
    pages = pages_of(recipes, root / "results", root / "docs")
    return [file.name for file, text in pages.items() if not file.is_file() or file.read_text() != text]

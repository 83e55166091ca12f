"""The ledger is made from results, the recipes' pages hold what it says, and both are current in this checkout."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from tests.experiments.tiny_recipe import EXPERIMENTS
from tests.support import Tiny
from whorl import cli
from whorl.experiments.compare import Comparison, current, read_results, write_results
from whorl.experiments.judge import Result, judge
from whorl.experiments.ledger import BEGIN, END, pages_of, stale_pages, write_ledger
from whorl.experiments.plan import changed
from whorl.experiments.readings import AtLeast
from whorl.experiments.report import verdict_table
from whorl.experiments.trials import train_run
from whorl.recipes.catalog import recipes_with_experiments

RECIPES = {"tiny": (Tiny, EXPERIMENTS)}


def put_results(root: Path, accuracy: float = 0.9) -> Path:
    """Results of three seeds as a comparison leaves them."""
    place = root / "results" / "tiny" / "scripted"
    place.mkdir(parents=True)
    values = {"better": accuracy, "plain": 0.8}
    results = [
        Result(
            arm,
            seed,
            "k",
            values={"accuracy": v + 0.01 * seed, "steps": 2.0, "spikes": 2.0},
            date="2026-11-22",
        )
        for arm, v in values.items()
        for seed in range(3)
    ]
    write_results(place, EXPERIMENTS[0], results)
    config = {
        "command": "whorl compare tiny",
        "scale": "cpu",
        "budget": "steps",
        "settings": Tiny().to_dict(),
        "starts": {},
    }
    (place / "config.json").write_text(json.dumps(config))
    return place


def test_a_claim_stands_with_their_figure_ours_the_verdict_command_and_date(tmp_path):
    put_results(tmp_path)
    (text,) = pages_of(RECIPES, tmp_path / "results", tmp_path / "docs").values()
    row = next(line for line in text.splitlines() if line.startswith("| the better arm is better"))
    assert "by 0.1" in row and "**reproduced**" in row and "+0.100, 3 pairs" in row
    assert "better 0.910 [0.885, 0.935]" in row  # 0.90, 0.91, 0.92: 0.91 +- 4.303 * 0.01 / sqrt(3)
    assert "`whorl compare tiny`, 2026-11-22" in text and "4 x 4 rollouts a step, cpu" in text
    row = next(line for line in text.splitlines() if line.startswith("| on 456B"))
    assert "70.0" in row and "**not testable here**: that model does not fit" in row
    assert "Not run yet: `whorl compare tiny --experiment losses`" in text


def test_means_are_of_the_pairs_and_a_failed_trial_without_a_partner_ends_no_ledger(tmp_path):
    place = put_results(tmp_path)
    kept = read_results(place)
    alone = Result("better", 3, "k", values={"accuracy": 0.0, "steps": 2.0, "spikes": 2.0})
    write_results(place, EXPERIMENTS[0], [*kept, alone])
    (text,) = pages_of(RECIPES, tmp_path / "results", tmp_path / "docs").values()
    assert "better 0.910 [0.885, 0.935]" in text and ", 3 pairs" in text
    failed = Result("better", 3, "k", reason="weights not finite")
    write_results(place, EXPERIMENTS[0], [*kept, failed])
    (text,) = pages_of(RECIPES, tmp_path / "results", tmp_path / "docs").values()
    assert (
        "better at seed 3 has no accuracy: weights not finite" in text and "pairs" not in text.split("## ")[1]
    )


def test_what_is_known_from_below_is_shown_as_open(tmp_path):
    place = put_results(tmp_path)
    steps = {"better": 2.0, "plain": AtLeast(4.0)}
    kept = [replace(r, values={**r.values, "steps": steps[r.arm]}) for r in read_results(place)]
    write_results(place, EXPERIMENTS[0], kept)
    (text,) = pages_of(RECIPES, tmp_path / "results", tmp_path / "docs").values()
    assert "better 2.000, plain 4.000 or more; x0.500 or less, 3 pairs" in text
    lines = verdict_table(EXPERIMENTS[0], judge(EXPERIMENTS[0], kept))
    assert any("x0.500 or less, 3 pairs" in line for line in lines)


def test_results_of_a_gpu_stand_beside_those_of_a_cpu(tmp_path):
    place = put_results(tmp_path)
    (place.parent / "scripted-gpu").mkdir()
    for file in place.iterdir():
        text = file.read_text().replace('"scale": "cpu"', '"scale": "gpu"')
        (place.parent / "scripted-gpu" / file.name).write_text(text)
    (text,) = pages_of(RECIPES, tmp_path / "results", tmp_path / "docs").values()
    assert text.count("**scripted**: Is the better arm better?") == 2
    assert "rollouts a step, cpu." in text and "rollouts a step, gpu." in text


def test_a_scale_that_settings_do_not_tell_is_the_experiments_own(tmp_path):
    put_results(tmp_path)
    counted = {"tiny": (Tiny, (replace(EXPERIMENTS[0], scale="operations are counted"), EXPERIMENTS[1]))}
    (text,) = pages_of(counted, tmp_path / "results", tmp_path / "docs").values()
    assert "Scale: operations are counted, cpu." in text and "rollouts a step" not in text


@pytest.mark.parametrize("name", sorted(recipes_with_experiments()))
def test_where_no_steps_are_trained_from_a_start_the_scale_is_declared(name):
    for experiment in recipes_with_experiments()[name][1]:
        settings = [changed(b, arm.changes) for b in experiment.budgets.values() for arm in experiment.arms]
        if experiment.trial is not train_run and not any(one.cold_start.max_updates for one in settings):
            assert experiment.scale, f"{experiment.name}: say what a trial is"


def test_the_experiments_that_train_by_no_steps_are_known():
    found = {one.name for _, those in recipes_with_experiments().values() for one in those if one.scale}
    assert found == {"attention_kinds", "generation_flops"}


@dataclass(frozen=True)
class Small(Tiny):
    scaled: ClassVar[tuple[str, ...]] = ("a small model",)


@dataclass(frozen=True)
class Smaller(Small):
    scaled: ClassVar[tuple[str, ...]] = (*Small.scaled, "a scripted judge")
    unsaid: ClassVar[tuple[str, ...]] = (*Small.unsaid, "how it is watched")


def test_what_an_experiments_settings_declare_beside_the_recipes_stands_with_it(tmp_path):
    put_results(tmp_path)
    own = replace(EXPERIMENTS[0], cpu=Smaller())
    (text,) = pages_of(
        {"tiny": (Small, (own, EXPERIMENTS[1]))}, tmp_path / "results", tmp_path / "docs"
    ).values()
    first, second = text.split("**losses**")
    assert "Also scaled down here:\n\n- a scripted judge\n" in first and "how it is watched" in first
    assert "Also" not in second
    assert "a small model" not in first and second.count("- a small model") == 1


def test_a_section_links_to_its_report_from_either_page(tmp_path):
    place = put_results(tmp_path)
    page = tmp_path / "docs" / "recipes" / "tiny.md"
    page.parent.mkdir(parents=True)
    page.write_text(f"{BEGIN}\n{END}\n")
    assert "[Report]" not in "".join(pages_of(RECIPES, tmp_path / "results", tmp_path / "docs").values())
    (place / "report.md").write_text("# r")
    pages = pages_of(RECIPES, tmp_path / "results", tmp_path / "docs")
    for file, text in pages.items():
        (link,) = re.findall(r"\[Report\]\(([^)]*)\)", text)
        assert (file.parent / link).resolve() == (place / "report.md").resolve()
    assert len(pages) == 2


def test_a_ledger_of_no_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere: it is no folder"):
        write_ledger(RECIPES, tmp_path / "nowhere", tmp_path / "docs")
    assert not list(tmp_path.iterdir())
    assert cli.main(["ledger", "--results", str(tmp_path / "nowhere"), "--docs", str(tmp_path / "docs")]) == 2


def test_other_results_make_another_page_and_one_written_by_hand_is_found(tmp_path):
    place = put_results(tmp_path)
    page = tmp_path / "docs" / "recipes" / "tiny.md"
    page.parent.mkdir(parents=True)
    page.write_text(f"# Tiny\n\nWhat it is.\n\n{BEGIN}\nold\n{END}\n\nWhat we do not know.\n")
    assert stale_pages(RECIPES, tmp_path) == ["ledger.md", "tiny.md"]
    assert write_ledger(RECIPES, tmp_path / "results", tmp_path / "docs") == [
        tmp_path / "docs" / "ledger.md",
        page,
    ]
    assert stale_pages(RECIPES, tmp_path) == []
    text = page.read_text()
    assert (
        text.startswith("# Tiny\n\nWhat it is.")
        and text.endswith("What we do not know.\n")
        and "old" not in text
    )
    assert (
        "**reproduced**" in text
        and "[tiny](recipes/tiny.md)" in (tmp_path / "docs" / "ledger.md").read_text()
    )
    page.write_text(text.replace("**reproduced**", "**contradicted**", 1))
    assert stale_pages(RECIPES, tmp_path) == ["tiny.md"]
    write_ledger(RECIPES, tmp_path / "results", tmp_path / "docs")
    worse = [
        Result.from_dict({**r.to_dict(), "values": {**r.values, "accuracy": 0.1}})
        for r in read_results(place)
    ]
    write_results(place, EXPERIMENTS[0], worse)
    assert stale_pages(RECIPES, tmp_path) == ["ledger.md", "tiny.md"]


def test_the_ledger_of_this_checkout_is_current():
    assert stale_pages(recipes_with_experiments()) == [], "run `whorl ledger` and commit what it writes"


def test_results_in_this_checkout_are_small_and_name_no_machine():
    for folder in (Path(cli.__file__).parents[1] / "results").glob("*/*"):
        size = sum(file.stat().st_size for file in folder.iterdir())
        assert size <= 250_000, f"{folder.name}: {size:,} bytes are too many for the repository"
        for file in folder.glob("*.json"):
            assert "/tmp/" not in file.read_text() and "/home/" not in file.read_text(), file


def comparisons_of(name: str) -> list[Comparison]:
    """Every experiment of the recipe at every budget, on two seeds, with the results of this checkout."""
    results, module = Path(cli.__file__).parents[1] / "results", f"whorl.recipes.{name}"
    return [
        Comparison(module, name, experiment, (0, 1), budget, results, experiment.arms)
        for experiment in recipes_with_experiments()[name][1]
        for budget in experiment.budgets
    ]


@pytest.mark.parametrize("name", sorted(recipes_with_experiments()))
def test_results_in_this_checkout_are_of_the_experiments_as_they_are(name):
    for whole in comparisons_of(name):
        kept = read_results(whole.place)
        stale = {(result.arm, result.seed) for result in kept} - {
            (r.arm, r.seed) for r in current(whole, kept)
        }
        assert not stale, (
            f"{whole.place.name}: the settings of {sorted(stale)} are others now; run them again"
        )


@pytest.mark.parametrize("name", sorted(recipes_with_experiments()))
def test_the_experiments_of_a_recipe_can_be_begun(name):
    for whole in comparisons_of(name):
        keys = {task.key for task in whole.trials()}
        assert len(keys) == 2 * len(whole.experiment.arms), "two arms are the same"

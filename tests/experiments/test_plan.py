"""The nouns of a comparison: what they refuse, and what an arm's settings become."""

from dataclasses import replace

import pytest

from whorl.experiments.plan import Arm, Claim, Experiment, Measure, changed, log_margin
from whorl.experiments.readings import last
from whorl.recipes.quickstart import Quickstart
from whorl.settings import Settings

ARMS = (Arm("cispo", "method"), Arm("grpo", "baseline", {"algorithm": "GRPO", "optimizer.eps": 1e-8}))
ACCURACY = Measure("accuracy", "held-out accuracy", last("eval_accuracy"))
STEPS = Measure("steps", "steps to 0.9", last("step"), False, "steps", "ratio")


def experiment(**changes) -> Experiment:
    plain = Experiment(
        "losses", "which loss?", Quickstart(), ARMS, (ACCURACY, STEPS),
        (Claim("better", "44.6 against 34.5", "accuracy", "cispo", "grpo"),),
    )  # fmt: skip
    return replace(plain, **changes)


def test_an_arm_changes_what_it_names_and_nothing_else():
    settings = experiment().settings("cpu", ARMS[1], seed=3)
    assert (settings.algorithm, settings.optimizer.eps, settings.seed) == ("GRPO", 1e-8, 3)
    assert settings.device == "cpu"
    back = changed(
        settings, {"algorithm": Quickstart().algorithm, "optimizer.eps": 1e-15, "seed": 0, "device": "auto"}
    )
    assert back == Quickstart()


def test_a_whole_part_and_a_piece_of_it_can_both_be_changed():
    part = Quickstart().cold_start
    found = changed(
        Quickstart(), {"cold_start": replace(part, max_updates=7), "cold_start.until_accuracy": 0.1}
    )
    assert (found.cold_start.max_updates, found.cold_start.until_accuracy) == (7, 0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {
                "arms": (
                    *ARMS,
                    Arm("a", "method", {"optimizer.esp": 1.0}),
                )
            },
            "no setting 'esp'; did you mean eps?",
        ),
        (
            {
                "arms": (
                    *ARMS,
                    Arm("a", "method", {"algoritm": "GRPO"}),
                )
            },
            "did you mean algorithm?",
        ),
        (
            {
                "arms": (
                    *ARMS,
                    Arm("a", "method", {"seed.x": 1}),
                )
            },
            "no setting 'seed.x'",
        ),
        ({"arms": (*ARMS, ARMS[0])}, "two arms called 'cispo'"),
        ({"start": {"enviroment": "countdown"}}, "did you mean environment?"),
        ({"claims": (Claim("c", "", "accuracy", "cispo", "gpro"),)}, "did you mean grpo?"),
        ({"claims": (Claim("c", "", "acuracy", "cispo", "grpo"),)}, "did you mean accuracy?"),
        ({"claims": (Claim("c", "", "accuracy", "cispo", "grpo", "equal"),)}, "within which margin"),
        ({"claims": (Claim("c", "", "steps", "cispo", "grpo", margin=0.5),)}, "must be above 1"),
        ({"claims": (Claim("c", "", "accuracy", "cispo", "grpo", margin=0.0),)}, "must be above 0"),
        ({"budget": "generated_tokens"}, "set num_generated_tokens"),
        ({"name": "two words"}, "letters, digits"),
        ({"cpu": None}, "settings for no budget"),
        ({"gpu": Settings(), "gpu_start": {"modle": "m1-nano"}}, "did you mean model?"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_the_recipe_is_read(changes, said):
    with pytest.raises(ValueError, match=said.replace("?", r"\?").replace("(", r"\(")):
        experiment(**changes)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown arm of experiment losses: 'gropo'; did you mean grpo"):
        experiment().arm("gropo")


def test_there_is_no_gpu_budget_unless_the_recipe_has_one():
    with pytest.raises(ValueError, match="leave out --budget gpu"):
        experiment().settings("gpu", ARMS[0], 0)
    assert experiment(gpu=Settings()).settings("gpu", ARMS[0], 1) == Settings(seed=1, device="cuda")
    both = experiment(gpu=Settings(), start={"seed": 1}, gpu_start={"seed": 2})
    assert (both.start_changes("cpu"), both.start_changes("gpu")) == ({"seed": 1}, {"seed": 2})
    assert experiment(gpu=Settings(), start={"seed": 1}).start_changes("gpu") == {"seed": 1}


def test_the_first_baseline_is_what_the_others_are_compared_with():
    assert experiment().baseline.name == "grpo"
    assert experiment(arms=(Arm("grpo", "control"), Arm("cispo", "method"))).baseline.name == "grpo"


def test_a_margin_of_ratios_is_a_factor():
    claim = Claim("half the steps", "2x", "steps", "cispo", "grpo", "lower", margin=2.0)
    assert log_margin(claim, STEPS) == pytest.approx(0.6931, abs=1e-4)
    assert log_margin(replace(claim, margin=0.02), ACCURACY) == 0.02

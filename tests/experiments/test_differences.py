"""`whorl diff`, and the names that the command line of comparisons knows."""

import pytest

from whorl import cli
from whorl.cli_experiments import side_of
from whorl.experiments.differences import Difference, Side, differences, surroundings, table_of
from whorl.recipes.catalog import recipes_with_experiments
from whorl.settings import AnySettings, Settings


def settings_of(place: str, overrides: tuple[str, ...] | list[str] = ()) -> AnySettings:
    return side_of(place, overrides).settings


def test_nothing_differs_between_a_recipe_and_itself(capsys):
    assert differences(settings_of("quickstart"), settings_of("quickstart")) == []
    assert cli.main(["diff", "quickstart", "quickstart"]) == 0
    assert "are the same" in capsys.readouterr().out


def test_a_nested_setting_is_named_by_its_path():
    found = differences(
        settings_of("quickstart"), settings_of("quickstart", ["optimizer.eps=1e-8", "seed=3"])
    )
    assert found == [Difference("optimizer.eps", "1e-15", "1e-08"), Difference("seed", "0", "3")]


def test_algorithms_are_taken_apart():
    first = settings_of("quickstart", ["algorithm=GRPO"])
    second = settings_of("quickstart", ["algorithm=DAPO"])
    found = {one.name: (one.first, one.second) for one in differences(first, second)}
    assert found["algorithm"] == ("GRPO", "DAPO")
    assert found["algorithm: average"] == ("sequence_mean", "group_token_mean")
    assert found["algorithm: objective"] == (
        "ppo_clip(ratio_min=0.8, ratio_max=1.2)", "ppo_clip(ratio_min=0.8, ratio_max=1.28)",
    )  # fmt: skip
    assert found["algorithm: term minus_kl_k3"] == ("0.04 x minus_kl_k3, sequence_mean", "-")
    assert found["algorithm: shaping"] == ("-", "overlong(max_tokens=20480, buffer_tokens=4096)")
    assert found["algorithm: dynamic sampling"] == ("False", "True")
    assert "algorithm: credit" not in found


def test_arms_are_compared_and_two_that_differ_exit_with_1(capsys):
    first, second = "reinforce_pp:overfit:grpo", "reinforce_pp:overfit:rfpp_baseline"
    found = differences(settings_of(first), settings_of(second))
    assert {one.name for one in found} == {"algorithm", "algorithm: credit"}
    harder = settings_of("reinforce_pp:difficulty:grpo")
    assert isinstance(harder, Settings) and harder.environment == "chain_arithmetic,num_terms=3"
    assert settings_of("minimax_m1:cispo_16") == settings_of("minimax_m1:stale_updates:cispo_16")
    assert cli.main(["diff", first, "reinforce_pp:overfit:rloo"]) == 1
    said = capsys.readouterr().out
    assert "leave_one_out" in said and "the same settings" not in said


def of(experiment: str, arm: str, **keywords) -> Side:
    return side_of(f"{experiment}:{arm}", **keywords)


def test_two_arms_with_the_same_settings_are_told_apart_by_what_their_trial_makes_of_them(capsys):
    place = "reflect_retry_reward:reflect_retry_reward"
    assert differences(of(place, "start").settings, of(place, "rrr").settings) == []
    assert cli.main(["diff", f"{place}:start", f"{place}:rrr"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "are the same" not in said
    expected = "they differ by what the trial makes of the arm: start: the model before training, with reflections | "
    assert expected + "rrr: a method" in said
    found = {one.name: (one.first, one.second) for one in surroundings(of(place, "start"), of(place, "rrr"))}
    assert found["arm"] == ("start", "rrr") and found["role"] == ("start", "method")
    assert found["note"] == ("the model before training, with reflections", "-") and len(found) == 3


def test_no_two_arms_of_an_experiment_are_called_the_same(capsys):
    for recipe, (_, experiments) in recipes_with_experiments().items():
        for experiment in experiments:
            first, *others = (f"{recipe}:{experiment.name}:{arm.name}" for arm in experiment.arms)
            for other in others:
                assert cli.main(["diff", first, other]) == 1
                said = capsys.readouterr().out
                assert "are the same" not in said and ("difference" in said)
            for one in experiment.arms:
                for two in experiment.arms:
                    pair = (
                        of(f"{recipe}:{experiment.name}", one.name),
                        of(f"{recipe}:{experiment.name}", two.name),
                    )
                    assert bool(surroundings(*pair)) is (one is not two)
    assert cli.main(["diff", first, first]) == 0
    assert "are the same" in " ".join(capsys.readouterr().out.split())


def test_role_start_and_trial_are_shown_where_experiments_differ():
    sides = of("minimax_m1:judge_length_bias", "unwatched"), of("minimax_m1:fp32_head", "fp32")
    found = {one.name: (one.first, one.second) for one in surroundings(*sides)}
    assert found["start: environment"] == ("judged_arithmetic", "-")
    assert found["trial"][0].endswith("judge_length_bias.train_watched")
    assert found["role"] == ("baseline", "method")


def test_settings_are_those_of_the_budget_and_a_gpus_where_there_are_no_others():
    here, there = (of("minimax_m1:stale_updates", "cispo_16", budget=one) for one in ("cpu", "gpu"))
    assert of("minimax_m1:stale_updates", "cispo_16").settings == here.settings != there.settings
    only = of("reflect_retry_reward:countdown", "rrr")
    assert only.budget == "gpu" and only == of("reflect_retry_reward:countdown", "rrr", budget="gpu")


def test_one_difference_is_not_called_differences():
    one = [Difference("seed", "0", "1")]
    assert (table_of(one, "a", "b").title, table_of(one * 2, "a", "b").title) == (
        "1 difference",
        "2 differences",
    )


def test_help_says_in_a_sentence_what_is_compared(capsys):
    with pytest.raises(SystemExit):
        cli.main(["diff", "--help"])
    said = capsys.readouterr().out
    assert "likewise" not in said and "what it is compared with" in said


def test_recipes_of_different_kinds_can_be_compared():
    found = {
        one.name: (one.first, one.second)
        for one in differences(settings_of("quickstart"), settings_of("sft"))
    }
    assert found["num_epochs"] == ("-", "2") and found["data"] == ("-", "DATA")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["diff", "quickstart", "quikstart"], "did you mean quickstart"),
        (["diff", "quickstart", "reinforce_pp:gropo"], "did you mean grpo"),
        (["diff", "quickstart", "reinforce_pp:overfit:gropo"], "did you mean grpo"),
        (["diff", "quickstart", "reinforce_pp:grpo"], "say which: reinforce_pp:overfit:grpo, reinforce_pp:difficulty:"),
        (["diff", "quickstart", "minimax_m1:stale_updates"], "is an experiment of minimax_m1; name one of its arms"),
        (["diff", "quickstart", "minimax_m1:fp32_head:fp32", "--budget", "gpu"], "leave out --budget gpu"),
        (["diff", "quickstart", "sft", "--budget", "gpu"], "--budget chooses the settings of arms"),
        (["diff", "quickstart", "reinforce_pp:overfitt:grpo"], "did you mean overfit"),
        (["diff", "quickstart", "quickstart", "optimizer.esp=1"], "did you mean eps"),
        (["diff", "quickstart", "quickstart", "seed"], "expected name=value"),
        (["diff", "quickstart", "a:b:c:d"], "recipe:experiment:arm"),
        (["compare", "reinforc_pp"], "did you mean reinforce_pp"),
        (["compare", "quickstart"], "quickstart has no experiments"),
        (["compare", "reinforce_pp", "--experiment", "overfitt"], "did you mean overfit"),
        (["compare", "reinforce_pp", "--arms", "grpo,rlo"], "did you mean rloo"),
        (["compare", "reinforce_pp", "--seeds", "0"], "--seeds must be at least 1"),
        (["compare", "reinforce_pp", "--jobs", "-1"], "--jobs must be at least 1"),
        (["compare", "reinforce_pp", "--budget", "gpu"], "leave out --budget gpu"),
    ],
)  # fmt: skip
def test_wrong_use_is_answered_with_the_nearest_and_exit_code_2(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

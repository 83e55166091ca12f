"""The catalogue: its names, its settings, and the numbers that papers print."""

import math

import pytest

from whorl.algorithms.algorithm import Algorithm
from whorl.algorithms.averages import constant_length, token_mean
from whorl.algorithms.catalog import ALGORITHMS, AVERAGES, GRPO, algorithm_named, with_settings


def test_every_row_has_a_source_and_a_summary_of_one_line():
    assert len(ALGORITHMS) == 14
    for name, row in ALGORITHMS.items():
        assert row.source, name
        assert row.summary, name
        assert len(row.summary) < 110, name
        assert "\n" not in row.summary, name


# credit, objective, average, then the numbers as the papers print them
PAPERS = {
    "CISPO": ("zscore", "cispo", "group_token_mean", {"ratio_min": 0.0, "dynamic_sampling": True}),
    "DAPO": ("zscore", "ppo_clip", "group_token_mean", {"ratio_min": 1 - 0.2, "ratio_max": 1 + 0.28}),
    "GRPO": ("zscore", "ppo_clip", "sequence_mean", {"minus_kl_k3": 0.04}),
    "DR_GRPO": ("centred", "ppo_clip", "constant_length", {"ratio_min": 1 - 0.2, "ratio_max": 1 + 0.2}),
    "GSPO": ("zscore", "gspo", "sequence_mean", {"ratio_min": 1 - 3e-4, "ratio_max": 1 + 4e-4}),
    "GMPO": ("zscore", "gmpo", "sequence_mean", {"ratio_min": math.exp(-0.4), "ratio_max": math.exp(0.4)}),
    "SAPO": ("zscore", "sapo", "sequence_mean", {"tau_positive": 1.0, "tau_negative": 1.05}),
    "RLOO": ("leave_one_out", "reinforce", "sequence_sum", {}),
    "REMAX": ("greedy_baseline", "reinforce", "sequence_sum", {}),
    "OPO": ("optimal_baseline", "reinforce", "sequence_sum", {}),
    "PPO": ("gae", "ppo_clip", "token_mean", {"ratio_min": 1 - 0.2, "ratio_max": 1 + 0.2, "lam": 1.0}),
    "REINFORCE": ("reward_itself", "reinforce", "sequence_sum", {}),
    "REINFORCE_PP": ("whitened", "ppo_clip", "sequence_mean", {"kl_coefficient": 0.01}),
    "REINFORCE_PP_BASELINE": ("centred_then_whitened", "ppo_clip", "sequence_mean", {"minus_kl_k2": 1e-5}),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rows_are_those_of_the_papers(name):
    settings = ALGORITHMS[name].settings
    credit, objective, average, numbers = PAPERS[name]
    assert (settings["credit"], settings["objective"], settings["average"]) == (credit, objective, average)
    for key, value in numbers.items():
        assert settings[key] == pytest.approx(value), key


def test_a_row_is_found_by_its_name_in_any_case_and_an_unknown_one_names_the_nearest():
    assert algorithm_named("dr-grpo") is ALGORITHMS["DR_GRPO"]
    with pytest.raises(ValueError, match="unknown algorithm 'cipso'; did you mean CISPO"):
        algorithm_named("cipso")


def test_settings_of_a_row_can_be_changed_by_name():
    row = with_settings("cispo", ratio_max=4.0, eps=1e-4, average="token_mean", dynamic_sampling=False)
    assert row.average is token_mean
    assert not row.dynamic_sampling
    assert (row.settings["ratio_max"], row.settings["eps"]) == (4.0, 1e-4)
    assert ALGORITHMS["CISPO"].settings["ratio_max"] == 5.0


def test_extra_terms_follow_the_main_average_and_a_coefficient_of_0_leaves_one_out():
    row = with_settings("GRPO", average="constant_length", max_tokens=64)
    for term in row.terms:
        assert term.average.func is constant_length
        assert term.average.keywords == {"max_tokens": 64}
    assert GRPO.needs == ("logp_ref_N",)
    assert with_settings("GRPO", minus_kl_k3=0.0).needs == ()
    assert with_settings("REINFORCE_PP", kl_coefficient=0).needs == ()
    assert with_settings("GRPO", minus_kl_k3=0.001).extras[0].coefficient == 0.001


def test_a_setting_that_the_row_does_not_have_is_refused():
    with pytest.raises(ValueError, match="this algorithm has no setting 'ratio_mx'; did you mean ratio_max"):
        with_settings("CISPO", ratio_mx=4.0)
    with pytest.raises(ValueError, match=r"no setting 'credit'\. There are average, roles"):
        with_settings("CISPO", credit="centred")
    with pytest.raises(ValueError, match="no setting 'gamma'"):
        with_settings("CISPO", gamma=0.9)
    with pytest.raises(ValueError, match="unknown average 'tokenmean'; did you mean token_mean"):
        with_settings("CISPO", average="tokenmean")
    with pytest.raises(ValueError, match="constant_length needs a value for max_tokens"):
        with_settings("CISPO", average="constant_length")


def test_every_average_is_in_the_table_under_its_own_name():
    assert set(AVERAGES) == {
        "token_mean",
        "group_token_mean",
        "sequence_mean",
        "sequence_sum",
        "constant_length",
    }
    assert all(isinstance(row, Algorithm) for row in ALGORITHMS.values())

"""The gradient is one number, and the ways in which it commonly is not are seen."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from whorl.algorithms.algorithm import Algorithm
from whorl.algorithms.catalog import ALGORITHMS, CISPO, PPO, with_settings
from whorl.checks import ranks
from whorl.checks.gradients import EXTRAS, check_cuts, check_gradients, every_algorithm, gradients
from whorl.checks.ragged import REWARDS, difference, learner_and_batch, parameters, scripted_groups
from whorl.checks.ranks import (
    WAYS,
    Way,
    add_gradients,
    check_ranks,
    every_second,
    train_alone,
    train_on_ranks,
)
from whorl.data import Batch, apply
from whorl.learning.learner import Learner

TOKEN_MEAN = with_settings("CISPO", average="token_mean")
"""Ranks with unequal numbers of tokens give every wrong average away."""


@pytest.mark.parametrize("name", ["GRPO", "GSPO", "on turns of one role only"])
def test_cuts_and_orders_give_one_gradient(name):
    row = check_cuts(name, every_algorithm()[name])
    assert row.ok
    assert "in 1, 2, 5, 15 micro-batches, 3 orders" in row.measured


def test_every_row_of_the_catalogue_and_every_extra_term_is_checked():
    cases = every_algorithm()
    assert set(ALGORITHMS) <= set(cases)
    extra_names = {term.name for row in ALGORITHMS.values() for term in row.extras}
    checked = {term.name for row in cases.values() for term in row.extras}
    assert extra_names <= checked
    assert len(checked) == len(EXTRAS) == 6


@pytest.mark.parametrize("name", sorted(every_algorithm()))
def test_the_objective_has_a_gradient_of_its_own_in_each_of_them(name):
    algorithm = every_algorithm()[name]
    learner, batch = learner_and_batch(algorithm)
    learner.router_aux_coefficient = 0.0
    found, _ = gradients(learner, batch, algorithm.terms)
    assert float(found["model/lm_head.weight"].norm()) > 1e-6


def test_the_batch_has_all_that_makes_a_difference():
    groups = scripted_groups()
    assert not groups[1].has_signal
    assert [reward is None for reward in REWARDS[2]] == [False, True, False, False]
    _, batch = learner_and_batch(every_algorithm()["on turns of one role only"])
    assert batch.num_sequences == 15
    assert len(set(batch.length_S.tolist())) > 4
    trained_S = batch.sum_per_sequence(batch["trained_N"].long())
    assert (trained_S == 0).sum() == 1
    assert (batch["policy_N"] & ~batch["trained_N"]).any()
    parts = [every_second(batch, rank, CISPO) for rank in range(2)]
    assert parts[0].num_tokens != parts[1].num_tokens


def divided_by_what_is_there(logp_N, advantage_N):
    return logp_N * advantage_N / len(logp_N), {}


def test_an_objective_that_divides_by_the_tokens_it_is_given_is_seen():
    algorithm = replace(CISPO, objective=divided_by_what_is_there)
    row = check_cuts("divides", algorithm)
    assert not row.ok


def test_a_difference_of_one_part_in_a_billion_is_measured_as_that():
    wanted = {"a": torch.tensor([3.0, 4.0], dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    assert difference(wanted, wanted) == 0
    moved = wanted | {"a": wanted["a"] + torch.tensor([5e-9, 0.0])}
    assert difference(moved, wanted) == pytest.approx(1e-9, rel=1e-6)  # 5e-9 / |(3, 4)|
    assert difference(wanted | {"a": wanted["a"] * torch.nan}, wanted) == float("inf")
    assert difference({"a": wanted["a"]}, wanted) == float("inf")
    assert difference({"a": torch.ones(1)}, {"a": torch.zeros(1)}) == float("inf")


def average_gradients(learner: Learner) -> None:
    """The known bug: what DistributedDataParallel does by itself."""
    add_gradients(learner)
    for _, parameter in parameters(learner):
        assert parameter.grad is not None
        parameter.grad /= dist.get_world_size()


def weights_of_its_own(batch: Batch, rank: int, algorithm: Algorithm) -> Batch:
    """The known bug: each rank divides by its own tokens (and the ranks are averaged)."""
    part = every_second(batch, rank, algorithm)
    own = {term.weight_column: apply(term.average, part) / ranks.NUM_RANKS for term in algorithm.terms}
    return part.with_columns(**own)


def forgets_to_add(learner: Learner) -> None:
    """The known bug: every rank goes its own way."""


@pytest.fixture(scope="module")
def outcomes():
    """All ways, right and wrong, in one pair of processes."""
    wrong = {
        "averaged": Way(every_second, average_gradients),
        "weights per rank": Way(weights_of_its_own, add_gradients),
        "not added": Way(every_second, forgets_to_add),
    }
    return train_on_ranks({"tokens": TOKEN_MEAN, "PPO": PPO}, WAYS | wrong)


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("name", ["tokens", "PPO"])
def test_two_processes_have_the_gradient_and_the_adam_state_of_one(outcomes, way, name):
    alone = train_alone({"tokens": TOKEN_MEAN, "PPO": PPO}[name])
    found = outcomes[way][name]
    assert difference(found.gradient, alone.gradient) <= 1e-12
    assert difference(found.state, alone.state) <= 1e-10
    assert any(key.endswith("exp_avg_sq") for key in found.state)


@pytest.mark.parametrize(
    ("way", "least"), [("averaged", 0.49), ("weights per rank", 0.01), ("not added", 0.1)]
)
def test_what_ranks_commonly_get_wrong_is_seen(outcomes, way, least):
    found = outcomes[way]["tokens"]
    gap = difference(found.gradient, train_alone(TOKEN_MEAN).gradient)
    assert gap > least
    if way == "averaged":
        assert gap == pytest.approx(1 / 2)  # half of the sum is missing, in every tensor


def test_adam_hides_an_average_in_its_direction_but_its_moments_do_not(outcomes):
    # Adam divides by the gradient's size, so the weights of an averaged run look right; hence moments are compared.
    alone, averaged = train_alone(TOKEN_MEAN).state, outcomes["averaged"]["tokens"].state
    name = "model/lm_head.weight"
    first_moment, second_moment = f"{name}/exp_avg", f"{name}/exp_avg_sq"
    assert float((averaged[name] - alone[name]).norm() / alone[name].norm()) < 0.05
    for moment in (first_moment, second_moment):
        assert difference({moment: averaged[moment]}, {moment: alone[moment]}) > 0.1


@pytest.mark.parametrize(("way", "ok"), [("every second sequence each", True), ("averaged", False)])
def test_rows_for_ranks_say_whether_gradient_and_state_agree(outcomes, way, ok, monkeypatch):
    monkeypatch.setattr(ranks, "train_on_ranks", lambda algorithms, ways: {way: outcomes[way]})
    rows = check_ranks({"tokens": TOKEN_MEAN, "PPO": PPO})
    assert [row.ok for row in rows] == [ok, ok]
    assert rows[0].promise == f"one gradient on 2 ranks: {way}"
    assert rows[1].promise == f"one Adam state after 3 updates on 2 ranks: {way}"
    assert "largest of 2 algorithms" in rows[0].measured


def test_nothing_to_check_is_refused():
    with pytest.raises(ValueError, match="at least one algorithm"):
        check_gradients({})

"""The gradient does not depend on how the batch is cut: float64, relative 1e-12."""

import pytest
import torch

from tests.learning.support import REWARDS, gradient_of, relative, scripted_groups, tiny_config, tiny_learner
from whorl.algorithms.algorithm import Algorithm, assemble
from whorl.algorithms.catalog import ALGORITHMS, with_settings
from whorl.algorithms.penalties import truncated_importance
from whorl.data import Batch, apply
from whorl.learning.learner import Learner
from whorl.learning.packing import micro_batches

BUDGETS = [10_000, 150, 60, 1]
"""One micro-batch; a few; many; every sequence alone."""


def learner_and_batch(algorithm: Algorithm, **config) -> tuple[Learner, Batch]:
    """A learner after one update, so that the router's shares are not uniform, and a batch for the next."""
    learner = tiny_learner(
        config=tiny_config(**config), temperature=0.9, value_head=True, reference=True,
        router_aux_coefficient=0.01,
    )  # fmt: skip
    provide = {
        "logp_ref_N": learner.reference_logprobs,
        "logp_old_N": learner.logprobs,
        "value_old_N": learner.values,
        "reward_greedy_S": lambda batch: torch.full((batch.num_sequences,), 0.25, dtype=torch.float64),
    }
    groups = scripted_groups(REWARDS, seed=5)
    learner.forward_backward(assemble(groups, algorithm, provide), algorithm.terms)
    learner.optim_step()
    return learner, assemble(groups, algorithm, provide)


def gradient(learner: Learner, batch: Batch, algorithm: Algorithm, budget: int) -> torch.Tensor:
    learner.token_budget = budget
    learner.forward_backward(batch, algorithm.terms)
    found = gradient_of(learner)
    learner.optimizer.adamw.zero_grad()
    return found


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_any_cut_and_any_order_give_the_same_gradient(name):
    algorithm = ALGORITHMS[name]
    learner, batch = learner_and_batch(algorithm)
    numbers = [len(micro_batches(batch, budget)) for budget in BUDGETS]
    assert numbers[0] == 1
    assert numbers[-1] == batch.num_sequences == 15
    assert len(set(numbers)) == 4
    whole = gradient(learner, batch, algorithm, BUDGETS[0])
    assert whole.norm() > 1e-3
    order = torch.randperm(batch.num_sequences, generator=torch.Generator().manual_seed(0))
    for part in (batch, batch.select(order)):
        for budget in BUDGETS:
            assert relative(gradient(learner, part, algorithm, budget), whole) < 1e-12


@pytest.mark.parametrize(
    "config",
    [
        {"tied": True},
        {"num_experts": 0},
        {"softmax_period": 0},
        {"dense_layers": (0,), "router_renormalised": False},
        {"softmax_period": 1, "sliding_window": 3, "beta": 0.7},
    ],
)
def test_so_it_is_for_other_models(config):
    algorithm = ALGORITHMS["CISPO"]
    learner, batch = learner_and_batch(algorithm, **config)
    whole = gradient(learner, batch, algorithm, 10_000)
    for budget in BUDGETS[1:]:
        assert relative(gradient(learner, batch, algorithm, budget), whole) < 1e-12


def test_so_it_is_with_a_correction_for_the_sampler_and_one_role_only():
    correction = Algorithm(
        ALGORITHMS["CISPO"].credit, ALGORITHMS["CISPO"].objective, ALGORITHMS["CISPO"].average,
        correction=lambda logp_old_N, logp_sampler_N: truncated_importance(
            logp_old_N, logp_sampler_N, max_weight=2.0
        ),
    )  # fmt: skip
    learner, batch = learner_and_batch(correction)
    assert batch["weight_cispo_N"].unique().numel() > 10
    whole = gradient(learner, batch, correction, 10_000)
    assert relative(gradient(learner, batch, correction, 1), whole) < 1e-12


def test_weights_made_per_micro_batch_would_be_caught():
    """The known bug: each micro-batch divided by its own tokens, then averaged over micro-batches."""
    algorithm = with_settings("CISPO", average="token_mean")
    learner, batch = learner_and_batch(algorithm)
    whole = gradient(learner, batch, algorithm, 10_000)
    parts = micro_batches(batch, 60)
    wrong = torch.zeros_like(whole)
    for part in parts:
        own = {term.weight_column: apply(term.average, part) / len(parts) for term in algorithm.terms}
        wrong += gradient(learner, part.with_columns(**own), algorithm, 10_000)
    assert relative(wrong, whole) > 0.05


def test_a_router_share_made_per_micro_batch_would_be_caught():
    algorithm = ALGORITHMS["CISPO"]
    learner, batch = learner_and_batch(algorithm)
    learner.router_aux_coefficient = 1.0
    whole = gradient(learner, batch, algorithm, 10_000)
    learner._share_LE = learner._share_LE.flip(1)
    assert relative(gradient(learner, batch, algorithm, 10_000), whole) > 1e-3


def test_metrics_do_not_depend_on_the_cut_either():
    algorithm = ALGORITHMS["PPO"]
    learner, batch = learner_and_batch(algorithm)
    seen = []
    for budget in BUDGETS:
        learner.token_budget = budget
        seen.append(learner.forward_backward(batch, algorithm.terms))
    for metrics in seen[1:]:
        assert metrics == {n: pytest.approx(v, rel=1e-11, abs=1e-13) for n, v in seen[0].items()}

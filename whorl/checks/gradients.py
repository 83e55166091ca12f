"""Promise 2: the gradient of a batch is one number, however the batch is cut.

Every row of the catalogue and every extra term is trained in float64 on one ragged batch: whole, in micro-batches,
in other orders, and dealt to the two ranks of a `torchrun`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor

from whorl.algorithms.algorithm import Algorithm, Term, name_of
from whorl.algorithms.averages import token_mean
from whorl.algorithms.catalog import ALGORITHMS, CISPO, PPO
from whorl.algorithms.critic import minus_clipped_value_error, minus_value_error
from whorl.algorithms.penalties import entropy_bonus, minus_kl_k2, minus_kl_k3, truncated_importance
from whorl.checks.ragged import GRADIENT_LIMIT, difference, learner_and_batch, parameters
from whorl.checks.ranks import check_ranks
from whorl.checks.table import Row
from whorl.data import Batch
from whorl.learning.learner import Learner
from whorl.learning.packing import micro_batches, with_prefixes
from whorl.learning.supervised import log_likelihood

EXTRAS: tuple[Callable, ...] = (
    entropy_bonus, minus_kl_k2, minus_kl_k3, log_likelihood, minus_value_error,
    partial(minus_clipped_value_error, max_change=0.2),
)  # fmt: skip
"""Objectives that can be added to any algorithm."""


def every_algorithm() -> dict[str, Algorithm]:
    """The catalogue, one algorithm for each extra term, a corrected one, and one that trains on some turns."""
    cases = dict(ALGORITHMS)
    for objective in EXTRAS:
        # A critic's objectives need the critic's targets.
        base = PPO if "value" in name_of(objective) else CISPO
        term = Term(objective, token_mean, 0.5)
        cases[f"with {name_of(objective)}"] = replace(base, extras=(term,))
    cases["with a correction for the sampler"] = replace(
        CISPO, correction=partial(truncated_importance, max_weight=2.0)
    )
    cases["on turns of one role only"] = replace(CISPO, roles=("reflection",))
    return cases


def check_gradients(algorithms: Mapping[str, Algorithm] | None = None) -> list[Row]:
    """A row for each algorithm on the cuts within a process, and the rows of `check_ranks` for all of them.

    `algorithms` by name; default: `every_algorithm()`. They are sent to other processes, so their functions must
    be those of modules.
    """
    cases = every_algorithm() if algorithms is None else algorithms
    if not cases:
        raise ValueError("check_gradients needs at least one algorithm")
    return [check_cuts(name, algorithm) for name, algorithm in cases.items()] + check_ranks(cases)


def check_cuts(name: str, algorithm: Algorithm) -> Row:
    """The largest difference between the gradient of the whole batch and those of its cuts and orders."""
    learner, batch = learner_and_batch(algorithm)
    terms = algorithm.terms
    whole, _ = gradients(learner, batch, terms)
    rng = np.random.default_rng(3)
    orders = [np.arange(batch.num_sequences), *(rng.permutation(batch.num_sequences) for _ in range(2))]
    budgets = budgets_by_count(batch)
    worst, counts = 0.0, set()
    for order in orders:
        for budget in budgets:
            found, count = gradients(learner, batch.select(order.tolist()), terms, budget)
            worst = max(worst, difference(found, whole))
            counts.add(count)
    return Row(
        f"one gradient: {name}",
        f"{worst:.1e} in {', '.join(map(str, sorted(counts)))} micro-batches, {len(orders)} orders",
        f"{GRADIENT_LIMIT:.0e} relative",
        bool(worst <= GRADIENT_LIMIT) and counts >= {1, 2, 5, batch.num_sequences},
    )


def gradients(
    learner: Learner, batch: Batch, terms: Sequence[Term], budget: int = 10**9
) -> tuple[dict[str, Tensor], int]:
    """The gradient of each parameter, and in how many micro-batches of `budget` tokens it was computed."""
    count = 0

    def note(*_) -> None:
        nonlocal count
        count += 1

    learner.token_budget = budget
    handle = learner.model.register_forward_hook(note)
    try:
        learner.forward_backward(batch, terms)
    finally:
        handle.remove()
    found = {name: p.grad.clone() for name, p in parameters(learner) if p.grad is not None}
    learner.optimizer.zero_grad()
    return found, count


def budgets_by_count(batch: Batch) -> list[int]:
    """Token budgets that cut the batch into 1, 2, 5 and as many micro-batches as it has sequences."""
    shared = with_prefixes(batch, batch["policy_N"])
    found: dict[int, int] = {}
    for budget in range(1, batch.num_sequences * int(batch.length_S.max()) + 1):
        found.setdefault(len(micro_batches(shared, budget)), budget)
    wanted = (1, 2, 5, batch.num_sequences)
    return [found[count] for count in wanted]

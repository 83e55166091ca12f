"""Two processes that share a batch: gradients are added over ranks, never averaged.

Every weight was fixed on the global batch, so the sum over ranks is the whole gradient, just as the sum over
micro-batches is; a rank needs to know neither how many others there are nor how much they have.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from whorl.algorithms.algorithm import Algorithm
from whorl.checks.ragged import GRADIENT_LIMIT, difference, learner_and_batch, parameters
from whorl.checks.table import Row
from whorl.data import Batch
from whorl.learning.learner import Learner

NUM_RANKS = 2

STATE_LIMIT = 1e-10
"""Largest |difference| / |value| of a weight tensor or of its moments in Adam after `NUM_UPDATES` updates, each of
which magnifies what the last one left."""

NUM_UPDATES = 3


class Way(NamedTuple):
    """How a batch is divided (`deal(batch, rank, algorithm)`: that rank's part) and gradients are put together."""

    deal: Callable[[Batch, int, Algorithm], Batch]
    reduce: Callable[[Learner], None]


class Outcome(NamedTuple):
    """The gradient of the first update, and weights and Adam's moments after the last."""

    gradient: dict[str, Tensor]
    state: dict[str, Tensor]


def every_second(batch: Batch, rank: int, algorithm: Algorithm) -> Batch:
    """Sequences rank, rank + 2, ...: groups are torn apart, and ranks have different numbers of tokens."""
    return batch.select(range(rank, batch.num_sequences, NUM_RANKS))


def all_on_the_last(batch: Batch, rank: int, algorithm: Algorithm) -> Batch:
    """The last rank has all sequences, the others have nothing to do."""
    return batch.select(range(batch.num_sequences) if rank == NUM_RANKS - 1 else [])


def add_gradients(learner: Learner) -> None:
    """Gradients and the router's counts of choices, summed over ranks; a rank without a gradient adds 0."""
    for _, parameter in parameters(learner):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, dist.ReduceOp.SUM)
    dist.all_reduce(learner._chosen_LE, dist.ReduceOp.SUM)


WAYS = {
    "every second sequence each": Way(every_second, add_gradients),
    "one rank with nothing to do": Way(all_on_the_last, add_gradients),
}


def check_ranks(algorithms: Mapping[str, Algorithm]) -> list[Row]:
    """A row for each of `WAYS` and each of gradient and state, with the worst of the algorithms."""
    alone = {name: train_alone(algorithm) for name, algorithm in algorithms.items()}
    compared = (
        ("one gradient", GRADIENT_LIMIT),
        (f"one Adam state after {NUM_UPDATES} updates", STATE_LIMIT),
    )
    rows = []
    for way, outcomes in train_on_ranks(algorithms, WAYS).items():
        for index, (what, limit) in enumerate(compared):
            gaps = {name: difference(outcomes[name][index], alone[name][index]) for name in algorithms}
            worst = max(gaps, key=gaps.__getitem__)
            rows.append(
                Row(
                    f"{what} on {NUM_RANKS} ranks: {way}",
                    f"{gaps[worst]:.1e} (largest of {len(gaps)} algorithms, of {worst})",
                    f"{limit:.0e} relative",
                    gaps[worst] <= limit,
                )
            )
    return rows


def train_alone(algorithm: Algorithm) -> Outcome:
    """Updates of one learner on the whole batch."""
    learner, batch = learner_and_batch(algorithm)
    return _train(learner, algorithm, batch, batch.num_tokens, lambda learner: None)


def train_on_ranks(
    algorithms: Mapping[str, Algorithm], ways: Mapping[str, Way]
) -> dict[str, dict[str, Outcome]]:
    """What rank 0 has after the updates, by way and algorithm.

    The ranks are processes of their own, connected by gloo. An error in one of them is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (folder, dict(algorithms), dict(ways)), nprocs=NUM_RANKS)
        stored = torch.load(Path(folder) / "outcomes.pt")
    return {way: {n: Outcome(*outcome) for n, outcome in by_name.items()} for way, by_name in stored.items()}


def _rank(rank: int, folder: str, algorithms: dict[str, Algorithm], ways: dict[str, Way]) -> None:
    torch.set_num_threads(1)
    meeting = (Path(folder) / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=NUM_RANKS)
    outcomes = {}
    for way, (deal, reduce) in ways.items():
        for name, algorithm in algorithms.items():
            learner, batch = learner_and_batch(algorithm)
            part = deal(batch, rank, algorithm)
            outcome = _train(learner, algorithm, part, batch.num_tokens, reduce)
            outcomes.setdefault(way, {})[name] = tuple(outcome)
    if rank == 0:
        torch.save(outcomes, Path(folder) / "outcomes.pt")
    dist.destroy_process_group()


def _train(
    learner: Learner, algorithm: Algorithm, part: Batch, num_tokens: int, reduce: Callable[[Learner], None]
) -> Outcome:
    """`NUM_UPDATES` updates on the part that this process has of a batch of `num_tokens`."""
    # The learner's router loss is a mean over the tokens it is given. As a part of the global batch's it counts
    # by their share.
    learner.router_aux_coefficient *= part.num_tokens / num_tokens
    first: dict[str, Tensor] = {}
    for update in range(NUM_UPDATES):
        if part.num_sequences:
            learner.forward_backward(part, algorithm.terms)
        reduce(learner)
        if update == 0:
            first = {name: p.grad.clone() for name, p in parameters(learner) if p.grad is not None}
        learner.optim_step()
    moments = {name: tensor.clone() for name, tensor in learner.optimizer.tensors().items()}
    weights = {name: p.detach().clone() for name, p in parameters(learner)}
    return Outcome(first, moments | weights)

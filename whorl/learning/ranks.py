"""One batch on several processes (torchrun): the only place that knows of them.

Every weight is fixed on the global batch, so gradients and counts are added over ranks, never averaged, just as
they are over micro-batches. In one process, and in ranks that were not introduced to each other
(`torch.distributed.init_process_group`), nothing happens here.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

Value = TypeVar("Value")


def from_every_rank(value: Value) -> list[Value]:
    """The values of all ranks in their order, the same list on each. A value can be pickled; tensors on the CPU."""
    if not _several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def add_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Make every gradient the sum over ranks; one that a rank does not have counts as 0 there.

    A parameter that has a gradient nowhere keeps none, so that an optimizer passes over it as in one process.
    """
    if not _several():
        return
    owned = from_every_rank([parameter.grad is not None for parameter in parameters])
    for parameter, owners in zip(parameters, zip(*owned, strict=True), strict=True):
        if any(owners):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, dist.ReduceOp.SUM)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

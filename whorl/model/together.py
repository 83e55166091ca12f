"""Weights that multiply the same tokens, one after the other in memory: then a decode step has one product for them.

Of 128 rows, the products with a layer's queries, keys and values are each too small to fill a GPU.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lie_together(layers: Iterable[Sequence[nn.Module]]) -> None:
    """Give the linear modules of each sequence one storage, if they are plain. The parameters stay what they are."""
    for modules in layers:
        linears = [module for module in modules if type(module) is nn.Linear]
        if len(linears) < len(modules):
            continue
        _put_together([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears if linear.bias is not None]
        if len(biases) == len(linears):
            _put_together(biases)


def side_by_side(x: Tensor, modules: Sequence[nn.Module]) -> Sequence[Tensor]:
    """What each linear module makes of x: in one product if their weights lie together. No gradient of the weights."""
    linears = [module for module in modules if type(module) is nn.Linear]
    if len(linears) == len(modules):
        weight = _whole([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears if linear.bias is not None]
        bias = _whole(biases)
        if weight is not None and (bias is None) == (not biases):
            return F.linear(x, weight, bias).split([linear.out_features for linear in linears], dim=-1)
    return [module(x) for module in modules]


def _put_together(parts: Sequence[Tensor]) -> None:
    whole = torch.cat([part.detach() for part in parts])
    for part, place in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = place


def _whole(parts: Sequence[Tensor]) -> Tensor | None:
    """The rows of all parts, if they lie one after the other in one storage."""
    if not parts:
        return None
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        if part.data_ptr() != end or not part.is_contiguous():
            return None
        end += part.numel() * part.element_size()
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride())

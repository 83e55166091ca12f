"""Weights that lie together give the products that they give apart, and stay the model's parameters."""

import copy

import pytest
import torch
from torch import nn

from tests.model.shapes import small
from whorl.model.together import lie_together, side_by_side
from whorl.model.transformer import Transformer


def linears(*widths: int, bias: bool = True) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(8, width, bias=bias) for width in widths]


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_is_what_each_module_makes(bias):
    modules, x = linears(6, 2, 3, bias=bias), torch.randn(5, 8)
    expected = [module(x) for module in modules]
    lie_together([modules])
    parts = side_by_side(x, modules)
    assert parts[0].untyped_storage().data_ptr() == parts[2].untyped_storage().data_ptr()
    for part, right in zip(parts, expected, strict=True):
        assert (part - right).abs().max() < 1e-6


def test_a_product_is_made_with_the_weights_as_they_are_now():
    modules, x = linears(6, 2), torch.randn(5, 8)
    lie_together([modules])
    with torch.no_grad():
        modules[1].weight.mul_(2.0)
        modules[1].bias.add_(1.0)
    assert (side_by_side(x, modules)[1] - modules[1](x)).abs().max() < 1e-6


def apart(modules: list[nn.Linear]) -> list[nn.Linear]:
    return modules


def one_is_moved(modules: list[nn.Linear]) -> list[nn.Linear]:
    lie_together([modules])
    modules[1].weight.data = modules[1].weight.data.clone()
    return modules


def in_another_order(modules: list[nn.Linear]) -> list[nn.Linear]:
    lie_together([modules])
    return modules[::-1]


def with_a_module_of_another_kind(modules: list[nn.Linear]) -> list[nn.Linear]:
    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    other = [*modules[:2], Other(8, 3)]
    lie_together([other])
    return other


@pytest.mark.parametrize("change", [apart, one_is_moved, in_another_order, with_a_module_of_another_kind])
def test_modules_that_do_not_lie_together_are_asked_one_by_one(change):
    modules, x = change(linears(6, 2, 3)), torch.randn(5, 8)
    for part, module in zip(side_by_side(x, modules), modules, strict=True):
        assert torch.equal(part, module(x))


def test_the_parameters_learn_and_are_saved_as_before(tmp_path):
    config = small(residual="pre", qkv_bias=True)
    apart, together = (Transformer(config).initialise(3) for _ in range(2))
    lie_together(together.projections())
    for model in (apart, together):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
    pairs = zip(apart.state_dict().items(), together.state_dict().items(), strict=True)
    for (name, one), (same, other) in pairs:
        assert name == same and torch.equal(one, other)
    again = copy.deepcopy(together)
    with torch.no_grad():
        again.layers[1].self_attn.q_proj.weight.zero_()
    assert together.layers[1].self_attn.q_proj.weight.any()

"""A policy in bf16 whose weights, moments and gradient sums the optimizer keeps in fp32."""

import pytest
import torch
from torch import nn

from tests.learning.support import REWARDS, scripted_groups, tiny_learner
from whorl.algorithms.algorithm import assemble
from whorl.algorithms.catalog import PPO, with_settings
from whorl.learning.checkpoint import load, newest, save
from whorl.learning.learner import Learner
from whorl.learning.optimizer import Optimizer, OptimizerSettings
from whorl.model.adapter import Lora
from whorl.model.lora import add_lora

GRPO = with_settings("GRPO", dynamic_sampling=False)
SETTINGS = OptimizerSettings(1e-3, warmup_steps=2, weight_decay=0.1)


def fresh(dtype=torch.bfloat16, **options) -> Learner:
    return tiny_learner(dtype=dtype, settings=SETTINGS, **{"value_head": True, "reference": True, **options})


def train(learner: Learner, steps: range) -> list[dict[str, float]]:
    history = []
    for step in steps:
        provide = {"logp_ref_N": learner.reference_logprobs, "value_old_N": learner.values}
        metrics = {}
        for algorithm in (GRPO, PPO):
            batch = assemble(scripted_groups(REWARDS, seed=step), algorithm, provide)
            metrics |= learner.forward_backward(batch, algorithm.terms)
        history.append(metrics | learner.optim_step())
    return history


def test_updates_too_small_for_bf16_add_up():
    # Between 1 and 2, bf16 has steps of 1/128 and rounds 1 - 0.001 back to 1; Adam's first updates are -0.001.
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = Optimizer([("w", weight)], OptimizerSettings(1e-3, max_grad_norm=1e9))
    bare = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([bare], lr=1e-3, weight_decay=0.0)
    for _ in range(10):
        weight.grad = torch.ones(2, 2)
        bare.grad = torch.ones(2, 2, dtype=torch.bfloat16)
        optimizer.update()
        plain.step()
    assert (bare == 1).all()  # the known fault
    assert optimizer.tensors()["w/master"].flatten().tolist() == pytest.approx([0.99] * 4, rel=1e-5)
    # Below 1 the steps are of 1/256: 0.99 lies between 253/256 and 254/256 and rounds to the former.
    assert weight.dtype == torch.bfloat16 and (weight == 253 / 256).all()


def test_gradients_are_added_up_in_fp32():
    learner = fresh(token_budget=30)
    whole = fresh(token_budget=10_000)
    exact = fresh(torch.float64, token_budget=30)
    with torch.no_grad():
        for name, p in exact.model.named_parameters():
            p.copy_(learner.model.get_parameter(name))
    gradients = []
    for one in (learner, whole, exact):
        one.forward_backward(assemble(scripted_groups(REWARDS), PPO, {"value_old_N": one.values}), PPO.terms)
        gradients.append({name: p.grad for name, p in one._parameters().items() if p.grad is not None})
    assert all(grad.dtype == torch.float32 for grad in gradients[0].values())
    flat = [torch.cat([grad.flatten().double() for grad in found.values()]) for found in gradients]
    # Rounded to bf16 within each micro-batch, never between them: 2^-8 relative, with some room.
    assert (flat[0] - flat[2]).norm() < 4e-2 * flat[2].norm()
    assert (flat[1] - flat[2]).norm() < 4e-2 * flat[2].norm()


def test_an_update_is_that_of_the_fp32_weight_and_the_parameter_is_the_master_rounded():
    learner, wide = fresh(), fresh(torch.float32)
    names = list(learner._parameters())
    with torch.no_grad():
        for name, p in wide._parameters().items():
            p.copy_(learner._parameters()[name])
    for step in range(3):
        learner.forward_backward(
            assemble(scripted_groups(REWARDS, seed=step), PPO, {"value_old_N": learner.values}), PPO.terms
        )
        for name in names:
            grad = learner._parameters()[name].grad
            wide._parameters()[name].grad = None if grad is None else grad.clone()
        learner.optim_step()
        wide.optim_step()
    kept = learner.optimizer.tensors()
    for name, p in learner._parameters().items():
        if p.dtype == torch.bfloat16:
            assert torch.equal(kept[f"{name}/master"], wide._parameters()[name]), name
            assert torch.equal(p, kept[f"{name}/master"].bfloat16()), name


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_three_and_three_updates_are_six_to_the_bit(tmp_path, lora, threads):
    def start() -> Learner:
        learner = fresh(token_budget=60, num_threads=threads)
        if not lora:
            return learner
        model = add_lora(learner.model, Lora(2), seed=0)
        return Learner(model, SETTINGS, value_head=True, reference=True, token_budget=60, num_threads=threads)

    whole = start()
    history = train(whole, range(6))
    first = start()
    assert train(first, range(3)) == history[:3]
    save(tmp_path, 3, *first.state_dict())
    resumed = start()
    path = newest(tmp_path)
    assert path is not None
    resumed.load_state_dict(*load(path))
    assert train(resumed, range(3, 6)) == history[3:]
    ours, theirs = whole.state_dict()[0], resumed.state_dict()[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_checkpoint_without_masters_would_go_on_otherwise():
    """Negative control: what is lost when only the rounded weights are kept."""
    learner = fresh()
    train(learner, range(3))
    tensors, state = learner.state_dict()
    tensors = {name: t.clone() for name, t in tensors.items()}
    wanted = train(learner, range(3, 6))
    resumed = fresh()
    rounded = {n: t.bfloat16().float() if n.endswith("/master") else t for n, t in tensors.items()}
    assert any(not torch.equal(t, rounded[n]) for n, t in tensors.items())
    resumed.load_state_dict(rounded, state)
    assert train(resumed, range(3, 6)) != wanted


def test_masters_follow_weights_that_were_trained_before_the_first_update():
    learner = fresh()
    with torch.no_grad():
        for p in learner.model.parameters():
            p.add_(0.5)
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    train(learner, range(1))
    for name, p in learner.model.named_parameters():
        assert (p - before[name]).abs().max() < 0.02, name  # else they would be 0.5 away

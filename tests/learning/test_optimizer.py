import math

import numpy as np
import pytest
import torch
from torch import nn

from whorl.learning.optimizer import Optimizer, OptimizerSettings


def numpy_adamw(weights, gradients, *, lr, beta1, beta2, eps, decay):
    """AdamW as its paper's Algorithm 2 states it, one weight tensor through several gradients."""
    weight, m, v = weights.copy(), np.zeros_like(weights), np.zeros_like(weights)
    for t, gradient in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        weight = weight - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay * weight)
    return weight


def optimizer_of(settings: OptimizerSettings, dtype=torch.float64, **tensors: list) -> Optimizer:
    return Optimizer(
        [(name, nn.Parameter(torch.tensor(value, dtype=dtype))) for name, value in tensors.items()], settings
    )


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-14])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_updates_equal_adamw_in_numpy_down_to_the_gradients_of_m1(dtype, bound, scale):
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(4, 3)), rng.normal(size=(5, 4, 3)) * scale
    settings = OptimizerSettings(learning_rate=0.01, weight_decay=0.1, max_grad_norm=math.inf)
    optimizer = optimizer_of(settings, dtype, weight=start.tolist())
    for gradient in gradients:
        optimizer.parameters[0].grad = torch.tensor(gradient, dtype=dtype)
        optimizer.update()
    wanted = numpy_adamw(start, gradients, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-15, decay=0.1)
    assert np.abs(optimizer.parameters[0].detach().numpy() - wanted).max() < bound


def test_the_usual_eps_would_stop_the_gradients_that_m1_reports():
    def moved(eps: float) -> float:
        settings = OptimizerSettings(learning_rate=0.1, eps=eps)
        optimizer = optimizer_of(settings, weight=[[0.0]])
        optimizer.parameters[0].grad = torch.full((1, 1), 1e-14, dtype=torch.float64)
        optimizer.update()
        return abs(optimizer.parameters[0].item())

    assert moved(1e-15) == pytest.approx(0.1 * 10 / 11)  # g / (|g| + eps) = 1e-14 / 1.1e-14
    assert moved(1e-8) < 0.1 * 1.1e-6


def test_norms_and_biases_do_not_decay():
    settings = OptimizerSettings(learning_rate=0.5, weight_decay=0.1)
    optimizer = optimizer_of(settings, norm=[1.0, 1.0], matrix=[[1.0, 1.0]])
    for parameter in optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.update()
    values = dict(zip(optimizer.names, optimizer.parameters, strict=True))
    assert values["norm"].tolist() == [1.0, 1.0]
    assert values["matrix"].tolist() == [[0.95, 0.95]]  # 1 - 1/2 * 1/10


def test_the_gradient_is_clipped_by_its_norm_over_all_parameters():
    # Plain momentum-free steps show the clip: beta1 = beta2 = 0 would hide it, so read the first moment.
    optimizer = optimizer_of(OptimizerSettings(learning_rate=0.1, max_grad_norm=2.5), a=[[3.0]], b=[[4.0]])
    optimizer.parameters[0].grad = torch.tensor([[3.0]], dtype=torch.float64)
    optimizer.parameters[1].grad = torch.tensor([[4.0]], dtype=torch.float64)
    metrics = optimizer.update()
    assert metrics["grad_norm"] == 5.0
    assert metrics["grad_clipped_frac"] == 1.0
    moments = optimizer.tensors()
    # 3 * 2.5/5 * (1 - 0.9) and 4 * 2.5/5 * (1 - 0.9)
    assert float(moments["a/exp_avg"]) == pytest.approx(0.15, rel=1e-6)
    assert float(moments["b/exp_avg"]) == pytest.approx(0.2, rel=1e-6)


def test_a_gradient_under_the_limit_is_not_scaled_at_all():
    optimizer = optimizer_of(OptimizerSettings(learning_rate=0.1, max_grad_norm=5.0), a=[[1.0]])
    optimizer.parameters[0].grad = torch.tensor([[4.999999999]], dtype=torch.float64)
    assert optimizer.update()["grad_clipped_frac"] == 0.0
    assert float(optimizer.tensors()["a/exp_avg"]) == pytest.approx(0.4999999999, rel=1e-15)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(poison):
    optimizer = optimizer_of(OptimizerSettings(learning_rate=0.1, warmup_steps=10), a=[[1.0, 2.0]])
    optimizer.parameters[0].grad = torch.ones(1, 2, dtype=torch.float64)
    optimizer.update()
    before = {name: value.clone() for name, value in optimizer.tensors().items()}
    weights = optimizer.parameters[0].detach().clone()
    optimizer.parameters[0].grad = torch.tensor([[1.0, poison]], dtype=torch.float64)
    metrics = optimizer.update()
    assert metrics == {"learning_rate": pytest.approx(0.02), "skipped_updates": 1.0}
    assert optimizer.step == 1
    assert torch.equal(optimizer.parameters[0], weights)
    assert all(torch.equal(value, before[name]) for name, value in optimizer.tensors().items())
    assert optimizer.parameters[0].grad is None


def test_updating_without_a_gradient_says_what_to_do():
    optimizer = optimizer_of(OptimizerSettings(learning_rate=0.1), a=[[1.0]])
    with pytest.raises(ValueError, match="call forward_backward before optim_step"):
        optimizer.update()


def test_schedules_pass_through_their_corners():
    constant = OptimizerSettings(learning_rate=8.0, warmup_steps=4)
    assert [constant.learning_rate_at(s) for s in (0, 1, 3, 4, 999)] == [2.0, 4.0, 8.0, 8.0, 8.0]
    linear = OptimizerSettings(
        learning_rate=8.0, warmup_steps=2, total_steps=10, schedule="linear", final_frac=0.25
    )
    # From 8 at update 2 down to 2 at update 10: 6/8 an update.
    assert [linear.learning_rate_at(s) for s in (0, 1, 2, 6, 10, 50)] == [4.0, 8.0, 8.0, 5.0, 2.0, 2.0]
    cosine = OptimizerSettings(learning_rate=8.0, total_steps=6, schedule="cosine")
    rates = [cosine.learning_rate_at(s) for s in (0, 2, 3, 4, 6)]
    assert rates == pytest.approx([8.0, 6.0, 4.0, 2.0, 0.0], abs=1e-12)  # cos(60 deg) = 1/2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must not be negative"),
        ({"schedule": "cosine", "total_steps": 5, "warmup_steps": 5}, "must exceed warmup_steps"),
        ({"beta2": 1.0}, "betas in"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
        ({"final_frac": 2.0}, "final_frac must be in"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**{"learning_rate": 1e-3, **changes})


def test_moments_of_another_model_are_refused():
    optimizer = optimizer_of(OptimizerSettings(learning_rate=0.1), a=[[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"'a/exp_avg' has shape \(1, 3\); expected \(1, 2\)"):
        optimizer.load({"a/exp_avg": torch.zeros(1, 3)}, 1)
    with pytest.raises(ValueError, match="moments of 'b', which is no parameter"):
        optimizer.load({"b/exp_avg": torch.zeros(1, 2)}, 1)


def test_a_schedule_without_an_end_takes_the_run_s():
    open_end = OptimizerSettings(learning_rate=1.0, schedule="linear")
    with pytest.raises(ValueError, match="linear schedule needs total_steps"):
        open_end.learning_rate_at(3)
    assert open_end.over(4).learning_rate_at(3) == pytest.approx(1 / 4)
    fixed = OptimizerSettings(learning_rate=1.0, schedule="linear", total_steps=8)
    assert fixed.over(4) is fixed
    constant = OptimizerSettings(learning_rate=1.0)
    assert constant.over(4) is constant

import pytest
import torch

from tests.learning.support import (
    REWARDS,
    gradient_of,
    groups_with_prompts,
    relative,
    scripted_groups,
    tiny_learner,
)
from whorl.algorithms.algorithm import assemble
from whorl.algorithms.catalog import CISPO
from whorl.learning.learner import Learner
from whorl.learning.optimizer import OptimizerSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_batches_on_the_cpu_train_a_model_on_the_gpu():
    batch = assemble(scripted_groups(REWARDS), CISPO)
    here = tiny_learner(value_head=True, reference=True, token_budget=60)
    there = Learner(
        tiny_learner().model.cuda(), OptimizerSettings(learning_rate=1e-2),
        value_head=True, reference=True, token_budget=60,
    )  # fmt: skip
    assert (here.logprobs(batch) - there.logprobs(batch)).abs().max() < 1e-12
    assert there.logprobs(batch).device.type == "cpu"
    for _ in range(2):  # the second with shares of the router that are not uniform
        here.forward_backward(batch, CISPO.terms)
        there.forward_backward(batch, CISPO.terms)
        assert relative(gradient_of(there).cpu(), gradient_of(here)) < 1e-11
        assert there.optim_step()["grad_norm"] == pytest.approx(here.optim_step()["grad_norm"], rel=1e-11)
    again = Learner(
        tiny_learner().model.cuda(), OptimizerSettings(learning_rate=1e-2), value_head=True, reference=True
    )
    again.load_state_dict(*there.state_dict())
    assert torch.equal(again.values(batch), there.values(batch))


def test_a_shared_prompt_gives_the_same_gradient_on_the_gpu_and_the_same_bits_each_time():
    """Gradients of all continuations of a prompt add up in its state, its keys and its last hidden state."""
    groups = groups_with_prompts(rewards=[[0.0, 1.0] * 16] * 4, prompt_lengths=(150, 40, 7, 20))
    batch = assemble(groups, CISPO)
    here = tiny_learner()
    here.forward_backward(batch, CISPO.terms)
    there = Learner(tiny_learner().model.cuda(), OptimizerSettings(learning_rate=1e-2))
    assert (here.logprobs(batch) - there.logprobs(batch)).abs().max() < 1e-12
    there.forward_backward(batch, CISPO.terms)
    assert relative(gradient_of(there).cpu(), gradient_of(here)) < 1e-11
    again = []
    for _ in range(5):
        learner = Learner(
            tiny_learner(dtype=torch.float32).model.cuda(), OptimizerSettings(learning_rate=1e-2)
        )
        learner.forward_backward(batch, CISPO.terms)
        again.append(gradient_of(learner))
    assert all(torch.equal(gradient, again[0]) for gradient in again)

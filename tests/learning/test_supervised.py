import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.learning.support import gradient_of, random_batch, relative, slow_logits, tiny_learner
from whorl.data import Batch
from whorl.learning.optimizer import OptimizerSettings
from whorl.learning.packing import micro_batches
from whorl.learning.supervised import SUPERVISED, supervised_batch


def examples_of(batch: Batch):
    return [
        (tokens.numpy(), mask.numpy())
        for tokens, mask in zip(batch.unpack("tokens_N"), batch.unpack("trained_N"), strict=True)
    ]


def cross_entropy(learner, batch: Batch, temperature: float) -> torch.Tensor:
    """Plain PyTorch: mean over all target tokens of the batch."""
    logits = torch.cat([logits[:-1] for logits in slow_logits(learner.model, batch)]) / temperature
    targets = torch.cat([tokens[1:] for tokens in batch.unpack("tokens_N")])
    mask = torch.cat([mask[1:] for mask in batch.unpack("trained_N")])
    return F.cross_entropy(logits, torch.where(mask, targets, -100))


@pytest.mark.parametrize("budget", [8192, 40, 1])
def test_loss_and_gradient_equal_pytorchs_cross_entropy(budget):
    batch = supervised_batch(examples_of(random_batch(seed=3)))
    learner = tiny_learner(temperature=0.8, token_budget=budget, router_aux_coefficient=0.0)
    metrics = learner.forward_backward(batch, SUPERVISED)
    got = gradient_of(learner)
    learner.optimizer.adamw.zero_grad()
    loss = cross_entropy(learner, batch, 0.8)
    loss.backward()
    # The weights are fp32: 1 / tokens is rounded once.
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["supervised_loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert relative(got, gradient_of(learner)) < 1e-6


def test_a_mean_of_micro_batch_means_is_another_loss():
    """The known bug of gradient accumulation."""
    batch = supervised_batch(examples_of(random_batch(seed=3)))
    learner = tiny_learner()
    whole = learner.forward_backward(batch, SUPERVISED)["supervised_loss"]
    parts = micro_batches(batch, 20)
    means = [learner.forward_backward(part, SUPERVISED)["supervised_loss"] for part in parts]
    assert abs(sum(means) / len(means) - whole) > 0.01 * whole


def test_a_demonstration_is_learned():
    learner = tiny_learner(dtype=torch.float32, settings=OptimizerSettings(learning_rate=0.01))
    batch = supervised_batch([([1, 2, 3, 4], [False, True, True, True]), ([5, 6], [False, True])])
    losses = []
    for _ in range(40):
        losses.append(learner.forward_backward(batch, SUPERVISED)["supervised_loss"])
        learner.optim_step()
    assert losses[-1] < 0.1 * losses[0]
    assert learner.version == 40


def test_lists_and_arrays_pack_alike():
    batch = supervised_batch([([1, 2, 3], [False, True, True]), (np.array([4, 5]), np.array([False, True]))])
    assert batch["tokens_N"].tolist() == [1, 2, 3, 4, 5]
    assert batch["trained_N"].tolist() == [False, True, True, False, True]
    assert batch[SUPERVISED[0].weight_column].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3])
    assert batch.length_S.tolist() == [3, 2]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "at least one example"),
        ([([1, 2], [False, True]), ([1, 2], [True])], "example 1 has 2 tokens and a mask of 1"),
        ([([1, 2], [True, True])], "example 0 must begin with a token that is no target"),
        ([([1, 2], [False, False])], "no example has a target token"),
    ],
)
def test_examples_that_cannot_be_learned_are_refused(examples, message):
    with pytest.raises(ValueError, match=message):
        supervised_batch(examples)

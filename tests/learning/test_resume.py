"""Three updates, a checkpoint on disk, a fresh process's learner, three more: the bits of six in a row."""

import pytest
import torch

from tests.learning.support import REWARDS, scripted_groups, tiny_config, tiny_learner
from whorl.algorithms.algorithm import assemble
from whorl.algorithms.catalog import PPO, with_settings
from whorl.learning.checkpoint import load, newest, save
from whorl.learning.learner import Learner
from whorl.learning.optimizer import OptimizerSettings

ALGORITHM = with_settings("GRPO", dynamic_sampling=False)
SETTINGS = OptimizerSettings(learning_rate=0.01, warmup_steps=2, total_steps=6, schedule="cosine")


def fresh(tied: bool = False) -> Learner:
    return tiny_learner(
        dtype=torch.float32, config=tiny_config(tied=tied), settings=SETTINGS, value_head=True,
        reference=True, token_budget=80, temperature=0.9,
    )  # fmt: skip


def train(learner: Learner, steps: range) -> list[dict[str, float]]:
    history = []
    for step in steps:
        provide = {"logp_ref_N": learner.reference_logprobs, "value_old_N": learner.values}
        groups = scripted_groups(REWARDS, seed=step)
        metrics = {}
        for algorithm in (ALGORITHM, PPO):
            metrics |= learner.forward_backward(assemble(groups, algorithm, provide), algorithm.terms)
        history.append(metrics | learner.optim_step())
        if step == 1:
            learner.set_reference()
    return history


@pytest.mark.parametrize("tied", [False, True])
def test_three_and_three_updates_are_six_to_the_bit(tied, tmp_path):
    undisturbed = fresh(tied)
    history = train(undisturbed, range(6))

    first = fresh(tied)
    assert train(first, range(3)) == history[:3]
    save(tmp_path, 3, *first.state_dict())
    del first
    resumed = fresh(tied)
    resumed.model.initialise(99)
    path = newest(tmp_path)
    assert path is not None
    resumed.load_state_dict(*load(path))
    assert train(resumed, range(3, 6)) == history[3:]

    (ours, our_state), (theirs, their_state) = undisturbed.state_dict(), resumed.state_dict()
    assert our_state == their_state == {"version": 6, "updates": 6}
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.numpy().tobytes() == theirs[name].numpy().tobytes(), name


@pytest.mark.parametrize("forgotten", ["optimizer/", "router/", "reference/", "value_head/", "updates"])
def test_every_part_of_the_state_matters(forgotten):
    learner = fresh()
    train(learner, range(3))
    tensors, state = learner.state_dict()
    tensors = {name: t.clone() for name, t in tensors.items()}
    wanted = train(learner, range(3, 5))
    resumed = fresh()
    blank, _ = resumed.state_dict()
    for name in list(tensors):
        if name.startswith(forgotten):
            if name in blank:
                tensors[name] = blank[name].clone()
            else:
                del tensors[name]
    resumed.load_state_dict(tensors, state | ({"updates": 0} if forgotten == "updates" else {}))
    assert train(resumed, range(3, 5)) != wanted


def test_a_checkpoint_of_another_shape_names_the_first_difference():
    tensors, state = fresh().state_dict()
    wider = tiny_learner(
        dtype=torch.float32, config=tiny_config(ffn_width=24), value_head=True, reference=True
    )
    with pytest.raises(ValueError, match=r"layers.0.feed_forward.down the model has \(3, 16, 24\) float32, "):
        wider.load_state_dict(tensors, state)
    without = tiny_learner(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"of another shape: at reference/.* the model has nothing"):
        without.load_state_dict(tensors, state)
    doubled = tiny_learner(value_head=True, reference=True)
    with pytest.raises(ValueError, match=r"float64, the checkpoint .* float32"):
        doubled.load_state_dict(tensors, state)


def test_a_learner_with_a_gradient_in_hand_is_not_saved():
    learner = fresh()
    batch = assemble(scripted_groups(REWARDS), ALGORITHM, {"logp_ref_N": learner.reference_logprobs})
    learner.forward_backward(batch, ALGORITHM.terms)
    with pytest.raises(ValueError, match="call optim_step before saving"):
        learner.state_dict()
    learner.optim_step()
    learner.state_dict()

"""A policy of adapters: trained, delivered, kept and compared with its base without a second copy of it."""

import copy

import pytest
import torch

from tests.learning.support import (
    REWARDS,
    gradient_of,
    groups_with_prompts,
    random_batch,
    relative,
    scripted_groups,
    slow_logp,
    tiny_config,
)  # fmt: skip
from whorl.algorithms.algorithm import assemble
from whorl.algorithms.catalog import PPO, with_settings
from whorl.data import Batch
from whorl.learning.checkpoint import load, newest, save
from whorl.learning.learner import Learner
from whorl.learning.optimizer import OptimizerSettings
from whorl.model.adapter import TARGETS, Lora
from whorl.model.lora import add_lora, policy_parameters
from whorl.model.transformer import Transformer
from whorl.sampling.draw import Sampling, stream_key
from whorl.sampling.engine import Engine, Request

GRPO = with_settings("GRPO", dynamic_sampling=False)


def adapted(dtype=torch.float64, targets=TARGETS) -> Transformer:
    model = Transformer(tiny_config()).initialise(0).to(dtype)
    return add_lora(model, Lora(2, 8.0, targets), seed=0)


def learner_of(model, **options) -> Learner:
    return Learner(model, OptimizerSettings(0.05), **{"temperature": 0.9, **options})


def update(learner: Learner, step: int) -> dict[str, float]:
    groups = groups_with_prompts(seed=step)
    batch = assemble(groups, GRPO, {"logp_ref_N": learner.reference_logprobs})
    return learner.forward_backward(batch, GRPO.terms) | learner.optim_step()


def bits(tensors) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def test_updates_change_the_adapters_and_leave_the_base_to_the_bit():
    model = adapted(torch.float32)
    before = bits(dict(model.named_parameters()))
    learner = learner_of(model, reference=True)
    for step in range(3):
        update(learner, step)
    trained = policy_parameters(model)
    for name, now in bits(dict(model.named_parameters())).items():
        assert (now != before[name]) == (name in trained), name
    tensors, _ = learner.state_dict()
    kept = {name for name in tensors if name.startswith("model/")}
    assert kept == {f"model/{name}" for name in trained}


def test_the_reference_is_the_base_without_a_copy_of_it():
    model = adapted()
    frozen = copy.deepcopy(model)
    learner = learner_of(model, reference=True)
    assert learner.reference is not None
    kept = sum(t.numel() for t in learner.reference.tensors().values())
    assert kept == sum(p.numel() for p in policy_parameters(model).values()) < model.num_parameters / 2
    batch = random_batch()
    expected = learner_of(frozen).logprobs(batch)
    for step in range(2):
        update(learner, step)
    assert torch.equal(learner.reference_logprobs(batch), expected)
    assert (learner.logprobs(batch) - expected).abs().max() > 1e-3  # negative control: the adapters left on


def test_a_reference_set_later_keeps_the_adapters_of_that_moment():
    learner = learner_of(adapted(), reference=True)
    update(learner, 0)
    learner.set_reference()
    batch = random_batch()
    then = learner.logprobs(batch)
    live = {name: p.data_ptr() for name, p in policy_parameters(learner.model).items()}
    update(learner, 1)
    assert torch.equal(learner.reference_logprobs(batch), then)
    now = learner.logprobs(batch)
    assert (now - then).abs().max() > 1e-3
    expected = slow_logp(learner.model, batch, 0.9)
    assert (now - expected).abs().max() < 1e-10
    # The live tensors are where they were: other processes map them.
    assert {name: p.data_ptr() for name, p in policy_parameters(learner.model).items()} == live


@pytest.mark.parametrize("threads", [1, 2])
def test_the_gradient_of_adapters_does_not_depend_on_the_cut(threads):
    gradients = []
    for budget, num_threads in ((10_000, 1), (40, threads)):
        model = adapted()
        with torch.no_grad():
            for name, p in policy_parameters(model).items():
                if name.endswith(".B"):
                    p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        learner = learner_of(
            model, reference=True, token_budget=budget, num_threads=num_threads, value_head=True
        )
        for algorithm in (GRPO, PPO):
            provide = {"logp_ref_N": learner.reference_logprobs, "value_old_N": learner.values}
            batch = assemble(groups_with_prompts(), algorithm, provide)
            learner.forward_backward(batch, algorithm.terms)
        gradients.append(gradient_of(learner))
    assert relative(*gradients) < 1e-12


def test_the_sampler_gets_the_adapters_and_a_skipped_load_is_seen():
    model = adapted(torch.float32)
    own = copy.deepcopy(model)
    learner = learner_of(model, reference=True, temperature=1.0)
    engine = Engine(own, max_running=8)
    base = {n: p.data_ptr() for n, p in own.named_parameters()}
    for step in range(2):
        update(learner, step)
    weights = learner.weights()
    assert set(weights) == set(policy_parameters(own))
    requests = [
        Request([1, 2, 3 + i], stream_key(0, "train", 0, i), Sampling(max_tokens=20)) for i in range(4)
    ]

    def gap() -> float:
        worst = 0.0
        for request, done in zip(requests, engine.generate(requests), strict=True):
            tokens = torch.tensor([*request.tokens, *done.tokens.tolist()])
            policy = torch.arange(len(tokens)) >= 3
            batch = Batch(torch.tensor([0, len(tokens)]), {"tokens_N": tokens, "policy_N": policy})
            worst = max(worst, float((learner.logprobs(batch)[3:] - torch.from_numpy(done.logp)).abs().max()))
        return worst

    assert gap() > 1e-2  # stale adapters
    engine.load(weights, learner.version)
    assert gap() <= 1e-5
    assert {n: p.data_ptr() for n, p in own.named_parameters()} == base
    with pytest.raises(ValueError, match="weights do not fit the sampler's model"):
        engine.load(dict(model.named_parameters()), 3)


def test_three_and_three_updates_are_six_to_the_bit(tmp_path):
    def fresh() -> Learner:
        return learner_of(adapted(torch.float32), reference=True)

    whole = fresh()
    history = [update(whole, step) for step in range(6)]
    first = fresh()
    assert [update(first, step) for step in range(3)] == history[:3]
    save(tmp_path, 3, *first.state_dict())
    resumed = fresh()
    path = newest(tmp_path)
    assert path is not None
    resumed.load_state_dict(*load(path))
    assert [update(resumed, step) for step in range(3, 6)] == history[3:]
    assert bits(resumed.state_dict()[0]) == bits(whole.state_dict()[0])


def test_adapters_alone_learn():
    learner = learner_of(adapted(torch.float32, targets=("q_proj", "qkv_proj", "down")), temperature=1.0)
    algorithm = with_settings("REINFORCE")
    groups = scripted_groups(REWARDS)
    batch = assemble(groups, algorithm, {})
    first = learner.forward_backward(batch, algorithm.terms)["loss"]
    learner.optim_step()
    for _ in range(10):
        last = learner.forward_backward(batch, algorithm.terms)["loss"]
        learner.optim_step()
    assert last < first

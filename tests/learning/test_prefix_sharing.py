"""The learner computes a shared prompt once, and every number stays what it was."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.learning.support import (
    VOCAB,
    gradient_of,
    groups_with_prompts,
    relative,
    slow_logp,
    tiny_config,
    tiny_learner,
)
from whorl.algorithms.algorithm import Algorithm, assemble
from whorl.algorithms.catalog import ALGORITHMS
from whorl.data import Batch, cu_seqlens_of, pack
from whorl.learning import packing
from whorl.learning.learner import Learner
from whorl.learning.packing import layout_of, micro_batches, with_prefixes
from whorl.model.layout import Fork, Layout
from whorl.sampling.draw import Sampling, stream_key
from whorl.sampling.engine import Engine
from whorl.sampling.request import Request

CPU = torch.device("cpu")
BUDGETS = [10_000, 100, 60, 1]
"""One micro-batch; a few; many; every sequence alone, where nothing is shared."""


def batch_of(*rows: tuple[list[int], int], **columns) -> Batch:
    """Sequences given as tokens and the number of them that the policy did not write."""
    policy_N = torch.cat([torch.arange(len(tokens)) >= prompt for tokens, prompt in rows])
    tokens_N = torch.tensor([token for tokens, _ in rows for token in tokens])
    columns |= {"tokens_N": tokens_N, "policy_N": policy_N, "trained_N": policy_N}
    return Batch(cu_seqlens_of([len(tokens) for tokens, _ in rows]), columns)


@pytest.fixture
def unshared(monkeypatch):
    """Call it, and from then on no prefix is shared."""
    return lambda: monkeypatch.setattr(packing, "MIN_SAVED_FRAC", 2.0)


def learner_and_batch(algorithm: Algorithm, **config) -> tuple[Learner, Batch]:
    """A learner after one update, so that the router's shares are not uniform, and a batch for the next."""
    learner = tiny_learner(
        config=tiny_config(**config), temperature=0.9, value_head=True, reference=True,
        router_aux_coefficient=0.5,
    )  # fmt: skip
    provide = {
        "logp_ref_N": learner.reference_logprobs,
        "logp_old_N": learner.logprobs,
        "value_old_N": learner.values,
        "reward_greedy_S": lambda batch: torch.full((batch.num_sequences,), 0.25, dtype=torch.float64),
    }
    groups = groups_with_prompts(seed=5)
    learner.forward_backward(assemble(groups, algorithm, provide), algorithm.terms)
    learner.optim_step()
    return learner, assemble(groups, algorithm, provide)


def gradient_and_metrics(learner: Learner, batch: Batch, algorithm: Algorithm, budget: int = 10_000):
    learner.token_budget = budget
    learner._chosen_LE.zero_()
    metrics = learner.forward_backward(batch, algorithm.terms)
    found = gradient_of(learner)
    learner.optimizer.adamw.zero_grad()
    return found, metrics


# Nothing changes


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_gradient_and_metrics_of_every_algorithm_are_those_of_whole_sequences(name, unshared):
    algorithm = ALGORITHMS[name]
    learner, batch = learner_and_batch(algorithm)
    shared = [gradient_and_metrics(learner, batch, algorithm, budget) for budget in BUDGETS]
    unshared()
    whole, metrics = gradient_and_metrics(learner, batch, algorithm)
    assert whole.norm() > 1e-3
    for gradient, seen in shared:
        assert relative(gradient, whole) < 1e-12
        assert seen == {n: pytest.approx(v, rel=1e-11, abs=1e-13) for n, v in metrics.items()}


def test_these_batches_do_share_until_every_sequence_stands_alone():
    batch = pack(groups_with_prompts(seed=5))
    batch = with_prefixes(batch, batch["policy_N"])
    kinds = [[type(layout_of(p, CPU)) for p in micro_batches(batch, budget)] for budget in BUDGETS]
    assert [len(parts) for parts in kinds] == [1, 3, 5, 15]
    assert kinds[0] == [Fork]
    assert Fork in kinds[1] and Fork in kinds[2]
    assert set(kinds[3]) == {Layout}


MODELS = {
    "hybrid": {"num_experts": 0, "num_layers": 4},
    "lightning MoE": {"softmax_period": 0},
    "softmax with groups of heads, pre-norm": {"softmax_period": 1, "residual": "pre", "qk_norm": True},
    "tied": {"tied": True},
}


@pytest.mark.parametrize("config", MODELS)
def test_so_it_is_for_other_models(config, unshared):
    algorithm = ALGORITHMS["CISPO"]
    learner, batch = learner_and_batch(algorithm, **MODELS[config])
    shared, seen = gradient_and_metrics(learner, batch, algorithm)
    unshared()
    whole, metrics = gradient_and_metrics(learner, batch, algorithm)
    assert relative(shared, whole) < 1e-12
    assert seen == {n: pytest.approx(v, rel=1e-11, abs=1e-13) for n, v in metrics.items()}


@pytest.mark.parametrize("budget", BUDGETS)
def test_reading_gives_the_log_probs_and_values_of_whole_sequences(budget, unshared):
    batch = pack(groups_with_prompts())
    learner = tiny_learner(temperature=0.7, value_head=True, reference=True, token_budget=budget)
    assert learner.value_head is not None
    torch.nn.init.normal_(learner.value_head.weight, generator=torch.Generator().manual_seed(0))
    exact = slow_logp(learner.model, batch, 0.7)
    assert (learner.logprobs(batch) - exact).abs().max() < 1e-12
    assert (learner.reference_logprobs(batch) - exact).abs().max() < 1e-12
    values_N = learner.values(batch)
    unshared()
    assert (values_N - learner.values(batch)).abs().max() < 1e-12
    assert values_N.abs().max() > 0.1


def test_the_learner_computes_what_the_sampler_reported():
    """float32, 6 rollouts for each of three prompts, one of them longer than two blocks."""
    learner = tiny_learner(dtype=torch.float32, config=tiny_config(max_context=400), temperature=0.7)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (7, 40, 300)]
    requests = [
        Request(prompt, stream_key("sharing", p, i), Sampling(max_tokens=20, temperature=0.7))
        for p, prompt in enumerate(prompts)
        for i in range(6)
    ]
    done = Engine(learner.model).generate(requests)
    rows = [
        ([*request.tokens, *completion.tokens.tolist()], len(request.tokens))
        for request, completion in zip(requests, done, strict=True)
    ]
    batch = batch_of(*rows)
    assert isinstance(layout_of(with_prefixes(batch, batch["policy_N"]), CPU), Fork)
    reported = torch.from_numpy(np.concatenate([completion.logp for completion in done]))
    assert (learner.logprobs(batch)[batch["policy_N"]] - reported).abs().max() <= 1e-5


@pytest.mark.parametrize("rows", [([1, 2, 3, 4, 5, 6],) * 3, ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7])])
def test_sequences_that_are_the_same_to_the_end_or_almost_share_their_prompt_only(rows, unshared):
    batch = batch_of(*((list(tokens), 3) for tokens in rows))
    assert with_prefixes(batch, batch["policy_N"])["prefix_length_S"].tolist() == [3] * len(rows)
    learner = tiny_learner()
    logp_N = learner.logprobs(batch)
    assert (logp_N - slow_logp(learner.model, batch, 1.0)).abs().max() < 1e-12


def test_activation_checkpointing_changes_no_gradient():
    batch = assemble(groups_with_prompts(), ALGORITHMS["CISPO"])
    gradients = []
    for switched_on in (False, True):
        learner = tiny_learner(dtype=torch.float32)
        learner.model.checkpoint_activations = switched_on
        learner.forward_backward(batch, ALGORITHMS["CISPO"].terms)
        gradients.append(gradient_of(learner))
    assert torch.equal(*gradients)


# Controls


def test_control_prefix_tokens_counted_once_in_the_router_loss_are_seen(monkeypatch, unshared):
    algorithm = ALGORITHMS["CISPO"]
    learner, batch = learner_and_batch(algorithm)
    original = Fork.__init__

    def once(self, *arguments):
        original(self, *arguments)
        self.copies_U = torch.ones_like(self.copies_U)

    monkeypatch.setattr(Fork, "__init__", once)
    wrong, seen = gradient_and_metrics(learner, batch, algorithm)
    unshared()
    whole, metrics = gradient_and_metrics(learner, batch, algorithm)
    assert relative(wrong, whole) > 1e-3
    for name in ("router_aux_loss", "router_entropy_nats", "expert_load_max"):
        assert abs(seen[name] / metrics[name] - 1) > 1e-3


def test_control_a_first_token_read_from_its_own_place_is_seen(monkeypatch):
    """place_N of a rest's first token minus one is the end of another row, not of its prefix."""
    batch = pack(groups_with_prompts())
    learner = tiny_learner()
    exact = slow_logp(learner.model, batch, 1.0)
    original = Fork.__init__

    def shifted(self, *arguments):
        original(self, *arguments)
        self.place_N = (self.place_N.roll(-1) - 1).clamp(min=0)

    monkeypatch.setattr(Fork, "__init__", shifted)
    assert (learner.logprobs(batch) - exact).abs().max() > 1e-2


# What is shared


def test_a_prompt_is_computed_once():
    """2 prompts of 8 tokens stand once and not once for each of 4 samples: 2 * 3 * 8 tokens fewer."""
    groups = groups_with_prompts(rewards=[[0.0, 1.0, 0.0, 1.0]] * 2, prompt_lengths=(8, 8))
    batch = assemble(groups, ALGORITHMS["CISPO"])
    learner, counts = tiny_learner(), []
    learner.model.embed_tokens.register_forward_hook(lambda module, args, out: counts.append(len(out)))
    learner.forward_backward(batch, ALGORITHMS["CISPO"].terms)
    learner.logprobs(batch)
    assert counts == [batch.num_tokens - 48] * 2


def test_tokens_decide_who_shares_and_not_the_group():
    batch = batch_of(
        ([1, 2, 3, 9], 3), ([1, 2, 4, 9], 3), ([1, 2, 3, 8], 3), ([1, 2, 3, 9], 2),
        group_S=torch.tensor([0, 0, 1, 1]),
    )  # fmt: skip
    batch = with_prefixes(batch, batch["policy_N"])
    assert batch["prefix_S"].tolist() == [0, 1, 0, 2]
    assert batch["prefix_length_S"].tolist() == [3, 3, 3, 2]


def test_a_prefix_ends_before_whatever_is_read_and_before_the_last_token():
    batch = batch_of(([1, 2, 3, 4], 4), ([1, 2, 3, 4], 4), ([5], 1), ([5], 1))
    read_N = torch.zeros(10, dtype=torch.bool)
    assert with_prefixes(batch, read_N)["prefix_length_S"].tolist() == [3, 3, 1, 1]
    # Sequences of one token share nothing: nothing can follow.
    assert with_prefixes(batch, read_N)["prefix_S"].tolist() == [0, 0, 1, 2]
    read_N[[2, 5]] = True
    assert with_prefixes(batch, read_N)["prefix_length_S"].tolist() == [2, 1, 1, 1]


def test_a_weighted_token_is_never_inside_a_shared_prefix(unshared):
    """Imitation may put weight on tokens that the policy did not write."""
    algorithm = ALGORITHMS["REINFORCE"]
    groups = groups_with_prompts(rewards=[[0.0, 1.0, 0.0, 1.0]] * 2, prompt_lengths=(8, 8))
    batch = assemble(groups, algorithm)
    first = batch.cu_seqlens[:-1]
    weight_N, advantage_N = batch["weight_reinforce_N"].clone(), batch["advantage_N"].clone()
    weight_N[first + 6], advantage_N[first + 6] = 0.01, torch.arange(8.0).to(advantage_N)
    batch = batch.with_columns(weight_reinforce_N=weight_N, advantage_N=advantage_N)
    learner = tiny_learner()
    shared, _ = gradient_and_metrics(learner, batch, algorithm)
    unshared()
    whole, _ = gradient_and_metrics(learner, batch, algorithm)
    assert relative(shared, whole) < 1e-12


@pytest.mark.parametrize(("length", "kind"), [(1, Layout), (2, Layout), (3, Fork)])
def test_little_sharing_is_left_alone(length, kind):
    """4 sequences of prompt and 24 more tokens. Saved: 3/100; 6/104; 9/108, which is above 1/16."""
    rows = [([*range(length), *np.random.default_rng(i).integers(0, VOCAB, 24)], length) for i in range(4)]
    batch = batch_of(*rows)
    assert type(layout_of(with_prefixes(batch, batch["policy_N"]), CPU)) is kind


# Micro-batches


def shaped(families: list[tuple[int, list[int]]]) -> Batch:
    """For each family a prompt of its own of the given length, followed by rests of the given lengths."""
    rows = [
        ([number] * prompt + [0] * rest, prompt)
        for number, (prompt, rests) in enumerate(families)
        for rest in rests
    ]
    batch = batch_of(*rows, name_S=torch.arange(len(rows)))
    return with_prefixes(batch, batch["policy_N"])


def padded(part: Batch) -> int:
    layout = layout_of(part, CPU)
    rows = [layout.prefixes, layout.rests] if isinstance(layout, Fork) else [layout]
    return sum(row.num_sequences * row.max_length for row in rows)


def test_a_family_stays_together_where_the_budget_holds_it():
    batch = shaped([(10, [2, 2, 2]), (10, [3, 3, 3])])
    # 10 + 3 * 3 = 19 and 10 + 3 * 2 = 16; both together 2 * 10 + 6 * 3 = 38.
    assert [part["name_S"].tolist() for part in micro_batches(batch, 38)] == [[0, 1, 2, 3, 4, 5]]
    assert [part["name_S"].tolist() for part in micro_batches(batch, 37)] == [[3, 4, 5], [0, 1, 2]]


def test_a_family_beyond_the_budget_is_dealt_out():
    batch = shaped([(10, [3, 3, 3])])
    parts = micro_batches(batch, 16)  # 10 + 2 * 3
    assert [part["name_S"].tolist() for part in parts] == [[0, 1], [2]]
    assert [padded(part) for part in parts] == [16, 13]


@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 20), min_size=1, max_size=5)),
        min_size=1, max_size=8,
    ),
    st.integers(1, 150),
)  # fmt: skip
def test_every_sequence_is_in_one_part_and_every_part_within_the_budget(families, budget):
    batch = shaped(families)
    parts = micro_batches(batch, budget)
    names = [name for part in parts for name in part["name_S"].tolist()]
    assert sorted(names) == list(range(batch.num_sequences))
    assert all(padded(part) <= budget or part.num_sequences == 1 for part in parts)

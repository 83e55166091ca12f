import math

import pytest
import torch

from tests.learning.support import (
    REWARDS,
    gradient_of,
    random_batch,
    relative,
    scripted_groups,
    slow_logits,
    slow_logp,
    tiny_config,
    tiny_learner,
)
from whorl.algorithms.algorithm import Term, assemble
from whorl.algorithms.averages import token_mean
from whorl.algorithms.catalog import CISPO, PPO, REINFORCE
from whorl.algorithms.critic import minus_value_error
from whorl.algorithms.penalties import entropy_bonus
from whorl.data import Batch
from whorl.kernels import logprob
from whorl.learning.optimizer import OptimizerSettings
from whorl.learning.seen import sampler_gap
from whorl.model.layout import Layout
from whorl.reporting.glossary import check_names

KINDS = {
    "hybrid MoE": {},
    "tied": {"tied": True},
    "dense lightning": {"softmax_period": 0, "num_experts": 0},
    "pre-norm dense softmax": {"softmax_period": 1, "num_experts": 0, "residual": "pre", "qk_norm": True},
}


# Reading


@pytest.mark.parametrize("budget", [8192, 40, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_equal_a_float64_log_softmax_of_each_sequence_alone(kind, budget):
    batch = random_batch(seed=1)
    learner = tiny_learner(config=tiny_config(**KINDS[kind]), temperature=0.7, token_budget=budget)
    logp_N = learner.logprobs(batch)
    assert (logp_N - slow_logp(learner.model, batch, 0.7)).abs().max() < 1e-12
    assert (logp_N[~batch["policy_N"]] == 0).all()
    assert not logp_N.requires_grad


def test_logprobs_of_a_float32_model_are_within_1e_5_nats_of_float64():
    batch = random_batch(seed=2)
    logp_N = tiny_learner(dtype=torch.float32, temperature=0.7, token_budget=40).logprobs(batch)
    exact = slow_logp(tiny_learner().model, batch, 0.7)
    assert logp_N.dtype == torch.float32
    assert (logp_N - exact).abs().max() < 1e-5


def test_logprobs_of_a_bfloat16_model_come_from_a_float32_head():
    learner = tiny_learner(dtype=torch.bfloat16)
    assert learner.logprobs(random_batch()).dtype == torch.float32


def test_reading_the_wrong_position_or_temperature_would_be_noticed():
    batch = random_batch(seed=1)
    learner = tiny_learner(temperature=0.7)
    exact = slow_logp(learner.model, batch, 0.7)
    own_place = []
    for logits_TV, tokens_T in zip(slow_logits(learner.model, batch), batch.unpack("tokens_N"), strict=True):
        own_place.append((logits_TV / 0.7).log_softmax(-1).gather(1, tokens_T[:, None])[:, 0])
    shifted = torch.where(batch["policy_N"], torch.cat(own_place), 0.0)
    assert (shifted - exact).abs().max() > 0.1
    assert (slow_logp(learner.model, batch, 1.0) - exact).abs().max() > 0.1


def test_the_first_token_of_a_sequence_cannot_be_the_policys():
    batch = random_batch()
    first = batch["policy_N"].clone()
    first[batch.cu_seqlens[2]] = True
    learner = tiny_learner()
    with pytest.raises(ValueError, match="policy_N marks the first token of sequence 2"):
        learner.logprobs(batch.with_columns(policy_N=first))


def test_the_reference_stays_where_it_was_taken():
    groups = scripted_groups(REWARDS)
    learner = tiny_learner(reference=True)
    batch = assemble(groups, REINFORCE)
    before = learner.logprobs(batch)
    learner.forward_backward(batch, REINFORCE.terms)
    learner.optim_step()
    assert torch.equal(learner.reference_logprobs(batch), before)
    assert (learner.logprobs(batch) - before).abs().max() > 1e-3
    learner.set_reference()
    assert torch.equal(learner.reference_logprobs(batch), learner.logprobs(batch))


def test_a_learner_without_a_reference_or_critic_says_how_to_get_one():
    learner = tiny_learner()
    with pytest.raises(ValueError, match="build it with reference=True"):
        learner.reference_logprobs(random_batch())
    with pytest.raises(ValueError, match="build it with value_head=True"):
        learner.values(random_batch())


def test_a_value_is_read_before_its_token_is_written():
    learner = tiny_learner(value_head=True, token_budget=30)
    batch = random_batch(seed=3)
    assert (learner.values(batch) == 0).all()
    assert learner.value_head is not None
    torch.nn.init.normal_(learner.value_head.weight, generator=torch.Generator().manual_seed(0))
    values_N = learner.values(batch)
    # Another token at the end of a sequence cannot change the value that stood before it.
    last = int(batch.cu_seqlens[1]) - 1
    policy_N = batch["policy_N"].clone()
    policy_N[last] = True
    tokens_N = batch["tokens_N"].clone()
    tokens_N[last] = (tokens_N[last] + 1) % 13
    changed = learner.values(batch.with_columns(tokens_N=tokens_N, policy_N=policy_N))
    original = learner.values(batch.with_columns(policy_N=policy_N))
    assert changed[last] == original[last] != 0
    # And the token before it does change it.
    tokens_N[last - 1] = (tokens_N[last - 1] + 1) % 13
    assert learner.values(batch.with_columns(tokens_N=tokens_N, policy_N=policy_N))[last] != original[last]
    assert (values_N[~batch["policy_N"]] == 0).all()


def test_weights_are_the_live_tensors():
    learner = tiny_learner(config=tiny_config(tied=True))
    weights = learner.weights()
    assert weights["embed_tokens.weight"].data_ptr() == learner.model.embed_tokens.weight.data_ptr()
    assert not weights["embed_tokens.weight"].requires_grad
    assert set(weights) == {name for name, _ in learner.model.named_parameters()}


# Learning


def test_the_gradient_equals_finite_differences_of_a_loss_written_out():
    """REINFORCE plus the router's loss, along a random direction, from logits of each sequence alone."""
    batch = assemble(scripted_groups(REWARDS), REINFORCE)
    learner = tiny_learner(temperature=0.7, token_budget=30, router_aux_coefficient=0.5)
    learner.forward_backward(batch, REINFORCE.terms)
    parameters = list(learner._parameters().values())
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True))

    @torch.no_grad()
    def loss_at(distance: float) -> float:
        for p, d in zip(parameters, direction, strict=True):
            p.add_(d, alpha=distance)
        logp_N = slow_logp(learner.model, batch, 0.7)
        loss = -float((batch["weight_reinforce_N"] * batch["advantage_N"] * logp_N).sum())
        # The shares are uniform at first, so E * sum_e (1/E) p_e is 1 for every token and layer: its
        # gradient vanishes and the term is the constant 0.5.
        for p, d in zip(parameters, direction, strict=True):
            p.sub_(d, alpha=distance)
        return loss + 0.5

    h = 1e-6
    assert slope == pytest.approx((loss_at(h) - loss_at(-h)) / (2 * h), rel=1e-6)


def test_the_router_loss_pulls_towards_the_experts_of_fewer_tokens():
    batch = assemble(scripted_groups(REWARDS), REINFORCE)
    zero = batch.with_columns(weight_reinforce_N=torch.zeros(batch.num_tokens))
    learner = tiny_learner(
        router_aux_coefficient=1.0, settings=OptimizerSettings(learning_rate=0.0), token_budget=30
    )
    first = learner.forward_backward(zero, REINFORCE.terms)
    assert first["router_aux_loss"] == pytest.approx(1.0, rel=1e-12)
    learner.optim_step()
    # The next update's shares are this batch's counts: Switch's own formula on the same tokens.
    second = learner.forward_backward(zero, REINFORCE.terms)
    layout_tokens = batch.unpack("tokens_N")
    wanted, counts = [], []
    for layer in range(2):
        probs, chosen = [], []
        for tokens in layout_tokens:
            with torch.no_grad():
                hidden = learner.model(tokens, Layout(torch.tensor([0, len(tokens)])))
            probs.append(hidden.routing[layer].probs_NE)
            chosen.append(hidden.routing[layer].chosen)
        share = torch.bincount(torch.cat(chosen).flatten(), minlength=3) / (2 * batch.num_tokens)
        wanted.append(3 * float((share.double() * torch.cat(probs).mean(dim=0)).sum()))
        counts.append(share * 3)
    assert second["router_aux_loss"] == pytest.approx(sum(wanted) / 2, rel=1e-6)
    assert second["expert_load_max"] == pytest.approx(sum(float(c.max()) for c in counts) / 2, rel=1e-6)
    assert second["expert_load_min"] == pytest.approx(sum(float(c.min()) for c in counts) / 2, rel=1e-6)
    assert gradient_of(learner).norm() > 1e-4


def test_metrics_are_means_over_trained_tokens_whatever_the_cut():
    batch = assemble(scripted_groups(REWARDS), CISPO)
    runs = []
    for budget in (8192, 20):
        learner = tiny_learner(token_budget=budget, temperature=0.7)
        runs.append(learner.forward_backward(batch, CISPO.terms))
    assert runs[0] == {name: pytest.approx(value, rel=1e-9, abs=1e-12) for name, value in runs[1].items()}
    learner = tiny_learner()
    trained_N = batch["trained_N"]
    logp_N = slow_logp(learner.model, batch, 0.7)
    ratio_M = (logp_N - batch["logp_old_N"]).exp()[trained_N]
    entropies = []
    for logits, trained in zip(slow_logits(learner.model, batch), batch.unpack("trained_N"), strict=True):
        logp = (logits / 0.7).log_softmax(-1)
        entropies.append(-(logp.exp() * logp).sum(-1)[:-1][trained[1:]])
    entropy = torch.cat(entropies).mean().item()
    assert runs[0]["entropy_nats"] == pytest.approx(entropy, rel=1e-12)
    assert runs[0]["ratio_mean"] == pytest.approx(ratio_M.mean().item(), rel=1e-12)
    assert runs[0]["ratio_max"] == pytest.approx(ratio_M.max().item(), rel=1e-12)
    assert runs[0]["trained_tokens"] == trained_N.sum()
    assert runs[0]["loss"] == -runs[0]["objective"]


def test_every_metric_of_the_learner_is_in_the_table_of_metrics():
    batch = assemble(scripted_groups(REWARDS), REINFORCE)
    learner = tiny_learner()
    check_names(learner.forward_backward(batch, REINFORCE.terms))
    check_names(learner.optim_step())
    gap = sampler_gap(learner.logprobs(batch), batch["logp_sampler_N"], batch["policy_N"])
    assert "sampler_prob_correlation" in gap
    check_names(gap)


def test_an_entropy_term_has_the_gradient_of_the_entropy():
    batch = random_batch(seed=4)
    term = Term(entropy_bonus, token_mean, 2.0)
    batch = batch.with_columns(**{term.weight_column: token_mean(batch["trained_N"])})
    learner = tiny_learner(temperature=0.7, token_budget=30, router_aux_coefficient=0.0)
    metrics = learner.forward_backward(batch, [term])
    got = gradient_of(learner)
    learner.optimizer.adamw.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for logits, trained in zip(slow_logits(learner.model, batch), batch.unpack("trained_N"), strict=True):
        probs = (logits / 0.7).softmax(-1)[:-1][trained[1:]]
        total = total + torch.special.entr(probs).sum()
    (-2.0 * total / batch["trained_N"].sum()).backward()
    assert relative(got, gradient_of(learner)) < 1e-12
    assert metrics["objective"] == pytest.approx(metrics["entropy_nats"], rel=1e-12)


def test_a_value_term_trains_head_and_trunk():
    learner = tiny_learner(value_head=True)
    assert learner.value_head is not None
    torch.nn.init.constant_(learner.value_head.weight, 0.1)
    provide = {"value_old_N": learner.values}
    batch = assemble(scripted_groups(REWARDS), PPO, provide)
    term = PPO.terms[1]
    assert term.objective is minus_value_error
    learner.forward_backward(batch, [term])
    trained_N = batch["trained_N"]
    error_M = (batch["value_old_N"] - batch["return_N"])[trained_N]
    # d/d bias of mean((V - R)^2 / 2) is mean(V - R).
    assert learner.value_head.bias.grad is not None
    assert learner.value_head.bias.grad.item() == pytest.approx(error_M.mean().item(), rel=1e-6)
    assert learner.model.layers[0].self_attn.out_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_no_gradient(kind):
    batch = assemble(scripted_groups(REWARDS), CISPO)
    gradients = []
    for switched_on in (False, True):
        learner = tiny_learner(config=tiny_config(**KINDS[kind]), token_budget=60, dtype=torch.float32)
        learner.model.checkpoint_activations = switched_on
        learner.forward_backward(batch, CISPO.terms)
        gradients.append(gradient_of(learner))
    assert torch.equal(*gradients)


def test_scoring_the_head_in_pieces_changes_no_gradient(monkeypatch):
    batch = assemble(scripted_groups(REWARDS), CISPO)
    whole, pieces = tiny_learner(), tiny_learner()
    wanted = whole.logprobs(batch)
    metrics = whole.forward_backward(batch, CISPO.terms)
    monkeypatch.setattr(logprob, "MAX_LOGITS", 7 * 13)
    assert (pieces.logprobs(batch) - wanted).abs().max() < 1e-14
    assert pieces.forward_backward(batch, CISPO.terms)["loss"] == pytest.approx(metrics["loss"], rel=1e-13)
    assert relative(gradient_of(pieces), gradient_of(whole)) < 1e-13


def test_a_token_without_weight_counts_nothing_even_if_its_objective_overflows():
    batch = assemble(scripted_groups(REWARDS), REINFORCE)

    def exploding(logp_N, advantage_N):
        return torch.where(advantage_N == 0, torch.inf, advantage_N * logp_N), {}

    learner = tiny_learner()
    batch = batch.with_columns(
        weight_exploding_N=torch.where(batch["advantage_N"] == 0, 0.0, batch["weight_reinforce_N"])
    )
    metrics = learner.forward_backward(batch, [Term(exploding, token_mean)])
    assert math.isfinite(metrics["loss"])
    assert gradient_of(learner).isfinite().all()


def test_a_poisoned_gradient_is_skipped_and_leaves_no_trace():
    batch = assemble(scripted_groups(REWARDS), REINFORCE)
    clean, hit = tiny_learner(), tiny_learner()
    poisoned = batch.with_columns(advantage_N=torch.full((batch.num_tokens,), math.nan))
    hit.forward_backward(poisoned, REINFORCE.terms)
    metrics = hit.optim_step()
    assert metrics["skipped_updates"] == 1.0
    assert hit.version == 0
    for learner in (clean, hit):
        learner.forward_backward(batch, REINFORCE.terms)
        assert learner.optim_step()["skipped_updates"] == 0.0
    assert hit.version == 1
    ours, theirs = clean.state_dict()[0], hit.state_dict()[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_a_term_needs_and_does_not_get_is_named():
    batch = assemble(scripted_groups(REWARDS), REINFORCE)
    learner = tiny_learner()
    with pytest.raises(ValueError, match="no column weight_cispo_N; make it with assemble"):
        learner.forward_backward(batch, CISPO.terms)
    with pytest.raises(ValueError, match="needs at least one term"):
        learner.forward_backward(batch, [])
    nothing = batch.with_columns(trained_N=torch.zeros(batch.num_tokens, dtype=torch.bool))
    with pytest.raises(ValueError, match="no token of the batch is trained"):
        learner.forward_backward(nothing, REINFORCE.terms)
    slim = Batch(batch.cu_seqlens, {k: v for k, v in batch.columns.items() if k != "advantage_N"})
    with pytest.raises(ValueError, match="reinforce needs the column advantage_N"):
        learner.forward_backward(slim, REINFORCE.terms)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        tiny_learner(temperature=0.0)


def test_a_float32_learner_agrees_with_float64():
    batch = assemble(scripted_groups(REWARDS), CISPO)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        learner = tiny_learner(dtype=dtype)
        learner.forward_backward(batch, CISPO.terms)
        gradients.append(gradient_of(learner).double())
    assert relative(gradients[1], gradients[0]) < 1e-5


# Sampler against learner


def test_sampler_gap_counts_masked_tokens_only():
    learner_N = torch.full((201,), -1.0)
    sampler_N = learner_N.clone()
    sampler_N[:2] = -1.5
    sampler_N[2] = -3.0
    sampler_N[200] = -99.0
    mask_N = torch.arange(201) < 200
    metrics = sampler_gap(learner_N, sampler_N, mask_N)
    assert metrics == {
        "sampler_gap_mean_nats": pytest.approx(3 / 200),  # (1/2 + 1/2 + 2) / 200
        "sampler_gap_p99_nats": 0.5,  # the 198th smallest of 200; 197 are 0
        "sampler_gap_max_nats": 2.0,
    }
    with pytest.raises(ValueError, match="mask selects none"):
        sampler_gap(learner_N, sampler_N, torch.zeros(201, dtype=torch.bool))


def test_sampler_gap_correlates_probabilities_not_logarithms():
    learner_N = torch.tensor([0.1, 0.2, 0.4]).log()
    sampler_N = torch.tensor([0.2, 0.4, 0.8]).log()
    everything = torch.ones(3, dtype=torch.bool)
    assert sampler_gap(learner_N, sampler_N, everything)["sampler_prob_correlation"] == pytest.approx(1.0)
    swapped = sampler_gap(learner_N, sampler_N.flip(0), everything)
    # (.1,.2,.4) and (.8,.4,.2), times 30: deviations (-4,-1,5) and (10,-2,-8): -78 / sqrt(42 * 168)
    assert swapped["sampler_prob_correlation"] == pytest.approx(-78 / math.sqrt(42 * 168))


@pytest.mark.parametrize("budget", [8192, 20])
def test_the_gap_comes_with_the_gradient_at_no_extra_pass(budget):
    batch = assemble(scripted_groups(REWARDS), CISPO)
    learner = tiny_learner(token_budget=budget)
    metrics = learner.forward_backward(batch, CISPO.terms, compare_sampler=True)
    wanted = sampler_gap(learner.logprobs(batch), batch["logp_sampler_N"], batch["trained_N"])
    assert len(wanted) == 4
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)


def test_the_head_is_asked_for_trained_tokens_only():
    batch = assemble(scripted_groups(REWARDS), CISPO)
    learner = tiny_learner()
    rows = []
    products = learner.model.head_products
    learner.model.head_products = lambda hidden: rows.append(len(hidden)) or products(hidden)
    learner.forward_backward(batch, CISPO.terms)
    assert rows == [int(batch["trained_N"].sum())]
    assert rows[0] < batch.num_tokens


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_change_neither_gradient_nor_metrics_and_repeat_to_the_bit(num_threads, monkeypatch):
    monkeypatch.setattr("whorl.learning.packing.MIN_TOKENS_PER_THREAD", 8)
    batch = assemble(scripted_groups(REWARDS), CISPO)
    results = []
    for threads in (1, num_threads, num_threads):
        learner = tiny_learner(num_threads=threads)
        metrics = learner.forward_backward(batch, CISPO.terms, compare_sampler=True)
        gradient = {n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None}
        results.append((metrics, gradient, learner.logprobs(batch)))
    (metrics, gradient, logp), (others, threaded, logp_threaded), (_, again, logp_again) = results
    assert metrics.keys() == others.keys()
    assert all(others[name] == pytest.approx(metrics[name], rel=1e-10, abs=1e-12) for name in metrics)
    scale = max(float(g.abs().max()) for g in gradient.values())
    for name, expected in gradient.items():
        assert float((threaded[name] - expected).abs().max()) <= 1e-12 * scale
        assert torch.equal(threaded[name], again[name])
    assert torch.allclose(logp, logp_threaded, rtol=0, atol=1e-12)
    assert torch.equal(logp_threaded, logp_again)

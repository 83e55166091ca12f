"""The sampler's choice of experts, recorded, carried to the learner, compared and replayed."""

import asyncio
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.learning.support import (
    gradient_of,
    groups_with_prompts,
    relative,
    tiny_config,
    tiny_learner,
)
from tests.support import tiny_run
from whorl.algorithms.algorithm import assemble
from whorl.algorithms.catalog import CISPO
from whorl.checks.along import decode_along
from whorl.data import Batch, Group, Message, Problem, Score, pack
from whorl.learning import packing
from whorl.learning.learner import Learner
from whorl.learning.optimizer import OptimizerSettings
from whorl.loop import train
from whorl.model.layout import Layout
from whorl.model.tokenizer import Tokenizer
from whorl.model.transformer import Transformer
from whorl.sampling.dialogue import Dialogue
from whorl.sampling.draw import Sampling, stream_key
from whorl.sampling.engine import Engine
from whorl.sampling.request import Request
from whorl.updates import split_for_updates

TOKENIZER = Tokenizer.characters("0123456789")
CONFIG = tiny_config(vocab_size=TOKENIZER.vocab_size, num_experts=4, experts_per_token=2, max_context=256)


def network(dtype=torch.float32) -> Transformer:
    return Transformer(CONFIG).initialise(3).to(dtype)


def played(model: Transformer, *, keep_state: bool = True, turns: int = 2, **engine) -> list[Group]:
    """Three groups of four rollouts with a line of the environment between turns, all at once on one engine."""
    sampler = Engine(model, record_experts=True, **engine)

    async def play(g: int, i: int):
        problem = Problem(f"p{g}", "12345"[: g + 2] * 3)
        talk = Dialogue(
            sampler, TOKENIZER, problem, key=stream_key(g, i), group=g, sample=i,
            sampling=Sampling(max_tokens=7), keep_state=keep_state,
        )  # fmt: skip
        talk.read(*problem.messages)
        await talk.write()
        for _ in range(turns - 1):
            talk.read(Message("user", "77"))
            await talk.write()
        rollout = talk.rollout()
        rollout.score = Score(float(i % 2))
        return rollout

    async def everything():
        return await asyncio.gather(*(play(g, i) for g in range(3) for i in range(4)))

    rollouts = asyncio.run(everything())
    return [Group(rollouts[4 * g].problem, rollouts[4 * g : 4 * g + 4]) for g in range(3)]


def nudged(model: Transformer, size: float = 0.3) -> Transformer:
    """Other routers, as after many updates."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in other.layers:
            gate = block.feed_forward.gate.weight  # type: ignore[union-attr]
            gate += size * torch.randn(gate.shape, generator=generator).to(gate)
    return other


def learner_of(model: Transformer, **options) -> Learner:
    return Learner(model, OptimizerSettings(1e-2), **options)


def learn(learner: Learner, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    learner._chosen_LE.zero_()
    metrics = learner.forward_backward(batch, CISPO.terms, compare_sampler=True)
    gradient = gradient_of(learner)
    learner.optimizer.adamw.zero_grad()
    return gradient, metrics


# Recording.


@pytest.mark.parametrize("keep_state", [True, False], ids=["kept state", "read again"])
@pytest.mark.parametrize("limit", [0, 120], ids=["", "preempted"])
def test_rollouts_tell_the_experts_of_every_token_but_the_last(keep_state, limit):
    model = network()
    for group in played(model, keep_state=keep_state, max_cached_tokens=limit, prefill_chunk_tokens=5):
        for rollout in group.rollouts:
            found = rollout.experts_T
            assert found is not None
            assert found.shape == (len(rollout), 2, 2)
            assert found.dtype == np.int8
            decoded = decode_along(model, torch.from_numpy(rollout.tokens_T).long()[None])[1]
            assert decoded is not None
            assert np.array_equal(found[:-1], decoded[:, 0, :-1].permute(1, 0, 2).numpy())
            assert (found[-1] == -1).all()


def test_a_preempted_turn_tells_the_experts_that_it_was_written_with():
    model = network()
    wave = [Request([1, 2, 3 + i], stream_key(i), Sampling(max_tokens=150)) for i in range(4)]
    engine = Engine(model, record_experts=True, max_cached_tokens=350)
    done, free = engine.generate(wave), Engine(model, record_experts=True).generate(wave)
    assert engine.num_preemptions > 0
    for a, b in zip(done, free, strict=True):
        assert a.experts is not None and b.experts is not None
        assert a.experts.shape == (3 + 150 - 1, 2, 2)
        assert np.array_equal(a.experts, b.experts)


def test_nothing_is_recorded_unless_asked_for_and_dense_models_cannot_be_asked():
    done = Engine(network()).generate([Request([1, 2], 0, Sampling(max_tokens=3))])[0]
    assert done.experts is None
    assert pack(groups_with_prompts()).columns.get("experts_N") is None
    dense = Transformer(replace(CONFIG, num_experts=0))
    with pytest.raises(ValueError, match="record_experts needs a model with experts"):
        Engine(dense, record_experts=True)
    with pytest.raises(ValueError, match="replay_experts needs a model with experts"):
        learner_of(dense, replay_experts=True)
    with pytest.raises(ValueError, match="replay_experts needs the column experts_N"):
        learn(tiny_learner(replay_experts=True), assemble(groups_with_prompts(), CISPO))


def test_more_than_128_experts_take_two_bytes():
    many = Transformer(replace(CONFIG, num_experts=200)).initialise(0)
    done = Engine(many, record_experts=True).generate([Request([1, 2], 0, Sampling(max_tokens=30))])[0]
    assert done.experts is not None
    assert done.experts.dtype == np.int16
    assert done.experts.max() > 127


def test_a_rewound_conversation_tells_the_experts_of_its_last_branch():
    model = network()
    sampler = Engine(model, record_experts=True)
    talk = Dialogue(
        sampler, TOKENIZER, Problem("p", "123"), key=5, sampling=Sampling(max_tokens=6), keep_state=True
    )

    async def branches() -> None:
        talk.read(Message("user", "123"))
        await talk.write()
        mark = talk.mark()
        for line in ("44444", "9"):
            talk.rewind(mark)
            talk.read(Message("user", line))
            await talk.write()

    asyncio.run(branches())
    rollout = talk.rollout()
    decoded = decode_along(model, torch.from_numpy(rollout.tokens_T).long()[None])[1]
    assert decoded is not None
    assert rollout.experts_T is not None
    assert np.array_equal(rollout.experts_T[:-1], decoded[:, 0, :-1].permute(1, 0, 2).numpy())


# Replaying.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_the_weights_that_sampled_replay_changes_no_bit(dtype):
    model = network(dtype)
    batch = assemble(played(model), CISPO)
    (live, told), (replayed, again) = (
        learn(learner_of(copy.deepcopy(model), replay_experts=replay), batch) for replay in (False, True)
    )
    assert torch.equal(live, replayed)
    assert told == again
    assert told["experts_differ_frac"] == 0
    assert torch.equal(
        learner_of(model).logprobs(batch), learner_of(model, replay_experts=True).logprobs(batch)
    )


def test_with_other_routers_the_experts_are_the_sampler_s_and_the_weights_the_learner_s():
    model = network(torch.float64)
    batch, other = assemble(played(model), CISPO), nudged(model)
    learner = learner_of(other, replay_experts=True)
    seen = []
    for block in other.layers:
        block.feed_forward.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    replayed = assert_follows(learner, batch)
    assert all(
        (routing.probs_NE.topk(2).indices != routing.chosen).any() for routing in seen[: len(other.layers)]
    )
    assert (learner_of(other).logprobs(batch) - replayed).abs().max() > 1e-3
    assert int((batch["experts_N"][:, 0, 0] >= 0).sum()) == batch.num_tokens - batch.num_sequences


def assert_follows(learner: Learner, batch: Batch) -> torch.Tensor:
    """The learner's log-probs are those of a plain mixture that is told where each token goes."""
    logp_N = learner.logprobs(batch)
    expected = []
    for s in range(batch.num_sequences):
        part = batch.select([s])
        tokens_T, policy_T = part["tokens_N"], part["policy_N"]
        next_TV = plain_log_probs(learner.model, tokens_T, part["experts_N"])
        own_T = torch.cat([torch.zeros(1).double(), next_TV[:-1].gather(1, tokens_T[1:, None])[:, 0]])
        expected.append(torch.where(policy_T, own_T, 0.0))
    assert (logp_N - torch.cat(expected)).abs().max() <= 1e-12
    return logp_N


def plain_log_probs(model: Transformer, tokens: torch.Tensor, choice_TLk: torch.Tensor) -> torch.Tensor:
    """Next-token log-probs of one sequence by a mixture that is told where to go, expert by expert."""
    model = copy.deepcopy(model)
    for number, block in enumerate(model.layers):
        experts, choice = block.feed_forward, choice_TLk[:, number].tolist()

        def forward(x, replay=None, experts=experts, choice=choice):
            rows = []
            for row, chosen in zip(x, choice, strict=True):
                logits = experts.gate.weight @ row
                chosen = logits.topk(2).indices.tolist() if chosen[0] < 0 else chosen
                total = torch.zeros_like(row)
                for e in chosen:
                    gate, up = (experts.gate_up[e] @ row).chunk(2)
                    weight = logits[e].exp() / sum(logits[j].exp() for j in chosen)
                    total = total + weight * (experts.down[e] @ (torch.nn.functional.silu(gate) * up))
                rows.append(total)
            return torch.stack(rows), None

        block.feed_forward.forward = forward
    with torch.no_grad():
        hidden = model(tokens, Layout(torch.tensor([0, len(tokens)]))).hidden_ND
        return model.logits(hidden).log_softmax(-1)


def test_the_share_of_tokens_whose_experts_differ_is_counted_over_what_the_sampler_read():
    model = network(torch.float64)
    batch, other = assemble(played(model), CISPO), nudged(model)
    differ = total = 0
    for s in range(batch.num_sequences):
        part = batch.select([s])
        tokens = part["tokens_N"]
        routing = other(tokens, Layout(torch.tensor([0, len(tokens)]))).routing
        for t in range(len(tokens) - 1):
            total += 1
            differ += any(
                set(layer.chosen[t].tolist()) != set(part["experts_N"][t, number].tolist())
                for number, layer in enumerate(routing)
            )
    for budget in (10_000, 60):
        metrics = learn(learner_of(other, token_budget=budget), batch)[1]
        assert metrics["experts_differ_frac"] == pytest.approx(differ / total, abs=1e-12)
    assert 0.1 < differ / total < 1
    assert "experts_differ_frac" not in learner_of(other).forward_backward(batch, CISPO.terms)


def test_the_gradient_of_a_replayed_batch_is_that_of_finite_differences():
    model = network(torch.float64)
    batch = assemble(played(model, turns=1), CISPO)
    learner = learner_of(nudged(model), replay_experts=True, router_aux_coefficient=0.0)
    # On-policy CISPO: the ratio is stopped, so the loss to differentiate is -sum w r A log pi with r fixed.
    gradient, _ = learn(learner, batch)
    logp_N = learner.logprobs(batch)
    fixed_N = batch["weight_cispo_N"] * batch["advantage_N"] * (logp_N - batch["logp_old_N"]).exp()
    names = list(learner._parameters())
    flat = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(learner._parameters().values())])
    rng = np.random.default_rng(0)
    for name in ("model/layers.0.feed_forward.gate.weight", "model/layers.1.feed_forward.gate_up"):
        parameter = learner._parameters()[name]
        direction = torch.from_numpy(rng.normal(size=parameter.shape))
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6 * direction
                values.append(-(fixed_N * learner.logprobs(batch)).sum())
                parameter -= sign * 1e-6 * direction
        slope = (values[0] - values[1]) / 2e-6
        found = gradient[flat == names.index(name)] @ direction.flatten()
        assert float(found.abs()) > 1e-4
        assert float(found) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradient_under_replay_does_not_depend_on_the_cut_nor_on_shared_prompts(
    checkpointed, monkeypatch
):
    model = network(torch.float64)
    groups = played(model)
    # One member's prompt was sent elsewhere, as after a preemption with a close call: it shares no row with others.
    odd = groups[1].rollouts[2].experts_T
    assert odd is not None
    odd[1] = (odd[1] + 1) % 4
    batch, other = assemble(groups, CISPO), nudged(model)
    other.checkpoint_activations = checkpointed
    cut = [
        learn(learner_of(other, replay_experts=True, token_budget=budget, num_threads=threads), batch)[0]
        for budget, threads in ((10_000, 1), (60, 1), (1, 1), (60, 2))
    ]
    monkeypatch.setattr(packing, "MIN_SAVED_FRAC", 2.0)
    whole = learn(learner_of(other, replay_experts=True), batch)[0]
    assert all(relative(gradient, whole) < 1e-12 for gradient in cut)
    live = learn(learner_of(other), batch)[0]
    assert relative(live, whole) > 1e-2


def test_control_prompts_that_are_shared_in_spite_of_other_experts_are_seen(monkeypatch):
    model = network(torch.float64)
    groups = played(model)
    odd = groups[1].rollouts[2].experts_T
    assert odd is not None
    odd[1] = (odd[1] + 1) % 4
    batch, other = assemble(groups, CISPO), nudged(model)
    with_prefixes = packing.with_prefixes

    def by_tokens_alone(batch, read_N):
        columns = dict(batch.columns)
        experts = columns.pop("experts_N")
        return with_prefixes(Batch(batch.cu_seqlens, columns), read_N).with_columns(experts_N=experts)

    right = learn(learner_of(other, replay_experts=True), batch)[0]
    monkeypatch.setattr("whorl.learning.learner.with_prefixes", by_tokens_alone)
    wrong = learn(learner_of(other, replay_experts=True), batch)[0]
    assert relative(wrong, right) > 1e-6


def test_several_updates_of_a_batch_keep_the_choice_while_the_routers_move():
    model = network(torch.float64)
    before = copy.deepcopy(model)
    first, second, last = split_for_updates(assemble(played(model), CISPO), 3, (0, 0))
    learner = learner_of(model, replay_experts=True)
    for part in (first, second):
        learner.forward_backward(part, CISPO.terms)
        learner.optim_step()
    assert_follows(learner, last)
    moved = model(last["tokens_N"], Layout(last.cu_seqlens)).routing
    start = before(last["tokens_N"], Layout(last.cu_seqlens)).routing
    assert any((a.chosen != b.chosen).any() for a, b in zip(moved, start, strict=True))


def test_the_reference_chooses_for_itself():
    model = network()
    batch = assemble(played(model), CISPO)
    live, replay = learner_of(nudged(model), reference=True), learner_of(
        nudged(model), reference=True, replay_experts=True
    )  # fmt: skip
    assert torch.equal(live.reference_logprobs(batch), replay.reference_logprobs(batch))
    assert not torch.equal(live.logprobs(batch), replay.logprobs(batch))


# In a run.


@pytest.mark.parametrize("cores", [1, 2])
def test_a_run_that_replays_logs_the_share_and_sees_the_same_ratios(tmp_path, monkeypatch, cores):
    run = tiny_run(
        tmp_path / "run", monkeypatch, replay_experts=True, cores=cores, updates_per_batch=2, num_steps=2
    )
    run.warm = True
    calls = iter(range(10_000))
    monkeypatch.setattr(type(run.environment), "verify", lambda *_: Score(float(next(calls) % 2)))
    object.__setattr__(run.settings.sampling, "max_tokens", 8)
    train(run)
    rows = [row for row in run.directory.history() if "experts_differ_frac" in row]
    assert rows
    assert all(row["experts_differ_frac"] == 0 for row in rows)
    assert all(row["sampler_gap_max_nats"] <= 1e-5 for row in rows)
    run.player.close()  # type: ignore[attr-defined]


def test_a_run_of_a_dense_model_is_refused(tmp_path, monkeypatch):
    from whorl.model import config

    dense = lambda vocab_size, max_context: replace(CONFIG, vocab_size=vocab_size, num_experts=0)  # noqa: E731
    monkeypatch.setitem(config.PRESETS, "dense", dense)
    with pytest.raises(ValueError, match="need a model with experts; those of dense are dense"):
        tiny_run(tmp_path / "run", monkeypatch, model="dense", record_experts=True)
    assert not (tmp_path / "run").exists()

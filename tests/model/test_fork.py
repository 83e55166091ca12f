"""A prefix that sequences share is computed once, and nothing else changes."""

import functools

import pytest
import torch

import whorl.model.attention as attention
from tests.model.shapes import CONFIGS, make_model
from whorl.data import cu_seqlens_of
from whorl.kernels.lightning import BLOCK
from whorl.model.layout import Fork, Layout

# For each case the sequences, as (number of the prefix, its length, length of the rest).
CASES = {
    "two groups": [(0, 5, 4), (0, 5, 4), (1, 5, 4), (1, 5, 4)],
    "ragged, in mixed order": [(0, 7, 3), (2, 2, 9), (1, 12, 1), (0, 7, 5), (2, 2, 1), (0, 7, 4), (1, 12, 6)],
    "prefixes of one token": [(0, 1, 4), (0, 1, 2), (1, 1, 3), (1, 1, 3)],
    "a group of one": [(0, 6, 3), (1, 4, 5), (0, 6, 2)],
    "a sequence that ends with its prefix": [(0, 6, 0), (0, 6, 2), (1, 1, 0)],
    "prefixes of one block and a bit": [(0, BLOCK + 12, 5), (0, BLOCK + 12, 3), (1, 9, 4)],
    "prefixes of two blocks and a bit": [(0, 2 * BLOCK + 17, 3), (0, 2 * BLOCK + 17, 6), (1, BLOCK, 4)],
    "rests of more than a block": [(0, 20, BLOCK + 3), (0, 20, 7), (1, 3, 2 * BLOCK + 1)],
}


def fork_and_tokens(case, vocab_size=23):
    """The fork, the plain layout of the same sequences, and their tokens (equal where prefixes are)."""
    generator = torch.Generator().manual_seed(3)

    def draw(count):
        return torch.randint(vocab_size, (count,), generator=generator)

    prefix = {number: draw(length) for number, length, _ in sorted({(p, n, 0) for p, n, _ in case})}
    tokens_N = torch.cat([part for number, _, rest in case for part in (prefix[number], draw(rest))])
    cu_seqlens = cu_seqlens_of([length + rest for _, length, rest in case])
    fork = Fork(cu_seqlens, torch.tensor([p for p, _, _ in case]), torch.tensor([n for _, n, _ in case]))
    return fork, Layout(cu_seqlens), tokens_N


def log_probs(model, layout, tokens_N):
    """log p `[N, V]` after every token of the sequences, and the routing of every layer `[N, E]`."""
    hidden = model(tokens_N[layout.source_U], layout)
    logp_NV = model.logits(hidden.hidden_ND).log_softmax(dim=-1)[layout.place_N]
    return logp_NV, [routing.probs_NE[layout.place_N] for routing in hidden.routing]


def gradients(model, layout, tokens_N):
    logp_NV, routing = log_probs(model, layout, tokens_N)
    weight_NV = torch.randn(logp_NV.shape, generator=torch.Generator().manual_seed(5), dtype=logp_NV.dtype)
    loss = (weight_NV * logp_NV).sum() + sum((weight_NV[:, : p.shape[1]] * p).sum() for p in routing)
    return torch.autograd.grad(loss, list(model.parameters()))


def worst_gap(config, case):
    """max |log p with a fork - without| in nats, float64."""
    model = make_model(CONFIGS[config], torch.float64)
    fork, plain, tokens_N = fork_and_tokens(CASES[case])
    with torch.no_grad():
        return (log_probs(model, fork, tokens_N)[0] - log_probs(model, plain, tokens_N)[0]).abs().max()


def test_the_maps_by_hand():
    """ab|cd, ab|e, f|g: rows ab, f, then cd, e, g."""
    a, b, c, d, e, f, g = range(7)
    tokens_N = torch.tensor([a, b, c, d, a, b, e, f, g])
    fork = Fork(torch.tensor([0, 4, 7, 9]), torch.tensor([0, 0, 1]), torch.tensor([2, 2, 1]))
    assert tokens_N[fork.source_U].tolist() == [a, b, f, c, d, e, g]
    assert tokens_N[fork.source_U][fork.place_N].tolist() == tokens_N.tolist()
    assert fork.copies_U.tolist() == [2, 2, 1, 1, 1, 1, 1]
    assert fork.position_N.tolist() == [0, 1, 0, 2, 3, 2, 1]
    assert fork.parent_R.tolist() == [0, 0, 1]
    assert fork.prefixes.length_S.tolist() == [2, 1]
    assert fork.rests.length_S.tolist() == [2, 1, 1]
    # Two slots for the prefix's keys, two for the rest's own; a query for each of the two.
    assert fork.seen[:, 0].int().tolist() == [
        [[1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 0, 1, 0], [1, 0, 1, 1]],
    ]


def test_the_maps_of_a_plain_layout_leave_everything_in_its_place():
    layout = Layout(torch.tensor([0, 2, 5]))
    assert layout.place_N.tolist() == layout.source_U.tolist() == [0, 1, 2, 3, 4]
    assert layout.copies_U.tolist() == [1] * 5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", CONFIGS)
def test_values_and_gradients_are_those_of_sequences_computed_whole(config, case):
    model = make_model(CONFIGS[config], torch.float64)
    fork, plain, tokens_N = fork_and_tokens(CASES[case])
    assert fork.num_tokens < len(tokens_N)
    assert worst_gap(config, case) <= 1e-12
    for shared, whole in zip(
        gradients(model, fork, tokens_N), gradients(model, plain, tokens_N), strict=True
    ):
        assert (shared - whole).norm() <= 1e-12 * whole.norm()


@pytest.mark.parametrize("config", CONFIGS)
def test_float32_stays_within_1e_5_nats(config):
    model = make_model(CONFIGS[config])
    fork, plain, tokens_N = fork_and_tokens(CASES["prefixes of one block and a bit"])
    with torch.no_grad():
        gap = log_probs(model, fork, tokens_N)[0] - log_probs(model, plain, tokens_N)[0]
    assert gap.abs().max() <= 1e-5


def test_activation_checkpointing_gives_the_same_gradients():
    model = make_model(CONFIGS["hybrid moe"])
    fork, _, tokens_N = fork_and_tokens(CASES["ragged, in mixed order"])
    found = []
    for model.checkpoint_activations in (False, True):
        found.append(gradients(model, fork, tokens_N))
    assert all(torch.equal(plainly, recomputed) for plainly, recomputed in zip(*found, strict=True))


RAGGED = "ragged, in mixed order"


def test_control_a_state_that_is_not_handed_on_is_seen(monkeypatch):
    original = attention.lightning

    def forgetful(q, k, v, slope_H, *, state, length_S, want_state):
        return original(q, k, v, slope_H, state=None, length_S=length_S, want_state=want_state)

    monkeypatch.setattr(attention, "lightning", forgetful)
    assert worst_gap("lightning dense", RAGGED) > 1e-2


def test_control_a_state_of_the_padded_prefix_is_seen(monkeypatch):
    """Without `length_S` the state goes on decaying through the padding of a shorter prefix."""
    original = attention.lightning

    def careless(q, k, v, slope_H, *, state, length_S, want_state):
        return original(q, k, v, slope_H, state=state, length_S=None, want_state=want_state)

    monkeypatch.setattr(attention, "lightning", careless)
    assert worst_gap("lightning dense", RAGGED) > 1e-2
    assert worst_gap("lightning dense", "two groups") <= 1e-12


def test_control_a_state_of_another_prefix_is_seen(monkeypatch):
    original = Fork.__init__

    def crossed(self, *arguments):
        original(self, *arguments)
        self.parent_R = self.parent_R.flip(0)

    monkeypatch.setattr(Fork, "__init__", crossed)
    assert worst_gap("lightning dense", "two groups") > 1e-2
    assert worst_gap("softmax moe", "two groups") > 1e-2


def test_control_positions_that_begin_again_after_the_prefix_are_seen(monkeypatch):
    original = Fork.__init__

    def restarted(self, *arguments):
        original(self, *arguments)
        self.position_N = torch.cat([self.prefixes.position_N, self.rests.position_N])

    monkeypatch.setattr(Fork, "__init__", restarted)
    assert worst_gap("softmax moe", RAGGED) > 1e-2


@pytest.mark.parametrize("wrong", ["prefix short", "prefix long", "own late", "own early"])
def test_control_a_key_mask_that_is_off_by_one_is_seen(wrong, monkeypatch):
    original = Fork.__dict__["seen"].func

    def off(self):
        seen, P = original(self), self.prefixes.max_length
        prefix, own = seen[..., :P], seen[..., P:]
        if wrong == "prefix short":
            prefix = torch.cat([prefix[..., 1:], torch.zeros_like(prefix[..., :1])], dim=-1)
        if wrong == "prefix long":
            prefix = torch.cat([torch.ones_like(prefix[..., :1]), prefix[..., :-1]], dim=-1)
        if wrong == "own late":
            own = own.tril(1) | torch.ones_like(own).tril(1)
        if wrong == "own early":
            own = own.tril(-1)
        return torch.cat([prefix, own], dim=-1)

    broken = functools.cached_property(off)
    broken.__set_name__(Fork, "seen")
    monkeypatch.setattr(Fork, "seen", broken)
    assert worst_gap("softmax moe", RAGGED) > 1e-2


@pytest.mark.parametrize(
    ("prefix_S", "length_S", "message"),
    [
        ([0, 0], [2, 1], "must agree on its length"),
        ([0, 1], [2, 0], "at least one token"),
        ([0, 1], [2, 6], "no longer than its sequence"),
    ],
)
def test_prefixes_that_cannot_be_are_refused(prefix_S, length_S, message):
    with pytest.raises(ValueError, match=message):
        Fork(torch.tensor([0, 4, 8]), torch.tensor(prefix_S), torch.tensor(length_S))

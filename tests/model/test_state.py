"""What a model remembers: prefill in pieces, decode, continuation, and the moves of slots."""

import pytest
import torch
import torch.nn.functional as F

from tests.model.shapes import (
    CONFIGS,
    decode_log_probs,
    forward_log_probs,
    make_model,
    random_tokens,
    small,
)
from whorl.model.state import State

HYBRID = CONFIGS["hybrid moe"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
KINDS = ("hybrid moe", "hybrid dense", "softmax moe", "lightning dense", "qwen")


def slots(*indices):
    return torch.tensor(indices)


def prefilled(model, lengths, *, dtype=torch.float32, num_slots=None, capacity=16):
    """A state that holds random sequences of these lengths in slots 0, 1, ..., and the sequences."""
    tokens = random_tokens(model.config, list(lengths))
    state = State(model.config, num_slots or len(lengths), capacity=capacity, dtype=dtype)
    forward_log_probs(model, tokens, *lengths, state=state, slots=slots(*range(len(lengths))))
    return state, list(tokens.split(list(lengths)))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", KINDS)
def test_prefill_in_chunks_then_decode_equals_one_forward(name, dtype):
    """Three ragged sequences: two chunks each, then 20 single tokens, in one running state."""
    model = make_model(CONFIGS[name], dtype)
    first, second, steps = (70, 1, 9), (1, 66, 30), 20
    sequences = [
        random_tokens(model.config, [a + b + steps], seed=a) for a, b in zip(first, second, strict=True)
    ]
    lengths = [len(sequence) for sequence in sequences]
    whole = forward_log_probs(model, torch.cat(sequences), *lengths).split(lengths)

    state, found = State(model.config, 3, capacity=8, dtype=dtype), [[], [], []]
    taken = [0, 0, 0]
    for chunk in (first, second):
        pieces = [sequence[t : t + n] for sequence, t, n in zip(sequences, taken, chunk, strict=True)]
        out = forward_log_probs(model, torch.cat(pieces), *chunk, state=state, slots=slots(0, 1, 2))
        for s, row in enumerate(out.split(chunk)):
            found[s].append(row)
            taken[s] += chunk[s]
    for _ in range(steps):
        tokens = torch.stack([sequence[t] for sequence, t in zip(sequences, taken, strict=True)])
        for s, row in enumerate(decode_log_probs(model, tokens, state)):
            found[s].append(row[None])
            taken[s] += 1
    assert state.length.tolist() == lengths
    for rows, expected in zip(found, whole, strict=True):
        assert (torch.cat(rows) - expected).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", KINDS)
def test_several_tokens_after_decode_equal_one_forward(name):
    """A further user turn: five decoded tokens, a chunk each in another order of slots, one more."""
    model = make_model(CONFIGS[name])
    state, (a, b) = prefilled(model, (12, 40))
    rows = [a, b]

    def extend(s, tokens):
        rows[s] = torch.cat([rows[s], tokens])

    for t in range(5):
        tokens = random_tokens(model.config, [2], seed=t)
        decode_log_probs(model, tokens, state)
        for s in (0, 1):
            extend(s, tokens[s : s + 1])
    turn = random_tokens(model.config, [9, 3], seed=77)
    out = forward_log_probs(model, turn, 9, 3, state=state, slots=slots(1, 0))
    extend(1, turn[:9])
    extend(0, turn[9:])
    last = random_tokens(model.config, [2], seed=78)
    stepped = decode_log_probs(model, last, state)
    for s, piece in ((1, out[:9]), (0, out[9:])):
        extend(s, last[s : s + 1])
        whole = forward_log_probs(model, rows[s], len(rows[s]))
        assert (whole[-1 - len(piece) : -1] - piece).abs().max() <= 1e-5
        assert (whole[-1] - stepped[s]).abs().max() <= 1e-5


def test_control_a_continuation_that_forgets_what_the_cache_holds_is_seen(monkeypatch):
    """The known bug: a cache that reports length 0, so that new token i sees keys 0 .. i only."""
    original = F.scaled_dot_product_attention

    def mistaken(q, k, v, attn_mask=None, **options):
        if attn_mask is not None:
            attn_mask = torch.ones_like(attn_mask).tril()
        return original(q, k, v, attn_mask=attn_mask, **options)

    model = make_model(HYBRID)
    tokens = random_tokens(HYBRID, [40])
    whole = forward_log_probs(model, tokens, 40)
    monkeypatch.setattr(F, "scaled_dot_product_attention", mistaken)
    state = State(HYBRID, 1)
    one_shot = forward_log_probs(model, tokens[:30], 30, state=state, slots=slots(0))
    assert (one_shot - whole[:30]).abs().max() <= 1e-5, "a first prefill does not show the bug"
    continued = forward_log_probs(model, tokens[30:], 10, state=state, slots=slots(0))
    assert (continued - whole[30:]).abs().max() > 0.01


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_computed_once_is_forked_for_every_sample(name):
    model = make_model(CONFIGS[name])
    state, (prompt,) = prefilled(model, (30,), num_slots=4)
    state.restore([1, 2, 3], state.snapshot(0))
    assert state.length.tolist() == [30] * 4
    samples = random_tokens(model.config, [6, 6, 6, 6]).view(4, 6)
    stepped = torch.stack([decode_log_probs(model, samples[:, t], state) for t in range(6)], dim=1)
    for s in range(4):
        whole = forward_log_probs(model, torch.cat([prompt, samples[s]]), 36)
        assert (whole[30:] - stepped[s]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_a_snapshot_rewinds_exactly_and_later_decoding_does_not_touch_it(name):
    model = make_model(CONFIGS[name])
    state, _ = prefilled(model, (11, 5))
    saved = [state.snapshot(s) for s in (0, 1)]
    tokens = random_tokens(model.config, [7, 7]).view(2, 7)
    first = [decode_log_probs(model, tokens[:, t], state) for t in range(7)]
    for s in (0, 1):
        state.restore([s], saved[s])
    again = [decode_log_probs(model, tokens[:, t], state) for t in range(7)]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_a_snapshot_fits_into_a_smaller_state():
    """The sequence of 30 tokens makes the other state grow from 4."""
    model = make_model(HYBRID)
    state, (prompt,) = prefilled(model, (30,))
    other = State(HYBRID, 2, capacity=4)
    other.restore([1, 0], state.snapshot(0))
    assert other.capacity == 30
    stepped = decode_log_probs(model, torch.tensor([3, 4]), other)
    for s, token in enumerate((3, 4)):
        whole = forward_log_probs(model, torch.cat([prompt, torch.tensor([token])]), 31)
        assert (whole[-1] - stepped[s]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_moving_a_slot_copies_its_sequence_and_no_other(name):
    """The first sequence ends, the last takes its slot, and two go on as slots 0 and 1."""
    model = make_model(CONFIGS[name])
    state, (_, b, c) = prefilled(model, (50, 20, 33))
    state.move(2, 0)
    assert state.length.tolist() == [33, 20, 33]
    tokens = random_tokens(model.config, [2, 2], seed=5).view(2, 2)
    stepped = torch.stack([decode_log_probs(model, tokens[:, t], state) for t in (0, 1)], dim=1)
    for s, before in enumerate((c, b)):
        whole = forward_log_probs(model, torch.cat([before, tokens[s]]), len(before) + 2)
        assert (whole[-2:] - stepped[s]).abs().max() <= 1e-5


def test_control_a_slot_that_begins_with_another_sequence_s_state_is_seen():
    model = make_model(HYBRID)
    state, _ = prefilled(model, (40,))
    state.length[0] = 0  # keys are masked by the length; the lightning state has to be emptied
    tokens = random_tokens(HYBRID, [20], seed=8)
    out = forward_log_probs(model, tokens, 20, state=state, slots=slots(0))
    assert (out - forward_log_probs(model, tokens, 20)).abs().max() > 0.01


def test_slots_that_take_no_part_stay_as_they_are():
    model = make_model(HYBRID)
    state, _ = prefilled(model, (6, 7, 8))
    before = [state.snapshot(s) for s in range(3)]
    forward_log_probs(model, random_tokens(HYBRID, [4]), 4, state=state, slots=slots(1))
    decode_log_probs(model, random_tokens(HYBRID, [1]), state)
    after = state.snapshot(2)
    assert state.length.tolist() == [7, 11, 8]
    for old, new in ((before[2].lightning, after.lightning), (before[2].keys, after.keys)):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_the_cache_grows_by_doubling_up_to_the_context():
    state = State(small(max_context=100), 2, capacity=16)
    state.keys[0][1, 0, :16] = 7.0
    capacities = []
    for length in (16, 17, 33, 90, 100):
        state.reserve(length)
        capacities.append(state.capacity)
        assert all(row.shape[2] == state.capacity for row in (*state.keys, *state.values))
    assert capacities == [16, 32, 64, 100, 100]
    assert (state.keys[0][1, 0, :16] == 7).all()
    assert (state.keys[0][1, 0, 16:] == 0).all()
    with pytest.raises(ValueError, match="a sequence of 101 tokens exceeds the context of 100"):
        state.reserve(101)


@pytest.mark.parametrize("name", KINDS)
def test_a_state_of_another_size_goes_on_with_the_sequences_that_it_keeps(name):
    """Three slots of 16 become two of 40, then five of 41, while two sequences go on."""
    model = make_model(CONFIGS[name])
    state, rows = prefilled(model, (11, 14, 6), capacity=16)
    for num_slots, capacity in ((2, 40), (5, 41)):
        state.resize(num_slots, capacity)
        assert (state.num_slots, len(state.length)) == (num_slots, num_slots)
        assert all(layer.shape[0] == num_slots for layer in state.lightning)
        assert all(row.shape[::2] == (num_slots, capacity) for row in (*state.keys, *state.values))
        tokens = random_tokens(model.config, [2], seed=capacity)
        stepped = decode_log_probs(model, tokens, state)
        for s in (0, 1):
            rows[s] = torch.cat([rows[s], tokens[s : s + 1]])
            whole = forward_log_probs(model, rows[s], len(rows[s]))
            assert (whole[-1] - stepped[s]).abs().max() <= 1e-5
    assert state.length.tolist() == [13, 16, 0, 0, 0]


def test_decoding_past_the_context_is_an_error():
    config = small(max_context=8)
    model = make_model(config)
    state, _ = prefilled(model, (8,))
    with pytest.raises(ValueError, match="9 tokens exceeds the context of 8"):
        decode_log_probs(model, torch.tensor([1]), state)


def test_a_state_has_one_entry_per_layer_of_its_kind():
    """Four layers with period 3: lightning, lightning, softmax, lightning."""
    state = State(CONFIGS["hybrid dense"], 5, capacity=32)
    assert [layer.shape for layer in state.lightning] == [(5, 4, 8, 8)] * 3
    assert [row.shape for row in (*state.keys, *state.values)] == [(5, 2, 32, 8)] * 2


def test_a_float64_state_is_float64_throughout():
    state = State(HYBRID, 1, dtype=torch.float64)
    assert {x.dtype for x in (*state.lightning, *state.keys, *state.values)} == {torch.float64}

"""The blocked lightning operation against its recurrence: values, gradients, states, cuts, precision."""

import itertools

import numpy as np
import pytest
import torch

import whorl.kernels.lightning as kernel
from tests.kernels import recurrence
from tests.kernels.recurrence import relative
from whorl.kernels.lightning import lightning, lightning_decode, slopes
from whorl.model.layout import Layout

LENGTHS = (1, 63, 64, 65, 255, 256, 257, 1000)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def make_inputs(S, H, T, K=8, dtype=torch.float32, seed=0):
    """q, k, v, incoming state, gradient of the outputs, gradient of the final state."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(S, H, T, K)] * 3 + [(S, H, K, K), (S, H, T, K), (S, H, K, K)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_final(*inputs: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """`lightning` where the final state is wanted."""
    q, k, v, slope_H = inputs
    out, final = lightning(q, k, v, slope_H, **options)
    assert final is not None
    return out, final


def real_tokens(length_S, T):
    """1 where a row of `[S, H, T, K]` has a token, 0 in its padding."""
    return (torch.arange(T) < length_S[:, None])[:, None, :, None]


def errors(inputs, slope_H, *, lengths=None, block=64, oracle_slope_H=None):
    """Relative error of every output and gradient of `lightning` against the recurrence."""
    q, k, v, state, grad_out, grad_final = inputs
    T = q.shape[2]
    length_S = None if lengths is None else torch.tensor(lengths)
    if length_S is not None:
        grad_out = grad_out * real_tokens(length_S, T)
    q, k, v, state = leaves = [x.clone().requires_grad_() for x in (q, k, v, state)]
    out, final = with_final(q, k, v, slope_H, state=state, length_S=length_S, block=block)
    grads = torch.autograd.grad([out, final], leaves, [grad_out, grad_final])
    found = {"out": out.detach(), "final": final}
    found |= dict(zip(("dq", "dk", "dv", "dstate"), grads, strict=True))
    if length_S is not None:
        found["out"] = found["out"] * real_tokens(length_S, T)
    oracle_slope_H = slope_H if oracle_slope_H is None else oracle_slope_H
    lengths = lengths or [T] * len(q)
    expected = recurrence.rows(q, k, v, oracle_slope_H, state, grad_out, grad_final, lengths)
    return {name: relative(found[name], expected[name]) for name in expected}


def assert_close(inputs, slope_H, **options):
    worst = errors(inputs, slope_H, **options)
    tolerance = TOLERANCE[inputs[0].dtype]
    assert max(worst.values()) <= tolerance, worst


def test_two_tokens_by_hand():
    """One head of one channel with exp(-slope) = 1/2: S = 1*2 = 2, o = 3*2; S = 2/2 + 4*5 = 21, o = 6*21."""
    q, k, v = (torch.tensor(x).view(1, 1, 2, 1) for x in ([3.0, 6.0], [1.0, 4.0], [2.0, 5.0]))
    half = torch.tensor([np.log(2.0)], dtype=torch.float32)
    out, final = with_final(q, k, v, half)
    torch.testing.assert_close(out.flatten(), torch.tensor([6.0, 126.0]))
    torch.testing.assert_close(final.flatten(), torch.tensor([21.0]))


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_states_and_gradients_equal_the_recurrence(T, dtype):
    assert_close(make_inputs(2, 4, T, dtype=dtype), slopes(4, 3, 8))


@pytest.mark.parametrize("block", [16, 64, 128, 256])
@pytest.mark.parametrize("T", [65, 257, 1000])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_block_size_does_not_matter(block, T, dtype):
    assert_close(make_inputs(1, 4, T, dtype=dtype), slopes(4, 0, 8), block=block)


@pytest.mark.parametrize(
    ("num_heads", "layer", "num_layers"), [(4, 6, 8), (6, 0, 2), (12, 3, 8), (64, 78, 80)]
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_number_of_heads_and_depth(num_heads, layer, num_layers, dtype):
    assert_close(make_inputs(1, num_heads, 300, dtype=dtype), slopes(num_heads, layer, num_layers))


@pytest.mark.parametrize("lengths", [[257, 1, 64, 130], [63, 257, 192, 256], [60, 1, 31, 64]])
@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ragged_rows_end_where_they_end(lengths, block, dtype):
    """What stands in the padding is noise here, so a row that reads past its end is seen."""
    assert_close(make_inputs(4, 6, max(lengths), dtype=dtype), slopes(6, 2, 4), lengths=lengths, block=block)


@pytest.mark.parametrize("T", [64, 65])
def test_padding_receives_no_gradient(T):
    q, k, v, *_, grad_out, grad_final = make_inputs(2, 4, T)
    grad_out[1, :, 20:] = 0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, final = with_final(*leaves, slopes(4, 0, 2), length_S=torch.tensor([T, 20]))
    for grad in torch.autograd.grad([out, final], leaves, [grad_out, grad_final]):
        assert grad[1, :, :20].abs().sum() > 0
        assert grad[1, :, 20:].abs().sum() == 0


@pytest.mark.parametrize("want_state", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("T", [2, 5])
def test_gradcheck(want_state, with_state, T):
    """Finite differences, with ragged rows, with and without the states; T = 2 is a single block."""
    *inputs, _, _ = make_inputs(2, 2, T, K=3, dtype=torch.float64)
    length_S, slope_H = torch.tensor([T, T - 1]), slopes(2, 0, 3)
    real = real_tokens(length_S, T)

    def run(q, k, v, state):
        given = state if with_state else None
        out, final = lightning(
            q, k, v, slope_H, state=given, length_S=length_S, block=2, want_state=want_state
        )
        return (out * real,) if final is None else (out * real, final)

    for x in inputs:
        x.requires_grad_()
    if not with_state:
        inputs[3].requires_grad_(False)
    torch.autograd.gradcheck(run, inputs)


def test_a_state_is_not_changed_by_the_call_it_enters():
    q, k, v, state, *_ = make_inputs(1, 4, 100)
    before = state.clone()
    lightning(q, k, v, slopes(4, 0, 2), state=state)
    assert torch.equal(state, before)


def test_no_state_is_a_state_of_zeros():
    q, k, v, state, *_ = make_inputs(1, 4, 200)
    with_zeros, _ = lightning(q, k, v, slopes(4, 0, 2), state=torch.zeros_like(state))
    without, final = lightning(q, k, v, slopes(4, 0, 2), want_state=False)
    assert final is None
    torch.testing.assert_close(without, with_zeros, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_chunked_prefill_and_decode_equal_one_shot(dtype):
    q, k, v, start, *_ = make_inputs(2, 4, 437, dtype=dtype)
    slope_H = slopes(4, 6, 8)
    whole, last = with_final(q, k, v, slope_H, state=start)
    state, pieces = start, []
    for chunk in zip(*(x.split([1, 63, 100, 256, 17], dim=2) for x in (q, k, v)), strict=True):
        out, state = with_final(*chunk, slope_H, state=state)
        pieces.append(out)
    assert relative(torch.cat(pieces, dim=2), whole.double().numpy()) <= TOLERANCE[dtype]
    assert relative(state, last.double().numpy()) <= TOLERANCE[dtype]
    state = start.clone()
    pieces = [lightning_decode(q[:, :, t], k[:, :, t], v[:, :, t], slope_H, state) for t in range(437)]
    assert relative(torch.stack(pieces, dim=2), whole.double().numpy()) <= TOLERANCE[dtype]
    assert relative(state, last.double().numpy()) <= TOLERANCE[dtype]


def test_the_gradient_passes_through_the_cuts_of_chunks():
    q, k, v, start, grad_out, grad_final = make_inputs(2, 4, 150, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, start)]
    slope_H = slopes(4, 6, 8)
    out, final = with_final(q, k, v, slope_H, state=start)
    whole = torch.autograd.grad([out, final], leaves, [grad_out, grad_final])
    state, pieces = start, []
    for chunk in zip(*(x.split([70, 1, 79], dim=2) for x in leaves[:3]), strict=True):
        out, state = with_final(*chunk, slope_H, state=state)
        pieces.append(out)
    cut = torch.autograd.grad([torch.cat(pieces, dim=2), state], leaves, [grad_out, grad_final])
    for found, expected in zip(cut, whole, strict=True):
        assert relative(found, expected.numpy()) <= 1e-12


def test_packed_rows_equal_separate_ones():
    lengths = [130, 1, 64, 257]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])
    layout, slope_H = Layout(cu_seqlens), slopes(4, 3, 8)
    q, k, v, *_ = make_inputs(1, 4, sum(lengths), dtype=torch.float64)
    padded = (layout.pad(x[0].transpose(0, 1)).transpose(1, 2) for x in (q, k, v))
    rows, final = with_final(*padded, slope_H, length_S=layout.length_S)
    out = layout.unpad(rows.transpose(1, 2)).transpose(0, 1)
    for s, (a, b) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        alone, state = with_final(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], slope_H)
        assert relative(out[:, a:b], alone[0].numpy()) <= 1e-12
        assert relative(final[s], state[0].numpy()) <= 1e-12


def bfloat(x):
    """float64 values rounded to bf16."""
    return x.to(torch.bfloat16).double()


def test_bf16_inputs_cost_only_their_own_rounding():
    """The error of the operation is that of rounding its inputs and outputs, and the state stays fp32."""
    q, k, v, start, grad_out, grad_final = make_inputs(2, 8, 1000, dtype=torch.float64)
    slope_H, lengths = slopes(8, 6, 8), [1000, 1000]
    exact = recurrence.rows(q, k, v, slope_H, start, grad_out, grad_final, lengths)
    rounded = recurrence.rows(
        bfloat(q), bfloat(k), bfloat(v), slope_H, start, bfloat(grad_out), grad_final, lengths
    )
    leaves = [x.to(torch.bfloat16).requires_grad_() for x in (q, k, v)]
    leaves.append(start.float().requires_grad_())
    out, final = with_final(*leaves[:3], slope_H, state=leaves[3])
    assert out.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert relative(final, rounded["final"]) <= 1e-5
    grads = torch.autograd.grad([out, final], leaves, [grad_out.to(torch.bfloat16), grad_final.float()])
    for name, found in zip(("out", "dq", "dk", "dv"), (out, *grads[:3]), strict=True):
        allowed = relative(bfloat(torch.tensor(rounded[name])), exact[name])
        assert 1e-4 < allowed < 0.05, "the comparison needs a rounding that shows"
        assert relative(found, exact[name]) <= 1.2 * allowed, name
    assert relative(grads[3], rounded["dstate"]) <= 1e-5


def test_bf16_decode_keeps_its_state_in_fp32():
    q, k, v, start, *_ = make_inputs(1, 8, 300, dtype=torch.float64)
    slope_H, state = slopes(8, 6, 8), start.float()
    rounded = (bfloat(x)[0].numpy() for x in (q, k, v))
    expected, states = recurrence.forward(*rounded, slope=slope_H.double().numpy(), start=start[0].numpy())
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    outs = [lightning_decode(q[:, :, t], k[:, :, t], v[:, :, t], slope_H, state) for t in range(300)]
    assert relative(state[0], states[-1]) <= 1e-5
    # bf16 has 8 significant bits, so rounding to the nearest costs at most 2^-8 of a number.
    assert relative(torch.stack(outs, dim=2)[0], expected) <= 1.01 * 2**-8


def test_a_fast_decay_over_a_long_row_stays_finite():
    """exp(+slope t) would overflow fp32 past 88.7 / slope = 97 tokens; here no such number is ever formed."""
    inputs = make_inputs(1, 64, 1000, K=4)
    slope_H = slopes(64, 0, 80)
    assert 88.7 / slope_H[0] == pytest.approx(97, abs=1)
    assert_close(inputs, slope_H, block=256)


# The known bugs, put back: each must miss the tolerance of the tests above by a wide margin.


def tamper(monkeypatch, change):
    """Let `change(slope_H, within, query, key, carry)` alter the decay factors of the blocked form."""
    original = kernel._decays

    def changed(slope_H, *arguments):
        return change(slope_H, *original(slope_H, *arguments))

    monkeypatch.setattr(kernel, "_decays", changed)


def test_control_the_off_by_one_carry_shows_past_the_first_block(monkeypatch):
    """vLLM's prefill: queries see the carry once too little decayed. Exact while no carry exists."""

    def change(slope_H, within, query, key, carry):
        return within, query * torch.exp(slope_H.to(query.dtype))[:, None, None, None], key, carry

    tamper(monkeypatch, change)
    slope_H = slopes(4, 3, 8)
    short = make_inputs(2, 4, 64)
    short[3].zero_()
    assert errors(short, slope_H)["out"] <= TOLERANCE[torch.float32]
    worst = errors(make_inputs(2, 4, 257), slope_H)
    assert min(worst["out"], worst["dq"], worst["dstate"]) > 1000 * TOLERANCE[torch.float32], worst
    assert worst["final"] <= TOLERANCE[torch.float32], "this bug leaves the state exact, which hides it"


def test_control_other_slopes():
    """The series (8 / H) h (1 - layer / num_layers), as a library for linear attention has it."""
    H, layer, num_layers = 4, 3, 8
    others = 8 / H * torch.arange(H) * (1 - layer / num_layers)
    worst = errors(make_inputs(2, H, 257), others, oracle_slope_H=slopes(H, layer, num_layers))
    assert min(worst.values()) > 10_000 * TOLERANCE[torch.float32], worst


def test_control_a_decay_rounded_to_bf16(monkeypatch):
    """Layer 78 of 80: exp(-slope) of the slow heads rounds to exactly 1 in bf16, so they never forget."""
    slope_H = slopes(64, 78, 80)
    rounded = torch.exp(-slope_H).to(torch.bfloat16).float()
    assert int((rounded == 1).sum()) == 43
    slow = -torch.log(rounded)
    worst = errors(make_inputs(1, 64, 1000, K=4), slow, oracle_slope_H=slope_H)
    assert min(worst["out"], worst["final"], worst["dq"]) > 1000 * TOLERANCE[torch.float32], worst


def test_control_a_state_cut_at_each_block(monkeypatch):
    """Nothing is carried from block to block: a window, not a memory."""
    tamper(
        monkeypatch, lambda slope_H, within, query, key, carry: (within, query, key, torch.zeros_like(carry))
    )
    worst = errors(make_inputs(2, 4, 257), slopes(4, 6, 8))
    assert min(worst.values()) > 10_000 * TOLERANCE[torch.float32], worst


def test_control_a_state_kept_in_bf16():
    q, k, v, state, *_ = make_inputs(1, 8, 300)
    slope_H = slopes(8, 6, 8)
    whole, _ = lightning(q, k, v, slope_H, state=state)
    outs = []
    for t in range(300):
        outs.append(lightning_decode(q[:, :, t], k[:, :, t], v[:, :, t], slope_H, state))
        state = state.to(torch.bfloat16).float()
    assert relative(torch.stack(outs, dim=2), whole.double().numpy()) > 500 * TOLERANCE[torch.float32]


def test_control_rows_that_read_their_padding(monkeypatch):
    """Keys beyond the end of a row enter its state when the ragged lengths are forgotten."""
    original = kernel._decays
    monkeypatch.setattr(
        kernel, "_decays", lambda slope, block, length, *rest: original(slope, block, None, *rest)
    )
    worst = errors(make_inputs(2, 4, 130), slopes(4, 3, 8), lengths=[130, 70])
    assert worst["final"] > 10_000 * TOLERANCE[torch.float32], worst

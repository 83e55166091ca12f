"""The kernels of a decode step against plain PyTorch: on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels need Triton")

from whorl.kernels import attend_triton
from whorl.kernels.attend_triton import FEW, SPLIT, attend_step
from whorl.model.config import ModelConfig
from whorl.model.layout import within
from whorl.model.rotation import rotate, rotation

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LENGTHS = [0, 1, 63, SPLIT - 1, SPLIT, 2 * SPLIT + 9, 3 * SPLIT + 7, *([20 * SPLIT + 5] if ON_GPU else [])]
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]


def config(H: int, KV: int, K: int, rotary: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=8, width=16, num_layers=1, num_heads=H, head_dim=K, ffn_width=8, num_kv_heads=KV,
        softmax_period=1, rotary_dim=rotary, max_context=100_000,
    )  # fmt: skip


def make_inputs(lengths, H, KV, K, rotary, dtype):
    generator = torch.Generator().manual_seed(H * K)
    S, capacity = len(lengths), (max(lengths) // SPLIT + 1) * SPLIT

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    length_S = torch.tensor(lengths, device=DEVICE)
    cos, sin = rotation(config(H, KV, K, rotary), torch.arange(capacity, device=DEVICE), dtype)
    cache = [normal(S + 1, KV, capacity, K) for _ in range(2)]
    table = cos[:, 0].contiguous(), sin[:, 0].contiguous()
    return normal(S, H, K), normal(S, KV, K), normal(S, KV, K), table, *cache, length_S


def step(q, k, v, table, keys, values, length_S, live_S=None, window=None):
    """`attend_step`, which must leave its counters as they were."""
    arrived = torch.zeros(len(keys) * k.shape[1], dtype=torch.int32, device=DEVICE)
    out = attend_step(q, k, v, table, keys, values, length_S, live_S, window, arrived)
    assert not arrived.any()
    return out


def plain(q, k, v, table, keys, values, length_S, window):
    """As `SoftmaxAttention._decode` does it, in float64 but for what the cache holds."""
    S, H, K = q.shape
    turned = [x[length_S, None] for x in table]
    q, k = rotate(q, *turned), rotate(k, *turned)
    row = torch.arange(S, device=q.device)
    keys[row, :, length_S], values[row, :, length_S] = k, v
    seen = within(length_S, keys.shape[2], window)
    grouped = q.double().view(S, keys.shape[1], -1, K)
    scores = grouped @ keys[:S].double().transpose(-1, -2) * K**-0.5
    weight = scores.masked_fill(~seen[:, None, None, :], -torch.inf).softmax(dim=-1)
    return (weight @ values[:S].double()).view(S, H, K)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "KV", "K", "rotary"), [(14, 2, 64, 64), (4, 4, 40, 20), (2, 1, 8, 0)])
@pytest.mark.parametrize("window", [None, 1, 300])
def test_a_step_of_a_softmax_layer_equals_its_equation(H, KV, K, rotary, window, dtype):
    q, k, v, table, keys, values, length_S = make_inputs(LENGTHS, H, KV, K, rotary, dtype)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected = plain(q, k, v, table, expected_keys, expected_values, length_S, window)
    out = step(q, k, v, table, keys, values, length_S, None, window)
    assert torch.equal(values, expected_values)
    if dtype == torch.bfloat16:  # each product is rounded, so the bits are PyTorch's
        assert torch.equal(keys, expected_keys)
    assert (keys - expected_keys).abs().max() < 1e-6
    error = (out.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("window", [None, (FEW + 1) * SPLIT])
def test_more_cuts_than_are_joined_one_by_one_equal_the_equation(window):
    inputs = make_inputs([(FEW + 2) * SPLIT + 3, 5, 2 * SPLIT], 4, 2, 8, 8, torch.float32)
    expected = plain(*[x.clone() if torch.is_tensor(x) else x for x in inputs], window)
    assert (step(*inputs, None, window).double() - expected).norm() / expected.norm() < 1e-6


def test_rows_that_are_not_live_leave_the_cache_and_do_not_change_the_others():
    q, k, v, table, keys, values, length_S = make_inputs(LENGTHS, 4, 2, 16, 16, DTYPES[-1])
    again = keys.clone(), values.clone()
    before = keys[2].clone()
    live_S = torch.ones_like(length_S)
    live_S[[2, 4]] = 0
    out = step(q, k, v, table, keys, values, length_S, live_S)
    whole = step(q, k, v, table, *again, length_S)
    assert torch.equal(keys[2], before)
    assert (out[live_S == 0] == 0).all()
    assert torch.equal(out[live_S == 1], whole[live_S == 1])


def test_a_row_gets_the_same_bits_beside_any_neighbours_and_in_any_cache(monkeypatch):
    q, k, v, table, keys, values, length_S = make_inputs(LENGTHS, 4, 2, 16, 16, DTYPES[-1])
    together = step(q, k, v, table, keys, values, length_S)
    monkeypatch.setattr(attend_triton, "multiprocessors", lambda device: 0)  # then one program has all cuts
    for s in range(len(LENGTHS)):
        row = slice(s, s + 1)
        for more in (3 * SPLIT, FEW * SPLIT):  # the second has its cuts joined by a launch of its own
            wide = [F.pad(cache[row], (0, 0, 0, more)).contiguous() for cache in (keys, values)]
            longer = tuple(F.pad(x, (0, 0, 0, more)) for x in table)
            alone = step(q[row], k[row], v[row], longer, *wide, length_S[row])
            assert torch.equal(alone[0], together[s])


def test_control_a_key_beyond_the_length_that_is_read_is_seen():
    q, k, v, table, keys, values, length_S = make_inputs([100], 2, 1, 16, 16, torch.float32)
    right = plain(q, k, v, table, keys.clone(), values.clone(), length_S, None)
    wrong = step(q, k, v, table, keys, values, length_S + 1)
    assert (wrong.double() - right).norm() / right.norm() > 1e-3

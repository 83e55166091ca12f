"""The fused kernels against PyTorch's operations: on a GPU in bf16 and fp32, else in Triton's interpreter, in fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.learning.support import fp32_product, relative
from whorl.kernels.logprob import token_logprobs
from whorl.model.attention import RMSNorm
from whorl.model.experts import swiglu
from whorl.model.rotation import rotate

pytest.importorskip("triton", reason="the kernels need Triton")

from whorl.kernels import fused_triton, logprob_triton

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_gpu)]


def bound(dtype: torch.dtype) -> float:
    """Relative: fp32 sums in another order; half a step of bf16 (2^-9) where something is rounded once."""
    return 3e-6 if dtype == torch.float32 else 2**-8


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_both_agree(function, reference, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """The same outputs and gradients from a kernel in `dtype` and from the reference in float64."""
    narrow = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = function(*narrow), reference(*wide)
    grad = values(*out.shape, dtype=dtype, seed=9)
    assert relative(out.detach(), expected.detach()) < bound(dtype)
    pairs = zip(
        torch.autograd.grad(out, narrow, grad),
        torch.autograd.grad(expected, wide, grad.double()),
        strict=True,
    )
    for got, right in pairs:
        assert relative(got, right) < bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 24), (3, 2, 40), (2, 3000), (1100, 8)])
def test_the_norm_and_its_gradients_are_those_of_pytorch(shape, dtype):
    weight = values(shape[-1], dtype=dtype, seed=1)
    assert_both_agree(
        lambda x, w: fused_triton.rms_norm(x, w, 1e-5),
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-5),
        [values(*shape, dtype=dtype), weight],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (3.5, 1.0), (0.5, 2.5)])
@pytest.mark.parametrize("shape", [(5, 24), (3, 2, 40), (2, 3000), (1100, 8)])
def test_a_sum_and_its_norm_and_their_gradients_are_those_of_pytorch(shape, alpha, beta, outputs, dtype):
    def rounded(x):
        """What a tensor holds of x, with the gradient of x."""
        return x + (x.detach().to(dtype) - x.detach())

    def plain(x, branch, w):
        total = rounded(alpha * x + rounded(beta * branch))
        return total, F.rms_norm(total, w.shape, w, 1e-5)

    def chosen(made):
        """Which of the two outputs is used: the other has no gradient then."""
        return torch.cat([made[i] for i in outputs])

    inputs = [values(*shape, dtype=dtype, seed=seed) for seed in (0, 1)]
    weight = values(shape[-1], dtype=dtype, seed=2)
    if outputs == (0,):  # of which the weight has no part
        assert_both_agree(
            lambda x, b: chosen(fused_triton.add_norm(x, b, alpha, beta, weight, 1e-5)),
            lambda x, b: chosen(plain(x, b, weight.double())),
            inputs,
            dtype,
        )
        return
    assert_both_agree(
        lambda x, b, w: chosen(fused_triton.add_norm(x, b, alpha, beta, w, 1e-5)),
        lambda x, b, w: chosen(plain(x, b, w)),
        [*inputs, weight],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width", "rotary"), [(3, 8, 8), (4, 24, 12), (2, 40, 10)])
def test_heads_are_turned_as_pytorch_turns_them_and_gradients_turned_back(heads, width, rotary, dtype):
    angle = values(7, 1, rotary // 2, dtype=torch.float32, seed=2)
    angle = torch.cat([angle, angle], dim=-1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    assert_both_agree(
        lambda x: fused_triton.rotate(x, cos, sin),
        lambda x: rotate(x, cos.double(), sin.double()),
        [values(7, heads, width, dtype=dtype)],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 80), (700, 10)])
def test_swiglu_and_its_gradient_are_those_of_pytorch(shape, dtype):
    assert_both_agree(fused_triton.swiglu, swiglu, [values(*shape, dtype=dtype)], dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_in_bf16_values_are_rounded_where_pytorch_rounds_them():
    """Not only as close as bf16: the same bits, but where a norm's sum in another order tips the last one."""
    x, weight = values(300, 4, 128, dtype=torch.bfloat16), values(128, dtype=torch.bfloat16, seed=1)
    angle = values(300, 1, 64, dtype=torch.float32, seed=2).repeat(1, 1, 2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    turned = torch.cat([-x[..., 64:], x[..., :64]], dim=-1)
    assert torch.equal(fused_triton.rotate(x, cos, sin), x * cos + turned * sin)
    gate, up = x.chunk(2, dim=-1)
    assert (fused_triton.swiglu(x) != F.silu(gate) * up).float().mean() < 1e-3
    plain = F.rms_norm(x.float(), (128,), None, 1e-5).to(x.dtype) * weight
    assert (fused_triton.rms_norm(x, weight, 1e-5) != plain).float().mean() < 1e-3
    total, normed = fused_triton.add_norm(x, x.flip(0), 1.0, 1.0, weight, 1e-5)
    assert torch.equal(total, x + x.flip(0))
    assert torch.equal(normed, fused_triton.rms_norm(total, weight, 1e-5))


def test_the_fused_forms_are_what_a_bf16_model_on_a_gpu_runs(monkeypatch):
    called = []
    for module in ("attention", "rotation", "experts"):
        monkeypatch.setattr(f"whorl.model.{module}.fuses", lambda x: True)
    for name in ("rms_norm", "rotate", "swiglu"):
        monkeypatch.setattr(fused_triton, name, lambda x, *rest, name=name: called.append(name) or x)
    monkeypatch.setattr(fused_triton, "add_norm", lambda x, *rest: called.append("add_norm") or (x, x))
    x = torch.zeros(2, 1, 8, dtype=torch.bfloat16)
    RMSNorm(8, 1e-5)(x)
    RMSNorm(8, 1e-5).of_sum(x, x, 1.0, 1.0)
    rotate(x, x, x)
    swiglu(x)
    assert called == ["rms_norm", "add_norm", "rotate", "swiglu"]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(logprob_triton, "MAX_LOGITS", 256 * 12)  # several blocks, the last ragged
    monkeypatch.setattr(logprob_triton, "TILE", 128)
    if not ON_GPU:
        monkeypatch.setattr(logprob_triton, "_product", fp32_product)


@pytest.mark.parametrize("dtype", [torch.float32] if not ON_GPU else [torch.bfloat16])
@pytest.mark.parametrize("reads", ["logp", "entropy", "both"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_entropies_are_those_of_the_plain_head(temperature, reads, dtype, small_blocks):
    M, D, V = 9, 24, 700
    x, weight = values(M, D, dtype=dtype), values(V, D, dtype=dtype, seed=1)
    target = torch.randint(0, V, (M,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    target[:3] = torch.tensor([0, V - 1, 256])  # at the edges of blocks
    by = values(2, M, dtype=torch.float32, seed=3) * torch.tensor(
        [[float(reads != "entropy")], [float(reads != "logp")]], device=DEVICE
    )
    found = []
    for function, dtype_of in (
        (lambda x, w: logprob_triton.token_logprobs_bf16(x, w, target, temperature), dtype),
        (lambda x, w: token_logprobs([(x, w)], target, temperature), torch.float64),
    ):
        leaves = [y.detach().to(dtype_of).requires_grad_() for y in (x, weight)]
        logp, entropy = function(*leaves)
        wanted = {"logp": [logp], "entropy": [entropy], "both": [logp, entropy]}[reads]
        weights = {"logp": by[:1], "entropy": by[1:], "both": by}[reads]
        sum((y.double() * b.double()).sum() for y, b in zip(wanted, weights, strict=True)).backward()
        found.append((logp, entropy, *(y.grad for y in leaves)))
    got, expected = found
    # Of bf16 numbers, logits and what is read off them are in fp32 all the same.
    assert (got[0] - expected[0]).abs().max() < 5e-5 and (got[1] - expected[1]).abs().max() < 5e-5
    for gradient, right in zip(got[2:], expected[2:], strict=True):
        assert relative(gradient, right) < (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_a_bf16_head_loses_nothing_to_an_fp32_head_of_the_same_weights():
    """Logits up to 60, where a bf16 logit would be 0.125 off; and the same bits each time."""
    x, weight = 3 * values(64, 256, dtype=torch.bfloat16), values(5000, 256, dtype=torch.bfloat16, seed=1)
    target = (x.float() @ weight.float().T).argmax(dim=1)
    exact = token_logprobs([(x.double(), weight.double())], target, 1.0)[0]
    first = token_logprobs([(x, weight)], target, 1.0)[0]
    assert (first - exact).abs().max() < 1e-3
    assert torch.equal(first, token_logprobs([(x, weight)], target, 1.0)[0])

"""Log-probabilities in blocks of the vocabulary: the plain log-softmax, its entropy and both gradients."""

import subprocess
import sys

import pytest
import torch

from whorl.kernels import logprob
from whorl.kernels.logprob import token_logprobs

M, V, D, R = 17, 101, 12, 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def inputs(dtype, adapter=False, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return (
            (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        )

    pairs = [(random(M, D), random(V, D))] + ([(random(M, R), random(V, R))] if adapter else [])
    return pairs, torch.randint(V, (M,), generator=generator)


def plain(pairs, target_M, temperature):
    """The definition, through autograd."""
    logp_MV = (sum(x @ w.mT for x, w in pairs) / temperature).log_softmax(dim=-1)
    return logp_MV[torch.arange(len(target_M)), target_M], -(logp_MV.exp() * logp_MV).sum(dim=-1)


def gradients(function, pairs, target_M, temperature, weights):
    outputs = function(pairs, target_M, temperature)
    total = sum((w * y).sum() for w, y in zip(weights, outputs, strict=True) if w is not None)
    return outputs, torch.autograd.grad(total, [t for pair in pairs for t in pair])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 7, 50, 100, 101, 1000], ids=lambda width: f"blocks of {width}")
@pytest.mark.parametrize("terms", ["logp", "entropy", "both"])
def test_blocks_give_the_plain_value_and_gradient(dtype, width, terms, monkeypatch):
    monkeypatch.setattr(logprob, "MAX_LOGITS", width * M)
    pairs, target_M = inputs(dtype, adapter=True, scale=0.5)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(M, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    weights = [
        w if terms in (name, "both") else None for w, name in zip(weights, ("logp", "entropy"), strict=True)
    ]
    ours, our_grads = gradients(token_logprobs, pairs, target_M, 0.7, weights)
    exact = [(x.double().detach().requires_grad_(), w.double().detach().requires_grad_()) for x, w in pairs]
    wide = [None if w is None else w.double() for w in weights]
    theirs, their_grads = gradients(plain, exact, target_M, 0.7, wide)
    for a, b in zip((*ours, *our_grads), (*theirs, *their_grads), strict=True):
        assert (a - b).norm() <= TOLERANCE[dtype] * b.norm()


def test_two_tokens_of_equal_odds_by_hand():
    # Logits 0 and log 3 at temperature 1: probabilities 1/4 and 3/4.
    x = torch.ones(1, 1, dtype=torch.float64)
    w = torch.tensor([[0.0], [3.0]], dtype=torch.float64).log1p()[[0, 1]].clone()
    w[1] = torch.tensor(3.0, dtype=torch.float64).log()
    logp_M, entropy_M = token_logprobs([(x, w)], torch.tensor([1]), 1.0)
    quarter, three = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    assert logp_M.item() == pytest.approx(three.item())
    assert entropy_M.item() == pytest.approx(-(0.25 * quarter + 0.75 * three).item())


def test_large_logits_neither_overflow_nor_lose_the_entropy(monkeypatch):
    monkeypatch.setattr(logprob, "MAX_LOGITS", 10 * M)
    for offset in (-3e4, 3e4):
        pairs, target_M = inputs(torch.float32, scale=0.5)
        x, w = (t.detach() for t in pairs[0])
        # A constant added to all logits of a token changes neither.
        shifted = [(x, w), (torch.full((M, 1), offset), torch.ones(V, 1))]
        ours = token_logprobs(shifted, target_M, 1.0)
        theirs = plain([(x.double(), w.double())], target_M, 1.0)
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() < 2e-2  # 3e4 in fp32 is exact to 2e-3


def test_weights_in_bf16_are_multiplied_in_fp32(monkeypatch):
    monkeypatch.setattr(logprob, "MAX_LOGITS", 30 * M)
    (pair,), target_M = inputs(torch.float32)
    x, w = pair[0], pair[1].detach().bfloat16().requires_grad_()
    w.grad_dtype = torch.float32
    logp_M, _ = token_logprobs([(x, w)], target_M, 1.0)
    wide = w.detach().double().requires_grad_()
    expected, _ = plain([(x.detach().double(), wide)], target_M, 1.0)
    assert logp_M.dtype == torch.float32
    assert (logp_M - expected).abs().max() < 1e-5
    logp_M.sum().backward()
    expected.sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32
    assert (w.grad - wide.grad).norm() < 1e-6 * wide.grad.norm()


def test_what_needs_no_gradient_gets_none():
    (pair,), target_M = inputs(torch.float64)
    frozen = pair[1].detach()
    logp_M, _ = token_logprobs([(pair[0], frozen)], target_M, 1.0)
    logp_M.sum().backward()
    assert pair[0].grad is not None and frozen.grad is None
    with torch.no_grad():
        assert not token_logprobs([pair], target_M, 1.0)[0].requires_grad


@pytest.mark.parametrize("error", ["target", "entropy", "temperature"])
def test_a_wrong_gradient_would_be_seen(error, monkeypatch):
    """Negative controls: the terms of the gradient that are easy to forget, left out."""
    monkeypatch.setattr(logprob, "MAX_LOGITS", 7 * M)
    if error == "target":
        monkeypatch.setattr(logprob, "_within", lambda t, block: (torch.zeros_like(t), t < 0))
    backward = logprob._TokenLogprobs.backward

    def wrong(ctx, *grads):
        if error == "temperature":
            ctx.temperature = 1.0
        return backward(ctx, grads[0], None if error == "entropy" else grads[1])

    monkeypatch.setattr(logprob._TokenLogprobs, "backward", staticmethod(wrong))
    pairs, target_M = inputs(torch.float64)
    weights = [torch.ones(M, dtype=torch.float64)] * 2
    _, ours = gradients(token_logprobs, pairs, target_M, 0.7, weights)
    _, theirs = gradients(plain, pairs, target_M, 0.7, weights)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)) > 1e-2


PEAK = """
import resource, torch
from whorl.kernels.logprob import token_logprobs
torch.set_num_threads(1)
M, V, D = 1024, 151_936, 16
x, w = torch.randn(M, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
target = torch.randint(V, (M,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
logp, entropy = token_logprobs([(x, w)], target, 1.0)
(logp + entropy).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_the_logits_of_a_large_vocabulary_are_never_held():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    # All logits would be 594 MiB, and their gradient as many again. Three blocks are 192.
    assert float(done.stdout) < 320

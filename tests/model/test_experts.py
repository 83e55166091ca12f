"""Mixture of experts: the grouped product against a loop, and the load-balance loss against Switch's."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.model.shapes import CONFIGS
from whorl.model.config import ModelConfig
from whorl.model.experts import DenseFeedForward, Experts, Routing, load_balance_loss, num_rerouted

MOE = CONFIGS["hybrid moe"]


def make_experts(num_experts=4, k=2, dtype=torch.float64, seed=0):
    config = replace(MOE, num_experts=num_experts, experts_per_token=k)
    experts, generator = Experts(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return experts.to(dtype), torch.randn(19, config.width, generator=generator).to(dtype)


def by_loop(experts, x):
    """Every expert applied to every token, weighted by its share of the top k, one expert at a time."""
    probs = torch.softmax(x @ experts.gate.weight.T, dim=-1)
    kept = torch.zeros_like(probs, dtype=torch.bool).scatter(
        1, probs.argsort(descending=True)[:, : experts.k], True
    )
    share = torch.where(kept, probs, 0.0)
    share = share / share.sum(dim=-1, keepdim=True)
    out = torch.zeros_like(x)
    for e in range(experts.num_experts):
        gate, up = (experts.gate_up[e] @ x.T).T.chunk(2, dim=-1)
        out = out + share[:, e : e + 1] * ((F.silu(gate) * up) @ experts.down[e].T)
    return out


@pytest.mark.parametrize(("num_experts", "k"), [(4, 2), (5, 3), (3, 1), (2, 2), (1, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_grouped_experts_equal_a_loop(num_experts, k, dtype, tolerance):
    experts, x = make_experts(num_experts, k, dtype)
    x.requires_grad_()
    out, routing = experts(x)
    expected = by_loop(experts, x)
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()
    assert routing.chosen.shape == (19, k)
    torch.testing.assert_close(routing.probs_NE.sum(dim=-1), torch.ones(19, dtype=dtype))
    leaves = [x, *experts.parameters()]
    weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
    found = torch.autograd.grad((out * weight).sum(), leaves)
    reference = torch.autograd.grad((expected * weight).sum(), leaves)
    for a, b in zip(found, reference, strict=True):
        # One expert, or all of them chosen alone, leaves the gate without a gradient: compare to its noise.
        assert (a - b).abs().max() <= tolerance * max(b.abs().max().item(), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_experts_without_tokens_get_a_gradient_of_zero(num_tokens, dtype):
    """All tokens alike, so two of five experts do all the work."""
    experts, x = make_experts(5, 2, dtype)
    out, routing = experts(x[:1].expand(num_tokens, -1))
    busy = set(routing.chosen.flatten().tolist())
    assert len(busy) == 2
    out.float().square().sum().backward()
    for weight in (experts.gate_up, experts.down):
        assert weight.grad is not None
        for e, grad in enumerate(weight.grad):
            assert torch.isfinite(grad).all()
            assert bool(grad.abs().sum() > 0) == (e in busy)


def test_float32_and_float64_paths_agree():
    experts, x = make_experts(4, 2, torch.float64)
    wide, _ = experts(x)
    narrow, _ = experts.float()(x.float())
    assert (narrow - wide).abs().max() <= 1e-5 * wide.abs().max()


def test_top_k_weights_are_the_softmax_over_the_chosen_logits():
    """With experts that return a constant each, the output is the mixture itself: MiniMax-01's Eq. 1-2."""
    experts, x = make_experts(4, 2)
    logits = x @ experts.gate.weight.T
    top, chosen = logits.topk(2, dim=-1)
    probs = experts(x)[1].probs_NE.gather(1, chosen)
    torch.testing.assert_close(probs / probs.sum(-1, keepdim=True), top.softmax(-1), rtol=1e-12, atol=0)


def test_the_router_decides_in_fp32_for_a_bf16_model():
    """Two logits 2^-10 apart near 1: equal in bf16 (8 bits), so only an fp32 router puts expert 1 first."""
    experts, _ = make_experts(2, 1, torch.bfloat16)
    x = torch.zeros(1, MOE.width, dtype=torch.bfloat16)
    x[0, :2] = torch.tensor([1.0, 2.0**-10])
    with torch.no_grad():
        experts.gate.weight.zero_()
        experts.gate.weight[:, 0] = 1.0
        experts.gate.weight[1, 1] = 1.0
    assert (x @ experts.gate.weight.T).unique().numel() == 1
    _, routing = experts(x)
    assert routing.probs_NE.dtype == torch.float32
    assert routing.chosen.tolist() == [[1]]


def test_dense_feed_forward_by_hand():
    """width 1, ffn 1: w2 silu(w1 x) w3 x = 5 * silu(2*1) * 3*1 = 5 * 2/(1 + e^-2) * 3."""
    layer = DenseFeedForward(replace(CONFIGS["hybrid dense"], width=1, ffn_width=1))
    with torch.no_grad():
        layer.gate_up.weight.copy_(torch.tensor([[2.0], [3.0]]))
        layer.down.weight.fill_(5.0)
    out, routing = layer(torch.ones(1, 1))
    assert routing is None
    assert out.item() == pytest.approx(30 / (1 + 2.718281828459045**-2), rel=1e-6)


def routing_of(probs):
    probs = torch.tensor(probs, dtype=torch.float64)
    return Routing(probs, probs.topk(1, dim=-1).indices)


def test_load_balance_loss_by_hand():
    """Two tokens, two experts, one layer. f = (1, 0), p = (0.8 + 0.6)/2 = 0.7: loss = 2 * 1 * 0.7 = 1.4."""
    layer = routing_of([[0.8, 0.2], [0.6, 0.4]])
    loss = load_balance_loss([layer], torch.tensor([[1.0, 0.0]]), torch.tensor([0.5, 0.5]))
    assert loss.item() == pytest.approx(1.4)


def test_load_balance_loss_is_one_when_the_load_is_even():
    layers = [routing_of([[0.75, 0.25], [0.25, 0.75]])] * 3
    loss = load_balance_loss(layers, torch.full((3, 2), 0.5), torch.tensor([0.5, 0.5]))
    assert loss.item() == pytest.approx(1.0)


@pytest.mark.parametrize("k", [1, 2])
def test_load_balance_loss_with_the_batchs_own_share_is_switchs(k):
    """E sum_e f_e P_e, f the share of choices and P the mean probability of this batch, mean over layers."""
    layers, expected = [], 0.0
    shares = []
    for seed in (0, 1, 2):
        experts, x = make_experts(4, k, seed=seed)
        _, routing = experts(x)
        layers.append(routing)
        counts = [int((routing.chosen == e).sum()) for e in range(4)]
        shares.append([count / (19 * k) for count in counts])
        mean = routing.probs_NE.mean(dim=0)
        expected += 4 * sum(f * p.item() for f, p in zip(shares[-1], mean, strict=True)) / 3
    loss = load_balance_loss(layers, torch.tensor(shares), torch.full((19,), 1 / 19))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()


def test_load_balance_loss_and_its_gradient_do_not_depend_on_the_split():
    experts, x = make_experts(4, 2)
    share = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    weight = torch.rand(19, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight = weight / weight.sum()

    def loss(a, b):
        return load_balance_loss([experts(x[a:b])[1]], share, weight[a:b])

    whole, parts = loss(0, 19), loss(0, 4) + loss(4, 5) + loss(5, 19)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    (one,), (other,) = (torch.autograd.grad(value, [experts.gate.weight]) for value in (whole, parts))
    assert (one - other).abs().max() <= 1e-12 * one.abs().max()


def test_control_a_share_of_each_split_alone_depends_on_the_split():
    """Switch's loss as usually written, f from the same tokens as p, is not a sum over tokens."""
    experts, x = make_experts(4, 2)

    def loss(a, b):
        routing = experts(x[a:b])[1]
        share = routing.chosen.flatten().bincount(minlength=4) / routing.chosen.numel()
        return load_balance_loss([routing], share[None], torch.full((b - a,), 1 / 19)).item()

    whole, parts = loss(0, 19), loss(0, 4) + loss(4, 19)
    assert abs(parts / whole - 1) > 1e9 * 1e-12


@pytest.mark.parametrize(("width", "ffn_width"), [(20, 16), (24, 12)])
def test_sizes_that_the_grouped_product_cannot_take_are_refused_early(width, ffn_width):
    with pytest.raises(ValueError, match="multiples of 8"):
        replace(MOE, width=width, ffn_width=ffn_width)
    assert isinstance(replace(MOE, width=width, ffn_width=ffn_width, num_experts=0), ModelConfig)


# Replay of a choice made before.


def forced(experts, x, choice):
    """Independent statement: g_i = exp(s_i) / sum over the forced experts of exp(s_j), token by token."""
    rows = []
    for t in range(len(x)):
        logits = torch.stack([experts.gate.weight[e] @ x[t] for e in choice[t]])
        total = torch.zeros_like(x[t])
        for share, e in zip(logits.exp() / logits.exp().sum(), choice[t], strict=True):
            gate, up = (experts.gate_up[e] @ x[t]).chunk(2)
            total = total + share * (experts.down[e] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def some_choice(num_tokens, num_experts, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(num_experts, generator=generator)[:k] for _ in range(num_tokens)])


@pytest.mark.parametrize(("num_experts", "k"), [(4, 2), (5, 3), (3, 1)])
def test_replayed_experts_are_weighted_by_the_router_as_it_is_and_every_gradient_flows(num_experts, k):
    experts, x = make_experts(num_experts, k)
    x.requires_grad_()
    choice = some_choice(len(x), num_experts, k)
    out, routing = experts(x, choice.to(torch.int8))
    assert torch.equal(routing.chosen, choice)
    expected = forced(experts, x, choice.tolist())
    assert (out - expected).abs().max() <= 1e-12
    leaves = [x, *experts.parameters()]
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    found = torch.autograd.grad((out * weight).sum(), leaves)
    reference = torch.autograd.grad((expected * weight).sum(), leaves, allow_unused=True)
    for a, b in zip(found, reference, strict=True):
        assert (a - (0 if b is None else b)).abs().max() <= 1e-11
    (router,) = (grad for leaf, grad in zip(leaves, found, strict=True) if leaf is experts.gate.weight)
    assert (router.abs().max() > 1e-3) == (k > 1)  # the router learns; a single expert always has weight 1


def test_the_gradients_of_replayed_experts_are_those_of_finite_differences():
    experts, x = make_experts(4, 2)
    choice = some_choice(3, 4, 2)

    def mixture(x, gate):
        return torch.func.functional_call(experts, {"gate.weight": gate}, (x, choice))[0]

    gate = experts.gate.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(mixture, (x[:3].clone().requires_grad_(), gate))


def test_replaying_the_own_choice_changes_no_bit():
    for dtype in (torch.float32, torch.float64):
        experts, x = make_experts(5, 3, dtype)
        out, routing = experts(x)
        again, replayed = experts(x, routing.chosen.to(torch.int8))
        assert torch.equal(out, again)
        assert torch.equal(routing.chosen, replayed.chosen)
        grads = [torch.autograd.grad(y.square().sum(), list(experts.parameters())) for y in (out, again)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_tokens_without_a_record_go_where_the_router_sends_them():
    experts, x = make_experts(4, 2)
    out, routing = experts(x)
    choice = some_choice(len(x), 4, 2)
    choice[::2] = -1
    mixed, found = experts(x, choice)
    assert torch.equal(found.chosen[::2], routing.chosen[::2])
    assert torch.equal(found.chosen[1::2], choice[1::2])
    assert (mixed[::2] - out[::2]).abs().max() <= 1e-12


def test_rerouted_tokens_are_counted_as_sets_in_any_layer_and_with_their_copies():
    """Two layers, four tokens. Token 0 agrees but for the order, 1 differs in the second layer, 2 was not read."""
    routing = [
        Routing(torch.tensor([[0.5, 0.3, 0.2]] * 4), torch.tensor([[0, 1]] * 4)),
        Routing(torch.tensor([[0.2, 0.3, 0.5]] * 4), torch.tensor([[2, 1]] * 4)),
    ]
    recorded = torch.tensor([[[1, 0], [1, 2]], [[0, 1], [2, 0]], [[-1, -1], [-1, -1]], [[0, 2], [2, 1]]])
    counts = num_rerouted(routing, recorded.to(torch.int8), torch.tensor([1, 3, 10, 1]))
    assert [int(count) for count in counts] == [3 + 1, 1 + 3 + 1]

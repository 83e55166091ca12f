"""The network against its equations; the cuts that must not matter; the mistakes that must show."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import whorl.model.attention as attention
from tests.model import plain
from tests.model.shapes import (
    CONFIGS,
    SMALL,
    decode_log_probs,
    forward_log_probs,
    layout_of,
    make_model,
    random_tokens,
    small,
    weights_of,
)
from whorl.model.state import State

LENGTHS = (70, 1, 9, 130)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}


def worst_error(name, dtype, lengths=LENGTHS, defects=()):
    """max |log p - oracle| in nats over all tokens and the whole vocabulary."""
    config = CONFIGS[name]
    model = make_model(config, dtype)
    tokens = random_tokens(config, list(lengths))
    found = forward_log_probs(model, tokens, *lengths).double().numpy()
    pieces = np.split(tokens.numpy(), np.cumsum(lengths)[:-1])
    expected = [plain.log_probs(config, weights_of(model), piece, defects) for piece in pieces]
    return np.abs(found - np.concatenate(expected)).max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_equal_the_equations(name, dtype):
    assert worst_error(name, dtype) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("defect", "name"),
    [
        ("alpha of the 80-layer model", "hybrid moe"),
        ("residual carries the raw value", "hybrid moe"),
        ("interleaved rotary", "hybrid moe"),
        ("rotary over the whole head", "hybrid moe"),
        ("query heads dealt out in turn", "hybrid moe"),
        ("key rows not head-major", "hybrid moe"),
        ("no silu on the values", "hybrid moe"),
        ("norm per head", "hybrid moe"),
        ("router the other way", "hybrid moe"),
        ("router the other way", "qwen moe, one layer dense"),
        ("interleaved rotary", "qwen"),
        ("factors of the other branches", "factors by branch"),
        ("window left out", "mistral with a window"),
        ("rope scaling left out", "llama 3"),
        ("rope scaling left out", "yarn"),
    ],
)
def test_control_a_known_mistake_is_seen(defect, name):
    assert worst_error(name, torch.float32, defects=(defect,)) > 10_000 * TOLERANCE[torch.float32]


def test_control_the_eps_of_the_inner_norm_is_seen():
    """1e-5 in place of 1e-6 matters where the outputs of the lightning heads are small, as at the start."""
    config = CONFIGS["lightning dense"]
    model = make_model(config, torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("qkv_proj.weight"):
                parameter *= 0.05
    tokens = random_tokens(config, [20])
    found = forward_log_probs(model, tokens, 20).numpy()
    right = plain.log_probs(config, weights_of(model), tokens.numpy())
    wrong = plain.log_probs(config, weights_of(model), tokens.numpy(), ("block eps in the inner norm",))
    assert np.abs(found - right).max() <= 1e-10
    assert np.abs(found - wrong).max() > 1e-3


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_sequences_equal_separate_ones(name, dtype):
    model = make_model(CONFIGS[name], dtype)
    tokens = random_tokens(CONFIGS[name], list(LENGTHS))
    together = forward_log_probs(model, tokens, *LENGTHS).split(LENGTHS)
    for row, piece in zip(together, tokens.split(LENGTHS), strict=True):
        alone = forward_log_probs(model, piece, len(piece))
        assert (row - alone).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("name", ["hybrid moe", "qwen"])
def test_gradients_of_packed_sequences_add_up_to_those_of_separate_ones(name):
    model = make_model(CONFIGS[name], torch.float64)
    tokens = random_tokens(CONFIGS[name], list(LENGTHS))

    def loss(piece, *lengths):
        return model.logits(model(piece, layout_of(*lengths)).hidden_ND).log_softmax(-1)[:, 0].sum()

    parameters = list(model.parameters())
    together = torch.autograd.grad(loss(tokens, *LENGTHS), parameters)
    separate = [torch.autograd.grad(loss(piece, len(piece)), parameters) for piece in tokens.split(LENGTHS)]
    for whole, *parts in zip(together, *separate, strict=True):
        assert (whole - sum(parts)).abs().max() <= 1e-12 * whole.abs().max()


def test_control_a_state_that_leaks_across_packed_rows_is_seen(monkeypatch):
    """Rows run one after the other through one state, as a layer that ignores the offsets does."""
    original = attention.lightning

    def leaking(q, k, v, slope_H, *, state, length_S, want_state):
        outs, state = [], None
        for s in range(len(q)):
            n = q.shape[2] if length_S is None else int(length_S[s])
            row = slice(s, s + 1), slice(None), slice(n)
            out, state = original(q[row], k[row], v[row], slope_H, state=state)
            outs.append(torch.nn.functional.pad(out, (0, 0, 0, q.shape[2] - n)))
        return torch.cat(outs), None

    monkeypatch.setattr(attention, "lightning", leaking)
    assert worst_error("hybrid moe", torch.float32, lengths=(130,)) <= TOLERANCE[torch.float32]
    assert worst_error("hybrid moe", torch.float32) > 10_000 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["hybrid moe", "softmax moe"])
def test_no_token_sees_a_later_one(name):
    config = CONFIGS[name]
    model, tokens = make_model(config), random_tokens(config, [90])
    before = forward_log_probs(model, tokens, 90)
    tokens[60] = (tokens[60] + 1) % config.vocab_size
    after = forward_log_probs(model, tokens, 90)
    assert (after[:60] - before[:60]).abs().max() <= 1e-6
    assert (after[60:] - before[60:]).abs().amax(dim=-1).min() > 1e-3


def test_activation_checkpointing_gives_the_same_gradients():
    model = make_model(CONFIGS["hybrid moe"])
    tokens = random_tokens(CONFIGS["hybrid moe"], list(LENGTHS))
    gradients = []
    for model.checkpoint_activations in (False, True):
        out = model(tokens, layout_of(*LENGTHS))
        loss = model.logits(out.hidden_ND).log_softmax(-1)[:, 0].sum() + out.routing[1].probs_NE[:, 0].sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for plainly, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plainly, recomputed)


def test_a_model_that_sampled_in_inference_mode_can_still_be_trained():
    """What a layer keeps from its first call must be fit for a backward pass."""
    config = CONFIGS["hybrid moe"]
    model, tokens = make_model(config), random_tokens(config, [9])
    with torch.inference_mode():
        state = State(config, 1)
        model(tokens, layout_of(9), state=state, slots=torch.tensor([0]))
        model.decode(tokens[:1], state)
    model(tokens, layout_of(9)).hidden_ND.sum().backward()
    assert all(parameter.grad is not None for parameter in model.layers.parameters())


def test_every_parameter_has_a_gradient():
    for name, config in CONFIGS.items():
        model = make_model(config)
        out = model(random_tokens(config, list(LENGTHS)), layout_of(*LENGTHS))
        model.logits(out.hidden_ND).log_softmax(-1)[:, 0].sum().backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, (name, parameter_name)
            assert parameter.grad.abs().sum() > 0, (name, parameter_name)


def test_initialisation_is_a_function_of_the_seed():
    config = replace(CONFIGS["qwen"], tied=False, init_std=0.05)
    one, same, other = (weights_of(make_model(config, seed=9).initialise(seed)) for seed in (3, 3, 4))
    for name, values in one.items():
        assert np.array_equal(values, same[name])
        if name.endswith("norm.weight"):
            assert (values == 1).all()
        elif name.endswith("bias"):
            assert (values == 0).all()
        else:
            assert not np.array_equal(values, other[name])
            # The sample std of n normal numbers is within 5 / sqrt(2 n) of the true one.
            assert values.std() == pytest.approx(0.05, rel=5 / np.sqrt(2 * values.size))


def test_tied_weights_are_one_tensor_and_counted_once():
    tied, untied = (make_model(replace(CONFIGS["qwen"], tied=tied)) for tied in (True, False))
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.num_parameters - tied.num_parameters == SMALL["vocab_size"] * SMALL["width"]


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_keeps_slopes_states_router_and_head_in_fp32(name):
    config = CONFIGS[name]
    model, tokens = make_model(config, torch.bfloat16), random_tokens(config, [40])
    state = State(config, 1, dtype=torch.bfloat16)
    with torch.no_grad():
        out = model(tokens, layout_of(40), state=state, slots=torch.tensor([0]))
        logits = model.logits(out.hidden_ND)
        stepped = model.decode(tokens[:1], state)
    assert out.hidden_ND.dtype == stepped.hidden_ND.dtype == torch.bfloat16
    assert all(routing.probs_NE.dtype == torch.float32 for routing in out.routing)
    assert all(layer.dtype == torch.float32 for layer in state.lightning)
    assert all(row.dtype == torch.bfloat16 for row in (*state.keys, *state.values))
    for layer, block in enumerate(model.layers):
        if isinstance(block.self_attn, attention.LightningAttention):
            slope_H = block.self_attn.slope_H(torch.device("cpu"))
            assert slope_H.dtype == torch.float32
            assert torch.equal(slope_H, attention.slopes(config.num_heads, layer, config.num_layers))
    # The head multiplies in fp32: equal to the float64 product far below bf16's rounding of 2^-8.
    wide = out.hidden_ND.double() @ model.lm_head.weight.double().T
    assert logits.dtype == torch.float32
    assert (logits - wide).abs().max() <= 1e-6 * wide.abs().max()


def test_bf16_log_probs_stay_near_fp32():
    """Rounding each activation to 8 bits moves log-probs by hundredths of a nat, early and late alike."""
    config = small(init_std=0.1)
    model = make_model(config).initialise(0)
    tokens = random_tokens(config, [200])
    exact = forward_log_probs(model, tokens, 200)
    rounded = forward_log_probs(model.to(torch.bfloat16), tokens, 200)
    difference = (exact - rounded).abs()
    assert 1e-4 < difference.mean() < 0.01
    # It does not grow along the sequence, as it would with a state that is rounded at each token.
    assert difference[150:].mean() < 1.5 * difference[:50].mean()


def test_decode_equals_forward_in_bf16_as_closely_as_bf16_allows():
    config = small(init_std=0.1)
    model = make_model(config).initialise(0).to(torch.bfloat16)
    tokens, state = random_tokens(config, [150]), State(config, 1, dtype=torch.bfloat16)
    whole = forward_log_probs(model, tokens, 150)
    stepped = torch.cat([decode_log_probs(model, tokens[t : t + 1], state) for t in range(150)])
    assert (whole - stepped).abs().mean() < 0.01

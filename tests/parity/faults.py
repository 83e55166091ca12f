"""The known faults of transformers 5.23's MiniMax, each measured against the float64 statement.

Every function returns how far theirs and ours depart from it: in nats, largest over all tokens and the whole
vocabulary, or for a state as a share of its largest entry.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.model import plain
from tests.model.shapes import weights_of
from tests.parity.families import our_logits, saved, their_logits, theirs, tokens_of
from whorl.data import cu_seqlens_of
from whorl.kernels.lightning import lightning
from whorl.model.formats.pretrained import load_pretrained
from whorl.model.layout import Layout
from whorl.model.state import State
from whorl.model.transformer import Transformer


class Departures(NamedTuple):
    theirs: float
    ours: float


def pair(folder: Path, **changes):
    model = theirs("minimax", **changes)
    return model, load_pretrained(saved(model, folder / "theirs")).model


def statement(ours: Transformer, tokens: Tensor, *defects: str) -> np.ndarray:
    return plain.log_probs(ours.config, weights_of(ours), tokens.numpy(), defects)


def apart(logits: Tensor, expected: np.ndarray) -> float:
    return float(np.abs(logits.log_softmax(-1).double().numpy() - expected).max())


def departure(model, ours: Transformer, tokens: Tensor, *defects: str) -> float:
    """Of theirs, with known mistakes put into the statement."""
    return apart(their_logits(model, tokens), statement(ours, tokens, *defects))


def rotates_all_128_dimensions_of_a_head_not_64(folder: Path) -> Departures:
    model, ours = pair(folder, head_dim=128, rotary_dim=64)
    [tokens] = tokens_of(40)
    return Departures(
        departure(model, ours, tokens), apart(our_logits(ours, tokens)[0], statement(ours, tokens))
    )


def masks_wrongly_when_several_tokens_continue_a_sequence(folder: Path) -> Departures:
    model, ours = pair(folder)
    model.set_attn_implementation("sdpa")  # with "eager" the mask does not even fit: it fails
    [tokens] = tokens_of(40)
    expected = statement(ours, tokens)[30:]
    state, slot = State(ours.config, 1), torch.tensor([0])
    with torch.no_grad():
        cache = model(input_ids=tokens[None, :30], use_cache=True).past_key_values
        places = torch.arange(30, 40)[None]
        further = model(
            input_ids=tokens[None, 30:], past_key_values=cache, position_ids=places, use_cache=True
        )
        ours(tokens[:30], Layout(cu_seqlens_of([30])), state, slot)
        hidden = ours(tokens[30:], Layout(cu_seqlens_of([10])), state, slot).hidden_ND
        return Departures(apart(further.logits[0], expected), apart(ours.logits(hidden), expected))


def lets_packed_sequences_see_each_other(folder: Path) -> Departures:
    model, ours = pair(folder)
    first, second = tokens_of(25, 15)
    places = torch.cat([torch.arange(25), torch.arange(15)])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat([first, second])[None], position_ids=places).logits[0, 25:]
    expected = statement(ours, second)
    return Departures(apart(packed, expected), apart(our_logits(ours, first, second)[1], expected))


def gives_twelve_heads_other_decays(folder: Path) -> Departures:
    model, ours = pair(folder, num_attention_heads=12, num_key_value_heads=4, head_dim=8)
    [tokens] = tokens_of(40)
    return Departures(
        departure(model, ours, tokens), apart(our_logits(ours, tokens)[0], statement(ours, tokens))
    )


def rounds_the_decay_with_the_weights(folder: Path) -> Departures:
    """Loaded in bf16: the state of a layer after 512 tokens, decayed by what each of the models holds."""
    source = saved(theirs("minimax"), folder / "theirs")
    model = type(theirs("minimax")).from_pretrained(source, dtype=torch.bfloat16)
    ours = load_pretrained(source, torch.bfloat16).model
    assert ours.embed_tokens.weight.dtype == torch.bfloat16
    layer = 2
    slope_H = ours.layers[layer].self_attn.slope_H(torch.device("cpu"))
    exact = plain.head_slopes(4, layer, 4)
    assert np.abs(slope_H.double().numpy() / exact - 1).max() <= 1e-7
    ratio = torch.exp(-model.model.layers[layer].self_attn.slope_rate)[:, 0, 0].double().numpy()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 512, 8, generator=generator).bfloat16() for _ in range(3))
    _, state = lightning(q, k, v, slope_H)
    assert state is not None
    expected, rounded = np.zeros((2, 4, 8, 8))
    for t in range(512):
        added = k[0, :, t].double().numpy()[:, :, None] * v[0, :, t].double().numpy()[:, None, :]
        expected = np.exp(-exact)[:, None, None] * expected + added
        rounded = ratio[:, None, None] * rounded + added
    size = np.abs(expected).max()
    return Departures(
        float(np.abs(rounded - expected).max() / size),
        float(np.abs(state[0].double().numpy() - expected).max() / size),
    )


FAULTS = (
    rotates_all_128_dimensions_of_a_head_not_64,
    masks_wrongly_when_several_tokens_continue_a_sequence,
    lets_packed_sequences_see_each_other,
    gives_twelve_heads_other_decays,
    rounds_the_decay_with_the_weights,
)

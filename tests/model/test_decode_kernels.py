"""A decode step of whole models through the kernels: in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from tests.model.shapes import CONFIGS, decode_log_probs, forward_log_probs, make_model, random_tokens
from whorl.model.state import State
from whorl.model.together import lie_together

ON_GPU = torch.cuda.is_available()
LENGTHS = [3, 9, 1]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_one_by_one_through_the_kernels_equal_a_full_pass(name, together, monkeypatch):
    config = CONFIGS[name]
    model, device = make_model(config), "cuda" if ON_GPU else "cpu"
    model.to(device)
    prompts, new = (
        random_tokens(config, LENGTHS).to(device),
        random_tokens(config, [3 * 4], seed=2).to(device),
    )
    state = State(config, 3, capacity=16, device=device)
    forward_log_probs(model, prompts, *LENGTHS, state=state, slots=torch.arange(3, device=device))
    if together:
        lie_together(model.projections())
    monkeypatch.setattr("whorl.model.attention.on_gpu", lambda qkv: True)
    monkeypatch.setattr("whorl.model.state.on_gpu", lambda qkv: True)
    state.resize(3, 16)  # as if it had been made there
    read = list(prompts.split(LENGTHS))
    for tokens in new.view(4, 3):
        written = decode_log_probs(model, tokens, state)
        read = [torch.cat([row, token[None]]) for row, token in zip(read, tokens, strict=True)]
        monkeypatch.undo()
        expected = [forward_log_probs(model, row, len(row))[-1] for row in read]
        monkeypatch.setattr("whorl.model.attention.on_gpu", lambda qkv: True)
        assert (written - torch.stack(expected)).abs().max() < 2e-5
    assert not state.arrived.any()
    assert state.length.tolist() == [length + 4 for length in LENGTHS]

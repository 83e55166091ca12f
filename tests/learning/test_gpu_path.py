"""What a bf16 model runs on a GPU, in Triton's interpreter and fp32: every kernel in its place in a whole update."""

import pytest
import torch

from tests.learning.support import (
    fp32_product,
    gradient_of,
    groups_with_prompts,
    relative,
    tiny_config,
    tiny_learner,
)
from whorl.algorithms.algorithm import assemble
from whorl.algorithms.catalog import CISPO
from whorl.kernels import packed

pytest.importorskip("triton", reason="the kernels need Triton")
if torch.cuda.is_available():
    pytest.skip("a GPU runs the kernels themselves: test_gpu.py", allow_module_level=True)

from whorl.kernels import fused_triton, logprob_triton, packed_triton

CONFIG = tiny_config(
    attention_layers=("softmax", "softmax"), width=16, head_dim=16, qk_norm=True, rotary_dim=8
)
GROUPS = groups_with_prompts([[1.0, 0.0]], prompt_lengths=(6,))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    called = set()

    def noted(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: called.add(name) or function(*a, **k))

    for place in (
        "kernels.packed",
        "kernels.logprob",
        "model.attention",
        "model.experts",
        "model.rotation",
        "model.transformer",
    ):
        monkeypatch.setattr(f"whorl.{place}.fuses", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(packed, "takes", lambda q: True)
    for name, tiles in (("FORWARD", (32, 16)), ("QUERIES", (32, 16)), ("KEYS", (16, 32))):
        monkeypatch.setattr(packed_triton, name, {"BM": tiles[0], "BN": tiles[1]})
    monkeypatch.setattr(logprob_triton, "_product", fp32_product)
    for module, names in (
        (fused_triton, ("rms_norm", "add_norm", "rotate", "swiglu")),
        (packed_triton, ("attend", "attend_backward")),
        (logprob_triton, ("token_logprobs_bf16",)),
    ):
        for name in names:
            noted(module, name)
    return called


def test_an_update_through_the_kernels_is_that_of_the_plain_path(as_on_a_gpu, monkeypatch):
    """With a shared prompt, and blocks that are computed again for their backward pass."""
    batch = assemble(GROUPS, CISPO)
    learner = tiny_learner(config=CONFIG, dtype=torch.float32)
    assert not learner._padded
    learner.model.checkpoint_activations = True
    learner.forward_backward(batch, CISPO.terms)
    assert as_on_a_gpu == {
        "rms_norm", "add_norm", "rotate", "swiglu", "attend", "attend_backward", "token_logprobs_bf16",
    }  # fmt: skip
    monkeypatch.undo()
    plain = tiny_learner(config=CONFIG, dtype=torch.float32)
    assert plain._padded
    plain.forward_backward(batch, CISPO.terms)
    assert relative(gradient_of(learner), gradient_of(plain)) < 1e-5

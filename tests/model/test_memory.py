"""The predicted peak of memory, against what layers save and what a process held."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.model.shapes import layout_of
from whorl.model.adapter import Lora
from whorl.model.config import ModelConfig, m1_456b
from whorl.model.memory import Workload, _saved, parts, predict_peak
from whorl.model.transformer import Block, Transformer

SHAPE = {"width": 64, "num_heads": 4, "head_dim": 24, "ffn_width": 80, "num_kv_heads": 2}
KINDS = {
    "softmax": {"softmax_period": 1},
    "pre-norm": {"softmax_period": 1, "residual": "pre"},
    "lightning": {"softmax_period": 0},
    "softmax experts": {"softmax_period": 1, "num_experts": 4},
    "lightning experts": {"softmax_period": 0, "num_experts": 4, "experts_per_token": 3},
}


def saved_by_layers(config: ModelConfig, lengths, dtype) -> int:
    """Bytes that autograd keeps for two layers of the model more than for one, parameters not counted."""
    counts = []
    for layers in (1, 3):
        model = Transformer(replace(config, num_layers=layers)).initialise(0).to(dtype)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor, parameters=parameters, kept=kept):
            place = tensor.untyped_storage().data_ptr()
            if place not in parameters:
                kept[place] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tokens = torch.zeros(sum(lengths), dtype=torch.int64)
            hidden = model(tokens, layout_of(*lengths))
        counts.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
        del hidden
    return (counts[1] - counts[0]) // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(96, 96, 96, 96), (96, 50, 70, 96)], ids=["equal", "ragged"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layer_saves_is_counted_tensor_by_tensor(kind, lengths, dtype):
    config = ModelConfig(vocab_size=32, num_layers=1, **SHAPE, **KINDS[kind])
    block = Transformer(config).layers[0]
    assert isinstance(block, Block)
    work = Workload(sum(lengths), len(lengths) * max(lengths), 0, dtype=dtype)
    predicted = dtype.itemsize * _saved(config, block, work)
    assert predicted == pytest.approx(saved_by_layers(config, lengths, dtype), rel=0.06)


DENSE = {**SHAPE, "vocab_size": 24_000, "width": 192, "num_layers": 2, "softmax_period": 1, "residual": "pre"}
HYBRID = {
    **SHAPE, "vocab_size": 300, "width": 192, "num_layers": 4, "num_heads": 4, "head_dim": 48, "ffn_width": 512,
    "softmax_period": 2, "num_experts": 8,
}  # fmt: skip
CASES = {
    "dense, reference and sampling": {
        "config": DENSE, "lengths": [96] * 16,
        "work": {"reference": True, "running": 16, "prefilled": 16, "context": 24},
    },
    "experts with adapters, recomputed": {
        "config": HYBRID, "lengths": [128] * 24, "work": {"lora": 4, "checkpoint_activations": True},
    },
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CASES)
def test_the_predicted_peak_is_within_15_percent_of_what_a_process_held(case):
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.measure_peak", json.dumps(CASES[case])],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
        # Freed memory goes back at once, so that what is held is what is alive.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    predicted, measured = json.loads(done.stdout)
    assert measured > 150
    assert predicted == pytest.approx(measured, rel=0.15)


def test_each_choice_changes_its_own_part():
    config = ModelConfig(**{**HYBRID, "vocab_size": 32_000})
    work = Workload(8192, 8192, 8000)
    plain = predict_peak(config, work)
    num_parameters = Transformer(config).num_parameters
    assert plain.weights == 4 * num_parameters and plain.optimizer == 8 * num_parameters
    assert plain.total == sum((plain.weights, plain.optimizer, plain.reference, plain.sampling, plain.step))
    bf16 = predict_peak(config, replace(work, dtype=torch.bfloat16))
    assert bf16.weights == plain.weights // 2 and bf16.optimizer == 12 * num_parameters
    assert predict_peak(config, replace(work, reference=True)).reference == plain.weights
    lora = predict_peak(config, replace(work, lora=Lora(8), reference=True))
    assert lora.optimizer < plain.optimizer / 10 and lora.reference < plain.weights / 10
    less = predict_peak(config, replace(work, checkpoint_activations=True))
    assert less.step < plain.step / 2 and less.weights == plain.weights
    assert predict_peak(config, replace(work, several_micro_batches=False)).step < plain.step
    # Each of two softmax layers copies keys and values, 2 x 2 x 48 x 4 bytes, of 1,000 tokens.
    shared = predict_peak(config, replace(work, copied_tokens=1000)).step
    assert shared - plain.step == 2 * 1000 * 2 * config.kv_heads * config.head_dim * 4
    two = predict_peak(config, replace(work, threads=2))
    assert 1.5 * plain.step < two.step < 2.5 * plain.step
    # Two lightning and two softmax layers, fp32: 4 x 48^2 state, and 2 x 2 x 48 x 256 keys and values.
    sampling = predict_peak(config, replace(work, running=10)).sampling
    assert sampling == 10 * 4 * (2 * 4 * 48**2 + 2 * 2 * 2 * 48 * 256)
    assert dict(parts(plain))["total"] == plain.total / 2**30


def test_a_model_that_fits_nowhere_can_be_planned():
    peak = predict_peak(
        m1_456b(), Workload(8192, 8192, 8192, checkpoint_activations=True, dtype=torch.bfloat16)
    )
    assert peak.weights == pytest.approx(2 * 456.1e9, rel=1e-3)
    # A bf16 weight, its gradient, master and two moments in fp32: 18 bytes a parameter, then activations.
    assert 18 * 456e9 < peak.total < 19 * 456e9

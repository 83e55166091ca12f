"""Scalar heads on any model: what they read, that they are trained, and that they are kept."""

import pytest
import torch

from tests.learning.support import random_batch, tiny_learner
from tests.model.shapes import CONFIGS, layout_of, make_model, random_tokens, small
from whorl.algorithms.algorithm import Term
from whorl.algorithms.averages import token_mean
from whorl.algorithms.critic import minus_value_error
from whorl.data import apply
from whorl.learning.checkpoint import load_head, load_model, save_model
from whorl.model.heads import ScalarHead, score_sequences


def random_head(width=24, dtype=torch.float32):
    head = ScalarHead(width, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, width, generator=torch.Generator().manual_seed(0)))
        head.bias.fill_(0.25)
    return head


def test_a_new_head_says_zero_and_a_trained_one_w_h_plus_b():
    hidden = torch.arange(6.0).view(2, 3)
    head = ScalarHead(3)
    assert head(hidden).tolist() == [0.0, 0.0]
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0, -2.0]]))
        head.bias.fill_(0.5)
    assert head(hidden).tolist() == [0 - 2 * 2 + 0.5, 3 - 2 * 5 + 0.5]
    assert head(hidden.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_sequence_is_scored_at_its_own_last_token(kind):
    model, head = make_model(CONFIGS[kind], torch.float64), random_head(dtype=torch.float64)
    lengths = (5, 1, 9)
    tokens = random_tokens(model.config, list(lengths))
    scores = score_sequences(model, head, tokens, layout_of(*lengths))
    for score, alone in zip(scores, tokens.split(lengths), strict=True):
        hidden = model(alone, layout_of(len(alone))).hidden_ND
        assert (score - hidden[-1] @ head.weight[0] - 0.25).abs().item() < 1e-10
    scores.sum().backward()
    assert head.weight.grad is not None and model.embed_tokens.weight.grad is not None


def test_a_reward_model_is_saved_and_loaded_as_it_is(tmp_path):
    model, head = make_model(small(num_experts=4)), random_head()
    save_model(tmp_path / "reward", model, head=head)
    again, its_head = load_model(tmp_path / "reward"), load_head(tmp_path / "reward")
    tokens = random_tokens(model.config, [7, 3])
    with torch.no_grad():
        expected = score_sequences(model, head, tokens, layout_of(7, 3))
        assert torch.equal(score_sequences(again, its_head, tokens, layout_of(7, 3)), expected)
    save_model(tmp_path / "plain", model)
    with pytest.raises(ValueError, match=r"plain holds no scalar head: scalar_head.safetensors is expected"):
        load_head(tmp_path / "plain")


def test_a_head_learns_a_target_for_each_token():
    learner = tiny_learner(value_head=True, dtype=torch.float32)
    batch = random_batch()
    batch = batch.with_columns(return_N=torch.where(batch["trained_N"], batch["tokens_N"] / 13.0, 0.0))
    term = Term(minus_value_error, token_mean)
    batch = batch.with_columns(**{term.weight_column: apply(token_mean, batch).float()})
    errors = []
    for _ in range(30):
        errors.append(learner.forward_backward(batch, [term])["value_error"])
        learner.optim_step()
    assert errors[-1] < errors[0] / 4

"""Small models, scripted groups of ragged multi-turn rollouts, and log-probabilities computed the slow way."""

import numpy as np
import torch
from torch import Tensor

from whorl.data import Batch, Group, Problem, Rollout, Score, role_code
from whorl.learning.learner import Learner
from whorl.learning.optimizer import OptimizerSettings
from whorl.model.config import ModelConfig
from whorl.model.layout import Layout
from whorl.model.transformer import Transformer

VOCAB = 13


def tiny_config(**changes) -> ModelConfig:
    """One lightning and one softmax layer with three experts each: every kind of part, 16 wide."""
    settings = {
        "vocab_size": VOCAB, "width": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "ffn_width": 16,
        "num_kv_heads": 1, "softmax_period": 2, "num_experts": 3, "rotary_dim": 4, "init_std": 0.3,
    }  # fmt: skip
    return ModelConfig(**{**settings, **changes})


def tiny_learner(
    *,
    dtype: torch.dtype = torch.float64,
    config: ModelConfig | None = None,
    settings: OptimizerSettings | None = None,
    **options,
) -> Learner:
    model = Transformer(config or tiny_config()).initialise(0).to(dtype)
    return Learner(model, settings or OptimizerSettings(learning_rate=1e-2), **options)


def scripted_groups(rewards: list[list[float | None]], seed: int = 0, longest: int = 12) -> list[Group]:
    """Rollouts of ragged length: prompt, turn, an environment's line (not trained), turn."""
    rng = np.random.default_rng(seed)
    groups = []
    for g, row in enumerate(rewards):
        problem = Problem(f"p{g}", f"question {g}", "answer")
        rollouts = []
        for i, reward in enumerate(row):
            spans = rng.integers(1, longest // 2 + 1, size=4)
            policy_T = np.repeat([False, True, False, True], spans)
            length = len(policy_T)
            role_T = np.where(policy_T, role_code("assistant"), role_code("user")).astype(np.int8)
            logp_T = np.where(policy_T, -rng.exponential(size=length) - 1.5, 0.0)
            rollouts.append(
                Rollout(
                    problem, g, i, rng.integers(0, VOCAB, size=length), policy_T, role_T, logp_T, logp_T,
                    np.where(policy_T, 0, -1), score=Score(reward),
                )
            )  # fmt: skip
        groups.append(Group(problem, rollouts))
    return groups


REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, None, 0.0, 0.5], [0.0, 1.0, 1.0, 1.0]]
"""A group without signal, an unjudged rollout, and three groups with signal."""


def groups_with_prompts(rewards=REWARDS, seed=0, prompt_lengths=(6, 9, 1, 14)) -> list[Group]:
    """Two turns with an environment's line between them, after one prompt for all rollouts of a group."""
    rng = np.random.default_rng(seed)
    groups = []
    for g, row in enumerate(rewards):
        problem, prompt = Problem(f"p{g}", "", "answer"), rng.integers(0, VOCAB, prompt_lengths[g])
        rollouts = []
        for i, reward in enumerate(row):
            policy_T = np.repeat([False, True, False, True], [len(prompt), *rng.integers(1, 6, size=3)])
            tokens_T = np.concatenate([prompt, rng.integers(0, VOCAB, len(policy_T) - len(prompt))])
            role_T = np.where(policy_T, role_code("assistant"), role_code("user")).astype(np.int8)
            logp_T = np.where(policy_T, -rng.exponential(size=len(policy_T)) - 1.5, 0.0)
            rollouts.append(
                Rollout(
                    problem, g, i, tokens_T, policy_T, role_T, logp_T, logp_T, np.where(policy_T, 0, -1),
                    score=Score(reward),
                )
            )  # fmt: skip
        groups.append(Group(problem, rollouts))
    return groups


def random_batch(num_sequences: int = 6, seed: int = 0, longest: int = 20) -> Batch:
    """Ragged sequences with a mask; the first token of each is never the policy's."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, size=num_sequences)
    masks = [np.concatenate([[False], rng.random(n - 1) < 0.6]) for n in lengths]
    trained_N = torch.from_numpy(np.concatenate(masks))
    tokens_N = torch.from_numpy(rng.integers(0, VOCAB, size=int(lengths.sum())))
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])
    return Batch(cu_seqlens, {"tokens_N": tokens_N, "policy_N": trained_N, "trained_N": trained_N})


def slow_logits(model: Transformer, batch: Batch) -> list[Tensor]:
    """Logits of all positions, one sequence at a time and nothing packed."""
    logits = []
    for tokens_T in batch.unpack("tokens_N"):
        layout = Layout(torch.tensor([0, len(tokens_T)]))
        logits.append(model.logits(model(tokens_T, layout).hidden_ND))
    return logits


def slow_logp(model: Transformer, batch: Batch, temperature: float) -> Tensor:
    """log_softmax over full logits, read off token by token; 0 where the policy did not write."""
    out = []
    for logits_TV, tokens_T, policy_T in zip(
        slow_logits(model, batch), batch.unpack("tokens_N"), batch.unpack("policy_N"), strict=True
    ):
        all_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
        for t, token in enumerate(tokens_T.tolist()):
            out.append(all_TV[t - 1, token] if policy_T[t] else torch.zeros((), dtype=all_TV.dtype))
    return torch.stack(out)


def gradient_of(learner: Learner) -> Tensor:
    """All gradients, flat."""
    return torch.cat([p.grad.flatten() for p in learner._parameters().values() if p.grad is not None])


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in the Euclidean norm."""
    return float((a - b).norm() / b.norm())


def fp32_product(a: Tensor, b: Tensor, out: Tensor, *, adds: bool = False) -> Tensor:
    """In place of `logprob_triton._product`, for which PyTorch has no kernel on a CPU."""
    return out.addmm_(a, b) if adds else torch.mm(a, b, out=out)

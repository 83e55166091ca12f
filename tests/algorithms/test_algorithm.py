"""From groups to a batch with every credit and weight fixed, and the loss however that batch is cut."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.algorithms.support import loss_of, scripted_groups, scripted_rollout
from whorl.algorithms.algorithm import (
    Algorithm,
    Term,
    assemble,
    batch_statistics,
    group_statistics,
    with_signal,
)
from whorl.algorithms.averages import group_token_mean, sequence_mean, token_mean
from whorl.algorithms.catalog import ALGORITHMS, CISPO, DAPO, GRPO, PPO, REINFORCE_PP
from whorl.algorithms.credit import reward_itself, zscore
from whorl.algorithms.objectives import cispo, ppo_clip, reinforce
from whorl.algorithms.penalties import (
    entropy_bonus,
    kl_in_reward,
    minus_kl_k3,
    overlong,
    truncated_importance,
)
from whorl.data import Batch, Group, apply, role_code
from whorl.reporting.glossary import check_names

REWARDS = [[1.0, 0.0, 0.0, 1.0], [1.0, None, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]]
VOCABULARY = 7


def noise(scale: float):
    """A provider: logp_old_N, or zeros, with noise that depends on the token's place alone."""

    def provide(batch: Batch) -> Tensor:
        rng = np.random.default_rng(7)
        return batch["logp_old_N"] + torch.from_numpy(rng.normal(size=batch.num_tokens) * scale).float()

    return provide


PROVIDE = {
    "logp_ref_N": noise(0.3),
    "logp_old_N": noise(0.1),
    "value_old_N": noise(0.5),
    "reward_greedy_S": lambda batch: torch.linspace(0, 1, batch.num_sequences, dtype=torch.float64),
}


class Toy:
    """A policy with one logit per token id, and a critic with one value per token id."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits_V = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()
        self.values_V = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()

    def live(self, batch: Batch) -> dict[str, Tensor]:
        logp_V = self.logits_V.log_softmax(0)
        entropy = -(logp_V.exp() * logp_V).sum()
        tokens_N = batch["tokens_N"]
        return {
            "logp_N": logp_V[tokens_N],
            "value_N": self.values_V[tokens_N],
            "entropy_N": entropy.expand(batch.num_tokens),
        }


def loss_and_gradient(algorithm: Algorithm, parts: list[Batch]) -> tuple[float, Tensor]:
    toy, total = Toy(), 0.0
    for part in parts:
        loss = loss_of(algorithm, part, toy.live(part))
        loss.backward()
        total += loss.item()
    grads = [p.grad if p.grad is not None else torch.zeros(VOCABULARY) for p in (toy.logits_V, toy.values_V)]
    return total, torch.cat(grads)


def cut(batch: Batch, seed: int = 0) -> list[Batch]:
    """Three parts of 1, 5 and the remaining sequences, in a random order."""
    order = torch.randperm(batch.num_sequences, generator=torch.Generator().manual_seed(seed)).tolist()
    return [batch.select(order[:1]), batch.select(order[1:6]), batch.select(order[6:])]


def check_cut(algorithm: Algorithm, whole: Batch, parts: list[Batch]) -> None:
    loss, grad = loss_and_gradient(algorithm, [whole])
    cut_loss, cut_grad = loss_and_gradient(algorithm, parts)
    assert cut_loss == pytest.approx(loss, rel=1e-12, abs=1e-14)
    assert ((cut_grad - grad).norm() / grad.norm()).item() < 1e-12


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(name):
    algorithm = ALGORITHMS[name]
    batch = assemble(scripted_groups(REWARDS), algorithm, PROVIDE)
    check_cut(algorithm, batch, cut(batch))


@pytest.mark.parametrize("average", [token_mean, sequence_mean, group_token_mean])
def test_weights_computed_per_micro_batch_are_caught(average):
    algorithm = replace(CISPO, average=average)
    batch = assemble(scripted_groups(REWARDS), algorithm)
    column = algorithm.terms[0].weight_column
    parts = [part.with_columns(**{column: apply(average, part) / 3}) for part in cut(batch)]
    with pytest.raises(AssertionError):
        check_cut(algorithm, batch, parts)


def test_metrics_summed_over_parts_are_those_of_the_whole_and_their_mean_over_parts_is_not():
    batch = assemble(scripted_groups(REWARDS), GRPO, PROVIDE)

    def sums(part: Batch) -> dict[str, float]:
        total = {}
        for term in GRPO.terms:
            _, metrics = apply(term.objective, part, **Toy().live(part))
            total |= {k: float(v.detach()[part["trained_N"]].sum()) for k, v in metrics.items()}
        return total

    whole, parts = sums(batch), cut(batch)
    for name, value in whole.items():
        assert sum(sums(part)[name] for part in parts) == pytest.approx(value, rel=1e-12, abs=1e-12)
    tokens = [int(part["trained_N"].sum()) for part in parts]
    of_means = sum(sums(p)["ratio_mean"] / n for p, n in zip(parts, tokens, strict=True)) / 3
    assert abs(of_means - whole["ratio_mean"] / sum(tokens)) > 1e-3


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_metric_is_in_the_glossary(name):
    algorithm = ALGORITHMS[name]
    batch = assemble(scripted_groups(REWARDS), algorithm, PROVIDE)
    for term in algorithm.terms:
        _, metrics = apply(term.objective, batch, **Toy().live(batch))
        check_names(metrics)
        assert all(column.shape == (batch.num_tokens,) for column in metrics.values())
    check_names(batch_statistics(batch))
    check_names(group_statistics(scripted_groups(REWARDS)))


def test_assemble_of_cispo_by_hand():
    groups = scripted_groups([[1.0, 0.0], [0.5, 0.5]], seed=3)
    batch = assemble(groups, CISPO)
    n = [r.num_response_tokens for g in groups for r in g.rollouts]
    # z-scores 1, -1, 0, 0 up to eps; each group shares 1/2 over its own tokens
    weights = [1 / 2 / (n[0] + n[1])] * 2 + [1 / 2 / (n[2] + n[3])] * 2
    for s, (advantage, weight) in enumerate(zip([1.0, -1.0, 0.0, 0.0], weights, strict=True)):
        prompt_a, *reply_a = batch.unpack("advantage_N")[s][1:].tolist()
        prompt_w, *reply_w = batch.unpack("weight_cispo_N")[s][1:].tolist()
        assert (prompt_a, prompt_w) == (0.0, 0.0)
        assert reply_a == pytest.approx([advantage] * n[s], abs=1e-5)
        assert reply_w == pytest.approx([weight] * n[s], rel=1e-6)


def test_unjudged_rollouts_take_no_part():
    groups = scripted_groups(REWARDS)
    batch = assemble(groups, CISPO)
    assert batch.num_sequences == 15
    judged_only = [Group(g.problem, g.judged) for g in groups]
    other = assemble(judged_only, CISPO)
    assert torch.equal(batch["advantage_N"], other["advantage_N"])
    assert torch.equal(batch["weight_cispo_N"], other["weight_cispo_N"])


def test_an_algorithm_says_which_columns_a_run_must_provide():
    assert CISPO.needs == ()
    assert GRPO.needs == ("logp_ref_N",)
    assert PPO.needs == ("value_old_N",)
    assert PPO.live == ("logp_N", "value_N")
    assert ALGORITHMS["REMAX"].needs == ("reward_greedy_S",)
    corrected = replace(CISPO, correction=partial(truncated_importance, max_weight=2.0))
    assert corrected.needs == ("logp_old_N",)
    with pytest.raises(ValueError, match="minus_kl_k3 needs the column logp_ref_N, and nothing provides it"):
        assemble(scripted_groups(REWARDS), GRPO)


def test_the_critics_target_is_advantage_plus_value():
    batch = assemble(scripted_groups(REWARDS), PPO, PROVIDE)
    trained_N = batch["trained_N"]
    expected_N = (batch["advantage_N"] + batch["value_old_N"])[trained_N]
    torch.testing.assert_close(batch["return_N"][trained_N], expected_N, rtol=0, atol=1e-6)
    # gamma = lambda = 1: the target is the reward
    rewards_N = batch["reward_S"][batch["sequence_N"]][trained_N].float()
    torch.testing.assert_close(batch["return_N"][trained_N], rewards_N, rtol=0, atol=1e-6)


def test_only_the_chosen_roles_are_trained():
    batch = assemble(scripted_groups(REWARDS), replace(CISPO, roles=("reflection",)))
    reflection_N = batch["role_N"] == role_code("reflection")
    assert torch.equal(batch["trained_N"], reflection_N)
    assert (batch["advantage_N"][~reflection_N] == 0).all()
    assert (batch["weight_cispo_N"][~reflection_N] == 0).all()
    live = {"logp_N": batch["logp_old_N"].clone().requires_grad_()}
    loss_of(CISPO, batch, live).backward()
    assert (live["logp_N"].grad[~reflection_N] == 0).all()


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_where_the_policy_wrote_nothing_every_credit_and_weight_is_0(name):
    batch = assemble(scripted_groups(REWARDS), replace(ALGORITHMS[name], roles=("retry",)), PROVIDE)
    assert not batch["trained_N"].any()
    made = [c for n, c in batch.columns.items() if n.startswith(("advantage_", "weight_", "penalty_"))]
    assert len(made) >= 3
    assert not any(column.any() for column in made)
    assert batch_statistics(batch) == {
        "shaped_reward": pytest.approx(batch["reward_S"].mean()),
        "trained_tokens": 0,
    }


def test_rewards_are_shaped_before_credit():
    groups = scripted_groups([[1.0, 1.0], [0.0, 0.0]], seed=1)
    n = [r.num_response_tokens for g in groups for r in g.rollouts]
    assert n[0] != n[1]
    shaped = replace(DAPO, shaping=(partial(overlong, max_tokens=max(n), buffer_tokens=max(n) - 1),))
    batch = assemble(groups, shaped)
    expected = [r - (k - 1) / (max(n) - 1) for r, k in zip([1, 1, 0, 0], n, strict=True)]
    assert batch["reward_S"].tolist() == pytest.approx(expected)
    assert batch["advantage_N"].abs().max() > 0.9  # equal rewards, but not equally long


def test_the_sampler_correction_multiplies_the_main_weight_alone():
    correction = partial(truncated_importance, max_weight=1.05)
    plain = assemble(scripted_groups(REWARDS), GRPO, PROVIDE)
    batch = assemble(scripted_groups(REWARDS), replace(GRPO, correction=correction), PROVIDE)
    factor_N = (batch["logp_old_N"] - batch["logp_sampler_N"]).exp().clamp(max=1.05)
    expected_N = plain["weight_ppo_clip_N"] * factor_N
    torch.testing.assert_close(batch["weight_ppo_clip_N"], expected_N, rtol=1e-6, atol=0)
    assert torch.equal(batch["weight_minus_kl_k3_N"], plain["weight_minus_kl_k3_N"])
    assert (factor_N[batch["trained_N"]] != 1).any()


def test_extra_terms_add_their_own_weighted_sums():
    algorithm = Algorithm(
        reward_itself,
        reinforce,
        token_mean,
        extras=(Term(entropy_bonus, sequence_mean, 0.5), Term(minus_kl_k3, token_mean, 0.1)),
    )
    batch = assemble(scripted_groups(REWARDS), algorithm, PROVIDE)
    live = Toy().live(batch)
    assert algorithm.live == ("logp_N", "entropy_N")
    logp, ref = live["logp_N"].detach().numpy(), batch["logp_ref_N"].double().numpy()
    main = (batch["weight_reinforce_N"] * batch["advantage_N"]).double().numpy() @ logp
    entropy = live["entropy_N"][0].item()  # constant, and the weights sum to 1
    kl = batch["weight_minus_kl_k3_N"].double().numpy() @ (np.exp(ref - logp) - 1 - (ref - logp))
    loss = loss_of(algorithm, batch, live).item()
    assert loss == pytest.approx(-main - 0.5 * entropy + 0.1 * kl, rel=1e-6)


def test_settings_that_cannot_work_are_refused_when_the_row_is_made():
    with pytest.raises(
        ValueError, match=r"ppo_clip needs a value for ratio_min; bind it: partial\(ppo_clip, "
    ):
        Algorithm(zscore, ppo_clip, token_mean)
    with pytest.raises(ValueError, match=r"coefficient of minus_kl_k3 must be above 0; got -0.04"):
        Term(minus_kl_k3, token_mean, -0.04)
    with pytest.raises(ValueError, match="zscore does not read penalty_N, so the penalty kl_in_reward"):
        replace(CISPO, penalty=partial(kl_in_reward, kl_coefficient=0.1))
    with pytest.raises(ValueError, match="each term needs an objective of its own"):
        replace(CISPO, extras=(Term(partial(cispo, ratio_max=2.0), token_mean),))
    with pytest.raises(ValueError, match="unknown role 'thinker'"):
        replace(CISPO, roles=("thinker",))


@pytest.mark.parametrize("bounds", [{"ratio_max": 0.2}, {"ratio_min": 1.2}, {"ratio_min": -0.2}])
def test_a_ratio_bound_written_as_an_offset_is_refused(bounds):
    with pytest.raises(ValueError, match=r"Bounds are absolute: a paper's 1 - 0\.2 and 1 \+ 0\.2 are 0\.8"):
        replace(CISPO, objective=partial(CISPO.objective, **bounds))


def test_the_group_size_is_checked_before_anything_is_sampled():
    with pytest.raises(ValueError, match="zscore needs at least 2 rollouts per problem; got group_size=1"):
        CISPO.check_group_size(1)
    with pytest.raises(ValueError, match="dynamic_sampling needs at least 2 rollouts"):
        replace(REINFORCE_PP, dynamic_sampling=True).check_group_size(1)
    with pytest.raises(ValueError, match="group_size must be at least 1; got 0"):
        REINFORCE_PP.check_group_size(0)
    REINFORCE_PP.check_group_size(1)
    CISPO.check_group_size(2)


def test_group_statistics_and_signal_of_five_groups():
    groups = scripted_groups([[1, 0], [1, 1], [0, 0], [None, 1], [None, None]])
    statistics = group_statistics(groups)
    assert statistics == {
        "groups_with_signal_frac": 1 / 5,
        "groups_all_right_frac": 2 / 5,
        "groups_all_wrong_frac": 1 / 5,
        "unjudged_rollouts": 3.0,
    }
    assert with_signal(groups) == groups[:1]


def test_batch_statistics_are_over_trained_tokens():
    rng = np.random.default_rng(0)
    rollouts = [scripted_rollout(0, 0, 1.0, 3, rng), scripted_rollout(0, 1, 0.0, 1, rng)]
    batch = assemble([Group(rollouts[0].problem, rollouts)], replace(CISPO, credit=reward_itself))
    statistics = batch_statistics(batch)
    # advantages 1, 1, 1, 0
    assert statistics["advantage_mean"] == 3 / 4
    assert statistics["advantage_std"] == pytest.approx((3 / 16) ** 0.5)
    assert (statistics["shaped_reward"], statistics["trained_tokens"]) == (1 / 2, 4.0)
    written = np.concatenate([rollout.logp_T[rollout.policy_T] for rollout in rollouts])
    assert len(written) == 4 and np.ptp(written) > 0
    assert statistics["perplexity"] == pytest.approx(np.prod(np.exp(written.astype(float))) ** (-1 / 4))

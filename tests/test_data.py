from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whorl.data import (
    Batch,
    Group,
    Message,
    Problem,
    Rollout,
    Score,
    apply,
    columns_read_by,
    cu_seqlens_of,
    pack,
)

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=8)


def rollout(length: int, reward: float | None = 1.0, seed: int = 0, **changes) -> Rollout:
    rng = np.random.default_rng([seed, length])
    columns = {
        "tokens_T": rng.integers(0, 50, length),
        "policy_T": np.arange(length) > 0,
        "role_T": rng.integers(0, 6, length).astype(np.int8),
        "logp_T": -rng.random(length).astype(np.float32),
        "raw_logp_T": -rng.random(length).astype(np.float32),
        "version_T": np.zeros(length, dtype=np.int32),
    }
    return Rollout(Problem("p", "?"), 0, 0, **(columns | changes), score=Score(reward))


def groups_of(lengths: list[int]) -> list[Group]:
    return [
        Group(Problem(str(i), "?"), [rollout(n, 1.0, i), rollout(n + 1, 0.0, i)])
        for i, n in enumerate(lengths)
    ]


@given(LENGTHS)
@settings(deadline=None)
def test_packing_loses_nothing_and_unpacking_gives_it_back(lengths):
    groups = groups_of(lengths)
    batch = pack(groups)
    flat = [r for group in groups for r in group.rollouts]
    for name, column in (("tokens_N", "tokens_T"), ("policy_N", "policy_T"), ("logp_sampler_N", "logp_T")):
        for tensor, one in zip(batch.unpack(name), flat, strict=True):
            assert np.array_equal(tensor.numpy(), getattr(one, column))
    assert batch["group_S"].tolist() == [i for i in range(len(groups)) for _ in range(2)]
    assert batch["reward_S"].tolist() == [1.0, 0.0] * len(groups)


@given(LENGTHS, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_selecting_sequences_commutes_with_packing(lengths, random):
    batch = pack(groups_of(lengths))
    order = list(range(batch.num_sequences))
    random.shuffle(order)
    order = order[: random.randint(1, len(order))]
    chosen = batch.select(order)
    whole = batch.unpack("tokens_N")
    assert [t.tolist() for t in chosen.unpack("tokens_N")] == [whole[i].tolist() for i in order]
    assert chosen["reward_S"].tolist() == batch["reward_S"][order].tolist()
    assert chosen.length_S.tolist() == batch.length_S[order].tolist()


@given(LENGTHS)
@settings(deadline=None)
def test_positions_and_sums_follow_the_offsets(lengths):
    batch = Batch(cu_seqlens_of(lengths), {"x_N": torch.ones(sum(lengths), dtype=torch.float64)})
    assert batch.position_N.tolist() == [i for n in lengths for i in range(n)]
    assert batch.sequence_N.tolist() == [s for s, n in enumerate(lengths) for _ in range(n)]
    assert batch.sum_per_sequence(batch["x_N"]).tolist() == lengths


def test_a_rollout_that_could_not_be_judged_leaves_its_group():
    group = Group(Problem("p", "?"), [rollout(3, 1.0), rollout(4, None), rollout(5, 0.0)])
    assert group.rewards.tolist() == [1.0, 0.0]
    assert pack([group]).length_S.tolist() == [3, 5]
    with pytest.raises(ValueError, match="no rollout could be judged"):
        pack([Group(Problem("p", "?"), [rollout(4, None)])])


def test_a_group_has_signal_exactly_if_its_judged_rewards_differ():
    def has_signal(*rewards):
        return Group(Problem("p", "?"), [rollout(3, r) for r in rewards]).has_signal

    assert has_signal(0.0, 1.0)
    assert not has_signal(1.0, 1.0)
    assert not has_signal(1.0, None)
    assert not has_signal(None, None)


def test_columns_of_the_wrong_length_or_without_a_suffix_are_refused():
    with pytest.raises(ValueError, match="3 entries; expected 4"):
        Batch(cu_seqlens_of([4]), {"x_N": torch.zeros(3)})
    with pytest.raises(ValueError, match="_N"):
        Batch(cu_seqlens_of([4]), {"x": torch.zeros(4)})
    with pytest.raises(ValueError, match="logp_T has 2 entries for 3 tokens"):
        rollout(3, logp_T=np.zeros(2, dtype=np.float32))
    with pytest.raises(KeyError, match="no column 'y_N'"):
        Batch(cu_seqlens_of([1]), {})["y_N"]


def test_a_function_is_given_the_columns_that_its_signature_names():
    def objective(logp_N, advantage_N, *, scale):
        return scale * logp_N * advantage_N

    doubled = partial(objective, scale=2.0)
    assert columns_read_by(doubled) == ("logp_N", "advantage_N")
    batch = Batch(cu_seqlens_of([2]), {"advantage_N": torch.tensor([1.0, 3.0])})
    live = torch.tensor([5.0, 7.0])
    assert apply(doubled, batch, logp_N=live).tolist() == [10.0, 42.0]
    with pytest.raises(ValueError, match="objective needs the column logp_N"):
        apply(doubled, batch)


def test_problems_with_the_same_prompt_have_the_same_content_whatever_their_ids():
    one = Problem("a", "1+1=", answer="2")
    same = Problem("b", (Message("user", "1+1="),), answer="3")
    other = Problem("a", (Message("system", "1+1="),))
    assert one.content_key == same.content_key != other.content_key
    image = np.zeros((2, 2), dtype=np.uint8)
    assert Problem("a", "1+1=", images=(image,)).content_key != one.content_key


def test_unknown_roles_and_stop_reasons_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="expected one of system, user"):
        Message("narrator", "once upon a time")
    with pytest.raises(ValueError, match="unknown stop reason 'tired'"):
        rollout(2, stop="tired")

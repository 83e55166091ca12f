"""The nouns of the laboratory, and every convention, stated once.

Conventions
    * Log-probabilities are in nats, at the sampling temperature, over the whole vocabulary: top-p and its
      kin decide what is drawn, never what is reported, so that sampler and learner speak of one number.
    * `logp[n]` belongs to `tokens[n]`: it is the log-probability of that token given all tokens before it.
    * Which tokens the policy wrote is recorded by the sampler when it draws them. It is never inferred
      from ids or text, and text is never tokenised again between turns.
    * Ratio bounds are absolute (`ratio_min`, `ratio_max`), never "1 + epsilon".
    * A standard deviation is the population's (divide by n).
    * A reward of None means "could not be judged". It is not 0: the rollout leaves its group.

Shape legend (suffixes of names, and the letters of the jaxtyping annotations)
    N packed tokens   S sequences   T tokens of one sequence   G rollouts of one problem
    V vocabulary      D width       H heads   K head dimension   E experts   B block of tokens
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Metrics = dict[str, float]

ROLES = ("system", "user", "assistant", "tool", "reflection", "retry")
"""What a turn can be. The first four are chat roles; a policy may also label a turn of its own as one
of the later ones (the chat template then renders it as "assistant"), so that a recipe can train on the
reflection and not on the retry."""

STOP_REASONS = ("stop_token", "stop_string", "max_tokens", "context", "repetition", "environment", "error")


def role_code(role: str) -> int:
    """The small integer under which `role` is stored in per-token columns."""
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; expected one of {', '.join(ROLES)}")
    return ROLES.index(role)


@dataclass(frozen=True)
class Message:
    """Something said in a conversation."""

    role: str
    text: str

    def __post_init__(self) -> None:
        role_code(self.role)


@dataclass(frozen=True)
class Problem:
    """A question with what its verifier needs to judge an answer.

    `answer` is the gold answer where there is a single one. `extra` holds whatever else the
    environment's `verify` reads. Neither is ever shown to the policy.
    """

    id: str
    prompt: str | tuple[Message, ...]
    answer: str | None = None
    source: str = ""
    images: tuple[Any, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as messages; a bare string is one user message."""
        if isinstance(self.prompt, str):
            return (Message("user", self.prompt),)
        return self.prompt

    @functools.cached_property
    def content_key(self) -> str:
        """Hash of what the policy sees. Two problems with one key are the same problem, whatever their ids."""
        digest = hashlib.sha256()
        for message in self.messages:
            digest.update(f"{message.role}\x1f{message.text}\x1e".encode())
        for image in self.images:
            digest.update(np.ascontiguousarray(image).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Score:
    """A verdict: `reward` (None: could not be judged), named `parts`, and `why` in one phrase."""

    reward: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Turn:
    """One message of a transcript with the tokens `[start, end)` of the rollout that carry it."""

    role: str
    text: str
    by_policy: bool
    start: int
    end: int
    stop: str | None = None


@dataclass
class Rollout:
    """One played episode: its tokens, who wrote each of them, and its verdict.

    All arrays have length T. `logp_T` and `raw_logp_T` are the log-probabilities under the policy version
    `version_T` at the sampling temperature and at temperature 1; both are 0, and the version is -1, where
    `policy_T` is False. `experts_T [T, L, k]`, if the sampler recorded them, says which experts each token went to
    in each layer that has some (small integers), -1 where the sampler never read it, as the last token.
    """

    problem: Problem
    group: int
    sample: int
    tokens_T: np.ndarray
    policy_T: np.ndarray
    role_T: np.ndarray
    logp_T: np.ndarray
    raw_logp_T: np.ndarray
    version_T: np.ndarray
    transcript: tuple[Turn, ...] = ()
    stop: str = "stop_token"
    score: Score | None = None
    error: str | None = None
    experts_T: np.ndarray | None = None

    def __post_init__(self) -> None:
        length = len(self.tokens_T)
        if self.experts_T is not None and len(self.experts_T) != length:
            raise ValueError(f"experts_T has {len(self.experts_T)} entries for {length} tokens")
        for name in ("policy_T", "role_T", "logp_T", "raw_logp_T", "version_T"):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {length} tokens")
        if self.stop not in STOP_REASONS:
            raise ValueError(f"unknown stop reason {self.stop!r}; expected one of {', '.join(STOP_REASONS)}")

    def __len__(self) -> int:
        return len(self.tokens_T)

    @property
    def replies(self) -> tuple[str, ...]:
        """What the policy said, turn by turn."""
        return tuple(turn.text for turn in self.transcript if turn.by_policy)

    @property
    def reply(self) -> str:
        """The policy's last turn, or the empty string if it never spoke."""
        return self.replies[-1] if self.replies else ""

    @property
    def num_response_tokens(self) -> int:
        return int(self.policy_T.sum())

    @property
    def reward(self) -> float | None:
        return None if self.score is None else self.score.reward


@dataclass
class Group:
    """The rollouts of one problem. Credit is compared within it."""

    problem: Problem
    rollouts: list[Rollout]

    @property
    def judged(self) -> list[Rollout]:
        """The rollouts with a reward; the others take no part in credit."""
        return [rollout for rollout in self.rollouts if rollout.reward is not None]

    @property
    def rewards(self) -> np.ndarray:
        """Rewards of the judged rollouts, float64."""
        return np.array([rollout.reward for rollout in self.judged], dtype=np.float64)

    @property
    def has_signal(self) -> bool:
        """Whether rewards differ, so that a group-relative advantage is not zero throughout."""
        rewards = self.rewards
        return rewards.size > 0 and bool((rewards != rewards[0]).any())


@dataclass(frozen=True)
class Batch:
    """Packed sequences: flat columns without padding, in which sequence s is `[cu_seqlens[s], cu_seqlens[s+1])`.

    Columns are tensors whose name ends in `_N` (one entry per token) or `_S` (one per sequence).
    `sequence_N`, `position_N` and `length_S` follow from `cu_seqlens` and are always there. What the
    other modules read and write:

        tokens_N int64, policy_N bool, role_N int8, version_N int32     from the rollouts
        experts_N [N, L, k]  experts the sampler chose, if it recorded them; -1 where it never read the token
        logp_sampler_N      the sampler's log-probability of the token
        logp_old_N          the same under the policy at the start of the batch (the sampler's, unless recomputed)
        logp_ref_N          under the reference policy
        reward_S            reward of each sequence
        group_S, sample_S   index of its group, and its number among the rollouts of the problem
        trained_N bool      the policy wrote the token and the algorithm trains on its role
        advantage_N         credit of each token, 0 where not trained
        value_old_N, return_N   a critic's estimate before token n is written, and its target

    A learner adds the live ones while it computes a loss: `logp_N`, `entropy_N`, `value_N` carry gradients.
    """

    cu_seqlens: Tensor
    columns: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        num_tokens, num_sequences = int(self.cu_seqlens[-1]), len(self.cu_seqlens) - 1
        for name, column in self.columns.items():
            expected = {"N": num_tokens, "S": num_sequences}.get(name.rpartition("_")[2])
            if expected is None:
                raise ValueError(f"column {name!r}: a name ends in _N (per token) or _S (per sequence)")
            if len(column) != expected:
                raise ValueError(f"column {name!r} has {len(column)} entries; expected {expected}")

    @property
    def num_tokens(self) -> int:
        return int(self.cu_seqlens[-1])

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @functools.cached_property
    def length_S(self) -> Tensor:
        return self.cu_seqlens.diff()

    @functools.cached_property
    def sequence_N(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(self.num_sequences), self.length_S)

    @functools.cached_property
    def position_N(self) -> Tensor:
        return torch.arange(self.num_tokens) - self.cu_seqlens[:-1][self.sequence_N]

    def __contains__(self, name: str) -> bool:
        return name in self.columns or name in ("length_S", "sequence_N", "position_N")

    def __getitem__(self, name: str) -> Tensor:
        if name in self.columns:
            return self.columns[name]
        if name in ("length_S", "sequence_N", "position_N"):
            return getattr(self, name)
        raise KeyError(f"the batch has no column {name!r}; it has {', '.join(sorted(self.columns))}")

    def with_columns(self, **columns: Tensor) -> "Batch":
        return replace(self, columns={**self.columns, **columns})

    def select(self, sequences: Sequence[int] | Tensor) -> "Batch":
        """The given sequences, in the given order, as a batch of their own."""
        chosen = torch.as_tensor(sequences, dtype=torch.int64)
        length = self.length_S[chosen]
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
        start_N = torch.repeat_interleave(self.cu_seqlens[:-1][chosen] - cu_seqlens[:-1], length)
        index_N = start_N + torch.arange(int(cu_seqlens[-1]))
        picked = {k: v[index_N] if k.endswith("_N") else v[chosen] for k, v in self.columns.items()}
        return Batch(cu_seqlens, picked)

    def unpack(self, name: str) -> list[Tensor]:
        """A per-token column as one tensor per sequence."""
        return list(self[name].split(self.length_S.tolist()))

    def sum_per_sequence(self, column_N: Tensor) -> Tensor:
        """Sum of a per-token column over each sequence, `[S]`, in the column's dtype."""
        return column_N.new_zeros(self.num_sequences).index_add_(0, self.sequence_N, column_N)


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    """Offsets `[S + 1]` (int64) of sequences with these lengths laid end to end."""
    return torch.tensor([0, *np.cumsum(np.asarray(lengths, dtype=np.int64))], dtype=torch.int64)


def pack(groups: Sequence[Group]) -> Batch:
    """The judged rollouts of all groups, laid end to end. `group_S` is the index in `groups`."""
    rollouts = [(index, rollout) for index, group in enumerate(groups) for rollout in group.judged]
    if not rollouts:
        raise ValueError("no rollout could be judged, so there is nothing to pack")

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.concatenate([getattr(r, name) for _, r in rollouts])).to(dtype)

    experts = [rollout.experts_T for _, rollout in rollouts if rollout.experts_T is not None]
    recorded = (
        {"experts_N": torch.from_numpy(np.concatenate(experts))} if len(experts) == len(rollouts) else {}
    )
    return Batch(
        cu_seqlens_of([len(rollout) for _, rollout in rollouts]),
        recorded
        | {
            "tokens_N": column("tokens_T", torch.int64),
            "policy_N": column("policy_T", torch.bool),
            "role_N": column("role_T", torch.int8),
            "version_N": column("version_T", torch.int32),
            "logp_sampler_N": column("logp_T", torch.float32),
            "logp_old_N": column("logp_T", torch.float32),
            "reward_S": torch.tensor([r.reward for _, r in rollouts], dtype=torch.float64),
            "group_S": torch.tensor([index for index, _ in rollouts], dtype=torch.int64),
            "sample_S": torch.tensor([r.sample for _, r in rollouts], dtype=torch.int64),
        },
    )


@functools.lru_cache(maxsize=256)
def columns_read_by(function: Callable) -> tuple[str, ...]:
    """The batch columns a pure function asks for: its parameters that end in `_N` or `_S` and have no default.

    A loss, a credit or an average names what it needs in its signature and nothing else is passed to it:
    `cispo(logp_N, logp_old_N, advantage_N, *, ratio_max)` reads three columns.
    """
    parameters = inspect.signature(function).parameters.values()
    return tuple(
        p.name
        for p in parameters
        if p.default is inspect.Parameter.empty and p.name.rpartition("_")[2] in ("N", "S") and "_" in p.name
    )


def apply(function: Callable, columns: "Batch | Mapping[str, Tensor]", **extra: Any) -> Any:
    """Call `function` with the columns its signature names; `extra` columns come first."""
    arguments = {}
    for name in columns_read_by(function):
        if name in extra:
            arguments[name] = extra[name]
        elif name in columns:
            arguments[name] = columns[name]
        else:
            label = getattr(function, "__name__", None) or getattr(function, "func", function).__name__
            raise ValueError(f"{label} needs the column {name}, which this run does not provide")
    return function(**arguments)

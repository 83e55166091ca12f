"""An algorithm is a row: who gets credit, what is maximised per token, how tokens are averaged.

    J = sum_n weight_n * objective_n  +  sum over extras of coefficient * sum_n weight'_n * objective'_n

`assemble` turns groups of rollouts into the batch in which every credit and every weight is fixed. From
there a learner needs only the rows of `Algorithm.terms`; it may cut the batch between sequences as it
likes:

    for term in algorithm.terms:
        objective_N, metrics = apply(term.objective, part, **live)
        loss = loss - term.coefficient * (part[term.weight_column] * objective_N).sum()
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from whorl.algorithms.critic import value_target
from whorl.data import Batch, Group, Metrics, apply, columns_read_by, pack, role_code

LIVE = ("logp_N", "entropy_N", "value_N")
"""Columns that a learner computes, with gradient, while it computes the loss."""

PACKED = (
    "tokens_N", "policy_N", "role_N", "version_N", "logp_sampler_N", "logp_old_N", "reward_S", "group_S",
    "sample_S", "sequence_N", "position_N", "length_S",
)  # fmt: skip
"""Columns that every packed batch has."""

ASSEMBLED = ("trained_N", "penalty_N", "advantage_N", "return_N")
"""Columns that `assemble` makes."""


def name_of(function: Callable) -> str:
    """The name of a function, also where settings are bound to it with functools.partial."""
    return name_of(function.func) if isinstance(function, partial) else function.__name__


def settings_of(function: Callable) -> dict[str, Any]:
    """The keyword-only parameters of a function with their values; `inspect.Parameter.empty` if unbound."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@dataclass(frozen=True)
class Term:
    """One sum of the loss: an objective that is maximised, its average, and its coefficient (above 0).

    What is to be made small is an objective with a minus in its name (`minus_kl_k3`).
    """

    objective: Callable
    average: Callable
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        if not self.coefficient > 0:
            raise ValueError(
                f"the coefficient of {self.name} must be above 0; got {self.coefficient}. Objectives are "
                "maximised; to switch a term off, leave it out"
            )

    @property
    def name(self) -> str:
        return name_of(self.objective)

    @property
    def weight_column(self) -> str:
        """The batch column that holds this term's weights."""
        return f"weight_{self.name}_N"


@dataclass(frozen=True)
class Algorithm:
    """What a paper proposes, as functions of batch columns whose settings are bound with functools.partial.

    credit      rewards -> advantage_N, on the global batch (`credit.py`, `critic.py`)
    objective   what is maximised per token (`objectives.py`)
    average     the weight of each token in the sum (`averages.py`)
    extras      further terms with denominators of their own: KL, entropy, value, imitation
    shaping     functions from columns to a new reward_S, applied in order before credit
    penalty     cost per token that credit subtracts from the reward (`kl_in_reward`)
    correction  factor on the main weight for a sampler that is not the learner (`truncated_importance`);
                with it, logp_old_N is computed by the learner instead of taken from the sampler
    roles       train only on turns the policy wrote in these roles; None: on all that it wrote
    dynamic_sampling    groups whose rewards are all equal are set aside and replaced by new ones
    """

    credit: Callable
    objective: Callable
    average: Callable
    extras: tuple[Term, ...] = ()
    shaping: tuple[Callable, ...] = ()
    penalty: Callable | None = None
    correction: Callable | None = None
    roles: tuple[str, ...] | None = None
    dynamic_sampling: bool = False
    summary: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for function in self.functions:
            _check_settings(function)
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"each term needs an objective of its own; got {', '.join(names)}")
        if self.penalty is not None and "penalty_N" not in columns_read_by(self.credit):
            raise ValueError(
                f"{name_of(self.credit)} does not read penalty_N, so the penalty {name_of(self.penalty)} "
                "would have no effect; use a credit that does (whitened, gae) or an extra term"
            )
        for role in self.roles or ():
            role_code(role)

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The main term, then the extras: all that a learner needs to know of an algorithm."""
        return (Term(self.objective, self.average), *self.extras)

    @property
    def functions(self) -> tuple[Callable, ...]:
        """Every function of the row."""
        optional = tuple(f for f in (self.penalty, self.correction) if f is not None)
        of_terms = tuple(f for term in self.terms for f in (term.objective, term.average))
        return (self.credit, *self.shaping, *optional, *of_terms)

    @property
    def columns(self) -> tuple[str, ...]:
        """All recorded columns that some function of the row reads, sorted."""
        read = {name for function in self.functions for name in columns_read_by(function)}
        return tuple(sorted(read - set(LIVE)))

    @property
    def live(self) -> tuple[str, ...]:
        """The live columns that the terms read: `entropy_N` and `value_N` cost something, so know if."""
        read = {name for term in self.terms for name in columns_read_by(term.objective)}
        return tuple(name for name in LIVE if name in read)

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns that have to be provided: neither in a packed batch nor made by `assemble`.

        `logp_ref_N` asks for a reference policy, `value_old_N` for a critic, `reward_greedy_S` for a greedy
        rollout of each problem; `logp_old_N` (with a correction) for the learner's own log-probabilities.
        """
        read = set(self.columns) | ({"value_old_N"} if "return_N" in self.columns else set())
        missing = read - set(PACKED) - set(ASSEMBLED)
        return tuple(sorted(missing | ({"logp_old_N"} if self.correction is not None else set())))

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that was chosen, under plain names, to be written into a run's config."""
        chosen: dict[str, Any] = {
            "credit": name_of(self.credit),
            "objective": name_of(self.objective),
            "average": name_of(self.average),
            "shaping": [name_of(function) for function in self.shaping],
            "penalty": None if self.penalty is None else name_of(self.penalty),
            "correction": None if self.correction is None else name_of(self.correction),
            "roles": None if self.roles is None else list(self.roles),
            "dynamic_sampling": self.dynamic_sampling,
        }
        for function in self.functions:
            chosen |= settings_of(function)
        return chosen | {term.name: term.coefficient for term in self.extras}

    def check_group_size(self, group_size: int) -> None:
        """Raise a ValueError if this many rollouts per problem cannot work."""
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1; got {group_size}")
        if group_size > 1:
            return
        if "group_S" in columns_read_by(self.credit):
            raise ValueError(
                f"{name_of(self.credit)} needs at least 2 rollouts per problem; got group_size=1"
            )
        if self.dynamic_sampling:
            raise ValueError("dynamic_sampling needs at least 2 rollouts per problem; got group_size=1")


def _check_settings(function: Callable) -> None:
    name, settings = name_of(function), settings_of(function)
    for setting, value in settings.items():
        if value is inspect.Parameter.empty:
            raise ValueError(f"{name} needs a value for {setting}; bind it: partial({name}, {setting}=...)")
    ratio_min, ratio_max = settings.get("ratio_min", 1.0), settings.get("ratio_max", 1.0)
    if not 0.0 <= ratio_min <= 1.0 <= ratio_max:
        # 0.2 where 1.2 is meant is the commonest way to train something else than the paper's algorithm.
        raise ValueError(
            f"{name} needs 0 <= ratio_min <= 1 <= ratio_max; got ratio_min={ratio_min} and "
            f"ratio_max={ratio_max}. Bounds are absolute: a paper's 1 - 0.2 and 1 + 0.2 are 0.8 and 1.2"
        )


def assemble(
    groups: Sequence[Group],
    algorithm: Algorithm,
    provide: Mapping[str, Callable[[Batch], Tensor]] | None = None,
) -> Batch:
    """The global batch of a step, with every advantage and weight fixed.

    Packs the judged rollouts; marks the trained tokens; asks `provide` for the columns in
    `algorithm.needs`, each a function from the batch so far to the column; shapes the rewards; then
    computes `penalty_N`, `advantage_N`, `return_N` (if a term reads it) and one weight column per term. Where
    the policy wrote nothing that is trained, all of these are 0.
    Statistics are computed in float64 and stored in the dtype of `logp_old_N`.
    """
    provide = provide or {}
    batch = pack(groups)
    batch = batch.with_columns(trained_N=_trained(batch, algorithm))
    for name in algorithm.needs:
        if name not in provide:
            raise ValueError(
                f"{', '.join(_readers(algorithm, name))} needs the column {name}, and nothing "
                f"provides it; pass provide={{{name!r}: ...}} to assemble"
            )
        batch = batch.with_columns(**{name: provide[name](batch)})
    for shape in algorithm.shaping:
        batch = batch.with_columns(reward_S=apply(shape, batch))

    dtype = batch["logp_old_N"].dtype
    if algorithm.penalty is None:
        penalty_N = torch.zeros(batch.num_tokens, dtype=torch.float64)
    else:
        penalty_N = apply(algorithm.penalty, batch)
    batch = batch.with_columns(penalty_N=penalty_N)
    batch = batch.with_columns(advantage_N=apply(algorithm.credit, batch))
    if "return_N" in algorithm.columns:
        batch = batch.with_columns(return_N=apply(value_target, batch).to(dtype))
    batch = batch.with_columns(
        advantage_N=batch["advantage_N"].to(dtype), penalty_N=batch["penalty_N"].to(dtype)
    )
    for term in algorithm.terms:
        weight_N = apply(term.average, batch)
        if algorithm.correction is not None and term is algorithm.terms[0]:
            weight_N = weight_N * apply(algorithm.correction, batch)
        batch = batch.with_columns(**{term.weight_column: weight_N.to(dtype)})
    return batch


def with_signal(groups: Sequence[Group]) -> list[Group]:
    """The groups whose rewards differ: what dynamic sampling keeps.  DAPO, arXiv:2503.14476 Sec. 3.2."""
    return [group for group in groups if group.has_signal]


def group_statistics(groups: Sequence[Group], *, highest_reward: float = 1.0) -> Metrics:
    """How the groups as sampled divide into too easy, too hard and useful, by the rewards before shaping.

    A rollout is right if it has the highest reward of its environment. A group that could not be judged
    at all is in none of the three, but counts in the denominator.
    """
    judged = [group.rewards for group in groups if group.judged]
    num_groups = max(len(groups), 1)
    return {
        "groups_with_signal_frac": len(with_signal(groups)) / num_groups,
        "groups_all_right_frac": sum(bool((r >= highest_reward).all()) for r in judged) / num_groups,
        "groups_all_wrong_frac": sum(bool((r < highest_reward).all()) for r in judged) / num_groups,
        "unjudged_rollouts": float(sum(len(group.rollouts) - len(group.judged) for group in groups)),
    }


def batch_statistics(batch: Batch) -> Metrics:
    """What credit saw and gave, of an assembled batch. Without a trained token there is no advantage to speak of."""
    advantage_M = batch["advantage_N"][batch["trained_N"]].double()
    statistics = {
        "shaped_reward": float(batch["reward_S"].mean()),
        "trained_tokens": float(len(advantage_M)),
    }
    if len(advantage_M):
        statistics["advantage_mean"] = float(advantage_M.mean())
        statistics["advantage_std"] = float(advantage_M.std(correction=0))
        statistics["perplexity"] = float((-batch["logp_sampler_N"][batch["trained_N"]].double().mean()).exp())
    return statistics


def _trained(batch: Batch, algorithm: Algorithm) -> Tensor:
    trained_N = batch["policy_N"]
    if algorithm.roles is not None:
        codes = torch.tensor([role_code(role) for role in algorithm.roles], dtype=torch.int8)
        trained_N = trained_N & torch.isin(batch["role_N"], codes)
    return trained_N


def _readers(algorithm: Algorithm, column: str) -> list[str]:
    """Names of the functions that make a column necessary."""
    names = [name_of(f) for f in algorithm.functions if column in columns_read_by(f)]
    return names or [name_of(value_target)]

"""Rollouts as rows of a Parquet table, and back without loss.

One row is one rollout. Columns of a token each (`tokens`, `policy`, `roles`, `logp`, `raw_logp`, `versions`,
`advantage`, `pieces`) are lists as long as the rollout, in the data type of the arrays they came from, so
any Parquet reader can explode them.

The rows of a step hold all that its batch is made of: `batch_group` is the group's place in the batch, and
`greedy_reward` that of the greedy rollout of the problem, where the algorithm compares with one.

Two things are kept only for reading: `images` of a problem are not stored at all (the environment makes
them again from the problem's address), and `extra` is JSON, in which a value JSON cannot hold is its `repr`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from whorl.data import Group, Message, Problem, Rollout, Score, Turn

TOKEN_COLUMNS = {
    "tokens": "tokens_T",
    "policy": "policy_T",
    "roles": "role_T",
    "logp": "logp_T",
    "raw_logp": "raw_logp_T",
    "versions": "version_T",
}
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))
TURNS = pa.list_(
    pa.struct(
        [
            ("role", pa.string()),
            ("text", pa.string()),
            ("by_policy", pa.bool_()),
            ("start", pa.int64()),
            ("end", pa.int64()),
            ("stop", pa.string()),
        ]
    )
)


@dataclass(frozen=True)
class StoredRollout:
    """A rollout as it stands in a run directory.

    `advantage_T` (one number per token) is None if the rollout took no part in the update, and
    `pieces` (the text of each token) is None if the run did not record texts. `batch_group` is the place of its
    group among those of the step (None: written by a version that did not say), and `greedy_reward` is None
    where the algorithm asked for none.
    """

    rollout: Rollout
    advantage_T: np.ndarray | None
    pieces: tuple[str, ...] | None
    batch_group: int | None = None
    greedy_reward: float | None = None


def to_table(
    groups: Sequence[Group],
    advantages: Sequence[Any] | None = None,
    token_text: Callable[[int], str] | None = None,
    greedy_rewards: Sequence[float] | None = None,
) -> pa.Table:
    """All rollouts of the groups as a table.

    `advantages` holds one array (or tensor) per judged rollout, in the order in which `whorl.data.pack`
    lays them out: what `batch.unpack("advantage_N")` returns; `greedy_rewards` one number for each of them.
    `token_text` gives the text of a token id.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    advantage_of = _match_advantages(groups, advantages)
    greedy = iter(greedy_rewards or ())
    greedy_of = [None if greedy_rewards is None or r.reward is None else next(greedy) for r in rollouts]
    columns: dict[str, pa.Array] = {
        "problem_id": _texts([r.problem.id for r in rollouts]),
        "prompt": pa.array([[_message(m) for m in r.problem.messages] for r in rollouts], MESSAGES),
        "prompt_is_text": pa.array([isinstance(r.problem.prompt, str) for r in rollouts], pa.bool_()),
        "answer": _texts([r.problem.answer for r in rollouts]),
        "source": _texts([r.problem.source for r in rollouts]),
        "extra": _texts([json.dumps(dict(r.problem.extra), default=repr) for r in rollouts]),
        "batch_group": pa.array([place for place, g in enumerate(groups) for _ in g.rollouts], pa.int64()),
        "group": pa.array([r.group for r in rollouts], pa.int64()),
        "sample": pa.array([r.sample for r in rollouts], pa.int64()),
        "transcript": pa.array([[_turn(turn) for turn in r.transcript] for r in rollouts], TURNS),
        "stop": _texts([r.stop for r in rollouts]),
        "error": _texts([r.error for r in rollouts]),
        "verified": pa.array([r.score is not None for r in rollouts], pa.bool_()),
        "reward": pa.array([r.reward for r in rollouts], pa.float64()),
        "parts": pa.array(
            [[] if r.score is None else [(k, float(v)) for k, v in r.score.parts.items()] for r in rollouts],
            pa.map_(pa.string(), pa.float64()),
        ),
        "greedy_reward": pa.array(greedy_of, pa.float64()),
        "why": _texts(["" if r.score is None else r.score.why for r in rollouts]),
    }
    for column, attribute in TOKEN_COLUMNS.items():
        columns[column] = _lists([getattr(r, attribute) for r in rollouts])
    if any(r.experts_T is not None for r in rollouts):
        experts = [r.experts_T for r in rollouts]
        shape = next(e.shape[1:] for e in experts if e is not None)
        columns["experts"] = _lists([None if e is None else e.reshape(-1) for e in experts])
        columns["experts_shape"] = pa.array([list(shape)] * len(rollouts), pa.list_(pa.int64()))
    columns["advantage"] = _lists(advantage_of)
    if token_text is not None:
        pieces = {
            token: _storable(token_text(token)) for token in {int(t) for r in rollouts for t in r.tokens_T}
        }
        columns["pieces"] = pa.array(
            [[pieces[int(t)] for t in r.tokens_T] for r in rollouts], pa.list_(pa.string())
        )
    return pa.table(columns)


def from_table(table: pa.Table) -> list[StoredRollout]:
    """The rollouts of a table that `to_table` made, in its order."""
    present = [name for name in (*TOKEN_COLUMNS, "advantage", "experts") if name in table.column_names]
    arrays = {name: _arrays(table[name]) for name in present}
    plain = {name: table[name].to_pylist() for name in table.column_names if name not in arrays}
    stored, problems = [], {}
    for row in range(table.num_rows):
        get = {name: values[row] for name, values in plain.items()}
        problem = _problem(get)
        # The rollouts of a group share one problem object again.
        problem = problems.setdefault((get.get("batch_group"), get["group"], problem.id), problem)
        rollout = Rollout(
            problem=problem,
            group=get["group"],
            sample=get["sample"],
            **{attribute: arrays[name][row] for name, attribute in TOKEN_COLUMNS.items()},
            transcript=tuple(Turn(**turn) for turn in get["transcript"]),
            stop=get["stop"],
            score=Score(get["reward"], dict(get["parts"]), get["why"]) if get["verified"] else None,
            error=get["error"],
        )
        if "experts" in arrays and (flat := arrays["experts"][row]) is not None:
            rollout.experts_T = flat.reshape(-1, *get["experts_shape"])
        pieces = tuple(get["pieces"]) if "pieces" in get else None
        place, greedy = get.get("batch_group"), get.get("greedy_reward")
        stored.append(StoredRollout(rollout, arrays["advantage"][row], pieces, place, greedy))
    return stored


def groups_of(stored: Sequence[StoredRollout]) -> list[Group]:
    """The groups of a step, as they were given to `to_table`. ValueError if the table does not say which they were."""
    if any(one.batch_group is None for one in stored):
        raise ValueError("these rollouts were recorded by a version that did not write how they were grouped")
    groups: dict[int | None, Group] = {}
    for one in stored:
        groups.setdefault(one.batch_group, Group(one.rollout.problem, [])).rollouts.append(one.rollout)
    return list(groups.values())


def _match_advantages(groups: Sequence[Group], advantages: Sequence[Any] | None) -> list[np.ndarray | None]:
    """The advantage of every rollout, None for those that were not judged."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if advantages is None:
        return [None] * len(rollouts)
    num_judged = sum(rollout.reward is not None for rollout in rollouts)
    if len(advantages) != num_judged:
        raise ValueError(
            f"got advantages for {len(advantages)} rollouts; expected one array for each of the {num_judged} "
            "judged rollouts, in the order of whorl.data.pack"
        )
    arrays = (np.asarray(advantage) for advantage in advantages)
    matched = [None if rollout.reward is None else next(arrays) for rollout in rollouts]
    for rollout, advantage in zip(rollouts, matched, strict=True):
        if advantage is not None and len(advantage) != len(rollout):
            raise ValueError(
                f"rollout {rollout.sample} of group {rollout.group} has {len(rollout)} tokens, "
                f"but its advantage has {len(advantage)} entries"
            )
    return matched


def _problem(row: Mapping[str, Any]) -> Problem:
    messages = tuple(Message(**message) for message in row["prompt"])
    prompt = messages[0].text if row["prompt_is_text"] else messages
    return Problem(row["problem_id"], prompt, row["answer"], row["source"], extra=json.loads(row["extra"]))


def _message(message: Message) -> dict[str, str]:
    return {"role": message.role, "text": _storable(message.text)}


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        "role": turn.role,
        "text": _storable(turn.text),
        "by_policy": turn.by_policy,
        "start": turn.start,
        "end": turn.end,
        "stop": turn.stop,
    }


def _storable(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot hold, replaced by a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _texts(texts: Sequence[str | None]) -> pa.Array:
    return pa.array([None if text is None else _storable(text) for text in texts], pa.string())


def _lists(arrays: Sequence[np.ndarray | None]) -> pa.Array:
    """A column of lists, one per array, in the arrays' common data type; None becomes null."""
    present = [np.asarray(array) for array in arrays if array is not None]
    values = np.concatenate(present) if present else np.zeros(0, dtype=np.float32)
    offsets = np.cumsum([0, *(0 if array is None else len(array) for array in arrays)])
    is_null = np.array([array is None for array in arrays], dtype=bool)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values), mask=pa.array(is_null))


def _arrays(column: pa.ChunkedArray) -> list[Any]:
    """The lists of a column as arrays of their own (writable), None for null."""
    return [s.values.to_numpy(zero_copy_only=False).copy() if s.is_valid else None for s in column]

"""Rollouts prepared for reading: which ones to show, and each token with its log-prob and advantage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from whorl.reporting.rollout_table import StoredRollout

SURPRISE_NATS = 4.0
"""Minus log-probability at which a token has the full shade (probability 2%)."""
HEAD_TOKENS, TAIL_TOKENS = 700, 300
"""A longer rollout is shown from both ends."""


@dataclass(frozen=True)
class Token:
    """One token: its text, what to say when pointed at, and shades in [0, 1] (credit in [-1, 1])."""

    text: str
    title: str = ""
    surprise: float = 0.0
    credit: float = 0.0


@dataclass(frozen=True)
class Part:
    """A stretch of a transcript by one author: a turn, or (role "") tokens between turns."""

    role: str
    by_policy: bool
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Sample:
    """A rollout as the report shows it."""

    label: str
    problem_id: str
    reward: float | None
    why: str
    parts_of_score: dict[str, float]
    stop: str
    error: str | None
    answer: str | None
    num_tokens: int
    advantage: float | None
    parts: tuple[Part, ...]


def choose(stored: Sequence[StoredRollout], step: int) -> list[tuple[str, StoredRollout]]:
    """Best, worst and one rollout drawn at random of a step, with their labels; none of them twice.

    The draw depends on the step alone, so a report can be made again.
    """
    judged = [s for s in stored if s.rollout.reward is not None]
    judged.sort(key=lambda s: s.rollout.reward or 0.0)
    picks = [("best", judged[-1]), ("worst", judged[0])] if judged else []
    rest = [s for s in stored if all(s is not pick for _label, pick in picks)]
    if rest:
        picks.append(("random", rest[np.random.default_rng(step).integers(len(rest))]))
    if len(judged) == 1:
        del picks[1]
    return picks


def largest_advantage(stored: Sequence[StoredRollout]) -> float:
    """The largest finite |advantage| of a token, which gets the full shade; 1 if there is none."""
    arrays = [s.advantage_T for s in stored if s.advantage_T is not None]
    values = np.abs(np.concatenate([*arrays, np.zeros(1)]))
    return float(values[np.isfinite(values)].max()) or 1.0


def prepare(label: str, stored: StoredRollout, full_shade: float) -> Sample:
    """One rollout for the template. Texts are as the model wrote them: the template makes them harmless."""
    rollout, score = stored.rollout, stored.rollout.score
    advantage_T, policy_T = stored.advantage_T, rollout.policy_T
    mean = None
    if advantage_T is not None and policy_T.any():
        mean = float(advantage_T[policy_T].mean())
    return Sample(
        label=label,
        problem_id=rollout.problem.id,
        reward=rollout.reward,
        why=score.why if score is not None else "not verified",
        parts_of_score=dict(score.parts) if score is not None else {},
        stop=rollout.stop,
        error=rollout.error,
        answer=rollout.problem.answer,
        num_tokens=rollout.num_response_tokens,
        advantage=mean,
        parts=tuple(_parts(stored, full_shade)),
    )


def _parts(stored: StoredRollout, full_shade: float) -> list[Part]:
    rollout = stored.rollout
    if stored.pieces is None:
        # Without the tokens' texts there is nothing to shade; the turns are still worth reading.
        return [Part(t.role, t.by_policy, (Token(_shorten(t.text)),)) for t in rollout.transcript]
    parts, at = [], 0
    for turn in rollout.transcript:
        if turn.start > at:
            parts.append(Part("", False, _tokens(stored, full_shade, at, turn.start)))
        parts.append(Part(turn.role, turn.by_policy, _tokens(stored, full_shade, turn.start, turn.end)))
        at = max(at, turn.end)
    if at < len(rollout):
        parts.append(Part("", False, _tokens(stored, full_shade, at, len(rollout))))
    return [part for part in parts if part.tokens]


def _tokens(stored: StoredRollout, full_shade: float, start: int, end: int) -> tuple[Token, ...]:
    """Tokens `[start, end)`, the middle left out if there are too many."""
    if end - start <= HEAD_TOKENS + TAIL_TOKENS:
        return tuple(_token(stored, n, full_shade) for n in range(start, end))
    left_out = end - start - HEAD_TOKENS - TAIL_TOKENS
    head = tuple(_token(stored, n, full_shade) for n in range(start, start + HEAD_TOKENS))
    tail = tuple(_token(stored, n, full_shade) for n in range(end - TAIL_TOKENS, end))
    return (*head, Token(f"\n[… {left_out:,} tokens left out …]\n"), *tail)


def _token(stored: StoredRollout, n: int, full_shade: float) -> Token:
    assert stored.pieces is not None
    text = stored.pieces[n]
    title = f"token {n} “{text}” (id {stored.rollout.tokens_T[n]})"
    if not stored.rollout.policy_T[n]:
        return Token(text, f"{title}: not written by the policy")
    logp = float(stored.rollout.logp_T[n])
    title += f": log-prob {logp:.3f}, probability {math.exp(min(logp, 0.0)):.1%}"
    surprise = min(1.0, max(0.0, -logp / SURPRISE_NATS)) if math.isfinite(logp) else 1.0
    if stored.advantage_T is None:
        return Token(text, f"{title}, no advantage", surprise)
    advantage = float(stored.advantage_T[n])
    credit = advantage / full_shade if math.isfinite(advantage) else 0.0
    return Token(text, f"{title}, advantage {advantage:+.3f}", surprise, credit)


def _shorten(text: str) -> str:
    head, tail = 4 * HEAD_TOKENS, 4 * TAIL_TOKENS
    if len(text) <= head + tail:
        return text
    return f"{text[:head]}\n[… {len(text) - head - tail:,} characters left out …]\n{text[-tail:]}"

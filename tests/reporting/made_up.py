"""Small made-up rollouts for the tests of this folder: one token per character."""

import numpy as np

from whorl.data import Group, Problem, Rollout, Score, Turn, role_code

TEMPLATE = 0x2588
"""The id of a token that stands between turns."""


def rollout(
    prompt: str, reply: str, score: Score | None, group: int = 0, sample: int = 0, stop: str = "stop_token"
) -> Rollout:
    """A single-turn rollout: a template token, the prompt, the reply. Token n of the reply has logp -n/4."""
    tokens = np.array([TEMPLATE, *map(ord, prompt), *map(ord, reply)], dtype=np.int64)
    start = 1 + len(prompt)
    policy = np.arange(len(tokens)) >= start
    logp = np.where(policy, -(np.arange(len(tokens)) - start) / 4.0, 0.0).astype(np.float32)
    return Rollout(
        problem=Problem(f"made_up/{group}", prompt, answer="7", source="made_up", extra={"digits": [3, 4]}),
        group=group,
        sample=sample,
        tokens_T=tokens,
        policy_T=policy,
        role_T=np.where(policy, role_code("assistant"), role_code("user")).astype(np.int8),
        logp_T=logp,
        raw_logp_T=logp * 2,
        version_T=np.where(policy, 5, -1).astype(np.int32),
        transcript=(
            Turn("user", prompt, False, 1, start),
            Turn("assistant", reply, True, start, len(tokens), stop),
        ),
        stop=stop,
        score=score,
    )


def groups() -> tuple[list[Group], list[np.ndarray]]:
    """Two groups of two with one rollout unjudged, and advantages +1 (reward 1) and -1 (reward 0)."""
    right, wrong = Score(1.0, {"worked": 1.0}, "ends in 7"), Score(0.0, {}, "ends in another digit")
    rows = [
        [rollout("3+4=", "3+4=7#7", right), rollout("3+4=", "#8", wrong, sample=1)],
        [rollout("1+1=", "é\n#2", right, 1), rollout("1+1=", "", Score(None, {}, "timed out"), 1, 1)],
    ]
    made = [Group(row[0].problem, row) for row in rows]
    judged = [one for group in made for one in group.judged]
    advantages = [np.where(one.policy_T, 2.0 * one.reward - 1.0, 0.0).astype(np.float32) for one in judged]
    return made, advantages


def token_text(token: int) -> str:
    return "<user>" if token == TEMPLATE else chr(token)

"""Rewards for keeping to a length, given whether the answer is right (L1, arXiv:2503.04697 Sec. 3).

Both judge one rollout against the length that its prompt asked for. Penalties that compare the lengths of a
group, or soften the end of the context, act on advantages and are in `whorl.algorithms.penalties`.
"""

from whorl.data import Score


def exact_length(correct: float, num_tokens: int, target_tokens: int, *, per_token: float = 3e-4) -> Score:
    """correct - per_token |target_tokens - num_tokens|.  LCPO-Exact, Eq. 1, which uses per_token = 0.0003."""
    penalty = per_token * abs(_positive(target_tokens) - num_tokens)
    why = f"{num_tokens} tokens where {target_tokens} were asked for"
    return Score(correct - penalty, {"correct": correct, "length_penalty": penalty}, why)


def within_length(
    correct: float, num_tokens: int, target_tokens: int, *, per_token: float = 3e-4, at_target: float = 0.5
) -> Score:
    """correct * clip(per_token (target_tokens - num_tokens) + at_target, 0, 1).  LCPO-Max, Eq. 2.

    A right answer of exactly the target length earns `at_target` (0.5 in the paper), shorter ones more and
    longer ones less; a wrong answer earns nothing for being short.
    """
    factor = min(1.0, max(0.0, per_token * (_positive(target_tokens) - num_tokens) + at_target))
    why = f"{num_tokens} tokens where at most {target_tokens} were asked for"
    return Score(correct * factor, {"correct": correct, "length_factor": factor}, why)


def _positive(target_tokens: int) -> int:
    if target_tokens < 1:
        raise ValueError(f"a target length is at least 1 token; got target_tokens={target_tokens}")
    return target_tokens

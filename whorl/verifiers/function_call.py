"""Function calls: a JSON list of {"name": ..., "arguments": {...}}, right if each call is exactly a gold call.

The criterion of APIGen as used by Reflect, Retry, Reward (arXiv:2505.24726 Sec. 3.1): every name and every
argument must match. Its fine print here: the calls may come in any order, since calls of one turn are made in
parallel, but as often as in the gold list; arguments have no order; types count (2, 2.0, "2" and true are
four different values); text is compared character by character.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from whorl.data import Score

MAX_CHARACTERS = 100_000
"""A longer list is refused unread."""


def compare(reply: str, gold: Sequence[Mapping[str, Any]]) -> Score:
    """1 if the reply's calls are the gold calls, else 0.

    Parts: `parsed`, whether the reply is a list of calls; `names_frac` and `calls_frac`, the share of gold
    calls of which the name, and of which name and arguments, are in the reply.
    """
    wanted = [_canonical(call["name"], call["arguments"]) for call in gold]
    try:
        calls = parse(reply)
    except ValueError as error:
        return Score(0.0, {"parsed": 0.0, "names_frac": 0.0, "calls_frac": 0.0}, str(error))
    got = [_canonical(call["name"], call["arguments"]) for call in calls]
    missing, extra = _without(wanted, got), _without(got, wanted)
    names = [call["name"] for call in gold]
    missing_names = _without(names, [call["name"] for call in calls])
    parts = {
        "parsed": 1.0,
        "names_frac": 1 - len(missing_names) / len(names) if names else 1.0,
        "calls_frac": 1 - len(missing) / len(wanted) if wanted else 1.0,
    }
    if not missing and not extra:
        return Score(1.0, parts, "all calls match")
    reasons = [f"missing {missing[0][:100]}"] if missing else []
    reasons += [f"not asked for {extra[0][:100]}"] if extra else []
    return Score(0.0, parts, "; ".join(reasons))


def parse(reply: str) -> list[dict[str, Any]]:
    """The calls in a reply: the JSON list that it is, apart from thoughts before </think> and a code fence.

    ValueError if it is anything else: a list somewhere in running text does not count, for then a reply
    could offer several. Objects with a repeated key are refused, since readers differ in what they mean.
    """
    text = reply.rpartition("</think>")[2].strip()
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"expected a list of calls, got {len(text):,} characters")
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text.partition("\n")[2].removesuffix("```")
    try:
        calls = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON list of calls: {str(error)[:100]}") from None
    if not isinstance(calls, list):
        raise ValueError(f"expected a JSON list of calls, got {_KINDS[type(calls)]}")
    for number, call in enumerate(calls, 1):
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            raise ValueError(f'call {number}: expected {{"name": ..., "arguments": {{...}}}}')
        if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
            raise ValueError(f"call {number}: the name must be text and the arguments an object")
    return calls


_KINDS = {
    dict: "an object",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "a truth value",
    type(None): "null",
}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object repeats a key")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _canonical(name: str, arguments: Mapping[str, Any]) -> str:
    """One text per call, equal only for equal calls: sorted keys; JSON tells 2, 2.0, "2" and true apart."""
    try:
        return f"{name}({json.dumps(arguments, sort_keys=True, ensure_ascii=False)})"
    except RecursionError:
        return f"{name}(nested too deeply)"


def _without(items: Sequence[str], others: Sequence[str]) -> list[str]:
    """Items that are left when each of the others has taken away one equal item."""
    left = list(others)
    missing = []
    for item in items:
        if item in left:
            left.remove(item)
        else:
            missing.append(item)
    return missing

"""Is the reply in the form that was asked for? Says nothing about whether it is right."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from whorl.data import Score
from whorl.verifiers.pool import Pool


def tags(reply: str, names: Sequence[str] = ("think", "answer")) -> Score:
    """1 if the reply is <think>...</think><answer>...</answer> and nothing else (the format reward of
    DeepSeek-R1-Zero, arXiv:2501.12948 Sec. 2.2.2).

    Each tag stands exactly once, the sections are not empty, and between and around them is only white space.
    The parts say, section by section, which are there once and closed.
    """
    parts, end, why = {}, 0, ""
    for name in names:
        opening, closing = f"<{name}>", f"</{name}>"
        start, stop = reply.find(opening), reply.find(closing)
        once = reply.count(opening) == 1 == reply.count(closing) and start < stop
        parts[name] = float(once)
        if why:
            continue
        if not once:
            why = f"expected {opening}...{closing} once, got {reply.count(opening)} {opening}, "
            why += f"{reply.count(closing)} {closing}" + (" in the wrong order" if stop < start else "")
        elif start < end:
            why = f"{opening} stands before the end of the section that should precede it"
        elif reply[end:start].strip():
            why = f"there is text before {opening}: {reply[end:start].strip()[:40]!r}"
        elif not reply[start + len(opening) : stop].strip():
            why = f"{opening}...{closing} is empty"
        end = stop + len(closing)
    if not why and reply[end:].strip():
        why = f"there is text after </{names[-1]}>: {reply[end:].strip()[:40]!r}"
    return Score(0.0 if why else 1.0, parts, why or "well formed")


def matches(reply: str, pattern: str, *, deadline_seconds: float = 1.0) -> Score:
    """1 if the whole reply matches the regular expression; None if that takes longer than the deadline.

    Some patterns take exponentially long on texts made for it, so the matching is done in a process that
    can be killed. ValueError for a pattern that is not a regular expression.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    found = _pool().call(pattern, reply, deadline_seconds=deadline_seconds)
    if isinstance(found, bool):
        return Score(float(found), why="well formed" if found else f"the reply does not match {pattern!r}")
    return Score(None, why=f"matching {pattern!r} {found}")


@functools.cache
def _pool() -> Pool:
    return Pool(Path(__file__).with_name("worker_text.py"), "full_match", num_workers=1, memory_mib=512)

"""What runs inside a worker: are two final answers mathematically equal, by math-verify.

Loaded by its path (see `pool.py`), so it imports nothing of Whorl. math-verify's own timeouts are alarm
signals, which only work in a main thread; they are off, because the pool's deadline does that work.
"""

import functools
import logging

from math_verify import LatexExtractionConfig, parse, verify

logging.disable(logging.WARNING)  # nobody reads a worker's log, and formatting a huge expression can hang

# Read the box and nothing else: the other extractor hands strings to sympy's `eval`.
_BOX_ONLY = [LatexExtractionConfig(boxed_match_priority=0)]


def math_equal(gold: str, answer: str) -> bool | str:
    """Whether the two are equal; a sentence if the gold answer cannot be read."""
    expected, got = _read(gold), _read(answer)
    if not expected:
        return f"cannot read the gold answer {gold[:80]!r}"
    try:
        return bool(verify(expected, got, timeout_seconds=None, raise_on_error=True))
    except (MemoryError, RecursionError, OverflowError):
        raise  # too much for the judge, which says nothing about the answer
    except Exception:
        # Kinds of expressions that cannot be compared; other pairs of readings perhaps can.
        return bool(verify(expected, got, timeout_seconds=None))


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> list:
    boxed = f"\\boxed{{{text.replace('**', '^')}}}"  # a caret is the only power that LaTeX has
    return parse(boxed, extraction_config=_BOX_ONLY, parsing_timeout=None)  # type: ignore[arg-type]

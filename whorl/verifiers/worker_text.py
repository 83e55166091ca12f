"""What runs inside a worker: a regular expression, which a crafted text can keep busy for ever."""

import re


def full_match(pattern: str, text: str) -> bool:
    """Whether the whole text matches; `.` also matches a line end."""
    return re.fullmatch(pattern, text, re.DOTALL) is not None

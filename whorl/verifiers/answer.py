"""Final answers: where one stands in a reply, and whether it is the right one.

**Where.** A reply declares its final answer in one of these forms; in the last one that it completes.

    boxed          \\boxed{...}, with balanced braces
    tagged         <answer>...</answer>, over as many lines as it likes
    after_hashes   what follows #### on its line (GSM8K)
    after_answer   what follows "Answer:" on its line; Markdown's ** around either is dropped

What stands inside another form belongs to that form, so that <answer>\\boxed{4}</answer> is 4. A reply with
two boxes is judged by the last, as a reader would who takes the last word; a reply that never declares an
answer has none, even if the right number is in it: searching for it would pay for lists of guesses.

**Whether.** `exact` compares text, `numeric` numbers, `math_answer` mathematics. All give 1 or 0 with a
reason, or None if the judge itself failed. No text of a model is ever evaluated in this process.

What a reader would not see declares nothing: comments (<!-- ... -->, and a box behind a % within a box) and, to
`math_answer`, what LaTeX prints as blank space (\\phantom and its kin).
"""

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from whorl.data import Score
from whorl.verifiers.pool import Pool

MAX_ANSWER_CHARACTERS = 2_000
"""No final answer is longer. A longer one is not looked at: as text or a number it is wrong, as mathematics it might
be anything."""

Form = Callable[[str], tuple[int, str] | None]
"""A form of declaring an answer: from a reply to where the last answer starts, and the answer."""


def boxed(text: str) -> tuple[int, str] | None:
    """The content of the last complete \\boxed{...}. One pass, whatever the nesting.

    A box behind a % within a box is in a comment, as LaTeX reads it; other percent signs are percentages, also
    one that ends a box (15%), where LaTeX would see a comment too.
    """
    last, opened, comments = None, [], []
    num_boxes = line_end = 0
    for mark in re.finditer(r"\\boxed\s{0,4}\{|\\.|[{}]|%(?![ \t]*\})", text, re.DOTALL):
        at = mark.start()
        if comments and at < comments[-1][1]:
            continue
        if mark[0] == "%":
            if num_boxes and at >= line_end:
                line_end = text.find("\n", at) % (len(text) + 1)  # -1, where there is none, becomes the end
                if text.find("\\boxed", at, line_end) >= 0:
                    comments.append((at, line_end))
        elif mark[0] == "}":
            start, is_box = opened.pop() if opened else (0, False)
            num_boxes -= is_box
            if is_box and (last is None or start > last[0]):
                last = (start, at)
        elif mark[0].endswith("{") and mark[0] != "\\{":
            opened.append((mark.end(), mark[0] != "{"))
            num_boxes += mark[0] != "{"
    if last is None:
        return None
    pieces, start = [], last[0]
    for comment_start, comment_end in comments:
        if last[0] <= comment_start < last[1]:
            pieces.append(text[start:comment_start])
            start = comment_end
    return last[0], "".join([*pieces, text[start : last[1]]])


def tagged(text: str) -> tuple[int, str] | None:
    """The content of the last complete <answer>...</answer>."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return (start + 8, text[start + 8 : end]) if start >= 0 else None


def after_hashes(text: str) -> tuple[int, str] | None:
    """The rest of the line after the last ####."""
    return _rest_of_line(text, text.rfind("####"), 4)


def after_answer(text: str) -> tuple[int, str] | None:
    """The rest of the line after the last "Answer:" (or "answer:"), without Markdown's emphasis."""
    found = _rest_of_line(text, max(text.rfind("Answer:"), text.rfind("answer:")), 7)
    return found and (found[0], found[1].strip(" *"))


def _rest_of_line(text: str, mark: int, width: int) -> tuple[int, str] | None:
    return (mark + width, text[mark + width :].partition("\n")[0]) if mark >= 0 else None


_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)

ANY_FORM: tuple[Form, ...] = (boxed, tagged, after_hashes, after_answer)


def final_answer(reply: str, forms: Sequence[Form] = ANY_FORM) -> str | None:
    """The answer that the reply declares, without white space around it and a full stop; None if it has none."""
    reply = _COMMENT.sub("", reply)
    found = [place for form in forms if (place := form(reply)) is not None]
    if not found:
        return None
    answer = max(found)[1]
    # The innermost form is the last to start, and it may still carry the end of the form around it.
    answer = answer.partition("</answer>")[0].strip()
    return answer[:-1].rstrip() if answer.endswith(".") else answer


def exact(reply: str, gold: str, forms: Sequence[Form] = ANY_FORM) -> Score:
    """1 if the final answer is the gold text, apart from white space."""
    answer = _declared(reply, forms)
    return answer if isinstance(answer, Score) else _verdict(_text(answer) == _text(gold), gold, answer)


def numeric(reply: str, gold: str, forms: Sequence[Form] = ANY_FORM) -> Score:
    """1 if the final answer is the gold number: exact for whole numbers and fractions, else within 1e-6 of it.

    ValueError if the gold answer is not a number: that is an error of the data, not of the reply.
    """
    expected = number(gold)
    if expected is None:
        raise ValueError(f"numeric needs a number as gold answer, such as 12, -0.5, 3/4 or 15%; got {gold!r}")
    answer = _declared(reply, forms)
    if isinstance(answer, Score):
        return answer
    got = number(answer)
    if got is None:
        return Score(0.0, {"answered": 1.0}, f"{_short(answer)} is not a number")
    return _verdict(_same_number(got, expected), gold, answer)


def math_answer(
    reply: str, gold: str, forms: Sequence[Form] = ANY_FORM, *, deadline_seconds: float = 5.0
) -> Score:
    """1 if the final answer is mathematically equal to the gold one (math-verify, in a process of its own).

    Equal text, plain numbers, and pairs, intervals and sets of them are settled without it. So are gold answers
    that are words: math-verify reads a word as a product of letters, in which "silent" equals "listen".
    None if math-verify overruns the deadline, dies, cannot read the gold answer, or would have to deal with what
    it cannot: an answer too long, too deeply nested, or with a number too large to be written out.
    """
    answer = _declared(reply, forms, if_too_long=None)
    if isinstance(answer, Score):
        return answer
    if _text(answer) == _text(gold):
        return _verdict(True, gold, answer)
    got, expected = number(answer), number(gold)
    if got is not None and expected is not None:
        return _verdict(_same_number(got, expected), gold, answer)
    listed, wanted = _numbers(answer), _numbers(gold)
    if listed is not None and wanted is not None and listed[0] == wanted[0]:
        return _verdict(_same_numbers(*listed, wanted[1]), gold, answer)
    if _is_words(gold):
        return _verdict(_text(answer).casefold() == _text(gold).casefold(), gold, answer)
    if not _balanced(answer):
        return Score(0.0, {"answered": 1.0}, f"{_short(answer)} has unbalanced braces")
    printed = _printed(answer)
    if not printed:
        return Score(0.0, {"answered": 1.0}, f"{_short(answer)} prints nothing")
    try:
        return _verdict(_math_equal(gold.strip(), printed, deadline_seconds), gold, answer)
    except _NotJudged as error:
        return Score(None, {"answered": 1.0}, f"math-verify {error}")


class _NotJudged(Exception):
    """Why math-verify has no verdict."""


@functools.lru_cache(maxsize=8192)  # the samples of a group often agree; only verdicts are remembered
def _math_equal(gold: str, answer: str, deadline_seconds: float) -> bool:
    equal = _math_pool().call(gold, answer, deadline_seconds=deadline_seconds)
    if not isinstance(equal, bool):
        raise _NotJudged(equal)
    return equal


def _declared(reply: str, forms: Sequence[Form], if_too_long: float | None = 0.0) -> str | Score:
    """The final answer, or the verdict on a reply without one that could be looked at."""
    answer = final_answer(reply, forms)
    if not answer:
        names = ", ".join(getattr(form, "__name__", str(form)) for form in forms)
        return Score(0.0, {"answered": 0.0}, f"no final answer in a declared form ({names})")
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return Score(if_too_long, {"answered": 1.0}, f"the final answer has {len(answer):,} characters")
    return answer


def _verdict(right: bool, gold: str, answer: str) -> Score:
    why = "right" if right else f"expected {_short(gold)}, got {_short(answer)}"
    return Score(float(right), {"answered": 1.0}, why)


_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\$?(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?P<point>\.\d*)?(?:[eE](?P<exponent>[+-]?\d{1,3}))?"
    r"(?:/(?P<below>[1-9]\d*))?\s*(?P<percent>\\?%)?"
)
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")


def number(text: str) -> tuple[Fraction, bool] | None:
    """The value of a number written plainly, and whether the writing is exact; None for anything else.

    Read are whole numbers (with thousands commas), decimals, powers of ten (1.5e-3), fractions (3/4,
    \\frac{3}{4}) and percentages (15% is 0.15), after an optional sign and $. Whole numbers, fractions of
    them and percentages of them are exact. At most 100 characters and exponents of three digits, so that
    no text costs more than microseconds.
    """
    text = text.strip().strip("$").strip()
    if len(text) > 100:
        return None
    text = _FRACTION.sub(r"\1\2/\3", text)
    match = _NUMBER.fullmatch(text)
    if match is None or not text.isascii() or not re.search(r"\d", match["whole"] + (match["point"] or "")):
        return None
    if match["below"] and (match["point"] or match["exponent"]):
        return None
    value = Fraction(
        match["whole"].replace(",", "") + (match["point"] or "") + "e" + (match["exponent"] or "0")
    )
    value = value / int(match["below"] or 1) / (100 if match["percent"] else 1)
    return -value if match["sign"] == "-" else value, not match["point"] and not match["exponent"]


def _same_number(got: tuple[Fraction, bool], expected: tuple[Fraction, bool]) -> bool:
    """Equal, or within 1e-6 of the expected value (relative) if either is written as a decimal."""
    (value, is_exact), (wanted, wanted_is_exact) = got, expected
    tolerance = 0 if is_exact and wanted_is_exact else abs(wanted) / 10**6
    return abs(value - wanted) <= tolerance


_BRACKETED = re.compile(r"(?:\\left)?(\(|\[|\\\{)(.*?)(?:\\right)?(\)|\]|\\\})", re.DOTALL)
_ENDS = {"\\infty": 1, "+\\infty": 1, "-\\infty": -1}


def _numbers(text: str) -> tuple[str, list[tuple[Fraction, bool] | int]] | None:
    """The brackets and the numbers of a pair, tuple, interval or set of plain ones; infinities are 1 and -1."""
    match = _BRACKETED.fullmatch(text.strip())
    if match is None:
        return None
    found = [_ENDS.get(item.strip()) or number(item) for item in match[2].split(",")]
    numbers = [one for one in found if one is not None]
    return (match[1] + match[3], numbers) if len(numbers) == len(found) > 1 else None


def _same_numbers(brackets: str, got: list, expected: list) -> bool:
    """In order; in any order, and as often as one likes, between braces."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, int) or isinstance(other, int):
            return one == other
        return _same_number(one, other)

    if brackets == "\\{\\}":
        return all(any(same(g, e) for e in expected) for g in got) and all(
            any(same(g, e) for g in got) for e in expected
        )
    return len(got) == len(expected) and all(map(same, got, expected))


def _text(answer: str) -> str:
    return " ".join(answer.split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _is_words(gold: str) -> bool:
    """Whether three or more letters stand together outside LaTeX commands and names of functions."""
    plain = re.sub(
        r"\\[a-zA-Z]+|\b(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|arcsin|arccos|arctan|mod)\b", " ", gold
    )
    return re.search(r"[^\W\d_]{3}", plain) is not None


_BLANK = re.compile(r"\\(?:[hv]?phantom|[hv]space\*?|label)\s*\{")


def _printed(answer: str) -> str:
    """The answer without what LaTeX prints as blank space, which math-verify reads like any other text."""
    while opening := _BLANK.search(answer):
        depth, end = 1, opening.end()
        while depth:  # the braces are balanced, so this ends
            mark = re.compile(r"\\.|[{}]", re.DOTALL).search(answer, end)
            assert mark is not None, f"unbalanced: {answer!r}"
            depth += {"{": 1, "}": -1}.get(mark[0], 0)
            end = mark.end()
        answer = answer[: opening.start()] + answer[end:]
    return answer.strip()


def _balanced(text: str) -> bool:
    """Whether no brace closes what the text did not open: it is put into a box to be read."""
    depth = 0
    for mark in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(mark, 0)
        if depth < 0:
            return False
    return depth == 0


@functools.cache
def _math_pool() -> Pool:
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError('math_answer needs math-verify, which is not installed: pip install "whorl[tasks]"')
    return Pool(Path(__file__).with_name("worker_math.py"), "math_equal")

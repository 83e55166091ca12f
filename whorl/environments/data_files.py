"""Your own questions: a JSONL or Parquet file with a prompt and an answer in every row.

`data:problems.jsonl,prompt=question,answer=gold,verifier=math`. A prompt is text, or a list of messages
`{"role": ..., "content": ...}`. An answer is text or a number; where it is a worked solution that declares its
final answer (#### or \\boxed), as in GSM8K or MATH, that final answer is the gold answer.

With `verifier=program` the reply is a Python program, and the answer column has its tests: assertions about its
functions, or `{"stdin": ..., "stdout": ...}`, or a list of either. Programs run in a sandbox (`notice` says how safe
it is on this machine); they earn 1 if they pass every test.

The whole file is checked when it is opened, and an error names the file, the row and the column. A prompt
that stands in several rows is one problem. Which split a problem belongs to depends on its content (80%
train, 10% validation, 10% test), or the test problems are a file of their own, and then no problem of that
file is trained on.
"""

import ast
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from whorl.data import ROLES, Message, Problem, Rollout, Score
from whorl.environments.base import SPLITS, Card, Environment, check_split, split_of
from whorl.verifiers.answer import (
    MAX_ANSWER_CHARACTERS,
    after_hashes,
    boxed,
    exact,
    final_answer,
    math_answer,
    number,
    numeric,
)
from whorl.verifiers.program import Assertion, Example, extract_code, verify_program
from whorl.verifiers.sandbox import statement


def passes_tests(reply: str, tests: str) -> Score:
    """1 if the last ```python block of the reply passes the tests, as `_tests` wrote them down."""
    source = extract_code(reply)
    if source is None:
        return Score(0.0, {"answered": 0.0}, "no complete ```python block")
    read = [Assertion(test) if isinstance(test, str) else Example(**test) for test in json.loads(tests)]
    score = verify_program(source, read)
    return replace(score, parts={"answered": 1.0, **score.parts})


_VERIFIERS: Mapping[str, Callable[[str, str], Score]] = MappingProxyType(
    {"math": math_answer, "exact": exact, "numeric": numeric, "program": passes_tests}
)
_MIN_TO_SPLIT = 10
"""From so many problems on, each split gets at least one; a smaller file is all training."""


@dataclass(frozen=True)
class DataFile(Environment):
    """Single-turn questions from a file, judged against stored answers."""

    path: str
    prompt: str = "prompt"
    """Name of the column with the prompt."""
    answer: str = "answer"
    """Name of the column with the answer."""
    verifier: str = "math"
    """"math" (mathematically equal), "numeric" (the same number), "exact" (the same text) or "program" (passes its
    tests)."""
    test: str | None = None
    """A file whose problems are the test split; the rest of `path` is train and validation."""

    card = Card(
        prompt="the prompt column, unchanged",
        turn="one: anything that declares its final answer: \\boxed{...}, <answer>...</answer>, #### or Answer:; "
        "a program stands in a ```python block",
        ends="after the reply",
        reward="1 if the final answer is right by the chosen verifier, else 0",
        chance=0.0,
    )

    def __post_init__(self) -> None:
        if self.verifier not in _VERIFIERS:
            raise ValueError(f"data: expected verifier {', '.join(_VERIFIERS)}; got {self.verifier!r}")
        self._splits  # noqa: B018 - the file is read and checked before anything else happens

    @property
    def name(self) -> str:
        return f"data:{self.path}"

    @property
    def chance(self) -> float | None:
        """Unknown: it depends on the questions."""
        return None

    @property
    def notice(self) -> str | None:
        return statement() if self.verifier == "program" else None

    def num_problems(self, split: str) -> int:
        check_split(split)
        return len(self._splits[split])

    def problem(self, split: str, index: int) -> Problem:
        if not 0 <= index < self.num_problems(split):
            counts = ", ".join(f"{name} {len(self._splits[name])}" for name in SPLITS)
            hint = f" (below {_MIN_TO_SPLIT} problems all are for training; give test=FILE)"
            few = sum(map(len, self._splits.values())) < _MIN_TO_SPLIT
            raise IndexError(
                f"{self.name} has no problem {index} in {split}; it has {counts}{hint if few else ''}"
            )
        return self._splits[split][index]

    def verify(self, problem: Problem, rollout: Rollout) -> Score:
        assert problem.answer is not None, "every row was checked to have an answer"
        return _VERIFIERS[self.verifier](rollout.reply, problem.answer)

    def gold(self, problem: Problem) -> tuple[str, ...] | None:
        """The stored answer in a box, or after "Answer:" if its braces would break the box; None where there are
        only tests."""
        if self.verifier == "program":
            return None
        return (self._declaration(problem.answer),)

    def _declaration(self, answer: str | None) -> str:
        reply = f"\\boxed{{{answer}}}"
        return reply if final_answer(reply) == answer else f"Answer: {answer}"

    @functools.cached_property
    def _splits(self) -> Mapping[str, tuple[Problem, ...]]:
        problems = self._read(self.path)
        if self.test is None:
            splits = _divide(problems, SPLITS)
        else:
            held_out = {problem.content_key: problem for problem in self._read(self.test)}
            kept = [problem for problem in problems if problem.content_key not in held_out]
            if num_common := len(problems) - len(kept):
                warnings.warn(
                    f"{num_common} problems of {self.path} are also in {self.test} and are kept for the test only",
                    stacklevel=2,
                )
            splits = {**_divide(kept, ("train", "validation")), "test": list(held_out.values())}
        return {
            split: tuple(replace(problem, id=f"{self.name}/{split}/{i}") for i, problem in enumerate(members))
            for split, members in splits.items()
        }

    def _read(self, path: str) -> list[Problem]:
        """The problems of a file, in its order, each once."""
        first_row: dict[str, tuple[int, Problem]] = {}
        for row, fields in _rows(path):
            where = f"{path}, row {row}"
            for column in (self.prompt, self.answer):
                if column not in fields:
                    raise ValueError(
                        f"{where}: there is no column {column!r}; its columns are {', '.join(map(repr, fields))} "
                        "(name yours with prompt=... and answer=...)"
                    )
            prompt = _prompt(fields[self.prompt], f"{where}, column {self.prompt!r}")
            gold = self._gold(fields[self.answer], f"{where}, column {self.answer!r}")
            problem = Problem("", prompt, gold, self.name)
            known_row, known = first_row.setdefault(problem.content_key, (row, problem))
            if known.answer != gold:
                raise ValueError(
                    f"{where}: the prompt of row {known_row} again, with another answer ({gold!r}, there "
                    f"{known.answer!r}); remove one of the two rows"
                )
        if not first_row:
            raise ValueError(f"{path}: expected at least one row; the file is empty")
        return [problem for _, problem in first_row.values()]

    def _gold(self, value: object, where: str) -> str:
        if self.verifier == "program":
            return _tests(value, where)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:  # or nan
            raise ValueError(f"{where}: expected an answer as text or a number; got {_describe(value)}")
        solution = _encodable(str(value), where).strip()
        text = final_answer(solution, (boxed, after_hashes)) or solution.removesuffix(".").rstrip()
        if not text:
            raise ValueError(f"{where}: the answer is empty; remove the row or fill it in")
        if self.verifier == "numeric" and number(text) is None:
            raise ValueError(
                f"{where}: verifier=numeric needs a number such as 12, -0.5 or 3/4; got {text[:60]!r}"
            )
        if final_answer(self._declaration(text)) != text or len(text) > MAX_ANSWER_CHARACTERS:
            raise ValueError(
                f"{where}: no reply could declare this answer: {text[:60]!r} (it is longer than "
                f"{MAX_ANSWER_CHARACTERS:,} characters, holds the mark of another answer, or has several lines "
                "with unbalanced braces)"
            )
        return text


def _divide(problems: Sequence[Problem], names: Sequence[str]) -> dict[str, list[Problem]]:
    """The problems by split, each where its content puts it, or in training where that split is not wanted.

    If chance leaves a split of a file of 10 problems or more empty, one problem moves there. Which one depends
    on the contents (the last by its hash) and not on the order of the rows.
    """
    splits: dict[str, list[Problem]] = {name: [] for name in names}
    if len(problems) < _MIN_TO_SPLIT:
        return {**splits, "train": list(problems)}
    for problem in problems:
        split = split_of(problem.content_key)
        splits[split if split in splits else "train"].append(problem)
    for members in splits.values():
        if not members:
            donor = max(splits.values(), key=len)
            moved = max(donor, key=lambda problem: problem.content_key)
            donor.remove(moved)
            members.append(moved)
    return splits


def _rows(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Row number, counted from 1, and columns of every row."""
    kind = Path(path).suffix.lower()
    if kind not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: expected a file that ends in .jsonl or .parquet")
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file (from here, {Path.cwd()})")
    if kind == ".jsonl":
        yield from _jsonl_rows(path)
        return
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        rows = table.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from None
    yield from enumerate(rows, 1)


def _jsonl_rows(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """One JSON object a line; empty lines count as rows but hold none."""
    with open(path, "rb") as file:
        for row, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8-sig" if row == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, row {row}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
                ) from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, row {row}: not one JSON object on one line: {error}") from None
            if not isinstance(fields, dict):
                raise ValueError(
                    f'{path}, row {row}: expected {{"prompt": ..., "answer": ...}}; got {_describe(fields)}'
                )
            yield row, fields


def _prompt(value: object, where: str) -> str | tuple[Message, ...]:
    if isinstance(value, str) and value.strip():
        return _encodable(value, where)
    if isinstance(value, str):
        raise ValueError(f"{where}: the prompt is empty; remove the row or fill it in")
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: expected text or a list of messages; got {_describe(value)}")
    messages = []
    for place, message in enumerate(value, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(
                f'{where}, message {place}: expected {{"role": ..., "content": ...}}; got {_describe(message)}'
            )
        role, text = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(
                f"{where}, message {place}: expected a role among {', '.join(ROLES)}; got {role!r}"
            )
        if not isinstance(text, str):
            raise ValueError(f"{where}, message {place}: expected content as text; got {_describe(text)}")
        messages.append(Message(role, _encodable(text, where)))
    return tuple(messages)


def _tests(value: object, where: str) -> str:
    """The tests of a program as a JSON list of snippets and of examples."""
    tests = value if isinstance(value, list) else [value]
    if not tests:
        raise ValueError(f"{where}: expected at least one test; the list is empty")
    for place, test in enumerate(tests, 1):
        here = f"{where}, test {place}"
        example = test if isinstance(test, dict) and set(test) == {"stdin", "stdout"} else None
        parts = [test] if example is None else list(example.values())
        texts = [text for text in parts if isinstance(text, str)]
        if len(texts) < len(parts) or (example is None and not texts[0].strip()):
            raise ValueError(
                f'{here}: expected Python text with assertions, or {{"stdin": text, "stdout": text}}; got '
                f"{_describe(test)}"
            )
        for text in texts:
            _encodable(text, here)
        try:
            ast.parse(texts[0] if example is None else "")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{here}: not Python: {str(error).partition(chr(10))[0]}") from None
    return json.dumps(tests)


def _encodable(text: str, where: str) -> str:
    """The text, unless it has half of a surrogate pair (JSON can spell one as \\ud800, UTF-8 cannot)."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where}: the text has half of a surrogate pair, which is no character; remove it")
    return text


def _describe(value: object) -> str:
    """Type and beginning of a value, for an error."""
    return "nothing (null)" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"

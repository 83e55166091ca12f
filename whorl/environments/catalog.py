"""The environments by name, and how one is written in a line: `countdown,num_numbers=4`.

    name[:argument][,setting=value]*

    reasoning_gym:chain_sum,min_terms=2        the argument is the task
    data:problems.jsonl,prompt=question        the argument is the path

A value with a comma in it stands in quotes or brackets. Modules are imported when asked for, so that listing
the names costs nothing and needs no extra.
"""

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from whorl.environments.base import Environment
from whorl.environments.several import Several

_PLACES = {
    "chain_arithmetic": "chain_arithmetic.ChainArithmetic",
    "countdown": "countdown.Countdown",
    "data": "data_files.DataFile",
    "forked_arithmetic": "forked_arithmetic.ForkedArithmetic",
    "function_calling": "function_calling.FunctionCalling",
    "general_points": "general_points.GeneralPoints",
    "guess_number": "guess_number.GuessNumber",
    "judged_arithmetic": "judged_arithmetic.JudgedArithmetic",
    "looping_arithmetic": "looping_arithmetic.LoopingArithmetic",
    "next_token": "next_token.NextToken",
    "reasoning_gym": "reasoning_gym.ReasoningGym",
    "recall": "recall.Recall",
    "reflect_retry": "reflect_retry.ReflectRetry",
    "reverse_digits": "reverse_digits.ReverseDigits",
}
_ARGUMENTS = {"reasoning_gym": "task", "reflect_retry": "task", "data": "path"}
"""The field that `:argument` fills. Where the argument is a task there is a field `settings`, which takes every setting
that is not a field: those of the task."""

NEED_ARGUMENT = tuple(_ARGUMENTS)
"""Environments that are nothing without an argument after the colon."""


class _Environments(Mapping[str, type[Environment]]):
    def __getitem__(self, name: str) -> type[Environment]:
        module, _, label = _PLACES[name].rpartition(".")
        return getattr(importlib.import_module(f"whorl.environments.{module}"), label)

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)

    def __contains__(self, name: object) -> bool:
        return name in _PLACES


ENVIRONMENTS: Mapping[str, type[Environment]] = _Environments()
"""Name -> class. Looking one up imports its module."""


def one_line(name: str) -> str:
    """The first line of the environment's module, read without importing it."""
    _check_name(name)
    spec = importlib.util.find_spec(f"whorl.environments.{_PLACES[name].partition('.')[0]}")
    assert spec is not None, f"{name} is listed but has no module"
    assert spec.origin is not None, f"the module of {name} is not a file"
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    return (docstring or "").partition("\n")[0]


def make(spec: str) -> Environment:
    """The environment that a line describes, or several joined by ` + `. ValueError that names what is valid."""
    specs = tuple(part.strip() for part in spec.split(" + "))
    if len(specs) > 1:
        return Several(tuple(_make_one(part) for part in specs), specs)
    return _make_one(spec)


def _make_one(spec: str) -> Environment:
    head, *assignments = _split_outside_brackets(spec)
    name, colon, argument = (part.strip() for part in head.partition(":"))
    _check_name(name)
    environment_class = ENVIRONMENTS[name]
    hints = typing.get_type_hints(environment_class)
    fields = {
        field.name: field for field in dataclasses.fields(typing.cast(Any, environment_class)) if field.init
    }
    open_settings = "settings" in fields
    given: dict[str, Any] = {}
    task_settings: dict[str, Any] = {}

    wanted = _ARGUMENTS.get(name)
    if wanted is None and colon:
        raise ValueError(f"{name} takes no argument after ':'; its settings are {_describe(fields)}")
    if wanted is not None:
        if not argument:
            raise ValueError(f"{name} needs its {wanted}: {name}:{wanted.upper()}")
        given[wanted] = _parse(name, wanted, argument, hints[wanted])

    for assignment in assignments:
        setting, equals, value = (part.strip() for part in assignment.partition("="))
        if not equals or not setting:
            raise ValueError(f"{name}: expected setting=value; got {assignment.strip()!r}")
        if setting in given or setting in task_settings:
            raise ValueError(f"{name}: {setting} is given twice")
        if setting in fields and setting != "settings":
            given[setting] = _parse(name, setting, value, hints[setting])
        elif open_settings:
            task_settings[setting] = _literal_or_text(value)
        else:
            near = difflib.get_close_matches(setting, fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ";"
            raise ValueError(f"{name} has no setting {setting!r}{hint} Its settings are {_describe(fields)}")
    if open_settings:
        given["settings"] = task_settings
    return environment_class(**given)


def spec_of(environment: Environment) -> str:
    """The line that makes this environment: settings at their defaults are left out. Inverse of `make`."""
    if isinstance(environment, Several):
        return " + ".join(environment.specs)
    own_class = type(environment)
    place = f"{own_class.__module__.removeprefix('whorl.environments.')}.{own_class.__name__}"
    name = next((name for name, listed in _PLACES.items() if listed == place), None)
    if name is None:
        raise ValueError(f"{own_class.__name__} is not in the catalogue ({', '.join(_PLACES)})")
    wanted = _ARGUMENTS.get(name)
    head, assignments = name, []
    for field in dataclasses.fields(typing.cast(Any, environment)):
        value = getattr(environment, field.name)
        if field.name == wanted:
            head = f"{name}:{_write(value)}"
        elif field.name == "settings":
            assignments += [f"{key}={_write(item, literal=True)}" for key, item in value.items()]
        elif field.init and value != _default(field):
            assignments.append(f"{field.name}={_write(value)}")
    return ",".join([head, *assignments])


def _check_name(name: str) -> None:
    if name not in _PLACES:
        near = difflib.get_close_matches(name, _PLACES, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown environment {name!r}; {hint}The environments are {', '.join(_PLACES)}")


def _split_outside_brackets(spec: str) -> list[str]:
    """The spec cut at its commas, but not at those inside brackets or quotes."""
    pieces, depth, quote = [""], 0, ""
    escaped = False
    for character in spec:
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        # A quote opens only at the start of a value or inside brackets: it's also an apostrophe.
        elif character in "'\"" and (depth or pieces[-1].rstrip()[-1:] in ("=", ":")):
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == "," and not quote and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _describe(fields: Mapping[str, dataclasses.Field]) -> str:
    """`num_numbers=3, max_number=15`; a setting without a default stands alone."""
    described = []
    for field in fields.values():
        default = _default(field)
        described.append(field.name if default is dataclasses.MISSING else f"{field.name}={_write(default)}")
    return ", ".join(described)


def _parse(name: str, setting: str, text: str, hint: Any) -> Any:
    """The text as a value of the setting's type: int, float, bool, str, Path, a Literal, or a union."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = typing.get_args(hint)
        if type(None) in options and text == "None":
            return None
        kinds = [option for option in options if option is not type(None)]
    else:
        kinds = [hint]
    for kind in kinds:
        try:
            return _as_kind(text, kind)
        except (ValueError, SyntaxError):
            continue
    expected = " or ".join(_kind_name(kind) for kind in kinds)
    raise ValueError(f"{name}: {setting} expects {expected}; got {text!r}")


def _as_kind(text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"
    if kind in (int, float):
        return kind(text)
    if kind in (str, Path):
        return kind(ast.literal_eval(text) if re.fullmatch(r"'.*'|\".*\"", text, re.DOTALL) else text)
    if typing.get_origin(kind) is typing.Literal:
        for option in typing.get_args(kind):
            if text == str(option):
                return option
        raise ValueError
    value = ast.literal_eval(text)
    container = typing.get_origin(kind) or kind
    if container is tuple and isinstance(value, list):
        value = tuple(value)
    if isinstance(container, type) and not isinstance(value, container):
        raise ValueError
    return value


def _kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    return {bool: "true or false"}.get(kind, getattr(kind, "__name__", str(kind)))


def _literal_or_text(text: str) -> Any:
    """A task's setting has no declared type: a Python literal where it reads as one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text, text)


def _write(value: Any, *, literal: bool = False) -> str:
    """The value as `make` reads it. `literal`: a setting without a declared type, where 3 is a number."""
    if isinstance(value, str | Path):
        text = str(value)
        plain = re.fullmatch(r"[^,()\[\]{}'\"\s]+", text) is not None and text != "None"
        if plain and (not literal or _literal_or_text(text) == text):
            return text
        return repr(text)
    if isinstance(value, bool) and not literal:
        return str(value).lower()
    return repr(value)

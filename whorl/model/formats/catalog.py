"""The formats. A new family is one module and one entry here."""

from collections.abc import Mapping
from typing import Any

from whorl.model.config import ModelConfig
from whorl.model.formats.base import Format
from whorl.model.formats.keys import nearest
from whorl.model.formats.llama import LLAMA
from whorl.model.formats.minimax import MINIMAX, MINIMAX_M1, MINIMAX_TEXT_01
from whorl.model.formats.mistral import MISTRAL
from whorl.model.formats.mixtral import MIXTRAL
from whorl.model.formats.qwen2 import QWEN2
from whorl.model.formats.qwen3 import QWEN3
from whorl.model.formats.qwen3_moe import QWEN3_MOE

FORMATS = (MINIMAX, MINIMAX_M1, MINIMAX_TEXT_01, LLAMA, QWEN2, QWEN3, MISTRAL, MIXTRAL, QWEN3_MOE)


def format_named(name: str) -> Format:
    for format in FORMATS:
        if format.name == name:
            return format
    names = [format.name for format in FORMATS]
    raise ValueError(f"unknown format {name!r}{nearest(name, names)}; expected one of {', '.join(names)}")


def format_of(settings: Mapping[str, Any], source: str) -> Format:
    """The format of a `config.json`: by the class it names, else by its model type."""
    architectures, model_type = settings.get("architectures") or [], settings.get("model_type")
    for format in FORMATS:
        if format.architecture in architectures:
            return format
    for format in FORMATS:
        if not architectures and model_type in (format.name, *format.aliases):
            return format
    known = [format.architecture for format in FORMATS]
    named = architectures[0] if architectures else f"model_type {model_type!r}"
    raise ValueError(f"{source} is of {named}{nearest(str(named), known)}; supported are {', '.join(known)}")


def format_for(config: ModelConfig) -> Format:
    """The first format that holds the whole model; ValueError that names the settings the closest one lacks."""
    lacks = {format.name: format.shortfalls(config) for format in FORMATS}
    best = min(FORMATS, key=lambda format: (len(lacks[format.name]), format.caveat(config) != ""))
    check_fits(best, config)
    return best


def check_fits(format: Format, config: ModelConfig) -> None:
    """ValueError that names the settings which the format has no place for."""
    lacks = format.shortfalls(config)
    if lacks:
        raise ValueError(f"the format {format.name} has no place for {', '.join(dict.fromkeys(lacks))}")

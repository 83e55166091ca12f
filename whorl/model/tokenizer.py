"""Text to token ids and back, and the chat format: what a tokenizer promises, and those of the small models.

`ChatTokenizer` is what the rest of the library speaks to. `Tokenizer` is a thin layer over the `tokenizers` library
for models made here; those of Hugging Face are in `huggingface.py`, and `pretrained_tokenizer.py` finds out which
one a folder holds.

Two kinds are made here, both with an exact round trip. `Tokenizer.characters(alphabet)` has one id per character
and suits small models of one task; `Tokenizer.byte_level()` has one id per byte of UTF-8 and takes any text. Ids
of text come first, those of the special tokens last.

Text is untrusted: a user, a tool or the policy itself may spell "<end>". The special tokens are entries of
the vocabulary that no text can reach, because text is cut into single characters or bytes and nothing ever
merges them; only `render` and the sampler put a special id into a sequence.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from whorl.data import Message

SPECIAL_TOKENS = ("<pad>", "<end>", "<system>", "<user>", "<assistant>", "<tool>")
"""The last ids of every vocabulary, in this order."""

CHAT_ROLE = {"reflection": "assistant", "retry": "assistant"}
"""Roles that a policy gives its own turns, and the chat role as which the model reads them."""


CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set role = "assistant" if message.role in ("reflection", "retry") else message.role -%}
{{- "<" + role + ">" + message.content + "<end>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}
"""
"""`Tokenizer.render` in the language of transformers, for those who load a saved tokenizer there."""


@dataclass(frozen=True)
class ToolUse:
    """What belongs to a chat besides its texts, in the form of Hugging Face's chat templates."""

    tools: tuple[Mapping[str, Any], ...] = ()
    """Schemas of the tools that are offered."""
    beside: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """By the place of a message: its `tool_calls`; of a tool's answer `name` and `tool_call_id`."""


NO_TOOLS = ToolUse()


@runtime_checkable
class ChatTokenizer(Protocol):
    """What the library needs of a tokenizer. It can be pickled and never changes.

    vocab_size: ids are below it. end_id: the token that ends a turn. stop_ids: all that do. pad_id: what stands
    where nothing is meant. fingerprint: 16 hex digits that name it.
    """

    vocab_size: int
    end_id: int
    stop_ids: tuple[int, ...]
    pad_id: int

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no special id, whatever it spells."""
        ...

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of the ids without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_text(self, index: int) -> str:
        """How one token looks in a display, on one line."""
        ...

    def render(
        self,
        messages: Sequence[Message],
        generation: bool,
        *,
        after: Sequence[Message] = (),
        ended: bool = True,
    ) -> list[tuple[str, list[int]]]:
        """What a conversation grows by when `messages` follow `after`, as segments (role, ids).

        If anything was said before, it ends with a turn of the policy, whose own tokens stand as written; the first
        segment is then what still closes that turn: without its end token if it was `ended` by one that the
        policy wrote, with it if it was cut short. There follows one segment per message and, with `generation`,
        the opening of the model's turn.
        """
        ...

    def demonstrate(
        self, messages: Sequence[Message], tool_use: ToolUse = NO_TOOLS
    ) -> tuple[list[int], list[bool]]:
        """Ids of a whole chat, and for each whether the assistant would write it: texts, calls and ends of its turns.

        ValueError if tools or calls are given that the tokenizer's form of a chat has no place for.
        """
        ...

    def files(self) -> dict[str, str]:
        """Contents by name of the files that `load_tokenizer` and transformers' AutoTokenizer read."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write `files`."""
        ...


def write_files(folder: str | Path, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        (Path(folder) / name).write_text(content, encoding="utf-8")


class Tokenizer:
    """Made by `characters`, `byte_level` or `load`; never changes afterwards."""

    def __init__(self, kind: Literal["characters", "bytes"], text_tokens: Sequence[str]):
        self.kind = kind
        self._text_tokens = tuple(text_tokens)
        self._known = frozenset(text_tokens)
        vocabulary = {token: index for index, token in enumerate((*text_tokens, *SPECIAL_TOKENS))}
        if kind == "characters":
            self._inner = tokenizers.Tokenizer(models.WordLevel(vocabulary))
            # Oniguruma's dot stops at a newline and it knows no (?s): this class is any character at all.
            every = tokenizers.Regex(r"[\s\S]")
            self._inner.pre_tokenizer = pre_tokenizers.Split(every, "isolated")
            self._inner.decoder = decoders.Fuse()
        else:
            # Byte-pair encoding without a single pair: every byte stays a token.
            self._inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
            self._inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            self._inner.decoder = decoders.ByteLevel()
        self.vocab_size = len(vocabulary)
        self.pad_id = vocabulary["<pad>"]
        self.end_id = vocabulary["<end>"]
        self.stop_ids = (self.end_id,)
        self._role_ids = {token[1:-1]: vocabulary[token] for token in SPECIAL_TOKENS[2:]}

    @classmethod
    def characters(cls, alphabet: str) -> "Tokenizer":
        """One id per character of `alphabet`, in the order of their code points; repetitions do not count."""
        if not alphabet:
            raise ValueError("a character tokenizer needs at least one character in its alphabet; got none")
        check_unicode(alphabet)
        return cls("characters", sorted(set(alphabet)))

    @classmethod
    def byte_level(cls) -> "Tokenizer":
        """256 ids, id b for byte b of the text's UTF-8, and the special tokens."""
        return cls("bytes", _BYTE_LETTERS)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no special id, whatever it spells.

        ValueError where a character is not in a character tokenizer's alphabet.
        """
        if self.kind == "characters" and not self._known.issuperset(text):
            unknown = next(character for character in text if character not in self._known)
            raise ValueError(
                f"character {unknown!r} (U+{ord(unknown):04X}) is not in the alphabet of this tokenizer, "
                f"{''.join(self._text_tokens)!r}; add it to the alphabet or use Tokenizer.byte_level()"
            )
        check_unicode(text)
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of the ids without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        values = np.array(ids if isinstance(ids, np.ndarray | list) else list(ids), dtype=np.int64)
        for index in (values.min(), values.max()) if len(values) else ():
            self._check_id(int(index))
        return self._inner.decode(values[values < len(self._text_tokens)].tolist())

    def token_text(self, index: int) -> str:
        """How one token looks in a display: as it is if printable, else escaped (`\\n`, `\\xe2`)."""
        self._check_id(index)
        if index >= len(self._text_tokens):
            return SPECIAL_TOKENS[index - len(self._text_tokens)]
        if self.kind == "bytes":
            return chr(index) if 0x20 <= index < 0x7F else repr(bytes([index]))[2:-1]
        character = self._text_tokens[index]
        return character if character.isprintable() else repr(character)[1:-1]

    def render(
        self,
        messages: Iterable[Message],
        generation: bool,
        *,
        after: Sequence[Message] = (),
        ended: bool = True,
    ) -> list[tuple[str, list[int]]]:
        """Segments (role, ids), one per message: role token, text, `<end>`; see `ChatTokenizer.render`.

        A message of role "reflection" or "retry" keeps that role in its segment; its ids are the assistant's.
        """
        segments = [(after[-1].role, [] if ended else [self.end_id])] if after else []
        for message in messages:
            segments.append(
                (message.role, [self._role_id(message.role), *self.encode(message.text), self.end_id])
            )
        if generation:
            segments.append(("assistant", [self._role_id("assistant")]))
        return segments

    def demonstrate(
        self, messages: Sequence[Message], tool_use: ToolUse = NO_TOOLS
    ) -> tuple[list[int], list[bool]]:
        """Ids of a whole chat, and for each whether the assistant would write it: all of its turns but the opening."""
        if tool_use != NO_TOOLS:
            raise ValueError(
                "the chat has tools or tool calls, for which this tokenizer has no form; use one with a chat template "
                "that takes them (--tokenizer)"
            )
        ids: list[int] = []
        mask: list[bool] = []
        for role, segment in self.render(messages, generation=False):
            written = CHAT_ROLE.get(role, role) == "assistant"
            ids += segment
            mask += [False, *[written] * (len(segment) - 1)]
        return ids, mask

    @property
    def fingerprint(self) -> str:
        """16 hex digits that two tokenizers share exactly if they give every text the same ids."""
        vocabulary = json.dumps([self.kind, *self._text_tokens, *SPECIAL_TOKENS])
        return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]

    def files(self) -> dict[str, str]:
        """tokenizer.json, with the special tokens marked as such, its configuration and the chat template."""
        marked = tokenizers.Tokenizer.from_str(self._inner.to_str())
        marked.add_special_tokens(list(SPECIAL_TOKENS))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<end>",
            "pad_token": "<pad>",
            "clean_up_tokenization_spaces": False,
        }
        return {
            "tokenizer.json": marked.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
            "chat_template.jinja": CHAT_TEMPLATE,
        }

    def save(self, folder: str | Path) -> None:
        """Write the files."""
        write_files(folder, self.files())

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read what `save` wrote; ValueError for the tokenizer.json of another program."""
        path = Path(folder) / "tokenizer.json"
        tokenizer = cls.read(path.read_text(encoding="utf-8"), str(path))
        if tokenizer is None:
            raise ValueError(
                f"{path} holds another vocabulary than Tokenizer.save writes: single characters or the 256 bytes, "
                f"then {' '.join(SPECIAL_TOKENS)}. load_tokenizer reads that of any model"
            )
        return tokenizer

    @classmethod
    def read(cls, content: str, where: str) -> "Tokenizer | None":
        """The tokenizer that `save` wrote as this tokenizer.json; None if another program did."""
        try:
            inner = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{where} is not a tokenizer.json: {error}") from error
        vocabulary = inner.get_vocab()
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        text_tokens = tokens[: -len(SPECIAL_TOKENS)]
        if tuple(tokens[len(text_tokens) :]) != SPECIAL_TOKENS:
            return None
        if isinstance(inner.model, models.BPE) and text_tokens == _BYTE_LETTERS:
            return cls.byte_level()
        if isinstance(inner.model, models.WordLevel) and all(len(token) == 1 for token in text_tokens):
            return cls.characters("".join(text_tokens))
        return None

    def _role_id(self, role: str) -> int:
        return self._role_ids[CHAT_ROLE.get(role, role)]

    def _check_id(self, index: int) -> None:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size} tokens")


def check_unicode(text: str) -> None:
    """ValueError for a lone surrogate, which no UTF-8 text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {text[error.start]!r} at {error.start} is half of a surrogate pair, not Unicode text"
        ) from error


def single_token_text(token: str, text: str) -> str:
    """A token for a display: `text`, its decoded text, if printable, else escaped; bytes as bytes."""
    if "\ufffd" in text and set(token) <= set(_BYTE_LETTERS):
        return repr(bytes(map(_BYTE_LETTERS.index, token)))[2:-1]
    return text if text and text.isprintable() else repr(text)[1:-1] or token


def _byte_letters() -> list[str]:
    """The letter by which the library's byte-level step names each byte, in the order of the bytes.

    Printable bytes of Latin-1 stand for themselves and the others for U+0100, U+0101, ... in order (GPT-2's
    table); the library lists the letters of its table but not which byte each one means.
    """
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in own else chr(next(spare)) for byte in range(256)]


_BYTE_LETTERS = _byte_letters()

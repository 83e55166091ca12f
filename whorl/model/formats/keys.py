"""The settings of a `config.json`, read so that none is passed over in silence."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

REQUIRED: Any = object()

NO_FUNCTION = frozenset(
    {
        "architectures", "model_type", "auto_map", "transformers_version", "torch_dtype", "dtype",
        "_name_or_path", "name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
        "sep_token_id", "decoder_start_token_id", "use_cache", "output_router_logits",
        "router_aux_loss_coef", "output_attentions", "output_hidden_states", "return_dict",
        "pretraining_tp", "block_size", "chunk_size_feed_forward", "id2label", "label2id",
        "problem_type", "task_specific_params", "finetuning_task", "attn_implementation",
        "_attn_implementation", "_attn_implementation_autoset", "torchscript", "use_bfloat16",
        "tokenizer_class", "prefix", "unsloth_fixed", "unsloth_version",
    }
)  # fmt: skip
"""Settings of `config.json` that do not change what a text model computes."""


class Keys:
    """The settings of a `config.json`. Every one must be read, fixed or without function, else it is refused."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.source = source
        self._values = dict(values)
        self._known = set(NO_FUNCTION)

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """Value of a setting; `default` where it is absent or null."""
        self._known.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(f"{self.source} has no {name!r}, which its model type needs")
        return default

    def one_of(self, names: Sequence[str], default: Any = REQUIRED) -> Any:
        """The value under any of the spellings; ValueError if two of them differ."""
        given = {name: self.take(name, None) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        values = list(given.values())
        if any(value != values[0] for value in values):
            raise ValueError(f"{self.source} says two things at once: {given}")
        return values[0] if values else self.take(names[0], default)

    def nullable(self, name: str, default: Any) -> Any:
        """As `take`, but null is a value of its own: None."""
        self._known.add(name)
        return self._values.get(name, default)

    def must(self, name: str, *allowed: Any) -> None:
        """Refuse a setting that is neither absent, nor null, nor one of `allowed`."""
        value = self.take(name, None)
        if value is not None and value not in allowed:
            raise ValueError(
                f"{self.source}: {name}={value!r} is not supported; expected {' or '.join(map(repr, allowed))}"
            )

    def ignore(self, *names: str) -> None:
        self._known.update(names)

    def finish(self) -> None:
        """ValueError for the first setting that nobody asked for."""
        for name, value in self._values.items():
            if name not in self._known and value is not None:
                raise ValueError(
                    f"{self.source}: unknown setting {name!r}{nearest(name, self._known)}; if the model computes "
                    "the same without it, remove it from the file"
                )


def nearest(name: str, known: Iterable[str]) -> str:
    """`, did you mean X?` for messages, or nothing."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" (nearest known: {close[0]!r})" if close else ""


def head_dim_of(keys: Keys, default: int | None = None) -> int:
    """Width of a head: as named, else the family's, else a share of the model's width."""
    share = keys.take("hidden_size") // keys.take("num_attention_heads")
    return keys.take("head_dim", default or share)

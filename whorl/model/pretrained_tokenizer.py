"""Whatever tokenizer a folder, a run or a name on the Hugging Face hub has."""

from pathlib import Path

from whorl.model.hub import folder_or_hub
from whorl.model.huggingface import FILES, TOKENIZER, HuggingFaceTokenizer
from whorl.model.tokenizer import ChatTokenizer, Tokenizer


def load_tokenizer(source: str | Path) -> ChatTokenizer:
    """The tokenizer in a run directory or model folder, or of a model on the hub ("owner/model").

    ValueError if there is none, or one that cannot hold a conversation; OSError if the hub cannot be reached and
    the tokenizer is not in its cache.
    """
    folder = folder_or_hub(source, FILES)
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(f"{source} has no {TOKENIZER}; expected a run directory or a model folder with one")
    own = Tokenizer.read(path.read_text(encoding="utf-8"), str(path))
    return HuggingFaceTokenizer.load(folder) if own is None else own

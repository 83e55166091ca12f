"""Whatever tokenizer a folder, a run or a name on the Hugging Face hub has."""

import re
from pathlib import Path

from whorl.model.huggingface import FILES, TOKENIZER, HuggingFaceTokenizer
from whorl.model.tokenizer import ChatTokenizer, Tokenizer

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_tokenizer(source: str | Path) -> ChatTokenizer:
    """The tokenizer in a run directory or model folder, or of a model on the hub ("organisation/name").

    ValueError if there is none, or one that cannot hold a conversation; OSError if the hub cannot be reached and
    the tokenizer is not in its cache.
    """
    folder = Path(source)
    if not folder.exists() and HUB_NAME.fullmatch(str(source)):
        folder = _from_hub(str(source))
    if not folder.is_dir():
        raise ValueError(
            f"{source} is neither a folder nor the name of a model on the hub (organisation/name)"
        )
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(f"{source} has no {TOKENIZER}; expected a run directory or a model folder with one")
    own = Tokenizer.read(path.read_text(encoding="utf-8"), str(path))
    return HuggingFaceTokenizer.load(folder) if own is None else own


def _from_hub(name: str) -> Path:
    """The tokenizer's files of a model on the hub: from the cache, or downloaded into it."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError:
        raise ValueError(
            f"there is no folder {name}; to fetch it from the Hugging Face hub install whorl[hf]"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise OSError(
            f"there is no folder {name}, the hub cannot be reached, and its cache does not hold the tokenizer; give a "
            "local folder, or download it where there is a network"
        ) from error
    except HfHubHTTPError as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(f"the hub does not give {name}: {first_line}") from error

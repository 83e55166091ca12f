"""Folders of models on the Hugging Face hub, through its own library and cache."""

import re
from collections.abc import Sequence
from pathlib import Path

NAME = re.compile(r"[\w.-]+/[\w.-]+")


def folder_or_hub(source: str | Path, files: Sequence[str]) -> Path:
    """A local folder as it is; for a name on the hub ("owner/model") a folder in the hub's cache.

    `files` are the names (or patterns) of what is fetched if the cache lacks it. ValueError if the source is
    neither; OSError if the hub does not have it or cannot be reached and nothing is cached.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if not NAME.fullmatch(str(source)):
        raise ValueError(f"no folder {source}, and no name on the hub either, which has the form owner/model")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{source} is no folder here; models on the hub need the extra: pip install 'whorl[hf]'"
        ) from error
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(files)))
    except Exception as error:  # a dozen kinds, of three libraries
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(
            f"{source} is no folder here and could not be fetched from the hub: {reason}"
        ) from error

"""Named tensors in a folder of safetensors files: read one file after the other, written in files of a size.

Files are mapped into memory, not read: a tensor's bytes come from the disk when it is copied to where it
belongs, and no file stays mapped when much of it has been read.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What weights may be stored in."""


MAPPED_BYTES = 2**25
"""How much of a file is read before it is mapped anew; one tensor may be larger."""


@dataclass(frozen=True)
class Entry:
    """What the header of a file says about one tensor."""

    file: Path
    shape: tuple[int, ...]


def headers(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint folder by name. ValueError where files and index do not fit together."""
    index = folder / INDEX
    if index.is_file():
        listed = _weight_map(index)
        files = [folder / name for name in sorted(set(listed.values()))]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{index} names {file.name}, which is not there; download it again")
    elif (folder / SINGLE).is_file():
        listed, files = {}, [folder / SINGLE]
    else:
        raise ValueError(f"{folder} holds no weights: {SINGLE} or {INDEX} is expected there")
    found: dict[str, Entry] = {}
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                if name in found:
                    raise ValueError(f"{name} is in {found[name].file.name} and again in {file.name}")
                found[name] = Entry(file, tuple(tensors.get_slice(name).get_shape()))
    for name, place in listed.items():
        if name not in found or found[name].file.name != place:
            raise ValueError(f"{index} says that {name} is in {place}, but it is not there")
    return found


def stream(found: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each entry, file by file. A tensor is a view of its file: copy it, do not keep it."""
    by_file: dict[Path, list[str]] = {}
    for name, entry in found.items():
        by_file.setdefault(entry.file, []).append(name)
    for file, names in by_file.items():
        waiting = iter(names)
        name = next(waiting, None)
        while name is not None:
            # Pages that were read count as this process's memory until the map is gone, so it is made anew.
            mapped = 0
            with _opened(file) as tensors:
                while name is not None and mapped < MAPPED_BYTES:
                    tensor = tensors.get_tensor(name)
                    mapped += tensor.nbytes
                    yield name, tensor
                    name = next(waiting, None)


def write(folder: Path, sizes: Mapping[str, int], tensors: Iterator[tuple[str, Tensor]], limit: int) -> None:
    """Write the tensors in their order, in files of at most `limit` bytes (or of one larger tensor).

    `sizes` has the bytes of each. One file is called `model.safetensors`; several have an index.
    """
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    count = len(shards)
    place: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        # Copies: safetensors refuses two views of one storage, which is what gate and up are.
        shard = {name: _next_of(tensors, name).detach().cpu().clone() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(names, file)
    if count > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(place.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def _next_of(tensors: Iterator[tuple[str, Tensor]], expected: str) -> Tensor:
    name, tensor = next(tensors)
    assert name == expected, f"tensors out of order: {name} where {expected} was announced"
    return tensor


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error}") from error


def _opened(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); it has {file.stat().st_size} bytes and may be cut short: "
            "download it again"
        ) from error

"""Checkpoints of a run, and models on disk. A folder appears whole or not at all.

    checkpoints/step_000012/
        tensors.safetensors     weights, moments, reference
        state.json              the rest: step, version, seeds, position in the data
        manifest.json           size and SHA-256 of the two

Everything is written to a sibling `step_000012.tmp`, each file and the folder are flushed to the disk, and
only then is the folder renamed. A process that dies on the way leaves a `.tmp`, which the next save removes.
One process writes a run's checkpoints at a time; any number may read.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from whorl.model.config import ModelConfig
from whorl.model.heads import ScalarHead
from whorl.model.transformer import Transformer

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
HEAD = "scalar_head.safetensors"
STEP = re.compile(r"step_(\d{6,})")


def save(root: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step` under `root` (a run's `checkpoints` folder) and return its folder.

    `state` is anything that JSON holds. OSError if the disk is full or fails; what was there before is then
    untouched. A checkpoint of the same step is replaced.
    """

    def fill(folder: Path) -> None:
        _write_tensors(folder / TENSORS, tensors)
        (folder / STATE).write_text(json.dumps(state, indent=1) + "\n")
        files = {name: _fingerprint(folder / name) for name in (TENSORS, STATE)}
        (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")

    root.mkdir(parents=True, exist_ok=True)
    remove_unfinished(root)
    target = root / f"step_{step:06d}"
    try:
        _replace_folder(target, fill)
    except (OSError, SafetensorError) as error:
        # By sizes alone: nothing that reads a whole checkpoint again stands between the user and this message.
        good = [path for path in _by_step(root) if not damage_of(path, contents=False)]
        kept = f"the last good checkpoint is {good[0]}" if good else "there is no earlier checkpoint"
        raise OSError(
            f"could not write checkpoint {target}: {error}; {kept}. Free space and resume"
        ) from error
    return target


def remove_unfinished(root: Path) -> None:
    """Delete what a killed process was still writing or already deleting."""
    for left in root.glob("step_*.tmp"):
        shutil.rmtree(left)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state of a checkpoint; ValueError if its files are not those written."""
    damage = damage_of(path)
    if damage:
        raise ValueError(f"checkpoint {path} is damaged: {damage}; resume from another one")
    return load_file(path / TENSORS), json.loads((path / STATE).read_text())


def newest(root: Path) -> Path | None:
    """The checkpoint of the highest step whose files are intact; None if there is no checkpoint at all.

    Each damaged one that is passed over is reported with a warning. ValueError if there are only damaged ones.
    """
    found = _by_step(root)
    for path in found:
        damage = damage_of(path)
        if not damage:
            return path
        warnings.warn(f"checkpoint {path} is damaged and passed over: {damage}", stacklevel=2)
    if found:
        raise ValueError(
            f"all checkpoints in {root} are damaged, and nothing was changed. Put back a good copy of one, or "
            "start a new run"
        )
    return None


def prune(root: Path, keep: int, step: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `step`, the one that was just written.

    Damaged ones do not count and are deleted too. So are later ones: they were found to be damaged when the run
    went on from an earlier one.
    """
    if keep < 1:
        raise ValueError(f"prune keeps at least 1 checkpoint; got keep={keep}")
    for path in _by_step(root):
        # Sizes alone: this runs after every save, and a flipped bit is found when it is read.
        if keep and _step_of(path) <= step and not damage_of(path, contents=False):
            keep -= 1
            continue
        # Renamed first, so that a process killed on the way leaves no half-deleted checkpoint.
        dying = path.with_name(path.name + ".tmp")
        path.rename(dying)
        shutil.rmtree(dying)


def damage_of(path: Path, *, contents: bool = True) -> str:
    """What is wrong with a checkpoint's files, in words; empty if nothing.

    With `contents=False` only names and sizes are compared.
    """
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        expected = {name: (files[name]["bytes"], files[name]["sha256"]) for name in (TENSORS, STATE)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    for name, (num_bytes, digest) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != num_bytes:
            return f"{name} has {file.stat().st_size} bytes; {num_bytes} were written"
        try:
            if contents and _fingerprint(file)["sha256"] != digest:
                return f"{name} has other contents than were written"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return ""


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """ValueError that names the first difference (in order of names) between two sets of named tensors."""
    for name in sorted(expected.keys() | found.keys()):
        here, there = (
            f"{tuple(t[name].shape)} {str(t[name].dtype).removeprefix('torch.')}" if name in t else "nothing"
            for t in (expected, found)
        )
        if here != there:
            raise ValueError(
                f"a checkpoint of another shape: at {name} the model has {here}, the checkpoint {there}; "
                "load it with the configuration it was trained with"
            )


def save_model(
    path: Path, model: Transformer, tokenizer_json: str | None = None, head: ScalarHead | None = None
) -> None:
    """Write `config.json`, `model.safetensors` and, if given, `tokenizer.json` as the folder `path`.

    A head goes into a file of its own, `scalar_head.safetensors`: without it the folder is a plain model.

    A folder that is already there is replaced, provided that it holds a model; ValueError otherwise, and for a
    model with adapters (`whorl.model.peft_format` writes those, `whorl.model.lora.merge` and `strip` remove them).
    """
    if model.lora is not None:
        raise ValueError("the model has adapters; merge and strip them, or save them with save_adapter")
    if path.exists() and not (path / "model.safetensors").is_file():
        raise ValueError(f"{path} exists and holds no model; choose a new folder")

    def fill(folder: Path) -> None:
        _write_tensors(folder / "model.safetensors", dict(model.named_parameters()))
        (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1) + "\n")
        if head is not None:
            _write_tensors(folder / HEAD, dict(head.named_parameters()))
        if tokenizer_json is not None:
            (folder / "tokenizer.json").write_text(tokenizer_json)

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _replace_folder(path, fill)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write the model {path}: {error}. Free space and save again") from error


def load_model(path: Path) -> Transformer:
    """The model that `save_model` wrote, in its dtype, on the CPU."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no model: config.json and model.safetensors are expected there")
    config = ModelConfig.from_dict(json.loads((path / "config.json").read_text()))
    tensors = load_file(path / "model.safetensors")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    model = Transformer(config)
    if len(dtypes) == 1:
        model = model.to(dtypes.pop())
    parameters = dict(model.named_parameters())
    check_tensors(parameters, tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return model


def load_head(path: Path) -> ScalarHead:
    """The head that `save_model` wrote beside its model, in its dtype, on the CPU."""
    if not (path / HEAD).is_file():
        raise ValueError(f"{path} holds no scalar head: {HEAD} is expected there")
    tensors = load_file(path / HEAD)
    weight = tensors.get("weight", torch.empty(0, 0))
    head = ScalarHead(weight.shape[-1], dtype=weight.dtype)
    check_tensors(dict(head.named_parameters()), tensors)
    head.load_state_dict(tensors)
    return head


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a new folder and put it at `target`; on an error nothing is left of it."""
    writing = target.with_name(target.name + ".tmp")
    if writing.exists():
        shutil.rmtree(writing)
    writing.mkdir()
    try:
        fill(writing)
        for file in writing.iterdir():
            _flush(file)
        _flush(writing)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    if target.exists():
        # A folder cannot be renamed over another. Killed between the two renames, a run goes on from the
        # checkpoint before this one and comes to the same bits.
        old = target.with_name(target.name + ".old.tmp")
        if old.exists():
            shutil.rmtree(old)
        target.rename(old)
        writing.rename(target)
        shutil.rmtree(old)
    else:
        writing.rename(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _step_of(path: Path) -> int:
    """The step of a finished checkpoint; -1 for any other path."""
    match = STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


def _by_step(root: Path) -> list[Path]:
    """Finished checkpoints under `root`, highest step first."""
    found = [path for path in root.glob("step_*") if _step_of(path) >= 0]
    return sorted(found, key=_step_of, reverse=True)

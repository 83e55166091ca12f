"""Adapters in the files of the peft library: adapter_config.json and adapter_model.safetensors.

peft names a tensor by the module of the transformers model that it adapts,
`base_model.model.<module>.lora_A.weight`. A stack of experts there is one parameter, adapted through
`target_parameters`: A is `[E r, in]`, expert after expert, B `[out, r E]`, rank after rank, and where both stacks
are adapted gate_up's adapter is one `base_layer` further in. (peft 0.21, `peft.tuners.lora.layer.ParamWrapper`.)
"""

import difflib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from whorl.model.adapter import Adapter, Lora
from whorl.model.experts import Experts
from whorl.model.lora import adapters_of, add_lora
from whorl.model.transformer import Block, Transformer

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Names = Mapping[str, tuple[str, ...]]
"""Module (of experts: parameter) of the transformers model for each linear layer of ours, by its name; two for a
fused gate and up that are apart there."""
NEUTRAL: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "trainable_token_indices": None,
}
"""Settings of peft under which an adapter is scale B A and nothing else."""


def transformers_names(model: Transformer) -> dict[str, tuple[str, ...]]:
    """Where the linear layers are in transformers 5 (MiniMax, Qwen, Llama, Mistral and Mixtral alike)."""
    names: dict[str, tuple[str, ...]] = {"lm_head": ("lm_head",)}
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        ours, theirs = f"layers.{number}", f"model.layers.{number}"
        for name, _ in layer.self_attn.named_children():
            names[f"{ours}.self_attn.{name}"] = (f"{theirs}.self_attn.{name}",)
        feed_forward = f"{ours}.feed_forward"
        if isinstance(layer.feed_forward, Experts):
            names[f"{feed_forward}.gate"] = (f"{theirs}.mlp.gate",)
            names[f"{feed_forward}.gate_up"] = (f"{theirs}.mlp.experts.gate_up_proj",)
            names[f"{feed_forward}.down"] = (f"{theirs}.mlp.experts.down_proj",)
        else:
            names[f"{feed_forward}.gate_up"] = (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")
            names[f"{feed_forward}.down"] = (f"{theirs}.mlp.down_proj",)
    return names


def save_adapter(path: Path, model: Transformer, base: str = "", names: Names | None = None) -> None:
    """Write the model's adapters into the folder `path`, over those that are there.

    `base` is the path or hub name of the base model, for who loads it without naming one.
    """
    if model.lora is None:
        raise ValueError("the model has no adapters to save")
    names = names or transformers_names(model)
    adapters = adapters_of(model)
    tensors: dict[str, Tensor] = {}
    modules, parameters = set(), set()
    for name, adapter in adapters.items():
        stacked = _is_stack(model, name)
        for part, (key, theirs) in enumerate(_places(name, names, adapters, stacked)):
            A, B = (adapter.A.detach(), adapter.B.detach())
            if stacked:
                A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
                parameters.add(".".join(theirs.split(".")[-2:]))
            else:
                A, B = A[part], B[part]
                if name.endswith(".gate"):  # the router there is a module of its own with a bare parameter
                    parameters.add("gate.weight")
                else:
                    modules.add(theirs.rpartition(".")[2])
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = A, B
    config = NEUTRAL | {
        "base_model_name_or_path": base or None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
    }
    path.mkdir(parents=True, exist_ok=True)
    ready = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    _write(path / TENSORS, lambda file: save_file(ready, file, {"format": "pt"}))
    _write(path / CONFIG, lambda file: file.write_text(json.dumps(config, indent=2) + "\n"))


def load_adapter(path: Path, model: Transformer, names: Names | None = None) -> Transformer:
    """Give the model, which has none, the adapters that `save_adapter` or peft wrote into the folder `path`.

    ValueError that names what is in the folder and has no place here: a setting of peft that makes it more than
    scale B A, a tensor without a layer, a layer without a tensor.
    """
    config, tensors = _read(path)
    names = names or transformers_names(model)
    theirs = {module: name for name, modules in names.items() for module in modules}
    found = set()
    for key in tensors:
        module = key.removeprefix("base_model.model.").partition(".lora_")[0]
        if module.endswith((".experts", ".experts.base_layer")):
            found |= _stacks(module, config)
        elif module in theirs:
            found.add(theirs[module].rpartition(".")[2])
        else:
            near = difflib.get_close_matches(module, theirs, 1)
            hint = f"; the nearest here is {near[0]}" if near else ""
            raise ValueError(f"{path} adapts {module}, which this model has no layer for{hint}")
    rank = config["r"]
    alpha = config["lora_alpha"] * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
    add_lora(model, Lora(rank, alpha, tuple(sorted(found))), seed=0)
    adapters = adapters_of(model)
    for name, adapter in adapters.items():
        stacked = _is_stack(model, name)
        for part, (key, _) in enumerate(_places(name, names, adapters, stacked)):
            for letter, target in (("A", adapter.A), ("B", adapter.B)):
                tensor = tensors.pop(f"{key}.lora_{letter}.weight", None)
                if tensor is None:
                    raise ValueError(
                        f"{path} has no {key}.lora_{letter}.weight; a target is adapted in every layer"
                    )
                if stacked and letter == "A":
                    tensor = tensor.unflatten(0, (len(adapter.A), -1))
                elif stacked:
                    tensor = tensor.unflatten(1, (-1, len(adapter.A))).permute(2, 0, 1)
                place = target if stacked else target[part]
                if tensor.shape != place.shape:
                    raise ValueError(
                        f"{path}: {key}.lora_{letter} is {tuple(tensor.shape)} here; expected {tuple(place.shape)}"
                    )
                with torch.no_grad():
                    place.copy_(tensor)
    if tensors:
        raise ValueError(f"{path} has {min(tensors)}, which is of no use here")
    return model


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((path / CONFIG).read_text())
        tensors = load_file(path / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} holds no adapter of peft ({CONFIG} and {TENSORS}): {error}") from error
    for name, neutral in NEUTRAL.items():
        if (given := config.get(name, neutral)) != neutral and (given or neutral):
            raise ValueError(f"{path}/{CONFIG} has {name} {given!r}; supported is {neutral!r}")
    # peft puts a copy of an adapted head's own weight in; it is the base model's.
    return config, {name: t for name, t in tensors.items() if not name.endswith(".base_layer.weight")}


def _stacks(module: str, config: Mapping[str, Any]) -> set[str]:
    """Which stack of experts the tensors at this module belong to."""
    given = {name.rpartition(".")[2] for name in config.get("target_parameters") or ()}
    stacks = {ours for ours in ("gate_up", "down") if f"{ours}_proj" in given}
    if not stacks:
        raise ValueError(f"the adapter has tensors of {module}, and its target_parameters name no experts")
    return stacks


def _places(name: str, names: Names, adapters: Mapping[str, Adapter], stacked: bool) -> list[tuple[str, str]]:
    """For each part: the beginning of its tensors' names, and the module or parameter of the other model."""
    if name not in names:
        raise ValueError(f"{name} has no counterpart in the transformers model, so peft cannot adapt it")
    places = []
    for theirs in names[name]:
        module = theirs
        if stacked:
            module = theirs.rpartition(".")[0]
            both = name.removesuffix("gate_up") + "down" in adapters
            module += ".base_layer" if name.endswith(".gate_up") and both else ""
        places.append((f"base_model.model.{module}", theirs))
    return places


def _is_stack(model: Transformer, name: str) -> bool:
    holder, _, leaf = name.rpartition(".")
    return leaf != "gate" and isinstance(model.get_submodule(holder), Experts)


def _write(path: Path, fill: Callable[[Path], object]) -> None:
    """A file that appears whole or not at all."""
    writing = path.with_name(path.name + ".tmp")
    fill(writing)
    os.replace(writing, path)

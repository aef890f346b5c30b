"""What lies at a place where a model should: told in one sentence before anything is opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from leansd.errors import LeansdError, read_cause
from leansd.surgery.checkpoints import POINTER, find_variant, is_pointer

INDEX = "model_index.json"
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that a pipeline draws without."""
_SCHEDULER = "scheduler/scheduler_config.json"
_LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_config.json")
_LORA_MARKS = (
    "lora_unet_",
    "lora_te",
    ".lora_A.",
    ".lora_B.",
    ".lora_down.",
    ".lora_up.",
    ".lora.",
)
# What a tensor's name says about the file that it is in; the first that fits counts.
_KINDS: Mapping[str, str] = {
    "control_model.": "a ControlNet",
    "controlnet_cond_embedding.": "a ControlNet",
    "ip_adapter.": "an IP-Adapter",
    "image_proj.": "an IP-Adapter",
    "double_blocks.": "a Flux transformer, which has no UNet",
    "model.diffusion_model.double_blocks.": "a Flux transformer, which has no UNet",
    "joint_blocks.": "a Stable Diffusion 3 transformer, which has no UNet",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 transformer, which has no UNet",
    "down_blocks.": "a UNet by itself",
    "text_model.": "a text encoder by itself",
    "decoder.": "an autoencoder by itself",
    "encoder.": "an autoencoder by itself",
    "emb_params": "a textual inversion",
}


class Contents(NamedTuple):
    """How a model's folder is to be opened."""

    variant: str | None
    """What stands in the names of its weights, `fp16`; None where nothing does."""
    absent: tuple[str, ...]
    """Parts that its index names and that are not there; it is opened without them."""


def find_snapshot(folder: Path) -> Path | None:
    """The model in the root of a hub cache's repository (`models--owner--name`), if it is one."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return None
    main = folder / "refs" / "main"
    names = [main.read_text(encoding="utf-8").strip()] if main.is_file() else []
    newest = sorted(snapshots.iterdir(), key=lambda each: each.stat().st_mtime, reverse=True)
    for found in (*(snapshots / name for name in names), *newest):
        if (found / INDEX).is_file() or (found / "config.json").is_file():
            return found
    name = folder.name.removeprefix("models--").replace("--", "/")
    raise LeansdError(f"{folder} is a hub cache without a whole model: fetch {name} again")


def describe_folder(folder: Path) -> str:
    """What a folder without a model index is, and what to do with it."""
    if any((folder / name).is_file() for name in _LORA_FILES):
        return f"{folder} is a LoRA, not a model: open the model that it is for, then {_LORA}"
    if (folder / "config.json").is_file():
        kind = _read_json(folder / "config.json").get("_class_name")
        if folder.name == "unet" and (folder.parent / INDEX).is_file():
            return f"{folder} is a model's UNet: give the whole model, {folder.parent}"
        if kind is not None and "UNet" in str(kind):
            return (
                f"{folder} is a UNet by itself ({kind}), not a model: give the model that it is "
                "for, and set `pipe.unet = leansd.load_unet(folder)`"
            )
        named = f"the part {kind} of a model" if kind else "a part of a model"
        return f"{folder} is {named}: give the whole model's folder"
    caches = sorted(each.name for each in folder.glob("models--*"))
    if caches:
        found = ", ".join(caches[:3]) + (", ..." if len(caches) > 3 else "")
        return f"{folder} is a hub cache: give one of the models in it ({found})"
    files = sorted(each.name for each in folder.glob("*.safetensors"))
    if files:
        return f"{folder} has no {INDEX}: give the file in it, {folder / files[0]}"
    return ""


_LORA = "`pipe.load_lora_weights(...)`"


def read_folder(folder: Path) -> Contents:
    """Look through a model's folder: parts, weights, their names.

    Raises:
        LeansdError: a part that it needs, or its weights, are missing, not safetensors, or only
            pointers; the message names the part and says what to do.
    """
    parts = {
        name: entry
        for name, entry in _read_json(folder / INDEX).items()
        if not name.startswith("_") and isinstance(entry, list) and entry[0] is not None
    }
    absent = tuple(n for n in OPTIONAL if n in parts and not (folder / n).is_dir())
    if "feature_extractor" in absent and "safety_checker" in parts:
        absent = tuple(dict.fromkeys((*absent, "safety_checker")))
    if not (folder / _SCHEDULER).is_file() and ("scheduler" in parts or "unet" in parts):
        raise LeansdError(
            f"{folder} has no {_SCHEDULER}: copy it from the model that this one was made of; "
            "without it nobody knows which noise the UNet was trained on"
        )
    variants: dict[str, tuple[str | None, ...]] = {}
    for name in parts:
        if name in absent:
            continue
        if not (folder / name).is_dir():
            raise LeansdError(f"{folder} has no folder {name}, which its {INDEX} names")
        if (folder / name / "config.json").is_file():
            _read_json(folder / name / "config.json")  # diffusers would not say which is damaged
            variants[name] = find_variant(folder / name, what=f"the {name} in {folder}")
    lacking = [found for found in variants.values() if None not in found]
    if not lacking:
        return Contents(None, absent)
    shared = [each for each in lacking[0] if all(each in others for others in lacking)]
    if not shared:
        raise LeansdError(
            f"the parts in {folder} have weights of no common variant: "
            + ", ".join(f"{name} {found[0]}" for name, found in variants.items() if found[0])
        )
    return Contents("fp16" if "fp16" in shared else shared[0], absent)


def check_file(file: Path) -> frozenset[str]:
    """The names of the tensors in a whole model's single file.

    Raises:
        LeansdError: it cannot be read, or is something else; the message says what.
    """
    if is_pointer(file):
        raise LeansdError(f"{file} {POINTER}")
    try:
        with safe_open(file, framework="pt") as weights:
            keys = frozenset(weights.keys())
    except (SafetensorError, OSError) as error:
        why = read_cause(error)
        raise LeansdError(f"{file} is not a readable .safetensors file: {why}") from error
    if any(mark in key for key in keys for mark in _LORA_MARKS):
        raise LeansdError(
            f"{file} is a LoRA, not a model: open the model that it is for, then {_LORA}"
        )
    for beginning, kind in _KINDS.items():
        if any(key.startswith(beginning) for key in keys):
            raise LeansdError(
                f"{file} is {kind}, not a whole model: give a Stable Diffusion checkpoint, or a "
                "folder in the diffusers layout"
            )
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise LeansdError(
            f"{file} holds no Stable Diffusion checkpoint (its first tensor is "
            f"{min(keys, default='missing')}): give one, or a folder in the diffusers layout"
        )
    return keys


def _read_json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LeansdError(f"{file} is damaged: it is not JSON") from error
    if not isinstance(read, dict):
        raise LeansdError(f"{file} is damaged: it holds no table")
    return read

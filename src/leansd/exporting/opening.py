"""What a user means by a net: a UNet, a pipeline, a UNet's folder, or a model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import UNet2DConditionModel

from leansd.errors import LeansdError
from leansd.loading import EMBEDDED, locate, silent_loading
from leansd.runtime.samplers import name_sampler

FORMS = f"give {EMBEDDED!r}, a UNet's folder with a config.json, or a model in the diffusers layout"


class Net(NamedTuple):
    """A UNet and, where it is known, the short name of the sampler that it is used with."""

    unet: UNet2DConditionModel
    sampler: str


def open_net(net: Any) -> Net:
    """Open what `export` was given, in float32 where it has to be read.

    Raises:
        LeansdError: there is no UNet in it.
    """
    if isinstance(net, UNet2DConditionModel):
        return Net(net, "")
    if isinstance(getattr(net, "unet", None), UNet2DConditionModel):
        return Net(net.unet, name_sampler(net))
    if not isinstance(net, str | Path):
        raise LeansdError(f"no UNet in a {type(net).__name__}: give a UNet or a pipeline; {FORMS}")
    return Net(_load_unet(find_unet(net)), read_sampler(net))


def find_unet(net: str | Path) -> Path:
    """The folder of the UNet that a user means.

    Raises:
        LeansdError: there is none.
    """
    home = _find_home(net)
    folder = home / "unet" if (home / "model_index.json").is_file() else home
    if not (folder / "config.json").is_file():
        raise LeansdError(f"no UNet in {net}: {FORMS}")
    return folder


def _find_home(net: str | Path) -> Path:
    """The folder of a model, or of what may be a UNet."""
    if str(net) != EMBEDDED:
        return Path(net).expanduser()
    home = locate(net)
    assert isinstance(home, Path)
    return home


def open_outline(folder: Path) -> UNet2DConditionModel:
    """The UNet of a folder on the meta device: its whole shape, from its config alone."""
    config = _read_config(folder)
    with torch.device("meta"):
        return _find_class(config, folder).from_config(config).eval()


def _load_unet(folder: Path) -> UNet2DConditionModel:
    kind = _find_class(_read_config(folder), folder)
    try:
        with silent_loading():
            return kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32
            ).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise LeansdError(f"cannot open the UNet in {folder}: {reason}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LeansdError(f"no UNet in {folder}: {FORMS}") from error


def _find_class(config: dict[str, Any], folder: Path) -> type[UNet2DConditionModel]:
    name = config.get("_class_name", "model of no class")
    if name != UNet2DConditionModel.__name__:
        raise LeansdError(f"{folder} holds a {name}, not a UNet2DConditionModel; {FORMS}")
    return UNet2DConditionModel


def read_sampler(net: str | Path) -> str:
    """The short name of a model's sampler; empty where a net is a UNet's folder alone."""
    file = _find_home(net) / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    except (OSError, ValueError, KeyError, AttributeError):
        return ""
    return name_sampler(SimpleNamespace(scheduler=scheduler))  # pyright: ignore[reportArgumentType]

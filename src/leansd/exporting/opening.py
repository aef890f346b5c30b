"""What a user means by a net: a UNet, a pipeline, a UNet's folder, or a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel

from leansd.errors import LeansdError
from leansd.loading import EMBEDDED, is_unet_folder, load_unet, locate, read_sampler
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
    unet = load_unet(find_home(net), device="cpu", dtype=torch.float32)
    return Net(unet, read_sampler(net))


def name_source(net: Any) -> str:
    """What `export` was given by name, a folder or a hub id; nothing where none is known."""
    if isinstance(net, str | Path):
        return str(net)
    unet = getattr(net, "unet", net)
    return str(getattr(net, "name_or_path", "") or unet.config.get("_name_or_path") or "")


def find_home(net: str | Path) -> Path:
    """The folder of a UNet or of a whole model.

    Raises:
        LeansdError: it is neither.
    """
    home = Path(net).expanduser()
    if str(net) == EMBEDDED:
        found = locate(net)
        assert isinstance(found, Path)
        return found
    if not is_unet_folder(home) and not (home / "unet" / "config.json").is_file():
        raise LeansdError(f"no UNet in {net}: {FORMS}")
    return home

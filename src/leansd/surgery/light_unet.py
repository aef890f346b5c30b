"""UNets that no diffusers config can express: what the config builds, less and other than that."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from leansd.anatomy.reading import SkippedAttention, read_anatomy
from leansd.errors import LeansdError
from leansd.plans.address import SEPARATOR, get_block, get_layer
from leansd.surgery.edits import read_name
from leansd.surgery.parts import AddressedUNet
from leansd.surgery.parts.gri import call_at_size
from leansd.surgery.replacements import find_replacement


class LightUNet2DConditionModel(UNet2DConditionModel):
    """A `UNet2DConditionModel` whose config says what to take out of it and what to replace.

    `structure` is plain JSON: `{"drop": [addresses], "replace": [{"at", "by", "options"}]}`. What
    is dropped names the network that the rest of the config builds, what is replaced the finished
    one. Saving, loading, pipelines, LoRA and `leansd.inherit` work as for any UNet.
    """

    def __init__(self, structure: Mapping[str, Any] | None = None, **config: Any) -> None:
        super().__init__(**config)
        structure = structure or {}
        self.register_to_config(structure=structure)
        drop_places(self, structure.get("drop", ()))
        net = AddressedUNet.read(self)
        for each in structure.get("replace", ()):
            replace_place(net, each["at"], by=read_name(each["by"]), options=each["options"])

    # diffusers takes from a saved config what the signature names.
    __init__.__signature__ = inspect.signature(UNet2DConditionModel.__init__).replace(  # type: ignore[attr-defined]
        parameters=[
            *inspect.signature(UNet2DConditionModel.__init__).parameters.values(),
            inspect.Parameter("structure", inspect.Parameter.KEYWORD_ONLY, default=None),
        ]
    )

    @functools.wraps(UNet2DConditionModel.forward)
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, sample: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """A UNet's forward; what depends on the size of the latents [B, C, H, W] knows it."""
        height, width = sample.shape[-2:]
        return call_at_size((height, width), super().forward, sample, *args, **kwargs)

    def get_time_embed(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor | None:
        """One row for a time step that all samples share, where kernels are merged by it.

        They are then merged once. Elsewhere it is any UNet's, to the bit.
        """
        config: Any = self.config
        is_shared = not isinstance(timestep, torch.Tensor) or timestep.ndim == 0
        replaced = (config.structure or {}).get("replace", ())
        is_merged = any(each["by"] == "condconv" for each in replaced)
        # A class is joined to the embedding row by row.
        if is_shared and is_merged and not config.class_embeddings_concat:
            sample = sample[:1]
        return super().get_time_embed(sample, timestep)


# A saved pipeline names the module that its parts' classes are from, and diffusers opens it again
# once that module is imported: `import leansd` is to be enough.
LightUNet2DConditionModel.__module__ = "leansd"


def read_config(unet: UNet2DConditionModel) -> dict[str, Any]:
    """The entries that a UNet is built by, without diffusers' own notes."""
    return {name: value for name, value in unet.config.items() if not name.startswith("_")}


def build_outline(
    config: Mapping[str, Any], structure: Mapping[str, Any] | None = None
) -> UNet2DConditionModel:
    """The network of a config, on the meta device; a plain one without a structure."""
    with torch.device("meta"):
        if structure is None:
            return UNet2DConditionModel(**config)
        return LightUNet2DConditionModel(structure, **config)


def drop_places(unet: UNet2DConditionModel, addresses: Iterable[str]) -> None:
    """Take modules out, in place; all addresses are those before anything is taken out.

    Raises:
        LeansdError: an address names nothing that can be dropped.
    """
    gone = set(addresses)
    units = set(read_anatomy(unet).by_address)
    layers = {get_layer(at) for at in units}
    for at in sorted(gone):
        block = _find_block(unet, at)
        is_block = any(each.startswith(at + ".sa") or each == at + ".ff" for each in units)
        if at in layers and at.endswith(".down"):
            block.downsamplers = None
        elif at in layers and at.endswith(".up"):
            block.upsamplers = None
            unet.num_upsamplers -= 1
        elif at in units and at.endswith(".attn"):
            block.attentions[int(_get_number(at, 1))] = SkippedAttention()
        elif not (at in layers or is_block):
            raise LeansdError(f"{at} cannot be dropped from what the config builds")
    for at in {at.rpartition(SEPARATOR)[0] for at in gone if at.count(SEPARATOR) == 3}:
        attention = _find_block(unet, at).attentions[_get_number(at, 1)]
        attention.transformer_blocks = _thin(attention.transformer_blocks, at + ".t", gone)
    for at in {get_block(at) for at in gone if at.rpartition(".l")[2].isdecimal()}:
        block = _find_block(unet, at)
        block.resnets = _thin(block.resnets, at + ".l", gone)
        if hasattr(block, "attentions"):
            block.attentions = _thin(block.attentions, at + ".l", gone)


def replace_place(net: AddressedUNet, at: str, *, by: str, options: Mapping[str, Any]) -> None:
    """Put something in the place of a unit or a part, in place."""
    replacement = find_replacement(by)
    replacement.validate(net.anatomy[at], options)
    replacement.build(net, at, options)


def _thin(modules: nn.ModuleList, prefix: str, gone: set[str]) -> nn.ModuleList:
    """The modules whose addresses, `prefix` and a number, are not gone."""
    kept = [each for number, each in enumerate(modules) if f"{prefix}{number}" not in gone]
    return nn.ModuleList(kept)


def _find_block(unet: UNet2DConditionModel, at: str) -> Any:
    block = get_block(at)
    if block == "mid":
        return unet.mid_block
    blocks = unet.down_blocks if block.startswith("dn") else unet.up_blocks
    return blocks[int(block[2:])]


def _get_number(at: str, depth: int) -> int:
    """The number in a part of an address: 1 of `dn0.l1.attn` at depth 1."""
    return int(at.split(SEPARATOR)[depth].lstrip("lt"))

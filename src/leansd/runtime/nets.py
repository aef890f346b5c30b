"""Several UNets of one pipeline: what of them is the same, and who runs at a step.

Two units are the same where they compute the same function: modules of the same kinds with equal
weights, behind the same embedding of the time step. An assembled student has the deep part of its
teacher, so that what either computes there both may inherit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from leansd.anatomy.reading import read_anatomy
from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, Anatomy
from leansd.plans.liveness import GUIDANCE, Net
from leansd.plans.row import OWN

EMBEDDINGS = ("time_embedding", "add_embedding", "class_embedding", "encoder_hid_proj")
"""What units are given besides each other's outputs and the text, by attribute of the UNet."""
BEFORE_HEAD = "conv_norm_out"
"""The norm that lies in no unit; the head's output depends on it."""
INTERFACE = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "time_cond_proj_dim",
)
"""What of a config decides how a UNet is called."""


@dataclass(frozen=True, eq=False)
class NetSet:
    """The UNets that a plan may run besides the pipeline's own."""

    unets: Mapping[str, UNet2DConditionModel] = field(default_factory=dict)
    nets: Mapping[str, Net] = field(default_factory=dict)


NO_OTHERS = NetSet()


def match_nets(own: UNet2DConditionModel, unets: Mapping[str, UNet2DConditionModel]) -> NetSet:
    """Find out what of some UNets is the same.

    Raises:
        LeansdError: one cannot take the place of the pipeline's own.
    """
    if not unets:
        return NO_OTHERS
    seen: dict[str, tuple[UNet2DConditionModel, Anatomy]] = {OWN: (own, read_anatomy(own))}
    nets: dict[str, Net] = {}
    for name, unet in unets.items():
        check_place(name, unet, own)
        anatomy = read_anatomy(unet)
        nets[name] = Net(anatomy, name_units(name, unet, anatomy, seen))
        seen[name] = (unet, anatomy)
    return NetSet(dict(unets), nets)


def check_place(name: str, unet: UNet2DConditionModel, own: UNet2DConditionModel) -> None:
    """Refuse a net that cannot be called as the pipeline's own UNet is."""
    if not name or not isinstance(unet, UNet2DConditionModel):
        raise LeansdError(
            f"nets[{name!r}] is a {type(unet).__name__}; give UNets under names of their own"
        )
    if unet is own:
        raise LeansdError(f"net {name!r} is the pipeline's own UNet: leave it out")
    for key in INTERFACE:
        theirs, mine = unet.config.get(key), own.config.get(key)
        if theirs != mine:
            raise LeansdError(
                f"net {name!r} cannot take the place of the pipeline's UNet: its {key} is "
                f"{theirs}, not {mine}"
            )
    # Offloaded weights lie nowhere until they are used; whoever offloads one UNet does all.
    is_away = "meta" in (unet.device.type, own.device.type)
    if unet.dtype != own.dtype or not (is_away or unet.device == own.device):
        raise LeansdError(
            f"net {name!r} lies on {unet.device} in {unet.dtype}, the pipeline's UNet on "
            f"{own.device} in {own.dtype}: move it with net.to(pipe.device, pipe.dtype)"
        )


def name_units(
    name: str,
    unet: UNet2DConditionModel,
    anatomy: Anatomy,
    seen: Mapping[str, tuple[UNet2DConditionModel, Anatomy]],
) -> dict[str, str]:
    """What the units and parts of a net are called: as those of the first net that has the same."""
    names = {at: f"{name}:{at}" for at in anatomy.by_address}
    names[GUIDANCE] = f"{name}:{GUIDANCE}"
    for other, (theirs, there) in reversed(list(seen.items())):
        if not share_embeddings(unet, theirs):
            continue
        found = find_same(unet, anatomy, theirs, there)
        for at, twin in found.items():
            names[at] = twin if other == OWN else f"{other}:{twin}"
        if found.get(HEAD) == HEAD:
            names[GUIDANCE] = GUIDANCE if other == OWN else f"{other}:{GUIDANCE}"
    return names


def share_embeddings(one: nn.Module, other: nn.Module) -> bool:
    """Whether the units of both are told the time step alike."""
    pairs = [(getattr(one, at, None), getattr(other, at, None)) for at in EMBEDDINGS]
    return all(
        mine is theirs or (mine is not None and theirs is not None and is_same(mine, theirs))
        for mine, theirs in pairs
    )


def find_same(
    unet: nn.Module, anatomy: Anatomy, other: nn.Module, there: Anatomy
) -> dict[str, str]:
    """The other's address of every unit, and part of one, that the other has as well."""
    places: dict[object, list[str]] = {}
    for unit in there:
        places.setdefault(sign(other.get_submodule(unit.path)), []).append(unit.at)
    same: dict[str, str] = {}
    for unit in anatomy:
        module = unet.get_submodule(unit.path)
        candidates = places.get(sign(module), [])
        # A unit of the same address first: untrained ones may all be alike.
        for at in sorted(candidates, key=lambda at: at != unit.at):
            if is_same(module, other.get_submodule(there[at].path)):
                same[unit.at] = at
                break
    for part in anatomy.parts:
        home = part.reads[0]
        if home in same:
            same[part.at] = same[home] + part.at.removeprefix(home)
    if not is_same(unet.get_submodule(BEFORE_HEAD), other.get_submodule(BEFORE_HEAD)):
        same.pop(HEAD, None)
    return same


def sign(module: nn.Module) -> tuple[object, ...]:
    """What modules that are the same have in common, and others hardly ever."""
    tensors = list(module.state_dict().values())
    few = tensors[0].flatten()[:4].tolist() if tensors and not tensors[0].is_meta else ()
    return (*describe_kinds(module), *(tuple(each.shape) for each in tensors), *few)


def describe_kinds(module: nn.Module) -> list[object]:
    """What a module is made of, its weights apart: also how its attentions attend."""
    kinds: list[object] = []
    for each in module.modules():
        kinds.append(type(each))
        processor: Any = getattr(each, "processor", None)
        if processor is not None:
            kinds += [type(processor), repr(sorted(vars(processor).items()))]
    return kinds


def is_same(one: nn.Module, other: nn.Module) -> bool:
    """Whether both compute the same function: the same kinds of modules with equal tensors."""
    if describe_kinds(one) != describe_kinds(other):
        return False
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        are_equal(tensor, theirs[key]) for key, tensor in mine.items()
    )


def are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one, or hold the same numbers, as far as can be seen."""
    if one.is_meta or other.is_meta:
        return False
    if one.data_ptr() == other.data_ptr() and one.shape == other.shape:
        return True
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)

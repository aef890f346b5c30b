"""Operating on UNets: everything is checked on the meta device, then weights are copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from leansd.errors import LeansdError
from leansd.plans.anatomy import Anatomy
from leansd.surgery.blueprint import Blueprint, Source, lay_out_surgery, make_lineage
from leansd.surgery.edits import Surgery
from leansd.surgery.light_unet import build_outline, replace_place
from leansd.surgery.lineage import Lineage, Origin
from leansd.surgery.parts import AddressedUNet
from leansd.surgery.presets import find_surgery
from leansd.surgery.replacements import find_replacement
from leansd.surgery.to_config import BuildConfig, make_config

NetOrNets: TypeAlias = UNet2DConditionModel | Mapping[str, UNet2DConditionModel]
BASE = "original"
"""What a net that is given without a name is called."""
_BLOCKS = "transformer_blocks"


class Donor(NamedTuple):
    """A tensor of one of the nets."""

    net: str
    name: str


@dataclass(frozen=True)
class Operation:
    """An operation that can be done: nothing is copied yet."""

    surgery: Surgery
    nets: Mapping[str, AddressedUNet]
    blueprint: Blueprint
    build: BuildConfig
    lineage: Lineage
    donors: Mapping[str, Donor]
    """Donors by tensor of the finished net before anything is replaced."""
    bare: AddressedUNet
    """The net before anything is replaced, on the meta device."""
    outline: UNet2DConditionModel
    """The finished net, on the meta device."""


def operate(nets: NetOrNets, surgery: Surgery | str | Path) -> tuple[UNet2DConditionModel, Lineage]:
    """A new UNet with the structure that a surgery makes, its weights, and where they come from.

    What is given is never touched, and nothing is shared with it. The new UNet is a plain
    `UNet2DConditionModel` where its config can say what it is, else a `LightUNet2DConditionModel`;
    dtype, device and training mode are those of the first net, which may be on the meta device.
    Copying weights by structure is as in BK-SDM (arXiv 2305.15798), putting a UNet together from
    several as in A-SDM (arXiv 2406.00210). An IP-Adapter does not come along: load it again.

    Args:
        nets: a UNet, or UNets by name: the first is operated on, `take` names the others.
        surgery: a surgery, its preset's name, or its file.

    Raises:
        LeansdError: an edit cannot be done, or what is left does not fit together. The message
            names the address. No weight was copied then.
    """
    plan = plan_operation(nets, surgery)
    base = plan.nets[plan.lineage.base].unet
    device, dtype = base.device, base.dtype  # diffusers looks for them at every call
    states = {name: net.unet.state_dict() for name, net in plan.nets.items()}
    student = plan.bare.unet
    student.load_state_dict(
        {
            name: _copy(
                states[donor.net][donor.name],
                device,
                None if donor.net == plan.lineage.base else dtype,
            )
            for name, donor in plan.donors.items()
        },
        strict=False,
        assign=True,
    )
    _replace_places(plan, base)
    tensors = chain(student.parameters(), student.buffers())
    if base.device.type != "meta" and any(tensor.is_meta for tensor in tensors):
        raise LeansdError("the new net has tensors that come from nowhere")
    return student.train(base.training), plan.lineage


def plan_operation(nets: NetOrNets, surgery: Surgery | str | Path) -> Operation:
    """Everything about an operation but its weights.

    Raises:
        LeansdError: it cannot be done.
    """
    surgery = find_surgery(surgery)
    given = nets if isinstance(nets, Mapping) else {BASE: nets}
    named = {name: AddressedUNet.read(net) for name, net in given.items()}
    sources = {name: Source.read(name, net.unet) for name, net in named.items()}
    blueprint = lay_out_surgery(sources, surgery)
    build = make_config(blueprint)
    lineage = make_lineage(blueprint, surgery.name, surgery.fingerprint)
    structure = None if build.is_plain else build.structure
    bare_structure = structure and {**structure, "replace": []}
    bare = AddressedUNet.read(build_outline(build.config, bare_structure))
    _check_outline(blueprint, bare.anatomy)
    came = [
        path
        for each in build.replaced
        if not each.is_new
        for path in find_replacement(each.by).reaches(bare.anatomy[each.at].path)
    ]
    donors = map_tensors(bare, lineage, named, skip=came)
    outline = build_outline(build.config, structure) if build.replaced else bare.unet
    return Operation(surgery, named, blueprint, build, lineage, donors, bare, outline)


def map_tensors(
    student: AddressedUNet,
    lineage: Lineage,
    nets: Mapping[str, AddressedUNet],
    *,
    skip: Sequence[str] = (),
) -> dict[str, Donor]:
    """For every tensor of the student, the tensor that it is a copy of.

    Args:
        skip: module paths of the student to leave out.

    Raises:
        LeansdError: there is none of that name and shape: the config of the net does not describe
            what it is made of. The message names the address.
    """
    theirs = {name: net.unet.state_dict() for name, net in nets.items()}
    prefixes = _map_prefixes(student.anatomy, lineage, nets)
    found: dict[str, Donor] = {}
    for name, tensor in student.unet.state_dict().items():
        if name.startswith(tuple(f"{path}." for path in skip)):
            continue
        prefix = _find_prefix(name, prefixes)
        at, (net, path) = prefixes[prefix] if prefix else ("", (lineage.base, ""))
        donor = Donor(net, path + name.removeprefix(prefix))
        other = theirs[net].get(donor.name)
        if other is None or other.shape != tensor.shape:
            raise LeansdError(_explain(at or name, donor, other, tensor))
        found[name] = donor
    return found


def _map_prefixes(
    anatomy: Anatomy, lineage: Lineage, nets: Mapping[str, AddressedUNet]
) -> dict[str, tuple[str, Donor]]:
    """Address and donor by the student's module path."""
    prefixes: dict[str, tuple[str, Donor]] = {}
    for at, origin in lineage.origins.items():
        theirs = nets[origin.net].anatomy.by_address
        unit, _, block = at.partition(".attn.t")
        if not block:
            donor = Donor(origin.net, theirs[origin.at].path)
            prefixes[anatomy.by_address[at].path] = (at, donor)
            continue
        whole, _, number = origin.at.partition(".attn.t")
        donor = Donor(origin.net, f"{theirs[whole + '.attn'].path}.{_BLOCKS}.{number}")
        inner = anatomy.by_address[unit + ".attn"].path
        prefixes[f"{inner}.{_BLOCKS}.{block}"] = (at, donor)
    return prefixes


def _find_prefix(name: str, prefixes: Mapping[str, object]) -> str:
    """The longest of the paths that a tensor lies under; empty for one outside all units."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        path = ".".join(parts[:depth])
        if path in prefixes:
            return path
    return ""


def _explain(at: str, donor: Donor, found: torch.Tensor | None, wanted: torch.Tensor) -> str:
    if found is None:
        has = f"no tensor {donor.name}"
    else:
        has = f"{donor.name} of shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    return (
        f"{at}: net {donor.net} has {has}, so its config does not describe it; unload its LoRA if "
        "it has one, operate before it is quantised, or open it with the config that it was saved "
        "with"
    )


def _check_outline(blueprint: Blueprint, anatomy: Anatomy) -> None:
    """Check that what was built is what the blueprint says, unit for unit."""
    for piece, unit in zip(blueprint.pieces, anatomy, strict=False):
        wanted = piece.unit
        if (wanted.at, wanted.kind, wanted.channels, wanted.reads) != (
            unit.at,
            unit.kind,
            unit.channels,
            unit.reads,
        ):
            raise LeansdError(
                f"{piece.place} ({wanted.channels[0]} to {wanted.channels[1]} channels) would "
                f"become {unit.at} ({unit.channels[0]} to {unit.channels[1]}): diffusers builds no "
                "such network; keep the layers of its block alike"
            )
    if len(blueprint.pieces) != len(anatomy):
        raise LeansdError(
            f"the new net would have {len(anatomy)} units instead of {len(blueprint.pieces)}: "
            "diffusers builds no such network"
        )


def _copy(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.detach().to(device=device, dtype=dtype or tensor.dtype, copy=True)


@torch.no_grad()
def _replace_places(plan: Operation, base: UNet2DConditionModel) -> None:
    """Build what stands in the place of units; weights of its own are the same every time."""
    if not plan.build.replaced:
        return
    student = plan.bare
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for piece in plan.blueprint.pieces:
            for each, before in zip(piece.list_replaced(), piece.replaced, strict=True):
                origin = Origin(piece.origin.net, before.at)
                if not each.is_new:
                    # What came as it is: the place of its weights, and then the weights themselves.
                    student.find(each.at).to_empty(device=base.device)
                replace_place(student, each.at, by=each.by, options=each.options)
                # That of `nn.Module`: diffusers' own warns where it has nothing to warn of.
                module = nn.Module.to(student.find(each.at), device=base.device, dtype=base.dtype)
                if each.is_new:
                    inherit = find_replacement(each.by).inherit
                    inherit(student, each.at, plan.nets, origin, each.options)
                else:
                    module.load_state_dict(plan.nets[origin.net].find(origin.at).state_dict())
    student.unet.register_to_config(structure=plan.build.structure)

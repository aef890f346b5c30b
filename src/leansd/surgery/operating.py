"""Operating on UNets: everything is checked on the meta device, then weights are copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from leansd.anatomy.reading import find_unet, read_anatomy
from leansd.errors import LeansdError
from leansd.plans.anatomy import Anatomy
from leansd.surgery.blueprint import Replaced, Source, draw_blueprint
from leansd.surgery.edits import Surgery
from leansd.surgery.expression import Expression, express
from leansd.surgery.layout import Layout, lay_out, make_lineage
from leansd.surgery.light import LightUNet2DConditionModel, replace_place
from leansd.surgery.lineage import Lineage, Origin
from leansd.surgery.presets import find_surgery
from leansd.surgery.replacements import find_replacement
from leansd.surgery.weights import Donor, map_tensors

Nets: TypeAlias = UNet2DConditionModel | Mapping[str, UNet2DConditionModel]
BASE = "original"
"""What a net that is given without a name is called."""


@dataclass(frozen=True)
class Draft:
    """An operation that can be done: nothing is copied yet."""

    surgery: Surgery
    nets: Mapping[str, UNet2DConditionModel]
    layout: Layout
    expression: Expression
    lineage: Lineage
    donors: Mapping[str, Donor]
    """By tensor of the finished net before anything is replaced."""
    bare: UNet2DConditionModel
    """That net, on the meta device."""
    outline: UNet2DConditionModel
    """The finished net, on the meta device."""


def operate(nets: Nets, surgery: Surgery | str | Path) -> tuple[UNet2DConditionModel, Lineage]:
    """A new UNet with the structure that a surgery makes, its weights, and where they come from.

    What is given is never touched, and nothing is shared with it. The new UNet is a plain
    `UNet2DConditionModel` where its config can say what it is, else a `LightUNet2DConditionModel`;
    dtype, device and training mode are those of the first net, which may be on the meta device.
    Copying weights by structure is as in BK-SDM (arXiv 2305.15798), putting a UNet together from
    several as in A-SDM (arXiv 2406.00210).

    Args:
        nets: a UNet, or UNets by name: the first is operated on, `take` names the others.
        surgery: a surgery, its preset's name, or its file.

    Raises:
        LeansdError: an edit cannot be done, or what is left does not fit together. The message
            names the address. No weight was copied then.
    """
    plan = draft(nets, surgery)
    base = plan.nets[plan.lineage.base]
    device, dtype = base.device, base.dtype  # diffusers looks for them at every call
    states = {name: net.state_dict() for name, net in plan.nets.items()}
    student = plan.bare
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
    _replace_places(student, plan, base)
    tensors = chain(student.parameters(), student.buffers())
    if base.device.type != "meta" and any(tensor.is_meta for tensor in tensors):
        raise LeansdError("the new net has tensors that come from nowhere")
    return student.train(base.training), plan.lineage


def draft(nets: Nets, surgery: Surgery | str | Path) -> Draft:
    """Everything about an operation but its weights.

    Raises:
        LeansdError: it cannot be done.
    """
    surgery = find_surgery(surgery)
    given = nets if isinstance(nets, Mapping) else {BASE: nets}
    named = {name: find_unet(net) for name, net in given.items()}
    sources = {name: describe_net(name, net) for name, net in named.items()}
    layout = lay_out_surgery(sources, surgery)
    expression = express(layout)
    lineage = make_lineage(layout, surgery.name, surgery.fingerprint)
    structure = None if expression.is_plain else expression.structure
    bare = _build(expression.config, structure and {**structure, "replace": []})
    paths = read_anatomy(bare)
    _check_outline(layout, paths)
    came = [
        path
        for each in expression.replaced
        if not each.is_new
        for path in find_replacement(each.by).reaches(paths.by_address[each.at].path)
    ]
    donors = map_tensors(bare, lineage, named, skip=came)
    outline = _build(expression.config, structure) if expression.replaced else bare
    return Draft(surgery, named, layout, expression, lineage, donors, bare, outline)


def lay_out_surgery(sources: Mapping[str, Source], surgery: Surgery) -> Layout:
    """What edits make of nets that are data."""
    blueprint = draw_blueprint(sources, surgery)
    try:
        return lay_out(blueprint)
    except LeansdError as error:
        raise LeansdError(f"surgery {surgery.name}: {error}") from None


def describe_net(name: str, net: UNet2DConditionModel) -> Source:
    """A net as data."""
    anatomy = read_anatomy(net, name=name)
    config: dict[str, Any] = {k: v for k, v in net.config.items() if not k.startswith("_")}
    if config.get("encoder_hid_dim_type") == "ip_image_proj":
        # An adapter's, which the new net is made without.
        has_text = getattr(net, "text_encoder_hid_proj", None) is not None
        config["encoder_hid_dim_type"] = "text_proj" if has_text else None
    structure = config.pop("structure", None) or {}
    replaced = tuple(
        Replaced(each["at"], each["by"], each["options"], is_new=False)
        for each in structure.get("replace", ())
    )
    return Source(anatomy, config, tuple(structure.get("drop", ())), replaced)


def _build(config: Mapping[str, Any], structure: Mapping[str, Any] | None) -> UNet2DConditionModel:
    """The network of a config, and a structure where there is one, on the meta device."""
    with torch.device("meta"):
        if structure is None:
            return UNet2DConditionModel(**config)
        return LightUNet2DConditionModel(structure, **config)


def _check_outline(layout: Layout, anatomy: Anatomy) -> None:
    """That what was built is what the layout says, unit for unit."""
    for row, unit in zip(layout.rows, anatomy, strict=False):
        wanted = (row.unit.at, row.unit.kind, row.unit.channels, row.unit.reads)
        if wanted != (unit.at, unit.kind, unit.channels, unit.reads):
            raise LeansdError(
                f"{row.piece.at} ({row.unit.channels[0]} to {row.unit.channels[1]} channels) would "
                f"become {unit.at} ({unit.channels[0]} to {unit.channels[1]}): diffusers builds no "
                "such network; keep the layers of its block alike"
            )
    if len(layout.rows) != len(anatomy):
        raise LeansdError(
            f"the new net would have {len(anatomy)} units instead of {len(layout.rows)}: diffusers "
            "builds no such network"
        )


def _copy(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.detach().to(device=device, dtype=dtype or tensor.dtype, copy=True)


@torch.no_grad()
def _replace_places(student: UNet2DConditionModel, plan: Draft, base: UNet2DConditionModel) -> None:
    """Build what stands in the place of units; weights of its own are the same every time."""
    if not plan.expression.replaced:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for row in plan.layout.rows:
            for each, before in zip(row.replaced, row.piece.replaced, strict=True):
                origin = Origin(row.piece.origin.net, before.at)
                _replace_place(student, each, origin, plan, base)
    student.register_to_config(structure=plan.expression.structure)


def _replace_place(
    student: UNet2DConditionModel,
    each: Replaced,
    origin: Origin,
    plan: Draft,
    base: UNet2DConditionModel,
) -> None:
    path = read_anatomy(student)[each.at].path
    if not each.is_new:
        # What came as it is: the place of its weights, and then the weights themselves.
        student.get_submodule(path).to_empty(device=base.device)
    replace_place(student, each.at, by=each.by, options=each.options)
    # That of `nn.Module`: diffusers' own warns where it has nothing to warn of.
    module = nn.Module.to(student.get_submodule(path), device=base.device, dtype=base.dtype)
    if each.is_new:
        find_replacement(each.by).inherit(student, each.at, plan.nets, origin, each.options)
        return
    net = plan.nets[origin.net]
    module.load_state_dict(net.get_submodule(read_anatomy(net)[origin.at].path).state_dict())

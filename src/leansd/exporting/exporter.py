"""`leansd.export`: a net as files that run elsewhere, in stock diffusers or in ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy.reading import read_anatomy
from leansd.cards import Card, write_card
from leansd.errors import LeansdError
from leansd.exporting.graphs import TABLE, check_out, require_packages
from leansd.exporting.onnx import OnExport, write_onnx
from leansd.files import writing
from leansd.loading import EMBEDDED, is_unet_folder, load_unet, locate, read_sampler
from leansd.plans.plan import Plan
from leansd.plans.resolve import PlanContext, find_source, resolve_plan
from leansd.runtime.samplers import check_sampler, name_sampler
from leansd.surgery.edits import read_name
from leansd.surgery.fold import fold
from leansd.surgery.light_unet import (
    LightUNet2DConditionModel,
    build_outline,
    read_config,
)

# -- stock diffusers -------------------------------------------------------------------------------

MERGED, FORGOTTEN = "condconv", "gri"
"""Replacements that a plain net can do without: kernels that can be merged, and an attention
processor, which has no weights."""
TIMESTEPS = 1000
"""Time steps of the noise schedule that UNets are trained on; merged kernels serve all of them."""


def to_plain(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The net itself where stock diffusers can hold it, or the plain one that is nearest to it.

    Conditional kernels are merged at the mean of their routings over all time steps; attention
    that was replaced by GRI runs in full. The result shares its weights with `unet`.

    Raises:
        LeansdError: stock diffusers cannot hold it; the message names the address.
    """
    if not isinstance(unet, LightUNet2DConditionModel):
        return unet
    structure: Any = unet.config.get("structure") or {}
    for at in structure.get("drop", ()):
        raise LeansdError(
            f"stock diffusers cannot hold a UNet without {at} only: no config of its says so; "
            "export to onnx, or open it with leansd.load_unet"
        )
    replaced: list[Mapping[str, Any]] = list(structure.get("replace", ()))
    for each in replaced:
        if each["by"] not in (MERGED, FORGOTTEN):
            raise LeansdError(
                f"stock diffusers cannot hold {read_name(each['by'])} at {each['at']}; export to "
                "onnx, or open it with leansd.load_unet"
            )
        if each["by"] == MERGED and each["options"].get("routing") == "image":
            raise LeansdError(
                f"stock diffusers cannot hold kernels routed by the image at {each['at']}: they "
                "cannot be merged beforehand; export to onnx, or open it with leansd.load_unet"
            )
    if any(each["by"] == MERGED for each in replaced):
        unet = fold(unet, range(TIMESTEPS))
    config = read_config(unet)
    config.pop("structure", None)
    plain = build_outline(config)
    plain.load_state_dict(unet.state_dict(), assign=True)
    return plain.train(unet.training)


def describe_losses(unet: UNet2DConditionModel) -> tuple[str, ...]:
    """What the plain form of a net does otherwise, a sentence each."""
    replaced = (unet.config.get("structure") or {}).get("replace", ())
    places = {
        by: [each["at"] for each in replaced if each["by"] == by] for by in (MERGED, FORGOTTEN)
    }
    losses = {
        MERGED: "the kernels are merged at their mean routing over all time steps "
        "(leansd.surgery.fold.fold_segments makes one net for each stretch of them)",
        FORGOTTEN: "stock diffusers runs full attention, for which the net was not distilled",
    }
    return tuple(f"{' '.join(places[by])}: {text}" for by, text in losses.items() if places[by])


def write_plain(unet: UNet2DConditionModel, folder: Path, card: Card) -> None:
    """Write a net and its card as a folder that `UNet2DConditionModel.from_pretrained` opens.

    Raises:
        LeansdError: see `to_plain`.
    """
    plain = to_plain(unet)
    _require_described(plain)
    with writing(folder) as draft:
        draft.mkdir()
        plain.save_pretrained(draft)
        write_card(draft, card, plain, before=unet)


def _require_described(plain: UNet2DConditionModel) -> None:
    """Refuse a net whose files would not open: one that is quantised, or has a LoRA loaded."""
    try:
        outline = build_outline(read_config(plain))
    except ValueError as error:  # an IP-Adapter leaves a config that no UNet can be built by
        raise LeansdError(
            f"stock diffusers builds no UNet of this config: {error}; unload the net's adapters"
        ) from error
    own = plain.state_dict()
    for name, tensor in outline.state_dict().items():
        if getattr(own.get(name), "shape", None) != tensor.shape:
            has = "has no such tensor" if name not in own else "has it in another form"
            raise LeansdError(
                f"stock diffusers wants {name} of shape {list(tensor.shape)}, and the net {has}: "
                "give the net before it was quantised, and unload its LoRAs"
            )


# -- exports ---------------------------------------------------------------------------------------

Form = Literal["diffusers", "onnx"]
FORMS: tuple[Form, ...] = get_args(Form)
NETS = f"give {EMBEDDED!r}, a UNet's folder with a config.json, or a model in the diffusers layout"


@dataclass(frozen=True)
class Exported:
    """What `export` has written."""

    folder: Path
    files: dict[str, int]
    """Size of each file in bytes."""
    plan: Plan | None = None
    difference: float | None = None
    """For ONNX, the largest difference from PyTorch that the check saw (see `onnx.compare`)."""
    losses: tuple[str, ...] = ()
    """What the exported net does otherwise than the net, with the addresses."""


def export(
    net: Any,
    folder: str | Path,
    *,
    to: Form,
    plan: Plan | str | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    tell: OnExport = lambda what, done, stages: None,
) -> Exported:
    """Write a net, or for ONNX all graphs that a plan makes of it, into a folder.

    Args:
        net: a `UNet2DConditionModel`, a pipeline, the folder of either, or `emoji`.
        folder: new, empty, or an earlier export to ONNX, which is replaced.
        to: `diffusers`, a folder that `UNet2DConditionModel.from_pretrained` opens, or `onnx`,
            files for ONNX Runtime that serve every batch, size and number of tokens; open them
            with `leansd.load_onnx`.
        plan: for ONNX, a plan, a preset or a plan file.
        steps: of the runs that a preset is for; 30 by default.
        sampler: short name of the sampler that a preset is for; the model's own by default.
        tell: called before every stage with what it is, its number and how many there are.

    Raises:
        LeansdError: the net is none, the plan does not suit it, the form cannot hold it, a package
            is missing, or the folder holds something else.
    """
    home = Path(folder).expanduser()
    check_form(to, home, plan)
    source = find_source(plan) if plan is not None else None
    if sampler is not None:
        check_sampler(sampler)
    unet, own = open_net(net)
    model = name_source(net)
    nets = {"exported": model} if model else {}
    if to == "diffusers":
        losses = describe_losses(unet)
        card = Card(home.name, nets, "plain", losses=losses)
        write_plain(unet, home, card)
        return Exported(home, _measure(home), losses=losses)
    chosen = None
    if source is not None:
        context = PlanContext(steps, sampler or own, anatomy=read_anatomy(unet))
        resolved = resolve_plan(source, context)
        chosen = resolved.plan
        for note in resolved.notes:
            warnings.warn(note, stacklevel=2)
    card = Card(home.name, nets, "onnx")
    difference = write_onnx(unet, home, chosen, card, tell)
    return Exported(home, _measure(home), chosen, difference)


def check_form(to: str, folder: Path, plan: Plan | str | None = None) -> Form:
    """The form itself, if there is such a one, it goes with the plan, and `folder` may be written.

    Raises:
        LeansdError: it is not so, or a package is missing.
    """
    form: Form | None = next((each for each in FORMS if each == to), None)
    if form is None:
        raise LeansdError(f"cannot export to {to!r}: there are {', '.join(FORMS)}")
    if form == "onnx":
        require_packages()
    elif plan is not None:
        raise LeansdError(
            "stock diffusers follows no plan: leave it out, or export to onnx, which can"
        )
    check_out(folder, replaces=TABLE if form == "onnx" else None)
    return form


def _measure(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def open_net(net: Any) -> tuple[UNet2DConditionModel, str]:
    """What `export` was given, in float32 where it has to be read, and the sampler it is used with.

    Raises:
        LeansdError: there is no UNet in it.
    """
    if isinstance(net, UNet2DConditionModel):
        return net, ""
    if isinstance(getattr(net, "unet", None), UNet2DConditionModel):
        return net.unet, name_sampler(net)
    if not isinstance(net, str | Path):
        raise LeansdError(f"no UNet in a {type(net).__name__}: give a UNet or a pipeline; {NETS}")
    unet = load_unet(find_home(net), device="cpu", dtype=torch.float32)
    return unet, read_sampler(net)


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
        raise LeansdError(f"no UNet in {net}: {NETS}")
    return home

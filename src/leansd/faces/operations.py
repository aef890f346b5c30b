"""Operations from models to folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers import DiffusionPipeline, UNet2DConditionModel

from leansd.cards import Card, write_card
from leansd.errors import LeansdError
from leansd.loading import is_unet_folder, load, load_unet
from leansd.surgery.apply import BASE, operate
from leansd.surgery.edits import Surgery


def list_nets(model: str, others: Sequence[str]) -> dict[str, str]:
    """Models by the name that a surgery has for them, from `NAME=MODEL`; the first has none."""
    nets = {BASE: model}
    for each in others:
        name, sign, path = each.partition("=")
        if not (name and sign and path):
            raise LeansdError(f"--net {each} names no model; give NAME=MODEL, light=nets/light")
        if name in nets:
            raise LeansdError(f"--net {each}: {name} is taken; {BASE} is the net operated on")
        nets[name] = path
    return nets


def operate_into(
    folder: Path, models: Mapping[str, str], surgery: Surgery, *, whole: bool
) -> list[Path]:
    """Operate, and write the UNet with lineage, surgery and card; gives what was written."""
    pipe: DiffusionPipeline | None = None
    if whole:
        if is_unet_folder(models[BASE]):
            raise LeansdError(f"{models[BASE]} is a UNet by itself: leave --whole out")
        pipe = load(models[BASE], device="cpu")
    nets = {name: _open_unet(model) for name, model in models.items() if name != BASE or not pipe}
    base: UNet2DConditionModel = pipe.unet if pipe is not None else nets.pop(BASE)
    student, lineage = operate({BASE: base, **nets}, surgery)
    home = folder / "unet" if whole else folder
    home.mkdir(parents=True, exist_ok=True)
    if pipe is not None:
        pipe.register_modules(unet=student)
        pipe.save_pretrained(folder)
    else:
        student.save_pretrained(home)
    lineage.save(home)
    surgery.save(home / "surgery.yaml")
    card = Card(
        name=surgery.name,
        nets=models,
        form="pipeline" if whole else "unet",
        edits=[str(edit) for edit in surgery.edits],
        lineage=lineage,
    )
    written = write_card(folder, card, student, before=base)
    return [folder, home / "lineage.json", home / "surgery.yaml", written]


def _open_unet(model: str) -> UNet2DConditionModel:
    if is_unet_folder(model):
        return load_unet(model, device="cpu")
    return load(model, device="cpu").unet

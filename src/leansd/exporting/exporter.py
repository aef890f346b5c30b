"""`leansd.export`: a net as files that run elsewhere, in stock diffusers or in ONNX Runtime."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy.reading import read_anatomy
from leansd.cards import Card, write_card
from leansd.errors import LeansdError
from leansd.exporting.folder import TABLE, check_out
from leansd.exporting.graphs import require_packages
from leansd.exporting.onnx import OnExport, write_onnx
from leansd.exporting.plain import describe_losses, write_plain
from leansd.loading import EMBEDDED, is_unet_folder, load_unet, locate, read_sampler
from leansd.plans.plan import Plan
from leansd.plans.resolve import PlanContext, find_source, resolve_plan
from leansd.runtime.samplers import check_sampler, name_sampler

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
        write_plain(unet, home, lambda draft, plain: write_card(draft, card, plain, before=unet))
        return Exported(home, _measure(home), losses=losses)
    chosen = None
    if source is not None:
        context = PlanContext(steps, sampler or own, anatomy=read_anatomy(unet))
        resolved = resolve_plan(source, context)
        chosen = resolved.plan
        for note in resolved.notes:
            warnings.warn(note, stacklevel=2)
    card = Card(home.name, nets, "onnx")
    difference = write_onnx(
        unet, home, chosen, tell, lambda draft, unet: write_card(draft, card, unet)
    )
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


class OpenedNet(NamedTuple):
    """A UNet and, where it is known, the short name of the sampler that it is used with."""

    unet: UNet2DConditionModel
    sampler: str


def open_net(net: Any) -> OpenedNet:
    """Open what `export` was given, in float32 where it has to be read.

    Raises:
        LeansdError: there is no UNet in it.
    """
    if isinstance(net, UNet2DConditionModel):
        return OpenedNet(net, "")
    if isinstance(getattr(net, "unet", None), UNet2DConditionModel):
        return OpenedNet(net.unet, name_sampler(net))
    if not isinstance(net, str | Path):
        raise LeansdError(f"no UNet in a {type(net).__name__}: give a UNet or a pipeline; {NETS}")
    unet = load_unet(find_home(net), device="cpu", dtype=torch.float32)
    return OpenedNet(unet, read_sampler(net))


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

"""`leansd operate`: a surgery, and the UNet that it makes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from leansd.cli.command import Result, argument, command, option
from leansd.cli.options import ReportFile, complete_shape, complete_surgery, read_pairs
from leansd.cli.terminal import hush_libraries
from leansd.errors import LeansdError
from leansd.files import check_file, writing
from leansd.text import Table

if TYPE_CHECKING:
    from leansd.surgery.edits import Surgery
    from leansd.surgery.preview import Preview

app = typer.Typer(add_completion=False)


@command(
    app,
    "operate",
    "leansd operate",
    "leansd operate bk-base --model sd15 --preview",
    "leansd operate bk-base --model emoji --out nets/light",
)
def operate_on_unet(
    surgery: str | None = argument(
        None,
        "A YAML file or a preset; without it, the presets are listed.",
        autocompletion=complete_surgery,
    ),
    *,
    model: str = option(
        "emoji",
        "Whose UNet is operated on: emoji, a model folder, a UNet's folder, a "
        ".safetensors file or a hub id; with --preview also sd15, sd21-base and sdxl.",
        autocompletion=complete_shape,
    ),
    nets: list[str] | None = option(
        None, "Another UNet that the surgery takes from.", "--net", metavar="NAME=MODEL"
    ),
    out: Path | None = option(
        None, "Folder for the UNet, its lineage and the surgery.", "--out", "-o"
    ),
    whole: bool = option(False, "Write a whole model with the UNet in it.", "--whole"),
    only_preview: bool = option(False, "Only say what goes and what is left.", "--preview"),
    latent: int | None = option(None, "Side of the latents that MACs are counted at.", min=1),
    report: ReportFile = None,
) -> Result:
    """Cut a UNet, or assemble one from several, and write it."""
    from leansd.surgery.presets import PRESETS, find_surgery

    if surgery is None:
        rows = {name: each.summary for name, each in PRESETS.items()}
        return Result({"presets": rows}, [Table(("surgery", "summary"), tuple(rows.items()))])
    if out is None and not only_preview:
        raise LeansdError("give --out a folder for the new UNet, or only look with --preview")
    chosen = find_surgery(surgery)
    from leansd.exporting.graphs import check_out
    from leansd.report.nets import report_surgery
    from leansd.surgery.preview import preview
    from leansd.unets import open_outline

    hush_libraries()
    if out is not None:
        check_out(out)
    if report is not None:
        check_file(report)
    models = list_nets(model, nets or [])
    outlines = {name: open_outline(each) for name, each in models.items()}
    seen = preview(outlines, chosen, latent=latent)
    is_asked = out is not None and not only_preview
    return Result(
        facts={"surgery": chosen.name, "model": model, **_list_facts(seen)},
        shown=[str(seen)],
        files=operate_into(out, models, chosen, whole=whole) if out and is_asked else [],
        pages={report: report_surgery(seen, model)} if report is not None else {},
    )


def _list_facts(seen: "Preview") -> dict[str, Any]:
    return {
        "fingerprint": seen.surgery.fingerprint,
        "class": seen.kind,
        "units": len(seen.after) - 2,
        "params": [seen.before.params, seen.after.params],
        "macs": [seen.before.macs, seen.after.macs],
        "latent": seen.after.size,
        "dropped": list(seen.gone),
        "taken": dict(seen.taken),
        "replaced": dict(seen.replaced),
    }


def list_nets(model: str, others: Sequence[str]) -> dict[str, str]:
    """Models by the name that a surgery has for them, from `NAME=MODEL`; the first has none.

    Raises:
        LeansdError: one is not of this form, or a name comes twice.
    """
    from leansd.surgery.apply import BASE

    nets = read_pairs("--net", others, "MODEL, light=nets/light")
    if BASE in nets:
        raise LeansdError(f"--net {BASE}={nets[BASE]}: {BASE} is the net operated on")
    return {BASE: model, **nets}


def operate_into(
    folder: Path, models: Mapping[str, str], surgery: "Surgery", *, whole: bool
) -> list[Path]:
    """Operates, and writes the UNet with lineage, surgery and card; gives what was written."""
    from leansd.cards import Card, write_card
    from leansd.loading import is_unet_folder, load_with_unet
    from leansd.surgery.apply import BASE, operate
    from leansd.unets import open_unet

    pipe: Any = None
    if whole:
        if is_unet_folder(models[BASE]):
            raise LeansdError(f"{models[BASE]} is a UNet by itself: leave --whole out")
        pipe = load_with_unet(models[BASE], device="cpu")
    unets = {
        name: pipe.unet if whole and name == BASE else open_unet(each, device="cpu")
        for name, each in models.items()
    }
    student, lineage = operate(unets, surgery)
    card = Card(
        name=surgery.name,
        nets=models,
        form="pipeline" if whole else "unet",
        edits=[str(edit) for edit in surgery.edits],
        lineage=lineage,
    )
    with writing(folder) as draft:
        home = draft / "unet" if whole else draft
        if pipe is not None:
            pipe.register_modules(unet=student)
            pipe.save_pretrained(draft)
        else:
            student.save_pretrained(home)
        lineage.save(home)
        surgery.save(home / "surgery.yaml")
        page = write_card(draft, card, student, before=unets[BASE])
    written = [home / "lineage.json", home / "surgery.yaml", page]
    return [folder, *(folder / path.relative_to(draft) for path in written)]

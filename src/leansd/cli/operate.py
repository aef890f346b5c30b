"""`leansd operate`: a surgery, and the UNet that it makes."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.completions import complete_shape, complete_surgery
from leansd.cli.examples import give_examples
from leansd.cli.options import Json, Quiet, ReportFile

app = typer.Typer(add_completion=False)


@app.command(
    epilog=give_examples(
        "leansd operate",
        "leansd operate bk-base --model sd15 --preview",
        "leansd operate bk-base --model emoji --out nets/light",
    )
)
def operate_on_unet(
    surgery: Annotated[
        str | None,
        typer.Argument(
            help="A YAML file or a preset; without it, the presets are listed.",
            autocompletion=complete_surgery,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Whose UNet is operated on: emoji, a model folder, a UNet's folder, a "
            ".safetensors file or a hub id; with --preview also sd15, sd21-base and sdxl.",
            autocompletion=complete_shape,
        ),
    ] = "emoji",
    nets: Annotated[
        list[str] | None,
        typer.Option(
            "--net", metavar="NAME=MODEL", help="Another UNet that the surgery takes from."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the UNet, its lineage and the surgery."),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Write a whole model with the UNet in it.")
    ] = False,
    only_preview: Annotated[
        bool, typer.Option("--preview", help="Only say what goes and what is left.")
    ] = False,
    latent: Annotated[
        int | None, typer.Option(min=1, help="Side of the latents that MACs are counted at.")
    ] = None,
    report: ReportFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cut a UNet, or assemble one from several, and write it."""
    from leansd.cli.invocation import quote_command
    from leansd.cli.terminal import hush_libraries, show_json, show_table, show_text
    from leansd.errors import LeansdError
    from leansd.surgery.presets import PRESETS, find_surgery
    from leansd.text import Table

    if surgery is None:
        rows = tuple((name, each.summary) for name, each in PRESETS.items())
        show_table(Table(("surgery", "summary"), rows))
        if as_json:
            show_json({"command": "operate", "presets": dict(rows)})
        return
    if out is None and not only_preview:
        raise LeansdError("give --out a folder for the new UNet, or only look with --preview")
    chosen = find_surgery(surgery)
    hush_libraries()

    from leansd.faces.operations import list_nets, operate_into
    from leansd.faces.outlines import open_outline
    from leansd.files import check_file, check_folder
    from leansd.surgery.preview import preview

    if out is not None:
        check_folder(out)
    if report is not None:
        check_file(report)
    models = list_nets(model, nets or [])
    outlines = {name: open_outline(each) for name, each in models.items()}
    seen = preview(outlines, chosen, latent=latent)
    written: list[Path] = []
    if out is not None and not only_preview:
        written = operate_into(out, models, chosen, whole=whole)
    if report is not None:
        from leansd.evaluation.records import stamp
        from leansd.report import Origin, write_report
        from leansd.report.nets import report_surgery

        origin = Origin(quote_command(), stamp("meta"))
        written.append(write_report(report, report_surgery(seen, model), origin))
    show_text(str(seen))
    for path in written:
        show_text(f"wrote {path}")
    if as_json:
        show_json(
            {
                "command": "operate",
                "surgery": chosen.name,
                "fingerprint": chosen.fingerprint,
                "model": model,
                "class": seen.kind,
                "units": len(seen.after) - 2,
                "params": [seen.before.params, seen.after.params],
                "macs": [seen.before.macs, seen.after.macs],
                "latent": seen.after.size,
                "dropped": list(seen.gone),
                "taken": dict(seen.taken),
                "replaced": dict(seen.replaced),
                "files": [str(path) for path in written],
            }
        )

"""`leansd incubate`: a lighter UNet distilled from a pipeline's, as a recipe says."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: leansd incubate recipes/smoke.yaml --out runs/smoke trainer.batch=4")
def incubate_recipe(
    recipe: Annotated[
        Path,
        typer.Argument(help="A YAML file, or one that comes along: smoke, sd15-asdm."),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes by dotted path."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run; the net is OUT/net.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what it takes: compute, memory, disk, hours."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Distil, assemble and distil again; accelerate launch -m leansd.faces.cli for several GPUs."""
    from leansd.errors import LeansdError
    from leansd.faces.cli.terminal import hush_libraries, note, show_json, show_text
    from leansd.incubation.recipe import load_recipe

    chosen = load_recipe(recipe, changes or ())
    if out is None and not dry_run:
        raise LeansdError("give --out a folder for the run, or only look with --dry-run")
    hush_libraries()
    if dry_run:
        from leansd.faces.incubating import estimate_recipe

        estimate = estimate_recipe(chosen)
        show_text(str(estimate))
        if as_json:
            show_json({"command": "incubate", "dry_run": True, **estimate.to_fields()})
        return

    from leansd.faces.incubating import incubate_into
    from leansd.measuring.files import check_folder

    assert out is not None
    check_folder(out)
    net = incubate_into(out, chosen, resume=resume, note=note)
    show_text(f"wrote {net}")
    if as_json:
        show_json({"command": "incubate", "recipe": chosen.name, "net": str(net)})

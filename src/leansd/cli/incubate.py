"""`leansd incubate`: a lighter UNet distilled from a pipeline's, as a recipe says."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.examples import give_examples
from leansd.cli.options import Quiet

app = typer.Typer(add_completion=False)


@app.command(
    epilog=give_examples(
        "leansd incubate recipes/smoke.yaml --dry-run",
        "leansd incubate recipes/smoke.yaml --out runs/smoke trainer.batch=4",
        "leansd incubate recipes/smoke.yaml --out runs/smoke --resume",
    )
)
def incubate_recipe(
    recipe: Annotated[
        Path,
        typer.Argument(help="A YAML file, or one that comes along: smoke, sd15-asdm."),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes by dotted path."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run; the net is OUT/net.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what it takes: compute, memory, disk, hours."),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="With --dry-run: an HTML page of it; a run has OUT/report.html."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Distil, assemble and distil again; accelerate launch -m leansd.cli for several GPUs."""
    from leansd.cli.invocation import quote_command
    from leansd.cli.terminal import hush_libraries, note, show_json, show_text
    from leansd.errors import LeansdError
    from leansd.files import check_file
    from leansd.incubation.recipe import load_recipe

    chosen = load_recipe(recipe, changes or ())
    if out is None and not dry_run:
        raise LeansdError("give --out a folder for the run, or only look with --dry-run")
    if report is not None:
        check_file(report)
    hush_libraries()
    if dry_run:
        from leansd.report.incubating import estimate_recipe

        estimate = estimate_recipe(chosen)
        show_text(str(estimate))
        if report is not None:
            from leansd.evaluation.records import stamp
            from leansd.report import Origin, write_report
            from leansd.report.training import report_estimate

            origin = Origin(quote_command(), stamp(estimate.device))
            show_text(f"wrote {write_report(report, report_estimate(estimate), origin)}")
        if as_json:
            show_json({"command": "incubate", "dry_run": True, **estimate.to_fields()})
        return

    from leansd.files import check_folder
    from leansd.report.incubating import PAGE, incubate_into

    assert out is not None
    check_folder(out)
    net = incubate_into(out, chosen, resume=resume, note=note, command=quote_command())
    show_text(f"wrote {net}, {out / PAGE}")
    if as_json:
        show_json({"command": "incubate", "recipe": chosen.name, "net": str(net)})

"""`leansd plan`: what runs when, as a grid, a file or a picture."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.completions import complete_plan, complete_shape
from leansd.cli.examples import give_examples
from leansd.cli.options import Fit, Force, Json, Nets, Quiet, ReportFile, Sampler

app = typer.Typer(add_completion=False)


@app.command(
    epilog=give_examples(
        "leansd plan",
        "leansd plan balanced --steps 30",
        "leansd plan fast --model sd15 -o plan.json --picture plan.png",
    )
)
def show_plan(
    plan: Annotated[
        str | None,
        typer.Argument(
            help="A preset or a plan file; without it, the presets are listed.",
            autocompletion=complete_plan,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the sampler: 30 for a preset, a file's own count."),
    ] = None,
    fit: Fit = False,
    force: Force = False,
    sampler: Sampler = None,
    model: Annotated[
        str,
        typer.Option(
            help="The model whose units are drawn; sd15, sd21-base, sdxl work too.",
            autocompletion=complete_shape,
        ),
    ] = "emoji",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the plan as a JSON file.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write the grid as a PNG, SVG or PDF file.")
    ] = None,
    report: ReportFile = None,
    net: Nets = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a plan as a grid of units and steps; save it, or a picture of it."""
    from leansd.cli.invocation import quote_command
    from leansd.cli.terminal import (
        hush_libraries,
        show_grid,
        show_json,
        show_table,
        show_text,
        warn,
    )
    from leansd.plans.presets import PRESETS
    from leansd.text import Table

    if plan is None:
        show_table(
            Table(("preset", "summary"), tuple((p.name, p.summary) for p in PRESETS.values()))
        )
        if as_json:
            show_json({"command": "plan", "presets": {p.name: p.summary for p in PRESETS.values()}})
        return

    from leansd.faces.outlines import (
        encode_figure,
        open_anatomy,
        outline_runs,
        predict_gain,
        read_nets,
    )
    from leansd.files import check_file, write_file
    from leansd.plans.grid import draw_picture
    from leansd.plans.resolve import resolve_plan
    from leansd.runtime.samplers import check_sampler

    for path in (out, picture, report):
        if path is not None:
            check_file(path)
    if sampler is not None:
        check_sampler(sampler)
    hush_libraries()
    anatomy = open_anatomy(model)
    nets = {name: open_anatomy(folder) for name, folder in read_nets(net or []).items()}
    context = outline_runs(model, anatomy, steps, sampler=sampler, nets=nets)
    resolved = resolve_plan(plan, context, fit=fit, force=force)
    chosen = resolved.plan
    grid = chosen.draw(anatomy)
    drawn = encode_figure(draw_picture(chosen, anatomy), picture) if picture is not None else b""
    speedup = predict_gain(chosen, anatomy, nets)
    for line in resolved.notes:
        warn(line)
    show_grid(grid, chosen.steps)
    show_text(f"fingerprint {chosen.fingerprint}, predicted speed-up of the UNet {speedup:.2f}x")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        chosen.save(out)
        show_text(f"wrote {out}")
    if picture is not None:
        write_file(picture, drawn)
        show_text(f"wrote {picture}")
    if report is not None:
        from leansd.evaluation.records import stamp
        from leansd.report import Origin, write_report
        from leansd.report.plans import report_plan

        origin = Origin(quote_command(), stamp("meta"))
        page = report_plan(chosen, anatomy, speedup)
        show_text(f"wrote {write_report(report, page, origin)}")
    if as_json:
        show_json(
            {
                "command": "plan",
                "plan": chosen.name,
                "fingerprint": chosen.fingerprint,
                "model": model,
                "steps": chosen.steps,
                "keys": list(chosen.keys),
                "predicted_speedup": round(speedup, 4),
                "files": [str(path) for path in (out, picture, report) if path is not None],
            }
        )

"""`leansd plan`: what runs when, as a grid, a file or a picture."""

from io import BytesIO
from pathlib import Path
from typing import Any

import typer

from leansd.cli.command import Result, argument, command, option
from leansd.cli.options import (
    Following,
    ReportFile,
    SamplerOption,
    complete_plan,
    complete_shape,
    tell_notes,
)
from leansd.cli.terminal import PlanText, hush_libraries
from leansd.errors import LeansdError
from leansd.files import check_file, write_file
from leansd.plans.anatomy import Anatomy
from leansd.plans.grid import draw_picture
from leansd.plans.plan import Plan
from leansd.plans.presets import PRESETS
from leansd.text import Table

app = typer.Typer(add_completion=False)
FORMATS = (".png", ".svg", ".pdf")


@command(
    app,
    "plan",
    "leansd plan",
    "leansd plan balanced --steps 30",
    "leansd plan fast --model sd15 -o plan.json --picture plan.png",
)
def show_plan(
    plan: str | None = argument(
        None,
        "A preset or a plan file; without it, the presets are listed.",
        autocompletion=complete_plan,
    ),
    *,
    steps: int | None = option(
        None, "Steps of the sampler: 30 for a preset, a file's own count.", min=1
    ),
    model: str = option(
        "emoji",
        "The model whose units are drawn; sd15, sd21-base, sdxl work too.",
        autocompletion=complete_shape,
    ),
    sampler: SamplerOption = None,
    following: Following,
    out: Path | None = option(None, "Write the plan as a JSON file.", "--out", "-o"),
    picture: Path | None = option(None, "Write the grid as a PNG, SVG or PDF file."),
    report: ReportFile = None,
) -> Result:
    """Show a plan as a grid of units and steps; save it, or a picture of it."""
    if plan is None:
        rows = {each.name: each.summary for each in PRESETS.values()}
        return Result({"presets": rows}, [Table(("preset", "summary"), tuple(rows.items()))])
    from leansd.report.plans import report_plan
    from leansd.runtime.samplers import check_sampler
    from leansd.unets import predict_gain

    for path in filter(None, (out, picture, report)):
        check_file(path)
    if sampler is not None:
        check_sampler(sampler)
    hush_libraries()
    resolved, context = following.outline(plan, model, steps=steps, sampler=sampler)
    chosen = tell_notes(resolved)
    anatomy: Any = context.anatomy
    drawn = _draw(chosen, anatomy, picture) if picture is not None else b""
    speedup = predict_gain(chosen, anatomy, context.nets)
    files = [write_file(out, chosen.encode())] if out is not None else []
    files += [write_file(picture, drawn)] if picture is not None else []
    return Result(
        facts={
            "plan": chosen.name,
            "fingerprint": chosen.fingerprint,
            "model": model,
            "steps": chosen.steps,
            "keys": list(chosen.keys),
            "predicted_speedup": round(speedup, 4),
            "notes": list(resolved.notes),
        },
        shown=[
            PlanText(chosen.draw(anatomy), chosen.steps),
            f"fingerprint {chosen.fingerprint}, predicted speed-up of the UNet {speedup:.2f}x",
        ],
        files=files,
        pages={report: report_plan(chosen, anatomy, speedup)} if report is not None else {},
    )


def _draw(plan: Plan, anatomy: Anatomy, path: Path) -> bytes:
    """The grid of a plan as the bytes of the file format that `path` ends in."""
    form = path.suffix.lower()
    if form not in FORMATS:
        raise LeansdError(f"cannot draw {path}: the name must end in one of {', '.join(FORMATS)}")
    buffer = BytesIO()
    draw_picture(plan, anatomy).savefig(buffer, format=form[1:], dpi=150)
    return buffer.getvalue()

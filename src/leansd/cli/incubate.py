"""`leansd incubate`: a lighter UNet distilled from a pipeline's, as a recipe says."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from leansd.cli.command import Result, argument, command, option, quote_command
from leansd.cli.terminal import hush_libraries, note
from leansd.errors import LeansdError
from leansd.files import check_file, check_folder

if TYPE_CHECKING:
    from leansd.incubation.recipe import Recipe

app = typer.Typer(add_completion=False)


@command(
    app,
    "incubate",
    "leansd incubate recipes/smoke.yaml --dry-run",
    "leansd incubate recipes/smoke.yaml --out runs/smoke trainer.batch=4",
    "leansd incubate recipes/smoke.yaml --out runs/smoke --resume",
)
def incubate_recipe(
    recipe: Path = argument(..., "A YAML file, or one that comes along: smoke, sd15-asdm."),
    changes: list[str] | None = argument(None, "Changes by dotted path.", metavar="KEY=VALUE"),
    *,
    out: Path | None = option(None, "Folder of the run; the net is OUT/net.", "--out", "-o"),
    resume: bool = option(False, "Go on with the run in OUT.", "--resume"),
    dry_run: bool = option(
        False, "Only say what it takes: compute, memory, disk, hours.", "--dry-run"
    ),
    report: Path | None = option(
        None, "With --dry-run: an HTML page of it; a run has OUT/report.html."
    ),
) -> Result:
    """Distil, assemble and distil again; accelerate launch -m leansd.cli for several GPUs."""
    from leansd.incubation.recipe import load_recipe

    chosen = load_recipe(recipe, changes or ())
    if out is None and not dry_run:
        raise LeansdError("give --out a folder for the run, or only look with --dry-run")
    if report is not None:
        check_file(report)
    hush_libraries()
    if out is None or dry_run:
        return _estimate(chosen, report)
    from leansd.report.incubating import PAGE, incubate_into

    check_folder(out)
    net = incubate_into(out, chosen, resume=resume, note=note, command=quote_command())
    return Result({"recipe": chosen.name, "net": str(net)}, files=[net, out / PAGE])


def _estimate(recipe: "Recipe", report: Path | None) -> Result:
    from leansd.incubation.estimate import estimate_recipe
    from leansd.report.training import report_estimate

    estimate = estimate_recipe(recipe)
    return Result(
        {"dry_run": True, **estimate.to_fields()},
        [str(estimate)],
        pages={report: report_estimate(estimate)} if report is not None else {},
        device=estimate.device,
    )

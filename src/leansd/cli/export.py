"""`leansd export`: a net as files for stock diffusers or for ONNX Runtime."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.completions import complete_model, complete_plan, complete_sampler, offer
from leansd.cli.examples import give_examples
from leansd.cli.options import Fit, Json, Quiet, ReportFile

app = typer.Typer(add_completion=False)


@app.command(
    epilog=give_examples(
        "leansd export emoji --to onnx --plan fast --out emoji-onnx",
        "leansd export emoji --to diffusers --out emoji-unet",
    )
)
def export_net(
    net: Annotated[
        str,
        typer.Argument(
            metavar="NET",
            help="emoji, a UNet's folder or a model folder.",
            autocompletion=complete_model,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="diffusers, a folder that UNet2DConditionModel.from_pretrained opens, or onnx.",
            autocompletion=offer("diffusers", "onnx"),
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder to write: new, empty or an earlier export to onnx."
        ),
    ],
    plan: Annotated[
        str | None,
        typer.Option(
            help="For onnx: a preset or a plan file, whose graphs are written, too.",
            autocompletion=complete_plan,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the runs: 30 for a preset, a plan file's own count."),
    ] = None,
    fit: Fit = False,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="What a preset is for: ddim, dpm++2m ...; the model's own by default.",
            autocompletion=complete_sampler,
        ),
    ] = None,
    report: ReportFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a net; for ONNX, check in ONNX Runtime that it gives what PyTorch gives."""
    from leansd.anatomy.reading import read_anatomy
    from leansd.cli.invocation import quote_command
    from leansd.cli.terminal import (
        hush_libraries,
        open_progress,
        show_json,
        show_table,
        show_text,
        warn,
    )
    from leansd.errors import LeansdError
    from leansd.exporting import export
    from leansd.exporting.exporter import check_form
    from leansd.exporting.opening import find_home
    from leansd.faces.outlines import outline_runs
    from leansd.files import check_file
    from leansd.loading import load_outline
    from leansd.plans.resolve import resolve_plan
    from leansd.runtime.samplers import check_sampler
    from leansd.text import Table

    # Everything that can be wrong is found before a weight is read.
    form = check_form(to, out, plan)
    if report is not None:
        check_file(report)
    if plan is None and (steps is not None or fit or sampler is not None):
        raise LeansdError("--steps, --fit and --sampler say what a plan is for: give --plan, too")
    if sampler is not None:
        check_sampler(sampler)
    hush_libraries()
    anatomy = read_anatomy(load_outline(find_home(net)))
    chosen = None
    if plan is not None:
        context = outline_runs(net, anatomy, steps, sampler=sampler)
        resolved = resolve_plan(plan, context, fit=fit)
        chosen = resolved.plan
        for line in resolved.notes:
            warn(line)

    with open_progress() as progress:
        bar = progress.add_task("opening the net", total=None)
        written = export(
            net,
            out,
            to=form,
            plan=chosen,
            tell=lambda what, done, stages: progress.update(
                bar, description=what, completed=done, total=stages
            ),
        )
    rows = tuple((name, f"{size / 1e6:.2f}") for name, size in written.files.items())
    show_table(Table(("file", "MB"), rows))
    for loss in written.losses:
        warn(loss)
    if written.difference is not None:
        show_text(f"largest difference from PyTorch: {written.difference:.1e}")
    show_text(f"wrote {written.folder}")
    if report is not None:
        from leansd.evaluation.records import stamp
        from leansd.report import Origin, write_report
        from leansd.report.nets import report_export

        origin = Origin(quote_command(), stamp("cpu"))
        page = report_export(written, net, to, anatomy)
        show_text(f"wrote {write_report(report, page, origin)}")
    if as_json:
        show_json(
            {
                "command": "export",
                "net": net,
                "to": to,
                "folder": str(written.folder),
                "files": written.files,
                "plan": chosen.name if chosen is not None else None,
                "fingerprint": chosen.fingerprint if chosen is not None else None,
                "steps": chosen.steps if chosen is not None else None,
                "difference": written.difference,
                "losses": list(written.losses),
            }
        )

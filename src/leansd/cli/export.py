"""`leansd export`: a net as files for stock diffusers or for ONNX Runtime."""

from pathlib import Path

import typer

from leansd.cli.command import Result, argument, command, option
from leansd.cli.completions import complete_model, complete_plan, complete_sampler, offer
from leansd.cli.options import Fit, ReportFile
from leansd.text import Table

app = typer.Typer(add_completion=False)


@command(
    app,
    "export",
    "leansd export emoji --to onnx --plan fast --out emoji-onnx",
    "leansd export emoji --to diffusers --out emoji-unet",
)
def export_net(
    net: str = argument(
        ...,
        "emoji, a UNet's folder or a model folder.",
        metavar="NET",
        autocompletion=complete_model,
    ),
    *,
    to: str = option(
        ...,
        "diffusers, a folder that UNet2DConditionModel.from_pretrained opens, or onnx.",
        autocompletion=offer("diffusers", "onnx"),
    ),
    out: Path = option(
        ..., "Folder to write: new, empty or an earlier export to onnx.", "--out", "-o"
    ),
    plan: str | None = option(
        None,
        "For onnx: a preset or a plan file, whose graphs are written, too.",
        autocompletion=complete_plan,
    ),
    steps: int | None = option(
        None, "Steps of the runs: 30 for a preset, a plan file's own count.", min=1
    ),
    fit: Fit = False,
    sampler: str | None = option(
        None,
        "What a preset is for: ddim, dpm++2m ...; the model's own by default.",
        autocompletion=complete_sampler,
    ),
    report: ReportFile = None,
) -> Result:
    """Export a net; for ONNX, check in ONNX Runtime that it gives what PyTorch gives."""
    from leansd.anatomy.reading import read_anatomy
    from leansd.cli.options import tell_notes
    from leansd.cli.terminal import follow, hush_libraries, warn
    from leansd.errors import LeansdError
    from leansd.exporting import export
    from leansd.exporting.exporter import check_form, find_home
    from leansd.files import check_file
    from leansd.loading import load_outline
    from leansd.plans.resolve import resolve_plan
    from leansd.report.nets import report_export
    from leansd.runtime.samplers import check_sampler
    from leansd.unets import outline_runs

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
        chosen = tell_notes(resolve_plan(plan, context, fit=fit))
    with follow("opening the net") as bar:
        written = export(
            net,
            out,
            to=form,
            plan=chosen,
            tell=lambda what, done, stages: bar.share(what, done / stages),
        )
    for loss in written.losses:
        warn(loss)
    rows = tuple((name, f"{size / 1e6:.2f}") for name, size in written.files.items())
    differs = written.difference
    return Result(
        facts={
            "net": net,
            "to": to,
            "folder": str(written.folder),
            "files": written.files,
            "plan": chosen.name if chosen is not None else None,
            "fingerprint": chosen.fingerprint if chosen is not None else None,
            "steps": chosen.steps if chosen is not None else None,
            "difference": differs,
            "losses": list(written.losses),
        },
        shown=[
            Table(("file", "MB"), rows),
            *([f"largest difference from PyTorch: {differs:.1e}"] if differs is not None else []),
        ],
        files=[written.folder],
        pages={report: report_export(written, net, to, anatomy)} if report is not None else {},
        device="cpu",
    )

"""`leansd export`: a net as files for stock diffusers or for ONNX Runtime."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from leansd.cli.command import Result, argument, command, option
from leansd.cli.options import (
    Fit,
    ReportFile,
    complete_model,
    complete_plan,
    complete_sampler,
    offer,
    tell_notes,
)
from leansd.cli.terminal import follow, hush_libraries, warn
from leansd.errors import LeansdError
from leansd.files import check_file
from leansd.plans.anatomy import Anatomy
from leansd.plans.plan import Plan
from leansd.plans.resolve import resolve_plan

if TYPE_CHECKING:
    from leansd.exporting.exporter import Exported

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Graphs:
    """The plan whose graphs are written, and the runs that it is for."""

    plan: str | None = option(
        None,
        "For onnx: a preset or a plan file, whose graphs are written, too.",
        autocompletion=complete_plan,
    )
    steps: int | None = option(
        None, "Steps of the runs: 30 for a preset, a plan file's own count.", min=1
    )
    fit: Fit = False
    sampler: str | None = option(
        None,
        "What a preset is for: ddim, dpm++2m ...; the model's own by default.",
        autocompletion=complete_sampler,
    )

    def check(self) -> None:
        """Refuses a sampler that there is none of, and options of a plan that is not given."""
        from leansd.runtime.samplers import check_sampler

        asked = self.steps is not None or self.fit or self.sampler is not None
        if self.plan is None and asked:
            raise LeansdError(
                "--steps, --fit and --sampler say what a plan is for: give --plan, too"
            )
        if self.sampler is not None:
            check_sampler(self.sampler)

    def resolve(self, net: str, anatomy: Anatomy) -> Plan | None:
        """The plan for the runs of a net, with what must be said of it told."""
        from leansd.unets import outline_runs

        if self.plan is None:
            return None
        context = outline_runs(net, anatomy, self.steps, sampler=self.sampler)
        return tell_notes(resolve_plan(self.plan, context, fit=self.fit))


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
    graphs: Graphs,
    report: ReportFile = None,
) -> Result:
    """Export a net; for ONNX, check in ONNX Runtime that it gives what PyTorch gives."""
    from leansd.anatomy.reading import read_anatomy
    from leansd.exporting import export
    from leansd.exporting.exporter import check_form, find_home
    from leansd.loading import load_outline
    from leansd.report.nets import report_export, tabulate_files

    # Everything that can be wrong is found before a weight is read.
    form = check_form(to, out, graphs.plan)
    if report is not None:
        check_file(report)
    graphs.check()
    hush_libraries()
    anatomy = read_anatomy(load_outline(find_home(net)))
    chosen = graphs.resolve(net, anatomy)
    with follow("opening the net") as bar:
        written = export(
            net,
            out,
            to=form,
            plan=chosen,
            sampler=graphs.sampler,
            tell=lambda what, done, stages: bar.share(what, done / stages),
        )
    for loss in written.losses:
        warn(loss)
    differs = written.difference
    return Result(
        facts={"net": net, "to": to, **_list_facts(written, chosen)},
        shown=[
            tabulate_files(written),
            *([f"largest difference from PyTorch: {differs:.1e}"] if differs is not None else []),
        ],
        files=[written.folder],
        pages={report: report_export(written, net, to, anatomy)} if report is not None else {},
        device="cpu",
    )


def _list_facts(written: "Exported", plan: Plan | None) -> dict[str, Any]:
    return {
        "folder": str(written.folder),
        "files": written.files,
        "plan": plan.name if plan is not None else None,
        "fingerprint": plan.fingerprint if plan is not None else None,
        "steps": plan.steps if plan is not None else None,
        "difference": written.difference,
        "losses": list(written.losses),
    }

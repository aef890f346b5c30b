"""`leansd demo`: what the plans gain and what they cost, on pictures."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.examples import give_examples
from leansd.cli.options import Device, Guidance, ModelOption, OnlyJson, Quiet, Sampler

app = typer.Typer(add_completion=False)


@app.command(
    epilog=give_examples(
        "leansd demo",
        "leansd demo --prompts 'a pizza' --prompts 'a panda face' --out pets",
    )
)
def show_demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the report, the pictures and the records.")
    ] = Path("demo"),
    model: ModelOption = "emoji",
    steps: Annotated[int, typer.Option(min=2, help="Sampler steps of the full run.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first prompt.")] = 0,
    prompts: Annotated[
        list[str] | None, typer.Option(help="A prompt; give the option once for each.")
    ] = None,
    sampler: Sampler = None,
    guidance: Guidance = None,
    device: Device = None,
    as_json: OnlyJson = False,
    quiet: Quiet = False,
) -> None:
    """Draw the same prompts in full and with every preset plan; compare time and pictures.

    The last line on standard output is one JSON object.
    """
    from leansd.cli.invocation import quote_command
    from leansd.cli.terminal import (
        hush_libraries,
        note,
        open_progress,
        show_json,
        show_table,
        show_text,
        warn,
    )
    from leansd.drawing import encode_png
    from leansd.evaluation.demo import list_cases, list_records, run_demo, tabulate_demo
    from leansd.evaluation.prompts import GUIDANCE, PROMPTS
    from leansd.evaluation.records import write_records
    from leansd.faces.outlines import open_anatomy
    from leansd.faces.scoring import find_embedder
    from leansd.files import check_folder, write_file
    from leansd.loading import EMBEDDED, find_device, load, locate
    from leansd.plans.presets import SPEED_PRESETS
    from leansd.plans.resolve import resolve_plan
    from leansd.report import Origin, write_report
    from leansd.report.plans import draw_sheet, report_comparison
    from leansd.runtime.context import describe_runs
    from leansd.runtime.samplers import check_sampler, set_sampler

    check_folder(out)
    find_device(device)
    if sampler is not None:
        check_sampler(sampler)
    locate(model)
    hush_libraries()
    anatomy = open_anatomy(model)
    pipe = load(model, device=device)
    if sampler is not None:
        set_sampler(pipe, sampler)
    pipe.set_progress_bar_config(disable=True)
    chosen = prompts or list(PROMPTS)
    context = describe_runs(pipe, steps, anatomy=anatomy)
    resolved = {name: resolve_plan(name, context, force=True) for name in SPEED_PRESETS}
    for line in dict.fromkeys(line for each in resolved.values() for line in each.notes):
        warn(line)
    cases = list_cases(anatomy, steps, {name: each.plan for name, each in resolved.items()})
    names = ", ".join(each.name for each in cases)
    note(f"drawing {len(chosen)} prompts on {pipe.device}, each with {names}")
    scale = GUIDANCE if guidance is None and model == EMBEDDED else guidance
    with open_progress() as progress:
        bar = progress.add_task("", total=None)
        demo = run_demo(
            pipe,
            chosen,
            cases,
            subject=model,
            anatomy=anatomy,
            seed=seed,
            guidance=scale,
            embedder=find_embedder(model),
            on_progress=lambda far: progress.update(
                bar, description=far.case, completed=far.done, total=far.total
            ),
        )
    origin = Origin(quote_command(), demo.circumstances)
    files = [
        write_report(out / "report.html", report_comparison(demo), origin),
        write_file(out / "grid.png", encode_png(draw_sheet(demo))),
        write_records(out / "records.jsonl", list_records(demo)),
    ]
    if not as_json:
        show_table(tabulate_demo(demo))
        show_text(f"{cases[-1].name}: {cases[-1].summary}")
        show_text("PSNR (dB) and SSIM compare with the full run's pictures from the same seeds")
        show_text("wrote " + ", ".join(map(str, files)))
    show_json(
        {
            "command": "demo",
            "model": model,
            "device": demo.circumstances["device"],
            "steps": steps,
            "seed": seed,
            "sampler": demo.sampler,
            "guidance": demo.guidance,
            "prompts": list(demo.prompts),
            "plans": [
                {
                    "name": entry.case.name,
                    "fingerprint": plan.fingerprint if (plan := entry.case.plan) else None,
                    "steps": entry.case.steps,
                    "seconds": round(entry.timing.median, 4),
                    "speedup": round(entry.speedup.median, 4),
                    "speedup_low": round(entry.speedup.low, 4),
                    "speedup_high": round(entry.speedup.high, 4),
                    "predicted_speedup": round(entry.predicted, 4),
                    "psnr": _round(entry.psnr),
                    "ssim": _round(entry.ssim),
                    "clip_score": _round(entry.clip),
                    "bytes_kept": entry.bytes_kept,
                }
                for entry in demo.entries
            ],
            "files": [str(path) for path in files],
        }
    )


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

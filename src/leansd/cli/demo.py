"""`leansd demo`: what the plans gain and what they cost, on pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from leansd.cli.command import OnlyJson, Result, command, option
from leansd.cli.options import Force, GuidanceOption, ModelOption, Opening
from leansd.cli.terminal import follow, note, warn
from leansd.emoji.prompts import PROMPTS
from leansd.evaluation.prompt_sets import choose_guidance
from leansd.files import check_folder
from leansd.plans.presets import SPEED_PRESETS
from leansd.plans.resolve import PlanContext, resolve_plan

if TYPE_CHECKING:
    from leansd.evaluation.demo import Demo

app = typer.Typer(add_completion=False)


@command(
    app,
    "demo",
    "leansd demo",
    "leansd demo --prompts 'a pizza' --prompts 'a panda face' --out pets",
    json=OnlyJson,
    keeps=True,
)
def show_demo(
    *,
    out: Path = option(Path("demo"), "Folder for the report, the pictures and the records."),
    model: ModelOption = "emoji",
    steps: int = option(30, "Sampler steps of the full run.", min=2),
    seed: int = option(0, "Seed of the first prompt.", min=0),
    prompts: list[str] | None = option(None, "A prompt; give the option once for each."),
    guidance: GuidanceOption = None,
    force: Force = False,
    opening: Opening,
) -> Result:
    """Draw the same prompts in full and with every preset plan; compare time and pictures.

    The last line on standard output is one JSON object.
    """
    from leansd.evaluation.demo import list_cases, run_demo
    from leansd.evaluation.extractors import find_embedder
    from leansd.evaluation.runs import CallSet
    from leansd.runtime.context import describe_runs
    from leansd.unets import open_anatomy

    check_folder(out)
    opening.check_model(model)
    guidance = choose_guidance(model, guidance)
    anatomy = open_anatomy(model)
    pipe = opening.open_with_unet(model)
    chosen = prompts or list(PROMPTS)
    context = describe_runs(pipe, PlanContext(steps, anatomy=anatomy))
    resolved = {name: resolve_plan(name, context, force=force) for name in SPEED_PRESETS}
    for line in dict.fromkeys(line for each in resolved.values() for line in each.notes):
        warn(line)
    cases = list_cases(anatomy, steps, {name: each.plan for name, each in resolved.items()})
    names = ", ".join(each.name for each in cases)
    note(f"drawing {len(chosen)} prompts on {pipe.device}, each with {names}")
    with follow("") as bar:
        demo = run_demo(
            pipe,
            cases,
            CallSet(chosen, seed, 1, {} if guidance is None else {"guidance_scale": guidance}),
            subject=model,
            anatomy=anatomy,
            embedder=find_embedder(model),
            on_progress=lambda far: bar.count(far.done, far.total, far.case),
        )
    facts = {"model": model, "steps": steps, "seed": seed, **_list_facts(demo)}
    facts["left_out"] = dict(demo.left_out)
    return _give_demo(demo, facts, out, pipe.device)


def _give_demo(demo: "Demo", facts: dict[str, Any], out: Path, device: Any) -> Result:
    from leansd.drawing import encode_png
    from leansd.evaluation.demo import list_records, tabulate_demo
    from leansd.report.plans import draw_sheet, report_comparison

    last = demo.entries[-1].case
    return Result(
        facts=facts,
        shown=[
            tabulate_demo(demo),
            f"{last.name}: {last.summary}",
            "PSNR (dB) and SSIM compare with the full run's pictures from the same seeds",
        ],
        failure="; ".join(f"left out: {why}" for why in demo.left_out.values()),
        content={out / "grid.png": encode_png(draw_sheet(demo))},
        pages={out / "report.html": report_comparison(demo)},
        records={out / "records.jsonl": list_records(demo)},
        device=device,
    )


def _list_facts(demo: "Demo") -> dict[str, Any]:
    return {
        "device": demo.circumstances["device"],
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
                "predicted_speedup": round(demo.predict(entry), 4),
                "psnr": _round(entry.mean("psnr")),
                "ssim": _round(entry.mean("ssim")),
                "clip_score": _round(entry.mean("clip_score", None)),
                "bytes_kept": entry.bytes_kept,
            }
            for entry in demo.entries
        ],
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

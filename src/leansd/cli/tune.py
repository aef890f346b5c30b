"""`leansd tune`: the plans that lose least, for every speed."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.examples import give_examples
from leansd.cli.options import (
    Batch,
    Guidance,
    Json,
    ModelArgument,
    Nets,
    PromptFile,
    Quiet,
    Sampler,
    Seed,
    TimingDevice,
)

app = typer.Typer(add_completion=False)


@app.command(
    epilog=give_examples(
        "leansd tune emoji --speedup 2.5 --sampler ddim --out ddim.json",
        "leansd tune emoji --psnr 40 --steps 20 --drift drift.jsonl",
    )
)
def tune_plans(
    model: ModelArgument = "emoji",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File of the chosen plan; all else lies beside it.")
    ] = Path("plan.json"),
    speedup: Annotated[
        float | None, typer.Option(help="Choose the best plan that is so many times faster.")
    ] = None,
    psnr: Annotated[
        float | None, typer.Option(help="Choose the fastest plan of so many dB to the full run.")
    ] = None,
    ms: Annotated[
        float | None, typer.Option(help="Choose the best plan of so many milliseconds a call.")
    ] = None,
    net: Nets = None,
    attend: Annotated[
        list[str] | None,
        typer.Option(help="Self-attentions that may go by GRI, as in dn0.*.attn; repeat it."),
    ] = None,
    steps: Annotated[int, typer.Option(min=4, help="Sampler steps of the full run.")] = 30,
    sampler: Sampler = None,
    prompts: PromptFile = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures, prompts in turns; all of a file's, 24 for emoji."),
    ] = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    batch: Batch = 8,
    tries: Annotated[
        int, typer.Option(min=0, help="Moves of key steps that are tried for each speed.")
    ] = 6,
    speeds: Annotated[
        str | None, typer.Option(help="Speed-ups of the front, as in 1.5,2,3.")
    ] = None,
    front: Annotated[
        Path | None, typer.Option(help="File of the whole front; OUT.front.json by default.")
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(help="What resumes a stopped tuning; OUT.journal.jsonl by default."),
    ] = None,
    drift: Annotated[
        Path | None, typer.Option(help="File of records of what changes from step to step.")
    ] = None,
    device: TimingDevice = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tune plans on some calls, check them on others, and save the whole front.

    One of --speedup, --psnr and --ms says which plan is written to OUT; 2 times faster by default.
    Stopped, the same command goes on where it was.
    """
    from textwrap import fill

    from leansd.anatomy import dissect
    from leansd.cli.invocation import quote_command
    from leansd.cli.terminal import (
        hush_libraries,
        note,
        open_progress,
        show_json,
        show_table,
        show_text,
    )
    from leansd.emoji.card import GRID_PROMPTS
    from leansd.errors import LeansdError
    from leansd.evaluation.prompts import find_guidance, read_prompts
    from leansd.evaluation.records import stamp, write_records
    from leansd.faces.fronts import describe_choice, tabulate_front
    from leansd.faces.outlines import read_nets
    from leansd.files import check_file
    from leansd.loading import EMBEDDED, find_device, load, load_unet, locate
    from leansd.report import Origin, write_report
    from leansd.report.plans import report_tuning
    from leansd.runtime.samplers import (
        check_sampler,
        name_sampler,
        require_convergence,
        set_sampler,
    )
    from leansd.tuning.calibration import require_tunable
    from leansd.tuning.drift import measure_drift
    from leansd.tuning.tuner import SPEEDS, split_calls, tune

    # Everything that can be wrong is found before a weight is read.
    front_file = front or out.with_suffix(".front.json")
    journal_file = journal or out.with_suffix(".journal.jsonl")
    for path in (out, front_file, journal_file, *([drift] if drift is not None else [])):
        check_file(path)
    goal = {"speedup": speedup, "psnr": psnr, "ms": ms}
    goal = {name: value for name, value in goal.items() if value is not None} or {"speedup": 2.0}
    if len(goal) > 1:
        raise LeansdError("give one goal: --speedup, --psnr or --ms")
    if min(goal.values()) <= 0:
        raise LeansdError("a goal is a positive number")
    if goal.get("speedup", 2.0) <= 1:
        raise LeansdError(f"{speedup:g} times as fast is no gain: give a speed-up above 1")
    find_device(device)
    if sampler is not None:
        require_convergence(check_sampler(sampler))
    locate(model)
    if prompts is None and model != EMBEDDED:
        raise LeansdError(f"no prompts for {model}: give --prompts FILE, one prompt a line")
    texts = read_prompts(prompts) if prompts is not None else list(GRID_PROMPTS)
    wanted = count or (len(texts) if prompts is not None else 24)
    calls = [texts[place % len(texts)] for place in range(wanted)]
    split_calls(calls, None)
    folders = read_nets(net or [])
    sought = parse_speeds(speeds) if speeds is not None else SPEEDS
    hush_libraries()

    pipe = load(model, device=device)
    if sampler is not None:
        set_sampler(pipe, sampler)
    pipe.set_progress_bar_config(disable=True)
    nets = {name: load_unet(path, beside=pipe.unet) for name, path in folders.items()}
    require_tunable(pipe.scheduler, steps)
    scale = find_guidance(pipe, model) if guidance is None else guidance
    settings = {"guidance_scale": scale}
    note(f"tuning on {len(calls)} pictures on {pipe.device}; every third decides, the rest tune")
    with open_progress() as progress:
        bar = progress.add_task("", total=100)
        found = tune(
            pipe,
            calls,
            steps=steps,
            settings=settings,
            speeds=sought,
            speedup=goal.get("speedup"),
            ms=goal.get("ms"),
            tries=tries,
            seed=seed,
            batch=batch,
            nets=nets,
            attend=attend or (),
            sampler=name_sampler(pipe),
            journal=journal_file,
            tell=lambda text, share: progress.update(
                bar, description=text, completed=round(100 * share)
            ),
        )
        found.save(front_file)
        drifts = []
        if drift is not None:
            progress.update(bar, description="measuring drift")
            drifts = measure_drift(
                pipe, calls[: min(4, len(calls))], steps,
                seed=seed, batch=batch, settings=settings, subject=model,
            )  # fmt: skip
            write_records(drift, drifts)
    chosen = found.find(**goal)
    chosen.plan.save(out)
    anatomy = dissect(pipe.unet, name=model)
    origin = Origin(quote_command(), stamp(pipe.device))
    page = write_report(
        out.with_suffix(".html"), report_tuning(found, chosen, anatomy, drifts), origin
    )
    files = [out, front_file, page, *([drift] if drift is not None else [])]
    show_table(tabulate_front(found, chosen))
    show_text("or: the best of the other kind, fewer steps or tuned, that is as fast")
    show_text(fill(describe_choice(found, chosen), 80))
    show_text("wrote " + ", ".join(map(str, files)))
    if as_json:
        show_json(
            {
                "command": "tune",
                "model": model,
                "sampler": found.sampler,
                "steps": steps,
                "seed": seed,
                "guidance": scale,
                "goal": goal,
                "plan": chosen.plan.name,
                "fingerprint": chosen.plan.fingerprint,
                "fewer_steps_win": chosen.is_plain,
                "front": [
                    {
                        "plan": point.plan.name,
                        "fingerprint": point.plan.fingerprint,
                        "speedup": round(point.speedup, 4),
                        "ms": round(point.milliseconds, 2),
                        "psnr": round(point.psnr, 4),
                        "steps": point.plan.steps,
                        "keys": list(point.plan.keys),
                    }
                    for point in found.points
                ],
                "files": [str(path) for path in files],
            }
        )


def parse_speeds(text: str) -> list[float]:
    """`1.5,2,3` as numbers above 1."""
    from leansd.errors import LeansdError

    try:
        speeds = [float(part) for part in text.split(",")]
    except ValueError:
        speeds = [0.0]
    if not all(1 < speed < 100 for speed in speeds):
        raise LeansdError(f"{text!r} are no speed-ups: give numbers above 1, as in 1.5,2,3")
    return speeds

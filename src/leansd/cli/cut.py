"""`leansd cut`: choose what to take out of a UNet for a budget of its cost."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.completions import offer
from leansd.cli.examples import give_examples
from leansd.cli.options import (
    Batch,
    Guidance,
    Json,
    ModelArgument,
    PromptFile,
    Quiet,
    Sampler,
    Seed,
    TimingDevice,
)

app = typer.Typer(add_completion=False)


@app.command(
    epilog=give_examples(
        "leansd cut emoji --budget 0.75 --of macs --out light.yaml",
        "leansd cut emoji --budget 0.8 --of ms --guidance 7.5 --json",
    )
)
def cut_unet(
    model: ModelArgument = "emoji",
    budget: Annotated[
        float, typer.Option(help="Share of the UNet's cost that may be left, as in 0.8.")
    ] = 0.8,
    of: Annotated[
        str,
        typer.Option(
            help="What costs: ms (of a call here), macs or params.",
            autocompletion=offer("ms", "macs", "params"),
        ),
    ] = "ms",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File of the surgery; the report lies beside it.")
    ] = Path("surgery.yaml"),
    cost: Annotated[
        Path | None,
        typer.Option(
            help="Records of leansd profile or leansd anatomy --time, for ms, of this UNet or of "
            "one with its addresses; measured here by default."
        ),
    ] = None,
    prompts: PromptFile = None,
    count: Annotated[
        int, typer.Option(min=1, help="Pictures that errors are measured on, prompts in turns.")
    ] = 8,
    steps: Annotated[int, typer.Option(min=2, help="Sampler steps of their runs.")] = 30,
    moments: Annotated[
        int, typer.Option(min=1, help="Time steps of each run that count, evenly spread.")
    ] = 6,
    sampler: Sampler = None,
    guidance: Guidance = None,
    tries: Annotated[
        int, typer.Option(min=0, help="Cuts near the first answer that are measured.")
    ] = 24,
    seed: Seed = 0,
    batch: Batch = 8,
    device: TimingDevice = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what every removal does to the UNet's output, and choose the best cut.

    What goes is a surgery: leansd operate builds the lighter UNet from it, to be trained.
    """
    from textwrap import fill
    from typing import Any

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
    from leansd.evaluation.prompts import find_guidance, read_prompts
    from leansd.evaluation.records import load_records, stamp
    from leansd.faces.redundancy import read_cost
    from leansd.files import check_file
    from leansd.loading import find_device, load, locate
    from leansd.report import Origin, write_report
    from leansd.report.nets import describe_cut, report_cut
    from leansd.runtime.samplers import check_sampler, set_sampler
    from leansd.surgery.preview import preview
    from leansd.tuning.cutting import CALLS, check_budget, cut

    # Everything that can be wrong is found before a weight is read.
    page = check_file(out.with_suffix(".html"))
    check_file(out)
    check_budget(budget, of)
    find_device(device)
    if sampler is not None:
        check_sampler(sampler)
    locate(model)
    texts = read_prompts(prompts) if prompts is not None else list(CALLS)
    profile = read_cost(load_records(cost)) if cost is not None else None
    hush_libraries()

    pipe: Any = load(model, device=device)
    if sampler is not None:
        set_sampler(pipe, sampler)
    pipe.set_progress_bar_config(disable=True)
    scale = find_guidance(pipe, model) if guidance is None else guidance
    calls = [texts[place % len(texts)] for place in range(count)]
    note(f"cutting on {len(calls)} pictures on {pipe.device}")
    with open_progress() as progress:
        bar = progress.add_task("", total=100)
        found = cut(
            pipe,
            calls,
            budget=budget,
            of=of,  # type: ignore[arg-type]
            cost=profile,
            steps=steps,
            moments=moments,
            settings={"guidance_scale": scale},
            seed=seed,
            batch=batch,
            tries=tries,
            name=out.stem,
            tell=lambda text, share: progress.update(
                bar, description=text, completed=round(100 * share)
            ),
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    found.surgery.save(out)
    origin = Origin(quote_command(), stamp(pipe.device))
    report = report_cut(found, dissect(pipe.unet, name=model))
    files = [out, write_report(page, report, origin)]
    show_table(found.tabulate())
    show_text(str(preview(pipe.unet, found.surgery)))
    show_text(fill(describe_cut(found), 80))
    show_text("wrote " + ", ".join(map(str, files)))
    if as_json:
        show_json(
            {
                "command": "cut",
                "model": model,
                "budget": budget,
                "of": of,
                "cost": found.cost,
                "least_cost": found.least_cost,
                "predicted_error": found.predicted_error,
                "measured_error": found.measured_error,
                "surgery": found.surgery.to_document(),
                "fingerprint": found.surgery.fingerprint,
                "candidates": [
                    {
                        "addresses": list(each.removal.addresses),
                        "error": each.error,
                        "saves": each.saves,
                        "cut": each.removal in found.removals,
                    }
                    for each in found.candidates
                ],
                "steps": steps,
                "seed": seed,
                "guidance": scale,
                "files": [str(path) for path in files],
            }
        )

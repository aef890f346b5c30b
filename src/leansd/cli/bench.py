"""`leansd bench`: ours and every rival in one process, in turns."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.completions import complete_plan, complete_sampler
from leansd.cli.examples import give_examples
from leansd.cli.options import (
    Clip,
    ConvergedSteps,
    Count,
    Device,
    Guidance,
    Json,
    ModelOption,
    PromptFile,
    Quiet,
    SeedsForSpread,
)

app = typer.Typer(add_completion=False)


@app.command(
    epilog=give_examples(
        "leansd bench --quick --rivals fewer,deepcache --out quick.jsonl",
        "leansd bench --sampler ddim --steps 30 --count 16 --report ddim",
    )
)
def bench(
    model: ModelOption = "emoji",
    rivals: Annotated[
        str, typer.Option(help="all, or some: fewer, samplers, deepcache, tgate, tomesd ...")
    ] = "all",
    plans: Annotated[
        list[str] | None,
        typer.Option(
            help="Ours: a preset, a plan file, or a folder of SAMPLER-STEPS-GOAL.json; once for "
            "each. The house presets by default.",
            autocompletion=complete_plan,
        ),
    ] = None,
    sampler: Annotated[
        list[str] | None,
        typer.Option(
            help="Once for each; dpm++2m, ddim and euler by default.",
            autocompletion=complete_sampler,
        ),
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(min=2, help="Once for each; 20, 30 and 50 by default.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look: 8 prompts, one sampler and step count.")
    ] = False,
    prompts: PromptFile = None,
    count: Count = 64,
    seed: Annotated[
        int, typer.Option(min=0, help="Picture i has seed SEED + i; nothing is tuned on these.")
    ] = 500_000,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once: a round.")] = 8,
    guidance: Guidance = None,
    converged_steps: ConvergedSteps = 150,
    seeds_for_spread: SeedsForSpread = 2,
    clip: Clip = None,
    out: Annotated[Path, typer.Option(help="File of records.")] = Path(
        "benchmarks/results/bench.jsonl"
    ),
    report: Annotated[Path, typer.Option(help="Folder for plots and the page.")] = Path("bench"),
    resume: Annotated[
        bool, typer.Option(help="Go on where a stopped run with the same settings was.")
    ] = True,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure ours against every rival: time and fidelity of the same runs, interleaved.

    Every contest is on record when it is over; the same command goes on with the next.
    """
    from functools import partial
    from textwrap import fill

    from leansd.cli.invocation import quote_command
    from leansd.cli.terminal import (
        hush_libraries,
        note,
        open_progress,
        show_json,
        show_table,
        show_text,
    )
    from leansd.errors import LeansdError
    from leansd.evaluation.bench import (
        SAMPLERS,
        SETTINGS,
        STEPS,
        BenchSettings,
        PreparedContest,
        check_plans,
        choose_plans,
        drop_done,
        estimate,
        hold,
        list_contests,
        prepare,
        time_step,
    )
    from leansd.evaluation.compare import CONVERGED, RunProgress
    from leansd.evaluation.prompts import choose_prompts, find_guidance, read_prompts
    from leansd.evaluation.records import get_field, load_records, stamp
    from leansd.evaluation.rivals import choose_rivals
    from leansd.evaluation.runs import FULL
    from leansd.evaluation.standings import (
        describe_quality,
        list_left_out,
        read_standings,
        tabulate_margins,
    )
    from leansd.faces.scoring import find_embedder
    from leansd.files import check_file, check_folder
    from leansd.loading import find_device, load, locate
    from leansd.report import Origin, write_report
    from leansd.report.measurements import report_bench
    from leansd.runtime.samplers import check_sampler, require_convergence
    from leansd.text import describe_duration
    from leansd.tuning.front import read_plans

    # Everything that can be wrong is found before a weight is read.
    check_file(out)
    check_folder(report)
    find_device(device)
    locate(model)
    chosen = choose_rivals(rivals)
    check_plans(plans or [])
    samplers = list(dict.fromkeys(sampler or SAMPLERS))
    counts = list(dict.fromkeys(steps or STEPS))
    if quick:
        count, batch = min(count, 8), min(batch, 2)
    for name in samplers:
        require_convergence(check_sampler(name))
    if converged_steps <= max(counts):
        raise LeansdError(
            f"a converged run of {converged_steps} steps against runs of {max(counts)}: "
            "it needs more, 150 are usual"
        )
    texts = read_prompts(prompts) if prompts is not None else None
    hush_libraries()
    embedder = find_embedder(model, clip)

    pipe = load(model, device=device)
    pipe.set_progress_bar_config(disable=True)
    if embedder is not None:
        embedder.clip.to(pipe.device)
    scale = find_guidance(pipe, model) if guidance is None else guidance
    settings = BenchSettings(
        model=model,
        prompts=choose_prompts(model, count, texts),
        rivals=chosen,
        choose_plans=partial(choose_plans, plans or (), read_front=read_plans),
        seed=seed,
        batch=batch,
        embedder=embedder,
        spread_sets=seeds_for_spread,
        converged_steps=converged_steps,
    )
    contests = list_contests(samplers, counts, scale, quick=quick)
    entries = prepare(pipe, settings, contests)
    waiting = drop_done(entries, out) if resume else entries
    step = time_step(waiting[0], settings) if waiting else 0.0
    expected = dict(
        zip((each.contest for each in waiting), estimate(waiting, settings, step), strict=True)
    )
    note(
        f"{len(waiting)} of {len(entries)} contests to hold on {pipe.device}, {count} pictures "
        f"each: about {describe_duration(sum(expected.values()))} at {step:.3f} s a step of {batch}"
    )
    with open_progress() as progress:
        bar = progress.add_task("", total=round(sum(expected.values())))

        def show(each: PreparedContest, far: RunProgress) -> None:
            before = sum(list(expected.values())[: list(expected).index(each.contest)])
            done = before + expected[each.contest] * far.done / far.total
            progress.update(bar, description=f"{each.contest}: {far.case}", completed=done)

        hold(
            waiting,
            settings,
            out,
            on_progress=show,
            on_end=lambda entry, records: note(f"on record: {entry.contest}"),
        )

    held = {entry.fingerprint for entry in entries}
    records = [record for record in load_records(out) if get_field(record, SETTINGS) in held]
    standings = read_standings(records)
    origin = Origin(quote_command(), stamp(pipe.device))
    files = [out, write_report(report / "report.html", report_bench(standings), origin)]
    for standing in standings:
        show_table(tabulate_margins(standing))
        quality = describe_quality(standing)
        for line in (*([quality] if quality else []), *list_left_out(standing)):
            show_text(fill(line, 80))
    if embedder is None:
        show_text("no quality of sets: the model has no CLIP of its own, give one by --clip")
    show_text("wrote " + ", ".join(map(str, files)))
    if as_json:
        show_json(
            {
                "command": "bench",
                "model": model,
                "seed": seed,
                "count": count,
                "batch": batch,
                "held": len(waiting),
                "contests": [
                    {
                        **standing.fields,
                        "left_out": list_left_out(standing),
                        "margins": [
                            {
                                "speed": margin.speed,
                                "reference": reference,
                                "ours": margin.ours and margin.ours.quality,
                                "plan": margin.ours and margin.ours.name,
                                "rival": margin.rival and margin.rival.quality,
                                "family": margin.family,
                                "margin": margin.value,
                            }
                            for reference in (FULL, CONVERGED)
                            for margin in standing.find_margins(reference)
                        ],
                    }
                    for standing in standings
                ],
                "files": [str(path) for path in files],
            }
        )

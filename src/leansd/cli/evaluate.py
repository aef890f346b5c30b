"""`leansd evaluate`: how true and how good pictures are, those of plans or those of a folder."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.completions import complete_plan, offer
from leansd.cli.examples import give_examples
from leansd.cli.options import (
    Batch,
    Clip,
    ConvergedSteps,
    Count,
    Device,
    Fit,
    Force,
    Guidance,
    Json,
    ModelArgument,
    PromptFile,
    Quiet,
    Sampler,
    Seed,
    SeedsForSpread,
)

app = typer.Typer(add_completion=False)


@app.command(
    epilog=give_examples(
        "leansd evaluate --plan balanced --count 16 --out balanced",
        "leansd evaluate --plan fast --plan turbo --rival unipc:15 --json",
        "leansd evaluate --pictures shards --reference coco --ray local",
    )
)
def evaluate_plans(
    model: ModelArgument = "emoji",
    plan: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset or a plan file; give the option once for each.",
            autocompletion=complete_plan,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Sampler steps of full run and plans.")] = 30,
    fit: Fit = False,
    force: Force = False,
    sampler: Sampler = None,
    prompts: PromptFile = None,
    count: Count = 64,
    seed: Seed = 1000,
    batch: Batch = 8,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            help="full, converged, or SAMPLER:STEPS as in dpm++2m:150; once for each. "
            "full and converged by default. With --pictures: a folder of pictures, or a file of "
            "statistics (.safetensors, or .npz with mu and sigma).",
            autocompletion=offer("full", "converged"),
        ),
    ] = None,
    converged_steps: ConvergedSteps = 150,
    rival: Annotated[
        list[str] | None,
        typer.Option(help="SAMPLER:STEPS to measure like a plan, as in unipc:15; once for each."),
    ] = None,
    seeds_for_spread: SeedsForSpread = 2,
    clip: Clip = None,
    lpips: Annotated[
        Path | None, typer.Option(help="AlexNet weights of torchvision, for LPIPS.")
    ] = None,
    guidance: Guidance = None,
    out: Annotated[
        Path, typer.Option(help="Folder for report, records and what resumes a stopped run.")
    ] = Path("evaluation"),
    device: Device = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="Score this folder of tar shards (leansd generate --prompts) or pictures, "
            "instead of plans."
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="With --pictures: of fid,is,clip,lpips,precision and tiny-frechet,tiny-clip,"
            "tiny-precision; by default what the weights at hand allow."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="With --pictures: weights of inception, clip or lpips; repeat it.",
        ),
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(min=8, help="With --pictures: their middle square at so many pixels first."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="With --pictures: where what is seen of references is kept."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="With --pictures: a Ray cluster, or local for one here."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray: networks at once; one a GPU by default.")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=0, help="With --pictures: of a network on a CPU; 0 for all.")
    ] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure plans: fidelity to references from the same seeds, and the quality of whole sets.

    With --pictures measure a folder of pictures, whoever drew them: FID, IS, CLIP score, LPIPS,
    precision and recall. Stopped, the same command goes on where it was; what was drawn stays in
    OUT/drawn, what was seen in OUT/seen.
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
    from leansd.emoji.card import GRID_PROMPTS
    from leansd.errors import LeansdError
    from leansd.evaluation.compare import CONVERGED, Case
    from leansd.evaluation.evaluation import evaluate_cases, list_cases, make_reference
    from leansd.evaluation.fidelity import explain_missing_lpips, find_lpips_weights, open_lpips
    from leansd.evaluation.prompts import GUIDANCE, find_guidance, read_prompts
    from leansd.evaluation.records import stamp, write_records
    from leansd.evaluation.runs import FULL
    from leansd.faces.outlines import open_anatomy, outline_runs
    from leansd.faces.scoring import find_embedder
    from leansd.files import check_folder
    from leansd.loading import EMBEDDED, find_device, load, locate
    from leansd.plans.resolve import resolve_plan
    from leansd.report import Origin, write_report
    from leansd.report.measurements import (
        report_evaluation,
        tabulate_fidelity,
        tabulate_quality,
    )
    from leansd.runtime.context import describe_runs
    from leansd.runtime.samplers import (
        check_sampler,
        make_scheduler,
        name_sampler,
        parse_course,
        require_convergence,
        set_sampler,
    )

    # Everything that can be wrong is found before a weight is read.
    check_folder(out)
    if (plan is None) == (pictures is None):
        raise LeansdError("give --plan to measure plans, or --pictures to score a folder")
    if pictures is not None:
        from leansd.cli.scores import score_folder
        from leansd.scoring.looking import Manner

        if len(reference or ()) > 1:
            raise LeansdError("pictures are scored against one reference: give --reference once")
        own = [f"clip={clip}"] if clip is not None else []
        own += [f"lpips={lpips}"] if lpips is not None else []
        score_folder(
            pictures,
            reference[0] if reference else None,
            metrics,
            [*own, *(weights or ())],
            manner=Manner({}, resize, batch, threads or (1 if ray is not None else 0), device),
            out=out,
            cache=cache,
            ray=ray,
            workers=workers,
            as_json=as_json,
        )
        return
    assert plan is not None
    find_device(device)
    if sampler is not None:
        check_sampler(sampler)
    locate(model)
    if prompts is None and model != EMBEDDED:
        raise LeansdError(f"no prompts for {model}: give --prompts FILE, one prompt a line")
    texts = read_prompts(prompts) if prompts is not None else GRID_PROMPTS
    named = reference or [FULL, CONVERGED]
    for name in named:
        if name in (FULL, CONVERGED):
            make_reference(name, steps, converged_steps)
        else:
            parse_course(name)
    for name in rival or ():
        parse_course(name)
    if CONVERGED in named and sampler is not None:
        require_convergence(sampler)
    hush_libraries()
    anatomy = open_anatomy(model)
    context = outline_runs(model, anatomy, steps, sampler=sampler)
    for each in plan:
        resolve_plan(each, context, fit=fit, force=force)
    alexnet = lpips or find_lpips_weights()
    distance = open_lpips(alexnet) if alexnet is not None else None
    embedder = find_embedder(model, clip)

    pipe = load(model, device=device)
    if sampler is not None:
        set_sampler(pipe, sampler)
    own = name_sampler(pipe)
    if CONVERGED in named:
        require_convergence(own)
    pipe.set_progress_bar_config(disable=True)
    if embedder is not None:
        embedder.clip.to(pipe.device)

    courses = {
        name: Case(name, length, scheduler=make_scheduler(pipe, other), sampler=other)
        for name in (*named, *(rival or ()))
        if name not in (FULL, CONVERGED)
        for other, length in (parse_course(name),)
    }

    def label(case: Case) -> Case:
        return Case(case.name, case.steps, case.plan, sampler=own)

    applied = find_guidance(pipe, model) if guidance is None else guidance
    context = describe_runs(pipe, steps, anatomy=anatomy, guidance=applied)
    resolved = [resolve_plan(each, context, fit=fit, force=force) for each in plan]
    for each in resolved:
        if not force:
            each.require_tuned()
        for line in each.notes:
            warn(line)
    plans = [each.plan for each in resolved]
    contestants = [label(each) for each in list_cases(pipe, plans, steps)]
    contestants += [courses[name] for name in rival or ()]
    references = [
        courses[name] if name in courses else label(make_reference(name, steps, converged_steps))
        for name in named
    ]
    scale = GUIDANCE if guidance is None and model == EMBEDDED else guidance
    drawn = [texts[place % len(texts)] for place in range(count)]
    names = ", ".join(each.name for each in contestants)
    note(f"drawing {count} pictures on {pipe.device}, each with {names}")
    with open_progress() as progress:
        bar = progress.add_task("steps of pictures", total=None)
        evaluation = evaluate_cases(
            pipe,
            contestants,
            drawn,
            subject=model,
            references=references,
            seed=seed,
            batch=batch,
            settings={"guidance_scale": scale} if scale is not None else {},
            keep=out / "drawn",
            embedder=embedder,
            lpips=distance,
            spread_sets=seeds_for_spread,
            on_progress=lambda far: progress.update(bar, completed=int(far.done), total=far.total),
        )

    notes = []
    if distance is None:
        notes.append(explain_missing_lpips())
    if embedder is None:
        notes.append("no quality of sets: the model has no CLIP of its own, give one by --clip")
    origin = Origin(quote_command(), stamp(pipe.device))
    page = report_evaluation(evaluation, named, drawn, notes)
    files = [
        write_report(out / "report.html", page, origin),
        write_records(out / "records.jsonl", evaluation.records),
        write_records(out / "values.jsonl", evaluation.values),
    ]
    for name in named:
        show_table(tabulate_fidelity(evaluation.records, name))
    quality = tabulate_quality(evaluation.records)
    if quality is not None:
        show_table(quality)
    for line in notes:
        show_text(line)
    show_text("wrote " + ", ".join(map(str, files)))
    if as_json:
        show_json(
            {
                "command": "evaluate",
                "model": model,
                "steps": steps,
                "seed": seed,
                "count": count,
                "sampler": own,
                "references": named,
                "clip": embedder.name if embedder is not None else None,
                "lpips": distance is not None,
                "plans": [each.name for each in contestants],
                "results": [
                    record.model_dump(
                        include={
                            "plan",
                            "fingerprint",
                            "metric",
                            "value",
                            "unit",
                            "reference",
                            "standard_error",
                            "seed_spread",
                        },
                        exclude_none=True,
                    )
                    for record in evaluation.records
                ],
                "files": [str(path) for path in files],
            }
        )

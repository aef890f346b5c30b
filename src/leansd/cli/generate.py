"""`leansd generate`: prompts in, pictures and a report out."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.completions import complete_plan
from leansd.cli.examples import give_examples
from leansd.cli.options import (
    Device,
    Fit,
    Force,
    Json,
    ModelOption,
    Nets,
    OwnGuidance,
    Quiet,
    Sampler,
    Size,
)

app = typer.Typer(add_completion=False)


@app.command(
    epilog=give_examples(
        "leansd generate 'a red apple' 'a pizza' --plan fast --out pictures",
        "leansd generate 'a pizza' --count 4 --seed 7 --sampler ddim --json",
        "leansd generate --prompts rows.jsonl --out shards --batch 16",
    )
)
def generate_pictures(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="A .jsonl or .parquet of rows (id, prompt, and if you like seed, negative_prompt, "
            "init_image, strength); pictures go to OUT/shard-*.tar, and a stopped run goes on.",
        ),
    ] = None,
    model: ModelOption = "emoji",
    plan: Annotated[
        str,
        typer.Option(
            help="A preset (see leansd plan), a plan file, or a front with --speedup; full skips "
            "nothing.",
            autocompletion=complete_plan,
        ),
    ] = "balanced",
    net: Nets = None,
    speedup: Annotated[
        float | None, typer.Option(help="With a front of leansd tune: the speed to take it at.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampler steps; 30, or what the plan file is for.")
    ] = None,
    fit: Fit = False,
    force: Force = False,
    guidance: OwnGuidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture of a prompt.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures a prompt, each a seed further.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    negative: Annotated[str, typer.Option(help="What to steer away from.")] = "",
    sampler: Sampler = None,
    size: Size = None,
    init: Annotated[
        Path | None, typer.Option(help="Start from this picture (image-to-image).")
    ] = None,
    strength: Annotated[
        float, typer.Option(help="With --init: how much to redraw, above 0 and up to 1.")
    ] = 0.8,
    vae: Annotated[
        Path | None,
        typer.Option(help="Folder of another autoencoder, such as a small one, to decode with."),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Draw in full as well, and show both in OUT/report.html."),
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="With --prompts: pictures at once.")] = 8,
    shard: Annotated[int, typer.Option(min=1, help="With --prompts: pictures a shard.")] = 256,
    strict: Annotated[
        bool, typer.Option("--strict", help="With --prompts: stop at a malformed row.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="With --prompts: a Ray cluster, or local for one here."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray: models at once; one a GPU by default.")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=0, help="With --prompts: of a model on a CPU; 0 for all.")
    ] = 0,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw pictures from prompts, each as a PNG that carries its prompt, seed and plan."""
    import time
    from dataclasses import replace

    from leansd.cli.invocation import quote_command
    from leansd.cli.terminal import (
        hush_libraries,
        note,
        open_progress,
        show_json,
        show_text,
        warn,
    )
    from leansd.drawing import (
        Request,
        describe_report,
        encode_png,
        open_picture,
        paint,
        parse_size,
        place_init,
    )
    from leansd.errors import LeansdError
    from leansd.evaluation.prompts import find_guidance
    from leansd.evaluation.records import stamp
    from leansd.faces.outlines import open_anatomy, outline_runs, read_front, read_nets
    from leansd.files import check_folder, name_file, write_new
    from leansd.loading import (
        as_image_to_image,
        find_device,
        load,
        load_unet,
        load_vae,
        locate,
        set_vae,
    )
    from leansd.plans.resolve import STEPS, resolve_plan
    from leansd.report import Origin, write_report
    from leansd.runtime.context import describe_runs
    from leansd.runtime.samplers import check_sampler, name_sampler, set_sampler
    from leansd.version import __version__

    # Everything that can be wrong is found before a weight is read.
    if (prompts is None) == (prompt_file is None):
        raise LeansdError("give prompts, or a file of them by --prompts; one of the two")
    if compare and prompt_file is not None:
        raise LeansdError("--compare is for prompts on the command line: leave --prompts out")
    check_folder(out)
    base = Request(
        prompt="",
        negative=negative or None,
        steps=steps or STEPS,
        guidance=guidance,
        size=parse_size(size) if size else None,
        strength=strength,
    )
    picture = open_picture(init) if init is not None else None
    if sampler is not None:
        check_sampler(sampler)
    find_device(device)
    locate(model)
    hush_libraries()
    anatomy = open_anatomy(model)
    folders = read_nets(net or [])
    anatomies = {name: open_anatomy(folder) for name, folder in folders.items()}
    source = plan if speedup is None else read_front(plan, steps, anatomy, speedup=speedup)
    context = outline_runs(model, anatomy, steps, sampler=sampler, nets=anatomies)
    resolved = resolve_plan(source, context, fit=fit, force=force)
    if not force:
        resolved.require_tuned()
    chosen = resolved.plan
    if prompt_file is not None:
        from leansd.bulk.jobs import Job, draw_here, place_order, run_job
        from leansd.bulk.rows import read_sheet
        from leansd.report.bulk import report_job

        for line in resolved.notes:
            warn(line)
        sheet = read_sheet(prompt_file)
        if sheet.flaws and strict:
            raise LeansdError(
                f"{prompt_file}, {sheet.flaws[0]}; leave --strict out to pass over it"
            )
        for flaw in sheet.flaws[:5]:
            warn(f"{prompt_file}, {flaw}: passed over")
        if len(sheet.flaws) > 5:
            warn(f"{prompt_file}: {len(sheet.flaws) - 5} more rows passed over")
        job = Job(
            model,
            chosen.steps,
            chosen.to_dict(),
            nets=folders,
            guidance=guidance,
            sampler=sampler,
            size=base.size,
            seed=seed,
            strength=strength,
            batch=batch,
            shard=shard,
            threads=threads or (1 if ray is not None else 0),
            device=device,
        )
        order = place_order(sheet, out, job)
        work = draw_here
        if ray is not None:
            from leansd.bulk.on_ray import work_on_ray

            work = work_on_ray(ray, workers=workers)
        total = order.total
        note(f"{order.left} of {total} pictures to draw, {len(order.missing)} shards")
        begin = time.monotonic()
        with open_progress() as progress:
            bar = progress.add_task("pictures", total=total, completed=total - order.left)
            run_job(
                order.job,
                order.missing,
                out,
                work=work,
                on_part=lambda part: progress.advance(bar, len(part.items)),
            )
        origin = Origin(quote_command(), stamp(find_device(device)))
        page = out / "report.html"
        if order.left or not page.exists():
            write_report(page, report_job(order, out, time.monotonic() - begin), origin)
        show_text(f"wrote {total} pictures in {len(order.parts)} shards in {out}")
        if as_json:
            show_json(
                {
                    "command": "generate",
                    "pictures": total,
                    "drawn": order.left,
                    "flaws": [str(flaw) for flaw in order.sheet.flaws],
                    "shards": [str(out / part.name) for part in order.parts],
                    "fingerprint": order.job.fingerprint,
                }
            )
        return
    assert prompts is not None
    from leansd.report.plans import Pair, report_pairs

    autoencoder = load_vae(vae) if vae is not None else None

    pipe = load(model, device=device)
    if autoencoder is not None:
        set_vae(pipe, autoencoder)
    if sampler is not None:
        set_sampler(pipe, sampler)
    nets = {name: load_unet(folder, beside=pipe.unet) for name, folder in folders.items()}
    if picture is not None:
        pipe = as_image_to_image(pipe)
    base = place_init(pipe, replace(base, steps=chosen.steps, init=picture))
    own = find_guidance(pipe, model="") if guidance is None else guidance
    context = describe_runs(pipe, steps, anatomy=anatomy, nets=anatomies, guidance=own)
    resolved = resolve_plan(source, context, fit=fit, force=force)
    if not force:
        resolved.require_tuned()
    for line in resolved.notes:
        warn(line)
    chosen = resolved.plan
    pipe.set_progress_bar_config(disable=True)

    requests = [
        replace(base, prompt=prompt, seed=seed + turn)
        for prompt in prompts
        for turn in range(count)
    ]
    written, painting, pairs = [], None, []
    if compare:  # the first call of a process takes longer than others
        paint(pipe, replace(requests[0], steps=max(2, round(2 / strength))))
    with open_progress() as progress:
        for number, request in enumerate(requests, start=1):
            bar = progress.add_task(
                f"{number}/{len(requests)} {request.prompt[:40]}", total=chosen.steps
            )
            painting = paint(
                pipe,
                request,
                chosen,
                lambda done, total, bar=bar: progress.update(bar, completed=done, total=total),
                nets,
            )
            progress.remove_task(bar)
            if compare:
                bar = progress.add_task(f"{number}/{len(requests)} in full", total=chosen.steps)
                full = paint(
                    pipe,
                    request,
                    None,
                    lambda done, total, bar=bar: progress.update(bar, completed=done, total=total),
                )
                progress.remove_task(bar)
                pairs.append(Pair(request, full, painting))
            facts = {
                "prompt": request.prompt,
                "negative": request.negative or None,
                "seed": request.seed,
                "steps": request.steps,
                "sampler": name_sampler(pipe),
                "guidance": getattr(pipe, "guidance_scale", guidance),
                "model": model,
                "plan": chosen.name,
                "nets": " ".join(net or []) or None,
                "vae": vae,
                "plan_fingerprint": chosen.fingerprint,
                "leansd": __version__,
                "init": init,
                "strength": strength if init is not None else None,
            }
            name = (
                f"{name_file(request.prompt.lower())}.{name_file(chosen.name)}.seed{request.seed}"
            )
            path = write_new(out / f"{name}.png", encode_png(painting.image, facts))
            written.append((path, painting, facts))
            told = f"{path}  {painting.seconds:.2f} s"
            progress.console.print(told, highlight=False, markup=False, soft_wrap=True)
    assert painting is not None
    show_text(str(painting.report))
    place = str(written[0][0]) if len(written) == 1 else f"{len(written)} pictures in {out}"
    show_text(f"wrote {place}")
    if compare:
        origin = Origin(quote_command(), stamp(pipe.device))
        page = write_report(out / "report.html", report_pairs(pairs, chosen, anatomy), origin)
        show_text(f"wrote {page}")
    if as_json:
        show_json(
            {
                "command": "generate",
                "pictures": [
                    {
                        "path": str(path),
                        "seconds": round(done.seconds, 4),
                        **{k: str(v) if isinstance(v, Path) else v for k, v in facts.items()},
                        **describe_report(done.report),
                    }
                    for path, done, facts in written
                ],
            }
        )

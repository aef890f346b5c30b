"""`leansd generate`: prompts in, pictures and a report out."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from leansd.cli.command import Result, argument, command, option
from leansd.cli.options import (
    Following,
    ModelOption,
    Opening,
    OwnGuidance,
    SizeOption,
    complete_plan,
    open_nets,
    tell_notes,
)
from leansd.cli.terminal import note, open_progress, warn
from leansd.errors import LeansdError
from leansd.evaluation.prompt_sets import choose_guidance, find_guidance
from leansd.files import check_folder, find_free, name_file, write_file, write_new
from leansd.plans.plan import Plan
from leansd.plans.resolve import PlanContext
from leansd.version import __version__

if TYPE_CHECKING:
    from leansd.drawing import Painting, Request
    from leansd.evaluation.compare import Comparison

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Wanted:
    """What to draw, whichever way the prompts come."""

    plan: str = option(
        "balanced",
        "A preset (see leansd plan), a plan file, or a front with --speedup; full skips nothing.",
        autocompletion=complete_plan,
    )
    speedup: float | None = option(None, "With a front of leansd tune: the speed to take it at.")
    steps: int | None = option(None, "Sampler steps; 30, or what the plan file is for.", min=1)
    guidance: OwnGuidance = None
    seed: int = option(0, "Seed of the first picture of a prompt.", min=0)
    count: int = option(1, "Pictures a prompt, each a seed further.", min=1)
    negative: str = option("", "What to steer away from.")
    size: SizeOption = None
    init: Path | None = option(None, "Start from this picture (image-to-image).")
    strength: float = option(0.8, "With --init: how much to redraw, above 0 and up to 1.")
    vae: Path | None = option(
        None, "Folder of another autoencoder, such as a small one, to decode with."
    )

    def find_source(self) -> Plan | str:
        """The plan that is asked for, that of a front looked up."""
        return self.plan if self.speedup is None else _read_front(self)

    def make_request(self, steps: int) -> "Request":
        """All but the prompt; raises LeansdError where options do not go together."""
        from leansd.drawing import Request, open_picture, parse_size

        return Request(
            prompt="",
            negative=self.negative or None,
            seed=self.seed,
            steps=steps,
            guidance=self.guidance,
            size=parse_size(self.size) if self.size else None,
            init=open_picture(self.init) if self.init is not None else None,
            strength=self.strength,
        )


@dataclass(frozen=True)
class PromptFile:
    """Prompts from a file, drawn into shards."""

    prompt_file: Path | None = option(
        None,
        "A .jsonl, .csv or .parquet of rows (id, prompt, and if you like seed, "
        "negative_prompt, init_image, strength), or a .txt of prompts; pictures go "
        "to OUT/shard-*.tar, and a stopped run goes on.",
        "--prompts",
    )
    batch: int = option(8, "With --prompts: pictures at once.", min=1)
    shard: int = option(256, "With --prompts: pictures a shard.", min=1)
    strict: bool = option(False, "With --prompts: stop at a malformed row.", "--strict")
    ray: str | None = option(
        None, "With --prompts: a Ray cluster, or local for one here.", metavar="ADDRESS"
    )
    workers: int | None = option(None, "With --ray: models at once; one a GPU by default.", min=1)
    threads: int = option(0, "With --prompts: of a model on a CPU; 0 for all.", min=0)


@command(
    app,
    "generate",
    "leansd generate 'a red apple' 'a pizza' --plan fast --out pictures",
    "leansd generate 'a pizza' --count 4 --seed 7 --sampler ddim --json",
    "leansd generate --prompts rows.jsonl --out shards --batch 16",
)
def generate_pictures(
    prompts: list[str] | None = argument(None, "What to draw.", metavar="PROMPT"),
    *,
    model: ModelOption = "emoji",
    wanted: Wanted,
    out: Path = option(Path("pictures"), "Folder for the pictures."),
    overwrite: bool = option(
        False, "Write over other pictures of the same name in OUT.", "--overwrite"
    ),
    compare: bool = option(
        False, "Draw in full as well, and show both in OUT/report.html.", "--compare"
    ),
    following: Following,
    opening: Opening,
    rows: PromptFile,
) -> Result:
    """Draw pictures from prompts, each as a PNG that carries its prompt, seed and plan."""
    # Everything that can be wrong is found before a weight is read.
    if bool(prompts) == (rows.prompt_file is not None):
        raise LeansdError("give prompts, or a file of them by --prompts; one of the two")
    if compare and rows.prompt_file is not None:
        raise LeansdError("--compare is for prompts on the command line: leave --prompts out")
    check_folder(out)
    wanted = replace(wanted, guidance=choose_guidance(model, wanted.guidance))
    wanted.make_request(wanted.steps or 1_000)
    opening.check_model(model)
    source = wanted.find_source()
    resolved, context = following.outline(
        source, model, steps=wanted.steps, sampler=opening.sampler
    )
    base = wanted.make_request(resolved.plan.steps)
    task = _Task(model, source, wanted, following, opening, context)
    if rows.prompt_file is not None:
        return _draw_rows(task, rows, rows.prompt_file, out)
    chosen = [
        replace(base, prompt=prompt, seed=wanted.seed + turn)
        for prompt in prompts or ()
        for turn in range(wanted.count)
    ]
    return _draw_prompts(task, chosen, out, overwrite=overwrite, compare=compare)


@dataclass(frozen=True)
class _Task:
    """What both ways share, checked."""

    model: str
    source: Plan | str
    wanted: Wanted
    following: Following
    opening: Opening
    context: PlanContext

    def open(self) -> tuple[Any, Plan]:
        """The pipeline, and the plan for its runs."""
        from leansd.loading import load_vae, set_vae

        vae = load_vae(self.wanted.vae) if self.wanted.vae is not None else None
        pipe = self.opening.open(self.model)
        if vae is not None:
            set_vae(pipe, vae)
        guidance = find_guidance(pipe, self.model, self.wanted.guidance)
        strength = self.wanted.strength if self.wanted.init is not None else 1.0
        return pipe, self.following.settle(self.source, pipe, self.context, guidance, strength)


def _draw_prompts(
    task: _Task, requests: "Sequence[Request]", out: Path, *, overwrite: bool, compare: bool
) -> Result:
    """One file a picture."""
    from leansd.drawing import describe_report, explain_fault, paint, place_init
    from leansd.loading import as_image_to_image

    pipe, plan = task.open()
    nets = open_nets(pipe, task.following.nets)
    if requests[0].init is not None:
        pipe = as_image_to_image(pipe)
    requests = [place_init(pipe, each) for each in requests]
    written: list[tuple[Path, Painting, Mapping[str, Any]]] = []
    faults: list[str] = []
    pairs: list[tuple[Request, Comparison]] = []
    with open_progress() as progress:
        for request, follow in _show_each(requests, progress):
            if compare:
                is_warm = request is not requests[0]
                drawn, painting = _compare(pipe, plan, nets, request, follow, is_warm=is_warm)
                pairs += [(request, drawn)] if not painting.fault else []
            else:
                painting = paint(pipe, request, plan, follow, nets)
            facts = _list_facts(task, pipe, request, plan)
            if painting.fault:
                why = explain_fault(pipe, request, painting, plan)
                faults.append(f"{request.prompt[:60]!r} with seed {request.seed}: {why}")
                continue
            path = _write_picture(out, painting, facts, {at for at, *_ in written}, overwrite)
            written.append((path, painting, facts))
            told = f"{path}  {painting.seconds:.2f} s"
            progress.console.print(told, highlight=False, markup=False, soft_wrap=True)
    page = out / "report.html"
    if pairs and not overwrite:
        page = find_free(page)
    pages = {page: _report_pairs(task, pairs, plan)} if pairs else {}
    places = ", ".join([f"{len(written)} pictures in {out}", *map(str, pages)])
    return Result(
        facts={
            "pictures": [
                {
                    "path": str(path),
                    "seconds": round(done.seconds, 4),
                    **{k: str(v) if isinstance(v, Path) else v for k, v in facts.items()},
                    **describe_report(done.report),
                }
                for path, done, facts in written
                if done.report is not None
            ],
            "faults": faults,
        },
        shown=[str(written[-1][1].report)] if written else [],
        pages=pages,
        device=pipe.device,
        files=[path for path, *_ in written] if len(written) < 2 else [],
        wrote="" if len(written) < 2 else places,
        failure="; ".join([f"{len(faults)} of {len(requests)} pictures show nothing", *faults])
        if faults
        else "",
    )


def _compare(
    pipe: Any,
    plan: Plan,
    nets: Mapping[str, Any],
    request: "Request",
    follow: "Callable[[float, float], None]",
    *,
    is_warm: bool,
) -> "tuple[Comparison, Painting]":
    """A request in full and after the plan."""
    from leansd.drawing import Painting, find_fault, paint
    from leansd.evaluation.compare import LEAN, compare_pair

    drawn = compare_pair(
        pipe, plan, request.arguments, request.seed, nets=nets, is_warm=is_warm,
        on_progress=lambda far: follow(far.done, far.total),
    )  # fmt: skip
    lean = drawn[LEAN]
    painting = Painting(lean.images[0], lean.timing.median, lean.attachment)
    if LEAN in drawn.faults or find_fault(painting.image):
        painting = paint(pipe, request, plan, nets=nets)  # says at which step, and of what
    return drawn, painting


def _report_pairs(task: _Task, pairs: "Sequence[tuple[Request, Comparison]]", plan: Plan) -> Any:
    from leansd.report.plans import report_pairs

    assert task.context.anatomy is not None
    return report_pairs(pairs, plan, task.context.anatomy)


def _show_each(
    requests: "Sequence[Request]", progress: Any
) -> "Iterator[tuple[Request, Callable[[float, float], None]]]":
    """The requests, each with what moves a bar of its own: steps done, of so many."""
    for number, request in enumerate(requests, start=1):
        bar = progress.add_task(f"{number}/{len(requests)} {request.prompt[:40]}", total=None)

        def follow(done: float, total: float, bar: Any = bar) -> None:
            progress.update(bar, completed=done, total=total)

        yield request, follow
        progress.remove_task(bar)


def _list_facts(task: _Task, pipe: Any, request: "Request", plan: Plan) -> dict[str, Any]:
    """What a picture says of itself."""
    from leansd.drawing import find_scale
    from leansd.runtime.samplers import name_sampler

    init = task.wanted.init
    return {
        "prompt": request.prompt,
        "negative": request.negative,
        "seed": request.seed,
        "steps": request.steps,
        "sampler": name_sampler(pipe),
        "guidance": find_scale(pipe, request.guidance),
        "model": task.model,
        "plan": plan.name,
        "nets": " ".join(task.following.net or ()) or None,
        "vae": task.wanted.vae,
        "plan_fingerprint": plan.fingerprint,
        "leansd": __version__,
        "init": init,
        "strength": request.strength if init is not None else None,
    }


def _write_picture(
    out: Path, painting: "Painting", facts: Mapping[str, Any], taken: set[Path], overwrite: bool
) -> Path:
    """`a-red-apple.balanced.seed0.png`; never over another picture of this run."""
    from leansd.drawing import encode_png

    words = name_file(facts["prompt"].lower())
    path = out / f"{words}.{name_file(facts['plan'])}.seed{facts['seed']}.png"
    content = encode_png(painting.image, facts)
    if path in taken:
        return write_file(find_free(path), content)
    return write_file(path, content) if overwrite else write_new(path, content)


def _draw_rows(task: _Task, rows: PromptFile, file: Path, out: Path) -> Result:
    """Shards of pictures, those that are there already left out."""

    from leansd.bulk.jobs import DRAWING, place_order, read_faults, run_job
    from leansd.report.plans import report_job

    order = place_order(_read_rows(file, strict=rows.strict), out, _make_job(task, rows))
    note(f"{order.left} of {order.total} pictures to draw, {len(order.missing)} shards")
    begin = time.monotonic()
    with open_progress() as progress:
        bar = progress.add_task("pictures", total=order.total, completed=order.total - order.left)
        run_job(
            order.job,
            order.missing,
            out,
            work=DRAWING.place(rows.ray, rows.workers),
            on_part=lambda part: progress.advance(bar, len(part.items)),
        )
    page, faults = out / "report.html", read_faults(out)
    isnew = bool(order.left) or not page.exists()
    first = " ".join(f"row {at}: {why}" for at, why in list(faults.items())[:1])
    return Result(
        facts={
            "pictures": order.total - len(faults),
            "drawn": order.left,
            "flaws": [str(flaw) for flaw in order.sheet.flaws],
            "faults": faults,
            "shards": [str(out / part.name) for part in order.parts],
            "fingerprint": order.job.fingerprint,
        },
        pages={page: report_job(order, out, time.monotonic() - begin)} if isnew else {},
        device=task.opening.find_device(),
        wrote=f"{order.total - len(faults)} pictures in {len(order.parts)} shards in {out}",
        failure=f"{len(faults)} of {order.total} pictures show nothing; {first}" if faults else "",
    )


def _make_job(task: _Task, rows: PromptFile) -> Any:
    """What decides which pictures come out, as it travels to workers."""
    from leansd.bulk.jobs import BulkJob
    from leansd.drawing import parse_size

    wanted, opening = task.wanted, task.opening
    resolved, _ = task.following.outline(
        task.source, task.model, steps=wanted.steps, sampler=opening.sampler
    )
    # Only a plan that was tuned for certain weights asks for them.
    plan = task.open()[1] if resolved.plan.tuned is not None else tell_notes(resolved)
    return BulkJob(
        task.model,
        plan.steps,
        plan.to_dict(),
        nets=task.following.nets,
        guidance=wanted.guidance,
        sampler=opening.sampler,
        size=parse_size(wanted.size) if wanted.size else None,
        seed=wanted.seed,
        count=wanted.count,
        negative=wanted.negative or None,
        init=str(wanted.init.resolve()) if wanted.init is not None else None,
        strength=wanted.strength,
        vae=str(wanted.vae.resolve()) if wanted.vae is not None else None,
        batch=rows.batch,
        shard=rows.shard,
        threads=rows.threads or (1 if rows.ray is not None else 0),
        device=opening.device,
        dtype=opening.dtype,
    )


def _read_rows(file: Path, *, strict: bool) -> Any:
    """The rows of a file; what is wrong with others is told."""
    from leansd.bulk.jobs import read_sheet

    sheet, most = read_sheet(file), 5
    if sheet.flaws and strict:
        more = f" (and {len(sheet.flaws) - 1} more)" if len(sheet.flaws) > 1 else ""
        first = next(iter(sheet.flaws))
        raise LeansdError(f"{file}, {first}{more}; leave --strict out to pass over it")
    for flaw in sheet.flaws[:most]:
        warn(f"{file}, {flaw}: passed over")
    if len(sheet.flaws) > most:
        warn(f"{file}: {len(sheet.flaws) - most} more rows passed over")
    for remark in sheet.remarks[:most]:
        warn(f"{file}, {remark}")
    return sheet


def _read_front(wanted: Wanted) -> Plan:
    """The plan of a tuned front for a speed-up; it says its number of steps itself."""
    from leansd.tuning.front import Front

    plan = Front.load(wanted.plan).at(speedup=wanted.speedup)
    if wanted.steps is not None and plan.steps != wanted.steps:
        raise LeansdError(
            f"plan {plan.name} of {wanted.plan} runs {plan.steps} steps, not {wanted.steps}: "
            "leave --steps out"
        )
    return plan

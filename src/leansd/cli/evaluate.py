"""`leansd evaluate`: how true and how good pictures are, those of plans or those of a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from leansd.cli.command import Result, command, option
from leansd.cli.options import (
    Calls,
    Clip,
    ConvergedSteps,
    Fitting,
    ModelArgument,
    Opening,
    SeedsForSpread,
    complete_plan,
    offer,
    read_pairs,
)
from leansd.cli.terminal import follow, hush_libraries, note
from leansd.emoji.location import EMBEDDED
from leansd.emoji.prompts import GRID_PROMPTS
from leansd.errors import LeansdError
from leansd.evaluation.prompt_sets import choose_guidance
from leansd.files import check_folder
from leansd.plans.plan import Plan

if TYPE_CHECKING:
    from leansd.evaluation.compare import Case
    from leansd.evaluation.evaluation import Evaluation
    from leansd.evaluation.fidelity import Lpips
    from leansd.evaluation.quality import Embedder

app = typer.Typer(add_completion=False)
CALLS = Calls(count=64, seed=1000)


@dataclass(frozen=True)
class References:
    """What plans are held against, and what is measured like them."""

    reference: list[str] | None = option(
        None,
        "full, converged, or SAMPLER:STEPS as in dpm++2m:150; once for each. full "
        "and converged by default. With --pictures: a folder of pictures, or a file "
        "of statistics (.safetensors, or .npz with mu and sigma).",
        autocompletion=offer("full", "converged"),
    )
    converged_steps: ConvergedSteps = 150
    rival: list[str] | None = option(
        None, "SAMPLER:STEPS to measure like a plan, as in unipc:15; once for each."
    )

    @property
    def names(self) -> list[str]:
        from leansd.evaluation.compare import CONVERGED
        from leansd.evaluation.runs import FULL

        return self.reference or [FULL, CONVERGED]

    def check(self, steps: int, sampler: str | None) -> None:
        """Raises LeansdError where one is no run, or has no converged one."""
        from leansd.evaluation.compare import CONVERGED
        from leansd.evaluation.evaluation import make_reference
        from leansd.evaluation.runs import FULL
        from leansd.runtime.samplers import parse_course, require_convergence

        for name in (*self.names, *(self.rival or ())):
            if name in (FULL, CONVERGED) and name not in (self.rival or ()):
                make_reference(name, steps, self.converged_steps)
            else:
                parse_course(name)
        if CONVERGED in self.names and sampler is not None:
            require_convergence(sampler)

    def list_cases(
        self, pipe: Any, plans: Sequence[Plan], steps: int
    ) -> "tuple[list[Case], list[Case]]":
        """What is measured, and what it is held against."""
        from leansd.evaluation.compare import Case
        from leansd.evaluation.evaluation import list_cases, make_reference
        from leansd.evaluation.runs import FULL
        from leansd.runtime.samplers import make_scheduler, name_sampler, parse_course

        own = name_sampler(pipe)

        def make(name: str) -> Case:
            if name in (FULL, "converged"):
                case = make_reference(name, steps, self.converged_steps)
                return Case(case.name, case.steps, case.plan, sampler=own)
            sampler, length = parse_course(name)
            return Case(name, length, scheduler=make_scheduler(pipe, sampler), sampler=sampler)

        given = list_cases(pipe, plans, steps)
        cases = [Case(each.name, each.steps, each.plan, sampler=own) for each in given]
        return [*cases, *map(make, self.rival or ())], list(map(make, self.names))


@dataclass(frozen=True)
class Judges:
    """Networks that look at pictures."""

    seeds_for_spread: SeedsForSpread = 2
    clip: Clip = None
    lpips: Path | None = option(None, "AlexNet weights of torchvision, for LPIPS.")

    @property
    def weights(self) -> dict[str, Path]:
        """Weights by the extractor's name, as scores of a folder take them."""
        given = {"clip": self.clip, "lpips": self.lpips}
        return {name: path for name, path in given.items() if path is not None}

    def open(self, model: str) -> "tuple[Embedder | None, Lpips | None]":
        """The CLIP and the LPIPS that there are."""
        from leansd.evaluation.extractors import find_embedder
        from leansd.evaluation.fidelity import find_lpips_weights, open_lpips

        alexnet = self.lpips or find_lpips_weights()
        distance = open_lpips(alexnet) if alexnet is not None else None
        return find_embedder(model, self.clip), distance


@dataclass(frozen=True)
class Scores:
    """Scores of a folder of pictures, whoever drew them."""

    pictures: Path | None = option(
        None,
        "Score this folder of tar shards (leansd generate --prompts) or pictures, "
        "instead of plans.",
    )
    metrics: str | None = option(
        None,
        "With --pictures: of fid,is,clip,lpips,precision and "
        "tiny-frechet,tiny-clip,tiny-precision; by default what the weights at hand "
        "allow.",
    )
    weights: list[str] | None = option(
        None,
        "With --pictures: weights of inception, clip or lpips; repeat it.",
        metavar="NAME=PATH",
    )
    resize: int | None = option(
        None, "With --pictures: their middle square at so many pixels first.", min=8
    )
    cache: Path | None = option(None, "With --pictures: where what is seen of references is kept.")
    ray: str | None = option(
        None, "With --pictures: a Ray cluster, or local for one here.", metavar="ADDRESS"
    )
    workers: int | None = option(None, "With --ray: networks at once; one a GPU by default.", min=1)
    threads: int = option(0, "With --pictures: of a network on a CPU; 0 for all.", min=0)


@command(
    app,
    "evaluate",
    "leansd evaluate --plan balanced --count 16 --out balanced",
    "leansd evaluate --plan fast --plan turbo --rival unipc:15 --json",
    "leansd evaluate --pictures shards --reference coco --ray local",
    keeps=True,
)
def evaluate_plans(
    model: ModelArgument = "emoji",
    *,
    plan: list[str] | None = option(
        None,
        "A preset or a plan file; give the option once for each.",
        autocompletion=complete_plan,
    ),
    steps: int = option(30, "Sampler steps of full run and plans.", min=2),
    fitting: Fitting,
    calls: Calls = CALLS,
    references: References,
    judges: Judges,
    out: Path = option(
        Path("evaluation"), "Folder for report, records and what resumes a stopped run."
    ),
    scores: Scores,
    opening: Opening,
) -> Result:
    """Measure plans: fidelity to references from the same seeds, and the quality of whole sets.

    With --pictures measure a folder of pictures, whoever drew them: FID, IS, CLIP score, LPIPS,
    precision and recall. Stopped, the same command goes on where it was; what was drawn stays in
    OUT/drawn, what was seen in OUT/seen.
    """
    # Everything that can be wrong is found before a weight is read.
    check_folder(out)
    if (plan is None) == (scores.pictures is None):
        raise LeansdError("give --plan to measure plans, or --pictures to score a folder")
    if plan is None:
        return _score(scores, references, judges, calls.batch, opening.device, out)
    if (calls.count or 2) < 2:
        raise LeansdError("a set needs 2 pictures at least: give --count 2 or more")
    opening.check_model(model)
    return _measure(_Task(model, plan, steps, fitting, calls, references, judges, opening), out)


@dataclass(frozen=True)
class _Task:
    """What plans are measured by."""

    model: str
    plans: Sequence[str]
    steps: int
    fitting: Fitting
    calls: Calls
    references: References
    judges: Judges
    opening: Opening


def _measure(task: _Task, out: Path) -> Result:
    """Plans against references."""
    from leansd.evaluation.compare import Judging
    from leansd.evaluation.evaluation import evaluate_cases
    from leansd.evaluation.fidelity import list_metrics
    from leansd.evaluation.runs import CallSet
    from leansd.runtime.samplers import name_sampler

    model, calls, references = task.model, task.calls, task.references
    prompts = calls.list_prompts(model, GRID_PROMPTS if model == EMBEDDED else ())
    references.check(task.steps, task.opening.sampler)
    sampler, fitting = task.opening.sampler, task.fitting
    outlined = [
        fitting.outline(each, model, steps=task.steps, sampler=sampler)[1] for each in task.plans
    ]
    embedder, lpips = task.judges.open(model)

    pipe = task.opening.open(model)
    references.check(task.steps, name_sampler(pipe))
    if embedder is not None:
        embedder.clip.to(pipe.device)
    scale = calls.find_guidance(pipe, model)
    pairs = zip(task.plans, outlined, strict=True)
    plans = [fitting.settle(each, pipe, known, scale) for each, known in pairs]
    cases, held = references.list_cases(pipe, plans, task.steps)
    told = choose_guidance(model, calls.guidance)
    settings = {} if told is None else {"guidance_scale": told}
    names = ", ".join(each.name for each in cases)
    note(f"drawing {len(prompts)} pictures on {pipe.device}, each with {names}")
    with follow("steps of pictures") as bar:
        evaluation = evaluate_cases(
            pipe,
            cases,
            CallSet(prompts, calls.seed, calls.batch, settings),
            subject=model,
            keep=out / "drawn",
            judging=Judging(list_metrics(lpips), embedder, task.judges.seeds_for_spread, held),
            on_progress=lambda far: bar.count(far.done, far.total),
        )
    facts = {
        "model": model,
        "steps": task.steps,
        "seed": calls.seed,
        "count": len(prompts),
        "sampler": name_sampler(pipe),
        "references": references.names,
        "clip": embedder.name if embedder is not None else None,
        "lpips": lpips is not None,
        "plans": [each.name for each in cases],
    }
    return _give_evaluation(evaluation, facts, prompts, out, pipe.device)


SHOWN = {
    "plan",
    "fingerprint",
    "metric",
    "value",
    "unit",
    "reference",
    "standard_error",
    "seed_spread",
}
"""What the JSON line holds of a record."""


def _give_evaluation(
    evaluation: "Evaluation", facts: dict[str, Any], prompts: Sequence[str], out: Path, device: Any
) -> Result:
    from leansd.evaluation.fidelity import explain_missing_lpips
    from leansd.report.measurements import report_evaluation, tabulate_fidelity, tabulate_quality

    notes = [] if facts["lpips"] else [explain_missing_lpips()]
    if facts["clip"] is None:
        notes.append("no quality of sets: the model has no CLIP of its own, give one by --clip")
    quality = tabulate_quality(evaluation.records)
    named = facts["references"]
    return Result(
        facts={
            **facts,
            "results": [
                record.model_dump(include=SHOWN, exclude_none=True) for record in evaluation.records
            ],
            "left_out": dict(evaluation.left_out),
        },
        shown=[
            *(tabulate_fidelity(evaluation.records, name) for name in named),
            *([quality] if quality is not None else []),
            *notes,
        ],
        pages={out / "report.html": report_evaluation(evaluation, named, list(prompts), notes)},
        records={
            out / "records.jsonl": evaluation.records,
            out / "values.jsonl": evaluation.values,
        },
        device=device,
        failure="; ".join(f"left out: {why}" for why in evaluation.left_out.values()),
    )


def _score(
    scores: Scores,
    references: References,
    judges: Judges,
    batch: int,
    device: str | None,
    out: Path,
) -> Result:
    """The scores of a folder of pictures."""
    from leansd.evaluation.extraction import EXTRACTION, ExtractionConfig
    from leansd.evaluation.scoring import KEPT, carry_out, list_notes, plan_scoring
    from leansd.report.measurements import report_scores, tabulate_scores

    assert scores.pictures is not None
    if len(references.reference or ()) > 1:
        raise LeansdError("pictures are scored against one reference: give --reference once")
    reference = next(iter(references.reference or ()), None)
    hush_libraries()
    metrics = None
    if scores.metrics is not None:
        metrics = [name.strip() for name in scores.metrics.split(",") if name.strip()]
    scoring = plan_scoring(
        scores.pictures,
        reference,
        metrics,
        judges.weights | read_pairs("--weights", scores.weights or (), "PATH, clip=nets/clip"),
        config=ExtractionConfig(
            {}, scores.resize, batch, scores.threads or (1 if scores.ray else 0), device
        ),
        keep=out / KEPT,
        cache=scores.cache,
    )
    for name in scoring.pictures.gaps:
        note(f"{name} is missing in {scores.pictures}: the run that draws it has not ended")
    notes = list_notes(scoring, asked=scores.metrics is not None)
    note(f"looking at {len(scoring.pictures)} pictures with {', '.join(scoring.names.values())}")
    with follow("pictures") as bar:
        scored = carry_out(
            scoring,
            work=EXTRACTION.place(scores.ray, scores.workers),
            on_pictures=bar.count,
            on_metric=lambda name: bar.advance(f"computing {name}", 0),
        )
    circumstances = {"device", "leansd", "torch", "diffusers", "python", "time", "unit"}
    return Result(
        facts={
            "pictures": len(scoring.pictures),
            "folder": str(scores.pictures),
            "reference": reference,
            "results": [
                record.model_dump(exclude=circumstances, exclude_none=True)
                for record in scored.records
            ],
            "notes": notes,
        },
        shown=[tabulate_scores(scoring, scored), *notes],
        pages={out / "report.html": report_scores(scoring, scored, notes)},
        records={out / "records.jsonl": scored.records}
        | ({out / "values.jsonl": scored.values} if scored.values else {}),
        device=Opening(device).find_device(),
    )

"""The benchmark: ours and every rival of a contest in one process, in turns, on the same batches.

A contest is one task, sampler, step count and guidance. Its records are in the file before the next
contest begins, so that a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from leansd.errors import LeansdError
from leansd.evaluation.compare import (
    CONVERGED,
    CONVERGED_STEPS,
    Case,
    Comparison,
    Drawings,
    Judging,
    RunProgress,
    compare_runs,
    require_distinct,
)
from leansd.evaluation.fidelity import list_metrics
from leansd.evaluation.fingerprints import fingerprint_call, fingerprint_case, fingerprint_pipe
from leansd.evaluation.quality import Embedder
from leansd.evaluation.records import Record, get_field, load_records, put_records, stamp
from leansd.evaluation.rivals import OURS, Contest, Rival, RivalContext, make_case
from leansd.evaluation.runs import FULL, CallSet, PipelineCall, expand_calls, run_calls
from leansd.evaluation.standings import MEASURED, PREDICTED, find_contest
from leansd.loading import as_image_to_image
from leansd.plans.anatomy import Anatomy
from leansd.plans.plan import Plan
from leansd.plans.presets import PRESETS, SPEED_PRESETS, Preset
from leansd.plans.presets.tuned import NOISY
from leansd.plans.resolve import PlanContext, Source, find_source, resolve_plan
from leansd.runtime.clock import is_flow
from leansd.runtime.context import dissect_denoiser
from leansd.runtime.samplers import make_scheduler

STEPS = (20, 30, 50)
LONG = 30
"""The step count at which the first sampler is run by all variants of all rivals."""
GUIDANCES = (7.5, 8.0)
"""Guidance scales besides the model's own: that of Stable Diffusion's pipelines, and with 30 steps
that of A-SDM's tables (arXiv 2406.00210)."""
STRENGTH, OTHER_STRENGTH = 0.6, 0.8
"""Strengths of image-to-image; records and fronts do not name the first one."""
INPUT_SEED = 10_000_000
INPUT_STEPS = 20
OWN_SETTING = re.compile(r"-(g[\d.]+|image-to-image(-s[\d.]+)?)")
"""What the name of a front for one guidance scale or for pictures has behind the steps."""
SETTINGS = "settings"
"""The field of records that holds the fingerprint of all that a contest's numbers follow from."""

ChoosePlans = Callable[[Contest, Anatomy], Sequence[Plan]]
"""Ours in a contest, for what denoises."""


# -- which contests ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Lineup:
    """The samplers of one kind of model.

    Attributes:
        samplers: of the contests, where none are named.
        hosts: held at one step count then.
        others: good ones, whose fewer steps are rivals in every contest.
    """

    samplers: tuple[str, ...]
    hosts: tuple[str, ...]
    others: tuple[str, ...]


NOISE = Lineup(
    ("dpm++2m", "ddim", "euler"),
    ("dpm++2m-karras", "unipc", "dpm++sde", "euler-a"),
    ("unipc", "deis"),
)
FLOW = Lineup(("flow-euler", "flow-dpm++2m"), (), ("flow-dpm++2m", "flow-unipc"))


def choose_lineup(pipe: Any) -> Lineup:
    """The samplers for what a pipeline's denoiser predicts."""
    return FLOW if is_flow(pipe.scheduler) else NOISE


def list_contests(
    samplers: Sequence[str],
    steps: Sequence[int],
    guidance: float,
    *,
    hosts: Sequence[str] = (),
    quick: bool = False,
) -> list[Contest]:
    """Text-to-image everywhere; image-to-image at two strengths and guidance as others have it with
    the first sampler, and further `hosts` at one step count.

    One contest is long: who is far from the front there is so elsewhere. `quick` is a first look at
    one contest.
    """
    first, central = samplers[0], LONG if LONG in steps else steps[0]
    if quick:
        return [Contest("text-to-image", first, central, guidance)]
    contests = [
        Contest("text-to-image", sampler, count, guidance, (sampler, count) == (first, central))
        for sampler in samplers
        for count in steps
    ]
    contests += [
        Contest("image-to-image", first, central, guidance, strength=strength)
        for strength in (STRENGTH, OTHER_STRENGTH)
    ]
    contests += [
        Contest("text-to-image", first, central, other) for other in GUIDANCES if other != guidance
    ]
    contests += [Contest("text-to-image", host, central, guidance) for host in hosts]
    return contests


def list_settings(contest: Contest, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The pipeline arguments of every call of a contest; `arguments` are those of all contests."""
    settings: dict[str, Any] = {**(arguments or {}), "guidance_scale": contest.guidance}
    if contest.task == "image-to-image":
        settings["strength"] = contest.strength
    return settings


def draw_inputs(
    pipe: Any,
    prompts: Sequence[str],
    scheduler: Any,
    *,
    guidance: float,
    batch: int,
    seed: int = INPUT_SEED,
    arguments: Mapping[str, Any] | None = None,
) -> list[PipelineCall]:
    """Image-to-image calls: every prompt on a picture that was drawn for the next one.

    By default, pictures come from seeds that no contest uses.
    """
    pictures = run_calls(
        pipe,
        CallSet(
            [*prompts[1:], prompts[0]],
            seed,
            batch,
            {**(arguments or {}), "guidance_scale": guidance},
        ),
        INPUT_STEPS,
        scheduler=scheduler,
    ).pictures
    return [
        {"prompt": prompt, "image": picture}
        for prompt, picture in zip(prompts, torch.split(pictures, 1), strict=True)
    ]


# -- ours --------------------------------------------------------------------------------------


def name_own_front(contest: Contest) -> str:
    """The name of a front that was tuned for what a contest draws: pictures, or one guidance."""
    setting = contest.task if contest.task == "image-to-image" else f"g{contest.guidance:g}"
    setting += f"-s{contest.strength:g}" if _tells_strength(contest) else ""
    return f"{contest.sampler}-{contest.steps}-{setting}"


def check_plans(sources: Sequence[str]) -> None:
    """Find what is wrong with --plans before anything is loaded.

    Raises:
        LeansdError: there is no such preset, file or folder, or a file is not a plan.
    """
    for source in sources:
        if not Path(source).is_dir():
            find_source(source)
        elif not any(Path(source).glob("*.json")):
            raise LeansdError(
                f"no plans in {source}: a folder holds SAMPLER-STEPS-GOAL.json, as in "
                "dpm++2m-30-2x.json"
            )


def choose_plans(
    sources: Sequence[str],
    contest: Contest,
    anatomy: Anatomy,
    *,
    read_front: Callable[[Path], Sequence[Plan]],
    force: bool = False,
    tell: Callable[[str], None] = lambda note: None,
) -> tuple[Plan, ...]:
    """The plans that are ours in a contest: the speed presets where none are named.

    A folder holds plans named SAMPLER-STEPS-GOAL.json, and fronts, SAMPLER-STEPS.json, or those of
    `name_own_front`; a plan file of another step count sits out, and so do a preset that means the
    full run and, where runs begin late, a plan with mixes.

    Args:
        read_front: gives the plans of a front's file.
        force: follow presets however few the steps are.
        tell: is told what must be said of a plan.
    """
    context = PlanContext(
        contest.steps,
        contest.sampler,
        anatomy=anatomy,
        guidance=contest.guidance,
        strength=contest.strength,
    )
    found: list[Source] = []
    for source in sources or SPEED_PRESETS:
        if source not in PRESETS and Path(source).is_dir():
            found += _read_folder(Path(source), contest, read_front)
        else:
            one = find_source(source)
            found += [one] if isinstance(one, Preset) or one.steps == contest.steps else []
    plans: list[Plan] = []
    for each in found:
        # Of its own step count, which a front's plan may have fewer of.
        steps = contest.steps if isinstance(each, Preset) else each.steps
        resolved = resolve_plan(each, replace(context, steps=steps), force=force)
        if resolved.plan.mixes and contest.strength < 1:
            tell(f"{resolved.plan.name} sits out in {contest.task}: it mixes since the first step")
            continue
        for note in resolved.notes:
            tell(note)
        if resolved.plan.name != FULL or not isinstance(each, Preset):
            plans.append(resolved.plan)
    return tuple(plans)


def _read_folder(
    folder: Path, contest: Contest, read_front: Callable[[Path], Sequence[Plan]]
) -> list[Plan]:
    """The front tuned for what a contest draws, and the plans of its sampler and steps."""
    stem = f"{contest.sampler}-{contest.steps}"
    return [
        *_read_nearest_front(folder, contest, read_front),
        *(
            Plan.load(file).rename(file.stem.split("-", 2)[-1])
            for file in sorted(folder.glob(f"{stem}-*.json"))
            if not OWN_SETTING.fullmatch(file.stem.removeprefix(stem))
        ),
    ]


def _read_nearest_front(
    folder: Path, contest: Contest, read_front: Callable[[Path], Sequence[Plan]]
) -> Sequence[Plan]:
    """The front tuned for what a contest draws; else of its sampler and steps, the one tuned at the
    nearest guidance.
    """
    stem = f"{contest.sampler}-{contest.steps}"
    own = folder / f"{name_own_front(contest)}.json"
    paths = [own] if own.exists() else [folder / f"{stem}.json", *folder.glob(f"{stem}-g*.json")]
    fronts = [read_front(path) for path in paths if path.exists()]

    def measure(front: Sequence[Plan]) -> float:
        tuned = next((plan.tuned for plan in front if plan.tuned is not None), None)
        scale = None if tuned is None else tuned.guidance
        return 0.0 if scale is None else abs(scale - contest.guidance)

    return min(fronts, key=measure, default=())


# -- preparing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchSettings:
    """What all contests share.

    Attributes:
        spread_sets: further sets of the full run from other seeds, to tell chance from effect.
        arguments: of every pipeline call, besides those that a contest is about.
    """

    model: str
    prompts: Sequence[str]
    rivals: Sequence[Rival]
    choose_plans: ChoosePlans
    seed: int = 0
    batch: int = 8
    embedder: Embedder | None = None
    spread_sets: int = 2
    converged_steps: int = CONVERGED_STEPS
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class PreparedContest:
    """A contest that is ready to be held.

    Attributes:
        cases: the full run first, then ours, then the rivals.
        calls: for the pipeline of the contest's task; call `i` has seed `seed + i`.
        left_out: rivals that do not take part, and why.
        fingerprint: of everything that its numbers follow from.
    """

    contest: Contest
    pipe: Any
    cases: tuple[Case, ...]
    calls: Sequence[PipelineCall]
    spread_sets: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    fingerprint: str = ""


def prepare(
    pipe: Any, settings: BenchSettings, contests: Sequence[Contest]
) -> list[PreparedContest]:
    """All cases of every contest; draws the pictures that image-to-image starts from."""
    weights, anatomy = fingerprint_pipe(pipe), dissect_denoiser(pipe)
    others = choose_lineup(pipe).others
    names = dict.fromkeys([*(each.sampler for each in contests), *others])
    schedulers = {name: make_scheduler(pipe, name) for name in names}
    tasks: dict[str, tuple[Any, Sequence[Any]]] = {"text-to-image": (pipe, settings.prompts)}
    prepared: list[PreparedContest] = []
    for contest in contests:
        if contest.task not in tasks:
            other: Any = as_image_to_image(pipe)
            other.set_progress_bar_config(disable=True)
            scheduler, guidance = schedulers[contest.sampler], contest.guidance
            calls = draw_inputs(
                pipe,
                settings.prompts,
                scheduler,
                guidance=guidance,
                batch=settings.batch,
                arguments=settings.arguments,
            )
            tasks[contest.task] = other, calls
        runner, calls = tasks[contest.task]
        context = RivalContext(
            contest,
            runner,
            anatomy,
            tuple(name for name in others if name != contest.sampler),
            tuple(settings.choose_plans(contest, anatomy)),
        )
        cases, left_out = line_up(context, settings.rivals, schedulers)
        spread = settings.spread_sets if contest.steps == LONG or contest.is_long else 0
        each = PreparedContest(contest, runner, cases, calls, spread, left_out)
        prepared.append(replace(each, fingerprint=fingerprint_contest(each, settings, weights)))
    return prepared


def line_up(
    context: RivalContext, rivals: Sequence[Rival], schedulers: Mapping[str, Any]
) -> tuple[tuple[Case, ...], dict[str, str]]:
    """The full run, ours and the rivals' cases, and which rivals do not take part and why.

    Raises:
        LeansdError: two have the same name.
    """
    contest = context.contest
    cases = [Case(FULL, contest.steps, family=FULL)]
    cases += [make_case(context, plan, plan.name, OURS) for plan in context.own]
    left_out: dict[str, str] = {}
    for rival in rivals:
        obstacle = rival.find_obstacle(context.anatomy)
        if obstacle:
            left_out[rival.name] = obstacle
        else:
            cases += [replace(each, may_fail=True) for each in rival.give(context)]
    require_distinct(cases)
    sampled = [replace(c, sampler=c.sampler or contest.sampler) for c in cases]
    return tuple(replace(c, scheduler=schedulers[c.sampler]) for c in sampled), left_out


def fingerprint_contest(prepared: PreparedContest, settings: BenchSettings, weights: str) -> str:
    """Sixteen hex digits of a contest: who takes part, on what, from which seeds, by which model.

    Args:
        weights: the pipeline's fingerprint, with the versions of the libraries.
    """
    calls = expand_calls(prepared.calls)
    return fingerprint_case(
        {
            **describe_contest(prepared.contest),
            "weights": weights,
            "calls": [fingerprint_call(each, settings.seed + i) for i, each in enumerate(calls)],
            "arguments": list_settings(prepared.contest, settings.arguments),
            "batch": settings.batch,
            "clip": settings.embedder.name if settings.embedder is not None else None,
            "spread_sets": prepared.spread_sets,
            "converged_steps": settings.converged_steps,
            "contestants": [
                [each.name, each.family, each.fingerprint, each.steps] for each in prepared.cases
            ],
            "left_out": dict(prepared.left_out),
        }
    )


def list_calls(prepared: PreparedContest, settings: BenchSettings) -> CallSet:
    """What every case of a contest draws."""
    arguments = list_settings(prepared.contest, settings.arguments)
    return CallSet(prepared.calls, settings.seed, settings.batch, arguments)


def drop_done(prepared: Sequence[PreparedContest], path: Path) -> list[PreparedContest]:
    """The contests that a file of records does not hold yet."""
    records = load_records(path) if path.exists() else []
    done = {get_field(record, SETTINGS) for record in records}
    return [each for each in prepared if each.fingerprint not in done]


# -- how long it takes -------------------------------------------------------------------------


def time_step(prepared: PreparedContest, settings: BenchSettings) -> float:
    """Seconds that a step of a full batch takes here, from one run after a warm-up."""
    calls = list_calls(prepared, settings)
    spent = 0.0
    for _ in range(2):
        start = time.perf_counter()
        compare_runs(
            prepared.pipe,
            prepared.cases[:1],
            calls.pick(calls.parts[0]),
            judging=Judging(references=()),
            rounds=None,
        )
        spent = time.perf_counter() - start
    return spent / prepared.contest.count_run(prepared.contest.steps)


def estimate(
    prepared: Sequence[PreparedContest], settings: BenchSettings, step: float
) -> list[float]:
    """The expected seconds of each contest, at so many seconds a step of a full batch."""
    seen: set[tuple[Any, ...]] = set()
    seconds: list[float] = []
    for each in prepared:
        contest = each.contest
        rounds = -(-len(each.calls) // settings.batch)
        share = rounds * sum(case.cost for case in each.cases)
        share += rounds * each.spread_sets if settings.embedder is not None else 0
        if has_limit(contest) and name_limit(contest) not in seen:
            share += rounds * settings.converged_steps / contest.steps
            seen.add(name_limit(contest))
        seconds.append(share * contest.count_run(contest.steps) * step)
    return seconds


def name_limit(contest: Contest) -> tuple[Any, ...]:
    """What contests have in common that have the same converged run."""
    return contest.task, contest.sampler, contest.guidance, contest.strength


def has_limit(contest: Contest) -> bool:
    """Whether there is a converged run: not where every step draws noise."""
    return contest.sampler not in NOISY


# -- holding -----------------------------------------------------------------------------------


def hold(
    prepared: Sequence[PreparedContest],
    settings: BenchSettings,
    path: Path,
    *,
    on_progress: Callable[[PreparedContest, RunProgress], None] = lambda each, far: None,
    on_end: Callable[[PreparedContest, Sequence[Record]], None] = lambda each, records: None,
) -> None:
    """Hold all contests; the records of each are in the file before the next begins."""
    limits: dict[tuple[Any, ...], Drawings] = {}
    for each in prepared:
        limit = name_limit(each.contest)
        comparison = compare_contest(
            each, settings, limits.get(limit), lambda far, each=each: on_progress(each, far)
        )
        if has_limit(each.contest):
            limits[limit] = comparison.references[CONVERGED]
        fields: Mapping[str, Any] = {**stamp(each.pipe.device), SETTINGS: each.fingerprint}
        records = list_records(each, settings, comparison, fields)
        put_records(path, records, find_contest)
        on_end(each, records)


def compare_contest(
    prepared: PreparedContest,
    settings: BenchSettings,
    limit: Drawings | None = None,
    on_progress: Callable[[RunProgress], None] = lambda far: None,
) -> Comparison:
    """Everybody on every batch, in turns; times are medians, so that a first run decides nothing.

    Args:
        limit: what the converged run drew, where another contest needed it.
    """
    converged = Case(CONVERGED, settings.converged_steps, scheduler=prepared.cases[0].scheduler)
    return compare_runs(
        prepared.pipe,
        prepared.cases,
        list_calls(prepared, settings),
        judging=Judging(
            list_metrics(),
            settings.embedder,
            prepared.spread_sets,
            references=(FULL, converged) if has_limit(prepared.contest) else (FULL,),
            known={CONVERGED: limit} if limit is not None else {},
        ),
        on_progress=on_progress,
    ).require_finite()


def list_records(
    prepared: PreparedContest,
    settings: BenchSettings,
    comparison: Comparison,
    fields: Mapping[str, Any],
) -> list[Record]:
    """All numbers of a contest; `fields` are on every record."""
    contest = prepared.contest
    shared = {
        **fields,
        "subject": settings.model,
        "seed": settings.seed,
        **describe_contest(contest),
        "calls": len(prepared.calls),
        "batch": settings.batch,
    }
    absent = {**prepared.left_out, **comparison.left_out}
    left_out = "; ".join(f"{name}: {why}" for name, why in absent.items())
    records: list[Record] = []
    for each in comparison:
        case, timing, ratio = each.case, each.timing, each.speedup
        base = {
            **shared,
            "plan": case.name,
            "fingerprint": case.fingerprint,
            "family": case.family,
            "run_steps": case.steps,
            "run_sampler": case.sampler,
        }
        rounds: dict[str, Any] = {"rounds": len(timing.seconds)}
        told: dict[str, Any] = {"each": " ".join(f"{value:.4f}" for value in timing.seconds)}
        if case.family == FULL and left_out:
            told["left_out"] = left_out
        span: dict[str, Any] = {"low": ratio.low, "high": ratio.high, **rounds}
        records += [
            Record(
                **base, **rounds, **told, metric="seconds", value=timing.median, unit="s a batch"
            ),
            Record(**base, **span, metric=MEASURED, value=ratio.median, unit="x"),
            *(measure.summarise(base) for measure in each.measures),
        ]
        # What an adaptive plan computes is known when it has run.
        if case.plan is None or case.plan.drift is None:
            records.append(Record(**base, metric=PREDICTED, value=1 / case.cost, unit="x"))
    return records


def describe_contest(contest: Contest) -> dict[str, Any]:
    """The fields that tell a contest from others."""
    return {
        "task": contest.task,
        "sampler": contest.sampler,
        "steps": contest.steps,
        "guidance": contest.guidance,
        **({"strength": contest.strength} if _tells_strength(contest) else {}),
    }


def _tells_strength(contest: Contest) -> bool:
    """Whether records of a contest say its strength; those of the first one never did."""
    return contest.task == "image-to-image" and contest.strength != STRENGTH

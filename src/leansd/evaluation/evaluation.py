"""Evaluation: plans against references from the same seeds, and the quality of whole sets.

Two references answer two questions. The full run: is it still the same picture? The converged run
of the same sampler: is it nearer to, or further from, what the sampler approximates? A plan that
only copies the full run's own discretisation error wins nothing under the second.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from leansd.drawing import find_scale
from leansd.errors import LeansdError
from leansd.evaluation.compare import (
    CONVERGED,
    CONVERGED_STEPS,
    Case,
    Judging,
    OnProgress,
    compare_runs,
)
from leansd.evaluation.fidelity import Lpips, list_metrics
from leansd.evaluation.quality import Embedder
from leansd.evaluation.records import Record, stamp
from leansd.evaluation.runs import FULL, CallSet, PipelineCall
from leansd.plans.compile import compile_plan, predict_speedup
from leansd.plans.plan import Plan
from leansd.plans.resolve import PlanContext, resolve_plan
from leansd.runtime.clock import lay_out_run
from leansd.runtime.context import describe_runs, dissect_denoiser

FIDELITY = Judging(list_metrics())
SHOWN = 8  # pictures of every case that are handed on for reports


@dataclass(frozen=True)
class Evaluation:
    """All numbers, and the first pictures of every case.

    Attributes:
        records: means over the calls, with a `standard_error` over them; those of whole sets have
            a `seed_spread`, the deviation between sets of the full run from different seeds.
        values: what the means are of, a record a picture, so that statistics can be paired.
        pictures: by the name of the case, 8 bits, [n, 3, H, W].
        left_out: cases without numbers, and why.
    """

    records: list[Record]
    values: list[Record]
    pictures: dict[str, Tensor]
    left_out: Mapping[str, str] = field(default_factory=dict)


def evaluate(
    pipe: DiffusionPipeline,
    plans: Plan | str | Sequence[Plan | str],
    calls: Sequence[PipelineCall],
    *,
    steps: int = 30,
    seed: int = 1000,
    batch: int = 8,
    references: Sequence[str | Case] = (FULL, CONVERGED),
    converged_steps: int = CONVERGED_STEPS,
    embedder: Embedder | None = None,
    lpips: Lpips | None = None,
    spread_sets: int = 0,
    settings: Mapping[str, Any] | None = None,
    keep: str | Path | None = None,
    subject: str = "",
) -> list[Record]:
    """Measure plans, and the full run, against references from the same seeds.

    Args:
        plans: plans, presets or plan files.
        calls: prompts, or pipeline arguments; call `i` has seed `seed + i`.
        references: `full`, `converged` or a case of one's own.
        embedder: a CLIP (`leansd.evaluation.quality.open_clip`) for the quality of sets.
        lpips: from `leansd.evaluation.fidelity.open_lpips`.
        spread_sets: further sets of the full run from other seeds, to tell chance from effect.
        settings: pipeline arguments of every call.
        keep: a folder for what was drawn; the same evaluation goes on from there.
        subject: what records call the model; its class where it is empty.

    Returns:
        A record a picture (those have a field `picture`), then the means.

    Raises:
        LeansdError: a plan or reference is unknown or does not suit, there are under 2 calls, or
            the full run gives NaN or Inf.
    """
    evaluation = evaluate_cases(
        pipe,
        list_cases(pipe, [plans] if isinstance(plans, Plan | str) else plans, steps),
        CallSet(calls, seed, batch, settings or {}),
        subject=subject or type(pipe).__name__,
        keep=keep,
        judging=Judging(
            list_metrics(lpips),
            embedder,
            spread_sets,
            [make_reference(each, steps, converged_steps) for each in references],
        ),
    )
    for why in evaluation.left_out.values():
        warnings.warn(f"left out: {why}", stacklevel=2)
    return [*evaluation.values, *evaluation.records]


def list_cases(pipe: DiffusionPipeline, plans: Sequence[Plan | str], steps: int) -> list[Case]:
    """The full run, then every plan, checked against the UNet."""
    context = describe_runs(pipe, PlanContext(steps))
    cases = [Case(FULL, steps)]
    for source in plans:
        resolved = resolve_plan(source, context)
        plan = resolved.plan
        if not isinstance(source, Plan):  # of a plan its runs say it
            for note in resolved.notes:
                warnings.warn(note, stacklevel=3)
        # A plan that computes everything is not the run without a plan; it has to prove equal.
        name = f"{plan.name} plan" if plan.name in (FULL, CONVERGED) else plan.name
        case = Case(name, steps, plan)
        if case not in cases:  # several presets mean the full run where steps are few
            cases.append(case)
    return cases


def make_reference(reference: str | Case, steps: int, converged_steps: int) -> Case:
    """A reference by name, or as it is."""
    if isinstance(reference, Case):
        return reference
    if reference == FULL:
        return Case(FULL, steps)
    if reference != CONVERGED:
        raise LeansdError(f"no reference {reference!r}: there are {FULL} and {CONVERGED}")
    if converged_steps <= steps:
        raise LeansdError(
            f"a converged run of {converged_steps} steps against runs of {steps}: it needs more, "
            f"{CONVERGED_STEPS} are usual"
        )
    return Case(CONVERGED, converged_steps)


def evaluate_cases(
    pipe: DiffusionPipeline,
    cases: Sequence[Case],
    calls: CallSet,
    *,
    subject: str,
    judging: Judging = FIDELITY,
    keep: str | Path | None = None,
    on_progress: OnProgress = lambda progress: None,
) -> Evaluation:
    """Run all cases, the first of which is the full run, and compare.

    Only the references' pictures, and those of the case at hand, are in memory at a time.
    """
    if len(calls.arguments) < 2:
        raise LeansdError("1 call makes no set: give at least 2, by prompts or by --count")
    comparison = compare_runs(
        pipe,
        cases,
        calls,
        judging=judging,
        rounds=None,
        keep=keep,
        shown=SHOWN,
        on_progress=on_progress,
    ).require_finite()
    anatomy = dissect_denoiser(pipe)
    shared = {
        **stamp(pipe.device),
        "subject": subject,
        "seed": calls.seed,
        "calls": len(calls),
        "guidance": find_scale(pipe, calls.settings.get("guidance_scale")),
    }

    def count_calls(case: Case) -> int:
        return len(lay_out_run(case.scheduler or pipe.scheduler, case.steps).timesteps)

    full = cases[0]
    records: list[Record] = []
    values: list[Record] = []
    for each in comparison:
        case = each.case
        scheduler = case.scheduler or full.scheduler or pipe.scheduler
        base = {
            **shared,
            "plan": case.name,
            "fingerprint": case.fingerprint,
            "steps": case.steps,
            "sampler": case.sampler or type(scheduler).__name__,
        }
        gain = count_calls(full) / count_calls(case)
        if case.plan is not None:
            gain *= predict_speedup(compile_plan(case.plan, anatomy).calls, anatomy)
        if isfinite(gain):
            records.append(Record(**base, metric="predicted_speedup", value=gain, unit="x"))
        for measure in each.measures:
            values += measure.list_values(base)
            records.append(measure.summarise(base))
    drawn = {name: drawn.pictures[:SHOWN] for name, drawn in comparison.references.items()}
    own = {each.case.name: each.pictures for each in comparison}
    pictures = {FULL: own[FULL]} | drawn | own
    return Evaluation(records, values, pictures, comparison.left_out)

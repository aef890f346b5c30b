"""Evaluation: plans against references from the same seeds, and the quality of whole sets.

Two references answer two questions. The full run: is it still the same picture? The converged run
of the same sampler: is it nearer to, or further from, what the sampler approximates? A plan that
only copies the full run's own discretisation error wins nothing under the second.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from leansd.anatomy.cost import dissect
from leansd.anatomy.reading import read_anatomy
from leansd.errors import LeansdError
from leansd.evaluation.cases import Case, Conditions, Drawer, OnWork
from leansd.evaluation.fidelity import Lpips
from leansd.evaluation.measures import FULL, Judge, compare_drawings
from leansd.evaluation.quality import Embedder, embed_pictures
from leansd.evaluation.records import Record, stamp
from leansd.evaluation.trajectories import PipelineCall, expand_calls
from leansd.plans.liveness import predict_speedup
from leansd.plans.plan import Plan
from leansd.plans.presets import resolve
from leansd.plans.tracing import compile_plan
from leansd.runtime.samplers import name_sampler

CONVERGED = "converged"
CONVERGED_STEPS = 150
SHOWN = 8  # pictures of every case that are handed on for reports


@dataclass(frozen=True)
class Evaluation:
    """All numbers, and the first pictures of every case.

    Attributes:
        records: means over the calls, with a `standard_error` over them; those of whole sets have
            a `seed_spread`, the deviation between sets of the full run from different seeds.
        values: what the means are of, a record a picture, so that statistics can be paired.
        pictures: by the name of the case, 8 bits, [n, 3, H, W].
    """

    records: list[Record]
    values: list[Record]
    pictures: dict[str, Tensor]


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
        LeansdError: a plan or reference is unknown or does not suit, or there are under 2 calls.
    """
    conditions = Conditions(
        pipe,
        calls,
        subject or type(pipe).__name__,
        seed,
        batch,
        settings or {},
        Path(keep) if keep is not None else None,
    )
    evaluation = evaluate_cases(
        conditions,
        list_contestants(pipe, [plans] if isinstance(plans, Plan | str) else plans, steps),
        [make_reference(each, steps, converged_steps) for each in references],
        embedder=embedder,
        lpips=lpips,
        spread_sets=spread_sets,
    )
    return [*evaluation.values, *evaluation.records]


def list_contestants(
    pipe: DiffusionPipeline, plans: Sequence[Plan | str], steps: int
) -> list[Case]:
    """The full run, then every plan, checked against the UNet."""
    anatomy = read_anatomy(pipe.unet)
    cases = [Case(FULL, steps)]
    for source in plans:
        plan = resolve(source, steps, blocks=anatomy.up_blocks, sampler=name_sampler(pipe))
        plan.resolve(anatomy)
        # A plan that computes everything is not the run without a plan; it has to prove equal.
        name = f"{plan.name} plan" if plan.name in (FULL, CONVERGED) else plan.name
        cases.append(Case(name, steps, plan))
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
    conditions: Conditions,
    contestants: Sequence[Case],
    references: Sequence[Case],
    *,
    embedder: Embedder | None = None,
    lpips: Lpips | None = None,
    spread_sets: int = 0,
    on_work: OnWork | None = None,
) -> Evaluation:
    """Run all cases and compare; the first contestant is the full run.

    Only the references' pictures, and those of the case at hand, are in memory at a time.
    """
    _require_distinct(contestants)
    _require_distinct(references)
    _require_distinct(list(dict.fromkeys([*contestants, *references])))
    full, *others = contestants
    drawer = Drawer(conditions)
    apart = [each for each in references if each.name != FULL]
    repeated = {each.name for each in references}
    work = [(full, 0), *((each, 0) for each in apart)]
    work += [(each, 0) for each in others if each.name not in repeated]
    work += [(full, number) for number in range(1, spread_sets + 1)] if embedder else []
    drawer.follow(sum(drawer.count_steps(*each) for each in work), on_work)

    first = drawer.draw(full, 0)
    known = {FULL: first} | {each.name: drawer.draw(each, 0) for each in apart}
    judge = None
    if embedder is not None:
        sets = [
            embed_pictures(embedder, drawer.draw(full, number).pictures)
            for number in range(1, spread_sets + 1)
        ]
        prompts = _read_prompts(conditions.calls)
        judge = Judge(embedder, prompts, embed_pictures(embedder, first.pictures), sets)

    common = _Common(conditions)
    pictures = {name: drawn.pictures[:SHOWN] for name, drawn in known.items()}
    records: list[Record] = []
    values: list[Record] = []
    for case in contestants:
        drawn = known[case.name] if case.name in known else drawer.draw(case, 0)
        pictures[case.name] = drawn.pictures[:SHOWN]
        base = common.describe(case, full)
        records.append(
            Record(**base, metric="predicted_speedup", value=common.predict(case, full), unit="x")
        )
        measured = chain.from_iterable(
            compare_drawings(drawn, known[each.name], each, lpips)
            for each in references
            if each.name != case.name
        )
        if judge is not None:
            measured = chain(measured, judge.judge(drawn.pictures))
        for each in measured:
            values += each.list_values(base)
            records.append(each.summarise(base))
    return Evaluation(records, values, pictures)


class _Common:
    """The fields that all records of an evaluation share, and what a case adds to them."""

    def __init__(self, conditions: Conditions) -> None:
        pipe = conditions.pipe
        self.pipe = pipe
        self.anatomy = dissect(pipe.unet)
        default = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
        guidance = conditions.settings.get(
            "guidance_scale", default.default if default is not None else None
        )
        self.fields = {
            **stamp(pipe.device),
            "subject": conditions.subject,
            "seed": conditions.seed,
            "calls": len(conditions.calls),
            "guidance": guidance,
        }

    def describe(self, case: Case, full: Case) -> dict[str, Any]:
        scheduler = case.scheduler or full.scheduler or self.pipe.scheduler
        return {
            **self.fields,
            "plan": case.name,
            "fingerprint": case.plan.fingerprint if case.plan is not None else "",
            "steps": case.steps,
            "sampler": case.sampler or type(scheduler).__name__,
        }

    def predict(self, case: Case, full: Case) -> float:
        """How many times fewer multiply-accumulates of the UNet than the full run."""
        gain = self._count_calls(full) / self._count_calls(case)
        if case.plan is not None:
            gain *= predict_speedup(compile_plan(case.plan, self.anatomy).calls, self.anatomy)
        return gain

    def _count_calls(self, case: Case) -> int:
        scheduler = case.scheduler or self.pipe.scheduler
        probe = type(scheduler).from_config(scheduler.config)
        probe.set_timesteps(case.steps)
        return len(probe.timesteps)


def _read_prompts(calls: Sequence[PipelineCall]) -> list[str] | None:
    """The prompts of the calls; None where some have none that can be read."""
    prompts = [call.get("prompt") for call in expand_calls(calls)]
    read = [prompt for prompt in prompts if isinstance(prompt, str)]
    return read if len(read) == len(prompts) else None


def _require_distinct(cases: Sequence[Case]) -> None:
    """One name, one case: a case may be contestant and reference, but two may not share a name."""
    names = [case.name for case in cases]
    for name in names:
        if names.count(name) > 1:
            raise LeansdError(f"two cases are called {name!r}: rename one, or leave it out")

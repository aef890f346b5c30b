"""What the judge names in pictures drawn under presets, beside those of as many plain steps.

Decibels say how near a picture is to the full run's, not whether it is one. The judge is trained on
real pictures alone and knows no plan.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from leansd.evaluation.compare import Case, Judging, OnProgress, compare_runs
from leansd.evaluation.prompt_sets import GUIDANCE
from leansd.evaluation.records import Record, stamp
from leansd.evaluation.runs import FULL, CallSet
from leansd.plans.presets import SPEED_PRESETS
from leansd.plans.resolve import PlanContext, resolve_plan
from leansd.runtime.samplers import set_sampler
from models.emoji.data import Pair, write_captions
from models.emoji.judge import Judge, rank_names
from models.emoji.recipe import name_pairs


def list_cases(steps: int, sampler: str) -> list[Case]:
    """The full run, and each preset beside as many plain steps, once where presets have as many."""
    cases = {FULL: Case(FULL, steps)}
    for name in SPEED_PRESETS:
        plan = resolve_plan(name, PlanContext(steps, sampler), force=True).plan
        plain = f"{len(plan.keys)} steps"
        cases |= {name: Case(name, steps, plan), plain: Case(plain, len(plan.keys))}
    return list(cases.values())


def judge_plans(
    pipe: DiffusionPipeline,
    judge: Judge,
    pairs: Sequence[Pair],
    *,
    sampler: str,
    steps: int,
    guidance: float = GUIDANCE,
    seed: int = 0,
    on_progress: OnProgress = lambda progress: None,
) -> list[Record]:
    """What the judge says of each case's pictures of the same captions, from the same seeds.

    `top1` is the share that is named right; `lost` and `won` are pictures that are named right in
    the full run alone, and in the case alone.
    """
    set_sampler(pipe, sampler)
    captions = [write_captions(pair)[0] for pair in pairs]
    shared = {
        **stamp(pipe.device), "subject": "emoji", "sampler": sampler, "guidance": guidance,
        "pictures": len(pairs), "seed": seed,
    }  # fmt: skip
    comparison = compare_runs(
        pipe,
        list_cases(steps, sampler),
        CallSet(captions, seed, batch=20, settings={"guidance_scale": guidance}),
        judging=Judging(metrics=()),
        rounds=None,
        on_progress=on_progress,
    )
    named = {
        each.case.name: torch.tensor(rank_names(judge, each.pictures, name_pairs(pairs))) == 0
        for each in comparison
    }
    full = named[FULL]
    records: list[Record] = []
    for case in (each.case for each in comparison):
        plan, right = case.plan, named[case.name]
        values = {
            "top1": float(right.double().mean()),
            "lost": float((full & ~right).sum()),
            "won": float((right & ~full).sum()),
        }
        fields = {
            **shared, "plan": case.name, "steps": case.steps, "unit": "",
            "fingerprint": case.fingerprint,
            "calls": len(plan.keys) if plan is not None else case.steps,
        }  # fmt: skip
        records += [Record(**fields, metric=key, value=value) for key, value in values.items()]
    return records

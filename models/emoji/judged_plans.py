"""What the judge names in pictures drawn under presets, beside those of as many plain steps.

Decibels say how near a picture is to the full run's, not whether it is one. The judge is trained on
real pictures alone and knows no plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from diffusers import DiffusionPipeline

from leansd.evaluation.bench import choose_plans
from leansd.evaluation.compare import Case, Judging, OnProgress, compare_runs
from leansd.evaluation.prompt_sets import GUIDANCE
from leansd.evaluation.records import Record, stamp
from leansd.evaluation.rivals import Contest
from leansd.evaluation.runs import FULL, CallSet
from leansd.plans.plan import Plan
from leansd.runtime.context import dissect_denoiser
from leansd.runtime.samplers import set_sampler
from leansd.tuning.front import read_plans
from models.emoji.data import Pair, write_captions
from models.emoji.evaluation import measure_frechet
from models.emoji.judge import Judge, rank_names
from models.emoji.recipe import name_pairs


def list_cases(steps: int, plans: Iterable[Plan]) -> list[Case]:
    """The full run, and each plan beside as many plain steps, once where plans have as many."""
    cases = {FULL: Case(FULL, steps)}
    for plan in plans:
        plain = f"{len(plan.keys)} steps"
        cases |= {plan.name: Case(plan.name, plan.steps, plan), plain: Case(plain, len(plan.keys))}
    return list(cases.values())


def judge_plans(
    pipe: DiffusionPipeline,
    judge: Judge,
    pairs: Sequence[Pair],
    real: torch.Tensor,
    *,
    sampler: str,
    steps: int,
    sources: Sequence[str] = (),
    guidance: float = GUIDANCE,
    seed: int = 0,
    on_progress: OnProgress = lambda progress: None,
) -> list[Record]:
    """What the judge says of each case's pictures of the same captions, from the same seeds.

    `sources` name plans as those of `leansd bench` do; by default, they are the speed presets.
    `real` are the pairs' own pictures, uint8 [pairs, 3, size, size].

    `top1` is the share that is named right; `lost` and `won` are pictures that are named right in
    the full run alone, and in the case alone; `frechet` is the distance to the real ones in the
    judge's features, which grows where pictures get dull.
    """
    set_sampler(pipe, sampler)
    contest = Contest("text-to-image", sampler, steps, guidance)
    plans = choose_plans(
        sources, contest, dissect_denoiser(pipe), read_front=read_plans, force=True
    )
    captions = [write_captions(pair)[0] for pair in pairs]
    shared = {
        **stamp(pipe.device), "subject": "emoji", "sampler": sampler, "guidance": guidance,
        "pictures": len(pairs), "seed": seed,
    }  # fmt: skip
    comparison = compare_runs(
        pipe,
        list_cases(steps, plans),
        CallSet(captions, seed, batch=20, settings={"guidance_scale": guidance}),
        judging=Judging(metrics=()),
        rounds=None,
        on_progress=on_progress,
    )
    names = name_pairs(pairs)
    named = [torch.tensor(rank_names(judge, each.pictures, names)) == 0 for each in comparison]
    full = named[0]
    records: list[Record] = []
    for each, right in zip(comparison, named, strict=True):
        case = each.case
        values = {
            "top1": float(right.double().mean()),
            "lost": float((full & ~right).sum()),
            "won": float((right & ~full).sum()),
            "frechet": measure_frechet(judge, real, each.pictures),
        }
        fields = {
            **shared, "plan": case.name, "steps": case.steps, "unit": "",
            "fingerprint": case.fingerprint,
            "calls": len(case.plan.keys) if case.plan is not None else case.steps,
        }  # fmt: skip
        records += [Record(**fields, metric=key, value=value) for key, value in values.items()]
    return records

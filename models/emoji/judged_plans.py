"""What the judge names in pictures drawn under presets, beside those of as many plain steps.

Decibels say how near a picture is to the full run's, not whether it is one. The judge is trained on
real pictures alone and knows no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import StableDiffusionPipeline

from leansd.evaluation.compare import Case
from leansd.evaluation.prompt_sets import GUIDANCE
from leansd.evaluation.records import Record, stamp
from leansd.evaluation.runs import FULL, CallSet, run_calls
from leansd.plans.presets import SPEED_PRESETS
from leansd.plans.resolve import PlanContext, resolve_plan
from leansd.runtime.samplers import set_sampler
from models.emoji.data import Pair, write_captions
from models.emoji.judge import Judge, rank_names
from models.emoji.recipe import name_pairs


def list_cases(steps: int, sampler: str) -> Iterator[Case]:
    """The full run, and each preset beside as many plain steps."""
    yield Case(FULL, steps)
    for name in SPEED_PRESETS:
        plan = resolve_plan(name, PlanContext(steps, sampler), force=True).plan
        yield Case(name, steps, plan)
        yield Case(f"{len(plan.keys)} steps", len(plan.keys))


def judge_plans(
    pipe: StableDiffusionPipeline,
    judge: Judge,
    pairs: Sequence[Pair],
    *,
    sampler: str,
    steps: int,
    guidance: float = GUIDANCE,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Every case draws the same captions from the same seeds.

    `top1` is the share that is named right; `lost` and `won` are pictures that are named right in
    the full run alone, and in the case alone.
    """
    set_sampler(pipe, sampler)
    captions = [write_captions(pair)[0] for pair in pairs]
    shared = {
        **stamp(pipe.device), "subject": "emoji", "sampler": sampler, "guidance": guidance,
        "pictures": len(pairs), "seed": seed,
    }  # fmt: skip
    records: list[Record] = []
    full: torch.Tensor | None = None
    settings = {"guidance_scale": guidance}
    for case in list_cases(steps, sampler):
        plan = case.plan
        drawn = run_calls(
            pipe, CallSet(captions, seed=seed, batch=20, settings=settings), case.steps, plan
        )
        pixels = drawn.pictures.mul(255).round().to(torch.uint8)
        right = torch.tensor(rank_names(judge, pixels, name_pairs(pairs))) == 0
        full = right if full is None else full
        values = {
            "top1": float(right.double().mean()),
            "lost": float((full & ~right).sum()),
            "won": float((right & ~full).sum()),
        }
        say(
            f"{sampler} {case.name}: "
            + ", ".join(f"{key} {value:g}" for key, value in values.items())
        )
        fields = {
            **shared, "plan": case.name, "steps": case.steps, "unit": "",
            "fingerprint": plan.fingerprint if plan is not None else "",
            "calls": len(plan.keys) if plan is not None else case.steps,
        }  # fmt: skip
        records += [Record(**fields, metric=key, value=value) for key, value in values.items()]
    return records

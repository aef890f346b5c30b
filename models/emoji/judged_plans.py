"""What the judge names in pictures drawn under presets, beside those of as many plain steps.

Decibels say how near a picture is to the full run's, not whether it is one. The judge is trained on
real pictures alone and knows no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import StableDiffusionPipeline

from leansd.evaluation.prompt_sets import GUIDANCE
from leansd.evaluation.records import Record, stamp
from leansd.evaluation.runs import FULL, run_calls
from leansd.plans.plan import Plan
from leansd.plans.presets import SPEED_PRESETS, preset
from leansd.runtime.samplers import set_sampler
from models.emoji.data import Pair, write_captions
from models.emoji.judge import Judge, rank_names
from models.emoji.recipe import name_pairs


def list_contestants(steps: int, sampler: str) -> Iterator[tuple[str, int, Plan | None]]:
    """Name, steps and plan: the full run, and each preset beside as many plain steps."""
    yield FULL, steps, None
    for name in SPEED_PRESETS:
        plan = preset(name, steps, sampler=sampler)
        yield name, steps, plan
        yield f"{len(plan.keys)} steps", len(plan.keys), None


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
    """Every contestant draws the same captions from the same seeds.

    `top1` is the share that is named right; `lost` and `won` are pictures that are named right in
    the full run alone, and under the contestant alone.
    """
    set_sampler(pipe, sampler)
    captions = [write_captions(pair)[0] for pair in pairs]
    shared = {
        **stamp(pipe.device), "subject": "emoji", "sampler": sampler, "guidance": guidance,
        "pictures": len(pairs), "seed": seed,
    }  # fmt: skip
    records: list[Record] = []
    full: torch.Tensor | None = None
    for name, count, plan in list_contestants(steps, sampler):
        settings = {"guidance_scale": guidance}
        drawn = run_calls(pipe, captions, count, plan, seed=seed, batch=20, settings=settings)
        pixels = drawn.pictures.mul(255).round().to(torch.uint8)
        right = torch.tensor(rank_names(judge, pixels, name_pairs(pairs))) == 0
        full = right if full is None else full
        values = {
            "top1": float(right.double().mean()),
            "lost": float((full & ~right).sum()),
            "won": float((right & ~full).sum()),
        }
        say(f"{sampler} {name}: " + ", ".join(f"{key} {value:g}" for key, value in values.items()))
        fields = {
            **shared, "plan": name, "fingerprint": plan.fingerprint if plan is not None else "",
            "steps": count, "calls": len(plan.keys) if plan is not None else count,
            "unit": "",
        }  # fmt: skip
        records += [Record(**fields, metric=key, value=value) for key, value in values.items()]
    return records

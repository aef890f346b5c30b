"""Which contests a benchmark holds, on which prompts and pictures, and who is ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from leansd.errors import LeansdError
from leansd.evaluation.contest import OURS, STRENGTH, Contest, Contestant, Grounds, send_plan
from leansd.evaluation.runs import PipelineCall, run_calls
from leansd.plans.plan import Plan
from leansd.plans.presets import SPEED_PRESETS
from leansd.plans.resolve import PlanContext, find_source, resolve_plan
from leansd.tuning.front import Front

SAMPLERS = ("dpm++2m", "ddim", "euler")
STEPS = (20, 30, 50)
LONG = 30
"""The step count at which the first sampler is run by all variants of all rivals."""
PAPER_GUIDANCE = 8.0
"""With 30 steps, the setting of A-SDM's tables (arXiv 2406.00210)."""
OWN_SETTING = re.compile(r"-(g[\d.]+|image-to-image)")
"""What the name of a front for one guidance scale or for pictures has behind the steps."""
OTHERS = ("unipc",)
"""Samplers whose fewer steps are rivals of every other: a good one, for its family's best."""
INPUT_SEED = 10_000_000
INPUT_STEPS = 20


def list_contests(samplers: Sequence[str], steps: Sequence[int], guidance: float) -> list[Contest]:
    """Text-to-image everywhere; image-to-image and the papers' guidance with the first sampler.

    One contest is long: who is far from the front there is so elsewhere.
    """
    first, central = samplers[0], LONG if LONG in steps else steps[0]
    contests = [
        Contest("text-to-image", sampler, count, guidance, (sampler, count) == (first, central))
        for sampler in samplers
        for count in steps
    ]
    contests.append(Contest("image-to-image", first, central, guidance))
    if guidance != PAPER_GUIDANCE:
        contests.append(Contest("text-to-image", first, central, PAPER_GUIDANCE))
    return contests


def list_quick_contests(
    samplers: Sequence[str], steps: Sequence[int], guidance: float
) -> list[Contest]:
    """One contest, a first look."""
    return [Contest("text-to-image", samplers[0], LONG if LONG in steps else steps[0], guidance)]


def draw_inputs(
    pipe: Any,
    prompts: Sequence[str],
    scheduler: Any,
    *,
    guidance: float,
    batch: int,
    seed: int = INPUT_SEED,
) -> list[PipelineCall]:
    """Image-to-image calls: every prompt on a picture that was drawn for the next one.

    By default, pictures come from seeds that no contest uses.
    """
    others = [*prompts[1:], prompts[0]]
    pictures = run_calls(
        pipe,
        others,
        INPUT_STEPS,
        seed=seed,
        batch=batch,
        scheduler=scheduler,
        settings={"guidance_scale": guidance},
    ).pictures
    return [
        {"prompt": prompt, "image": picture}
        for prompt, picture in zip(prompts, torch.split(pictures, 1), strict=True)
    ]


def list_settings(contest: Contest) -> dict[str, Any]:
    """The pipeline arguments of every call of a contest."""
    settings: dict[str, Any] = {"guidance_scale": contest.guidance}
    if contest.task == "image-to-image":
        settings["strength"] = STRENGTH
    return settings


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


def choose_plans(sources: Sequence[str], contest: Contest, blocks: int) -> tuple[Plan, ...]:
    """The plans that are ours in a contest: the house presets where none are named.

    A folder holds plans named SAMPLER-STEPS-GOAL.json, and fronts, SAMPLER-STEPS.json, or those of
    `name_own_front`; a plan file of another step count sits out.
    """
    context = PlanContext(contest.steps, contest.sampler, blocks=blocks)
    if not sources:
        return tuple(resolve_plan(name, context).plan for name in SPEED_PRESETS)
    plans: list[Plan] = []
    for source in sources:
        if Path(source).is_dir():
            stem = f"{contest.sampler}-{contest.steps}"
            own = Path(source) / f"{name_own_front(contest)}.json"
            front = own if own.exists() else Path(source) / f"{stem}.json"
            if front.exists():
                plans += list_plans(Front.load(front))
            plans += [
                Plan.load(file).rename(file.stem.split("-", 2)[-1])
                for file in sorted(Path(source).glob(f"{stem}-*.json"))
                if not OWN_SETTING.fullmatch(file.stem.removeprefix(stem))
            ]
            continue
        found = find_source(source)
        if not isinstance(found, Plan) or found.steps == contest.steps:
            plans.append(resolve_plan(found, context).plan)
    return tuple(plans)


def name_own_front(contest: Contest) -> str:
    """The name of a front that was tuned for what a contest draws: pictures, or one guidance."""
    setting = contest.task if contest.task == "image-to-image" else f"g{contest.guidance:g}"
    return f"{contest.sampler}-{contest.steps}-{setting}"


def list_plans(front: Front) -> list[Plan]:
    """The plans of a front, by names of their own; plain runs of fewer steps are rivals."""
    return [
        point.plan.rename(f"{point.plan.name} of {point.plan.steps} steps")
        for point in front.points
        if not point.is_plain
    ]


def send_own(grounds: Grounds) -> list[Contestant]:
    """Ours."""
    return [send_plan(grounds, plan, plan.name, OURS) for plan in grounds.own]

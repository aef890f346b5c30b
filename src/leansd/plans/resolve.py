"""The one road from what a user says to a plan: a name, a file or a plan, and the runs it is for.

The API, every command, the page, exports and bulk all resolve their plans here, so the same words
mean the same plan everywhere, and what must be said of it is said in the same sentences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, WHOLE, Anatomy
from leansd.plans.plan import Plan, Tuned
from leansd.plans.presets import DEFAULT_SAMPLER, PRESETS, Preset
from leansd.plans.presets.tuned import NEAREST_NOISY, NOISY, list_tuned_samplers
from leansd.text import suggest_name

# -- noise levels that a plan was tuned for, and the same plan at others ---------------------------
#
# A sampler's settings (spacing of time steps, Karras sigmas, another model's noise schedule) place
# the steps of a run at other noise levels. A key step is worth what it is at its noise level,
# whatever its number, so key steps go along to the nearest level, in log-SNR.

CLOSE = 0.05
"""Log-SNRs that differ by no more are the same noise level: a hundredth of a step of thirty."""


def differ(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two runs have other noise levels, or another number of them."""
    if len(one) != len(other):
        return True
    return any(abs(here - there) > CLOSE for here, there in zip(one, other, strict=True))


def carry_over(plan: Plan, then: Sequence[float], now: Sequence[float]) -> Plan:
    """A plan for steps at the log-SNRs `then` as one for steps at `now`.

    Key steps move to the nearest noise level; two that meet at one become one. Every other step
    does what the step nearest to it did. A correction is a multiple of what a forecast over log-SNR
    was wrong by, so it goes along.

    Raises:
        LeansdError: the plan mixes outputs, whose weights are a sampler's at its own levels.
    """
    if plan.mixes:
        raise LeansdError(
            f"plan {plan.name} mixes outputs as fitted to other noise levels: run the sampler with "
            "the settings that it was fitted with, or tune a plan for these"
        )
    keys = {_find_nearest(now, then[key]): plan.rows[key] for key in plan.keys[1:]}
    keys[0] = plan.rows[0]
    others = [step for step in range(plan.steps) if step not in plan.keys]
    if not others:
        return plan.fit(len(now))
    levels = [then[step] for step in others]
    rows = tuple(
        keys[step] if step in keys else plan.rows[others[_find_nearest(levels, level)]]
        for step, level in enumerate(now)
    )
    return Plan(rows, plan.name, plan.drift, plan.tuned)


def _find_nearest(levels: Sequence[float], level: float) -> int:
    return min(range(len(levels)), key=lambda step: abs(levels[step] - level))


# -- from a name to a plan -------------------------------------------------------------------------

STEPS = 30
"""Steps of a run where the user names none and no plan file says."""
NEAREST = "euler"
"""The sampler whose plans serve others, where a denoiser is known as a whole only."""
FEW_STEPS = 8
"""Runs of few-step models (LCM, Turbo, Lightning) have no more than these."""


@dataclass(frozen=True)
class PlanContext:
    """What is known of the runs that a plan is for; what is not known is left out.

    `leansd.runtime.context.describe_runs` makes one from a pipeline.
    """

    steps: int | None = None
    """The sampler's steps; None for those of the plan file, or `STEPS`."""
    sampler: str = ""
    """The sampler's short name, or its scheduler's class where it has none."""
    scheduler: str = ""
    """The class of its scheduler."""
    adds_noise: bool = False
    """Whether the sampler draws noise at every step, where its name does not say so (`NOISY`)."""
    anatomy: Anatomy | None = None
    """The anatomy of the pipeline's UNet; a plan is then checked against it."""
    blocks: int = 4
    """How many up blocks the UNet has, where there is no anatomy."""
    nets: Mapping[str, Anatomy] = field(default_factory=dict[str, Anatomy])
    """The anatomies of other UNets that a plan may run, by name."""
    guidance: float | None = None
    """Guidance scale."""
    strength: float | None = None
    """How much of its steps a run has: of image-to-image its strength, 1 of text-to-image."""
    log_snr: Sequence[float] = ()
    """The noise level at every step of the run; empty where it is not known yet."""
    find_unet: Callable[[], str | None] | None = None
    """Gives the fingerprint of the UNet's weights; asked only of a plan tuned for certain ones."""

    @property
    def up_blocks(self) -> int:
        return self.blocks if self.anatomy is None else self.anatomy.up_blocks

    def has_other_sampler(self, tuned: Tuned | None) -> bool:
        """Whether a plan was tuned for another sampler; what is not known is none."""
        names = {self.sampler, self.scheduler} - {""}
        return tuned is not None and bool(names) and tuned.sampler not in names


@dataclass(frozen=True)
class Resolved:
    """A plan for certain runs, and what a user should know of it."""

    plan: Plan
    notes: tuple[str, ...] = ()
    """Whole sentences, without their full stops."""
    elsewhere: tuple[str, ...] = ()
    """What the plan was tuned for and these runs are not; among the notes, too."""

    def require_tuned(self) -> None:
        """Refuse a plan that was tuned for another sampler or UNet.

        Raises:
            LeansdError: it was.
        """
        if self.elsewhere:
            raise LeansdError(
                f"{' and '.join(self.elsewhere)}: tune one by leansd tune, or use it by --force "
                "all the same"
            )


@dataclass(frozen=True)
class PlanChoice:
    """Plans that were tuned at several guidance scales or strengths; a run follows the nearest."""

    plans: tuple[Plan, ...]

    @property
    def steps(self) -> int:
        return self.plans[0].steps

    @property
    def name(self) -> str:
        return " or ".join(each.name for each in self.plans)

    def find_nearest(self, context: PlanContext) -> Plan:
        """The plan tuned nearest to a run: by its sampler, then its strength, then its guidance."""

        def rate(plan: Plan) -> tuple[float, ...]:
            tuned = plan.tuned
            share = None if tuned is None else tuned.share
            guidance = None if tuned is None else tuned.guidance
            return (
                context.has_other_sampler(tuned),
                _measure_gap(share, context.strength),
                _measure_gap(guidance, context.guidance),
            )

        return min(self.plans, key=rate)


def _measure_gap(tuned: float | None, run: float | None) -> float:
    """How far apart two numbers are; what is not known lies behind what is."""
    if run is None:
        return 0.0
    return math.inf if tuned is None else abs(tuned - run)


Source = Plan | Preset | PlanChoice
"""What is meant by a plan, once it is looked up."""


def find_source(source: Source | str | Path | Sequence[Plan | str | Path]) -> Source:
    """What a user means by a plan: a plan itself, the name of a preset, or the path of a plan file.

    Several plans or files, also as `a.json,b.json`, are a choice between plans that were tuned at
    several guidance scales or strengths.

    Raises:
        LeansdError: there is no such preset or file, or the file is not a plan.
    """
    if isinstance(source, Plan | Preset | PlanChoice):
        return source
    if not isinstance(source, str | Path):
        return _find_choice(source)
    name = str(source)
    if name in PRESETS:
        return PRESETS[name]
    if Path(name).is_file():
        return Plan.load(name)
    if "," in name:
        return _find_choice([each.strip() for each in name.split(",")])
    if Path(name).suffix or "/" in name:
        raise LeansdError(f"no plan file at {name}")
    raise LeansdError(f"no preset {name!r}{suggest_name(name, PRESETS)}")


def _find_choice(sources: Sequence[Plan | str | Path]) -> PlanChoice:
    given: Any = sources
    if not isinstance(given, Sequence):
        raise LeansdError(
            "a plan is a leansd.Plan, the name of a preset or the path of a plan file, or several "
            f"of them; not {type(given).__name__}"
        )
    found = [find_source(each) for each in sources]
    plans = tuple(each for each in found if isinstance(each, Plan))
    if not found or len(plans) < len(found):
        raise LeansdError(
            "several plans are a choice by guidance scale and strength, for plans that were tuned "
            "at one: give plan files of leansd tune, or one plan"
        )
    if len({each.steps for each in plans}) > 1:
        raise LeansdError(
            f"plans to choose from are for one number of steps: {PlanChoice(plans).name} are for "
            + ", ".join(str(each.steps) for each in plans)
        )
    return PlanChoice(plans)


def resolve_plan(
    source: Source | str | Path | Sequence[Plan | str | Path],
    context: PlanContext,
    *,
    fit: bool = False,
    force: bool = False,
) -> Resolved:
    """The plan that `source` means for the runs of `context`, and what must be said of it.

    A preset fits itself to the runs: to their steps, their sampler and their UNet. Where the steps
    are few, it means the full run. A plan is taken as it is, but that its key steps keep to the
    noise levels that it was tuned for. Of several plans, the one tuned nearest to the runs is.

    Args:
        fit: stretch a plan that is for another number of steps.
        force: follow a preset however few the steps are.

    Raises:
        LeansdError: there is no such preset or file, the plan is for another number of steps, or it
            does not suit the UNet.
    """
    found = find_source(source)
    if isinstance(found, PlanChoice):
        found = found.find_nearest(context)
    if isinstance(found, Preset):
        steps = context.steps or STEPS
        sampler, notes = _pick_sampler(found, context)
        plan = found.build_for(steps, context.up_blocks, sampler)
        if context.sampler and sampler != context.sampler:
            plan = replace(plan, tuned=None)  # as for another on purpose, which the notes say
        elsewhere: list[str] = []
    else:
        plan = _stretch(found, context.steps or found.steps, fit=fit)
        elsewhere = _list_elsewhere(plan, context)
        notes = [f"{each}: nothing says that it is any good here" for each in elsewhere]
        plan, moved = _carry(plan, context)
        notes += moved
        if plan.tuned is not None and not plan.tuned.unet:  # a preset's, for whatever UNet
            elsewhere = []
        notes += _describe_settings(plan, context)
    if context.anatomy is WHOLE:
        _require_whole_steps(plan)
    elif context.anatomy is not None:
        plan.resolve(context.anatomy, context.nets)
        plan.resolve_gates(context.anatomy, context.nets)
    if isinstance(found, Preset) and found.name != "full" and plan.steps <= FEW_STEPS and not force:
        return Resolved(Plan.full(plan.steps), (_explain_few(found.name, plan.steps),))
    return Resolved(plan, tuple(notes), tuple(elsewhere))


def _explain_few(name: str, steps: int) -> str:
    return (
        f"{steps} steps change too much each for inheritance to gain anything, so they run in "
        f"full; to follow {name} all the same give --force, or in Python the plan itself, "
        f"leansd.preset({name!r}, steps={steps})"
    )


def _require_whole_steps(plan: Plan) -> None:
    """Refuse what needs to know the inside of a denoiser.

    Raises:
        LeansdError: the plan does.
    """
    for step, row in enumerate(plan.rows):
        inside = [*(at for at in row.inherit if at != HEAD), *row.attend, *filter(None, [row.net])]
        if inside:
            raise LeansdError(
                f"plan {plan.name} is for UNets (step {step}: {inside[0]}); of this denoiser only "
                f"whole steps, {HEAD}, are inherited"
            )
    if plan.drift is not None:
        raise LeansdError(f"plan {plan.name} decides as it runs: that is for UNets")


def _pick_sampler(preset: Preset, context: PlanContext) -> tuple[str, list[str]]:
    """The sampler that a preset is built for, and what to say of that."""
    tuned = list_tuned_samplers(preset.name) if preset.by_sampler else []
    # A plain schedule inherits outputs inside the UNet; tuned ones are of whole steps.
    noisy = context.adds_noise or context.sampler in NOISY
    plain = context.anatomy is not WHOLE and not noisy
    if plain or not tuned or context.sampler in tuned:
        return context.sampler or DEFAULT_SAMPLER, _describe_sampler(preset, context.sampler)
    wanted = NEAREST_NOISY if noisy else NEAREST
    nearest = wanted if wanted in tuned else tuned[0]
    own = context.sampler or "this sampler"
    return nearest, [
        f"{preset.name} is not tuned for {own}: it is as for {nearest}; tune a plan of your own"
    ]


def _describe_sampler(preset: Preset, sampler: str) -> list[str]:
    """What to say of a tuned preset where it was not tuned for the sampler, or it is not known."""
    if not preset.by_sampler:
        return []
    tuned = list_tuned_samplers(preset.name)
    if not sampler:
        return [f"the sampler is not known, so {preset.name} is as tuned for {DEFAULT_SAMPLER}"]
    if sampler in tuned:
        return []
    return [
        f"no plan is tuned for sampler {sampler} (there are {', '.join(tuned)}), so {preset.name} "
        "is a plain schedule that is faster but not as near to the full run; leansd tune makes a "
        "tuned one"
    ]


def _stretch(plan: Plan, steps: int, *, fit: bool) -> Plan:
    if plan.steps != steps and not fit:
        raise LeansdError(
            f"plan {plan.name} is for {plan.steps} steps, this run has {steps}; stretch it, by "
            f"--fit or plan.fit({steps}), or run {plan.steps} steps"
        )
    return plan.fit(steps)


def _carry(plan: Plan, context: PlanContext) -> tuple[Plan, list[str]]:
    """The plan at the noise levels of the run, and what to say of it."""
    then = plan.tuned.log_snr if plan.tuned is not None else ()
    known = len(then) == len(context.log_snr) == plan.steps
    if not known or not differ(then, context.log_snr):
        return plan, []
    moved = carry_over(plan, then, context.log_snr)
    return moved, [
        f"plan {plan.name} was tuned for other noise levels, so its key steps have moved to the "
        "nearest"
    ]


def _list_elsewhere(plan: Plan, context: PlanContext) -> list[str]:
    """What a plan was tuned for and these runs are not, as far as it is known.

    Raises:
        LeansdError: the plan mixes outputs, and its weights are another sampler's.
    """
    tuned, found = plan.tuned, list[str]()
    if tuned is None:
        return found
    if context.has_other_sampler(tuned):
        own = context.sampler or context.scheduler
        if plan.mixes:
            raise LeansdError(
                f"plan {plan.name} mixes outputs as fitted to sampler {tuned.sampler}: use that "
                f"one, or tune a plan for {own}"
            )
        found.append(f"plan {plan.name} was tuned for sampler {tuned.sampler}, not {own}")
    unet = context.find_unet() if tuned.unet and context.find_unet is not None else None
    if unet is not None and tuned.unet != unet:
        found.append(f"plan {plan.name} was tuned for a UNet with other weights")
    return found


def _describe_settings(plan: Plan, context: PlanContext) -> list[str]:
    """What a plan was tuned at and these runs are not; there it runs, but is not as near."""
    tuned, notes = plan.tuned, list[str]()
    if tuned is None:
        return notes
    guidance, share = context.guidance, context.strength
    if tuned.guidance is not None and guidance is not None and tuned.guidance != guidance:
        notes.append(f"plan {plan.name} was tuned at guidance {tuned.guidance:g}, not {guidance:g}")
    if tuned.share is not None and share is not None:
        # Strengths are the same that run as many steps.
        then, now = (int(plan.steps * each + 1e-6) for each in (tuned.share, share))
        if then != now:
            notes.append(f"plan {plan.name} was tuned at strength {tuned.share:g}, not {share:.3g}")
    return notes

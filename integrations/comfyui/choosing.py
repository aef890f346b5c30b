"""Which plan a run of ComfyUI follows, and what must be said of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch

from leansd.core import (
    CallSchedule,
    Output,
    Prediction,
    Sample,
    adds_noise,
    explain_unplayable,
    find_denoised_output,
    list_log_snr,
    place_calls,
    probe_calls,
)
from leansd.errors import LeansdError
from leansd.plans.anatomy import WHOLE
from leansd.plans.plan import Plan, Tuned
from leansd.plans.presets import Preset
from leansd.plans.resolve import FEW_STEPS, PlanContext, Source, find_source, resolve_plan

from .blocks import Blocks, is_compiled, read_blocks
from .library import AUTO, PlanLibrary, Purpose

Mismatch = Literal["stretch", "compute in full"]
"""What to do with a plan that was made for another number of steps."""

NAMES = {
    "dpmpp_2m": "dpm++2m",
    "dpmpp_2m_sde": "dpm++sde",
    "euler_ancestral": "euler-a",
    "unipc": "unipc",
}
"""Samplers of ComfyUI that have another name in plans."""
FALLBACK = "balanced"
"""Instead of a tuned plan where there is none."""
PRESETS = Path(__file__).parent / "presets.json"
"""Plans tuned in ComfyUI's samplers, by `benchmarks/comfyui.py` of the leansd project."""
UNSUITED = (AttributeError, LookupError, TypeError, ValueError, RuntimeError)
"""What a sampler raises that wants more of its model than a stand-in has; anything else, such as
an interruption, is not for here."""
FLOW = "CONST"
"""In the kind of a model's noise: rectified flow."""
OUTPUTS: Mapping[str, Output | None] = {
    "EPS": "epsilon",
    "V_PREDICTION": "v_prediction",
    FLOW: "flow_prediction",
    "X0": "sample",
    "EDM": None,
}
"""What a model gives for its own input, by the kind of its noise; EDM's is scaled otherwise."""


@dataclass(frozen=True)
class PlanChoice:
    """What a user asked for."""

    source: str | Plan | Preset
    """The name of a preset, one with options, a plan, the path of a plan file, or `auto`."""
    mismatch: Mismatch = "stretch"
    model: str = ""
    """Digest of the model's weights, for `auto`."""
    library: PlanLibrary | None = None
    """Where `auto` looks."""


@dataclass(frozen=True)
class RunDescription:
    """What is known of a run before its first step."""

    sampler: str
    cfg: float
    sigmas: tuple[float, ...]
    """Of the steps, with that which the last one leads to."""
    calls: tuple[float, ...]
    """The sigma of every call of the model; none where they are not known beforehand."""
    prediction: Prediction
    output: Output | None = None
    """What the model gives where its calls are answered; None where that is not known."""
    places: tuple[float, ...] = ()
    """Where in the model's own time, from 1 to 0, each sigma lies."""
    blocks: Blocks | None = None
    """The inside of the model, where it is a UNet whose blocks are known."""
    adds_noise: bool = False
    """Whether the sampler draws noise at its steps."""
    trouble: str = ""
    """Why the calls are not known, where the sampler itself says so."""

    def place_in_whole(self, wanted: int | None = None) -> tuple[int, int]:
        """(its first step, all steps) of the whole run that it is a part of.

        A run that starts from a picture leaves out the first steps, one that another sampler goes
        on with the last. How many follows from how far apart its steps lie in the model's time; as
        schedules differ in whether the last step is at its end, `wanted` decides between two.
        """
        count, (start, *_, end) = len(self.sigmas) - 1, self.places
        if (start == 1 and end == 0) or count < 2:
            return 0, count
        noisy = [place for place in self.places if place > 0]
        apart = max((start - noisy[-1]) / max(len(noisy) - 1, 1), 1e-3)
        first = round((1 - start) / apart)
        if end == 0:
            return first, first + count
        least = max(round(1 / apart), first + count)
        return first, least + 1 if wanted == least + 1 else least


@dataclass(frozen=True)
class Chosen:
    """The plan of a run."""

    name: str
    plan: Plan | None = None
    schedule: CallSchedule | None = None
    blocks: Blocks | None = None
    """The model's inside, where the plan inherits there."""
    notes: tuple[str, ...] = ()
    reason: str = ""
    """Why there is none, in words."""


def describe_run(guider: Any, sampler: Any, sigmas: Sequence[float]) -> RunDescription:
    """What a guider and a sampler of ComfyUI say of a run with these sigmas."""
    noise = guider.model_patcher.get_model_object("model_sampling")
    sampled = bind_sampler(guider.model_patcher, sampler)
    calls: tuple[float, ...] = ()
    noisy, trouble = False, ""
    if sampled is not None and len(sigmas) > 1:
        try:
            calls = probe_calls(sampled, sigmas)
            noisy = bool(calls) and adds_noise(sampled, sigmas)
        except UNSUITED as error:
            trouble = f"{type(error).__name__}: {error}"
    prediction = find_prediction(noise)
    return RunDescription(
        name_sampler(sampler),
        float(getattr(guider, "cfg", 1.0)),
        tuple(sigmas),
        calls,
        prediction,
        find_denoised_output(prediction) if is_compiled(guider) else find_output(noise),
        tuple(_find_place(noise, sigma) for sigma in sigmas),
        read_blocks(guider.model_patcher.get_model_object("diffusion_model")),
        noisy,
        trouble,
    )


def name_sampler(sampler: Any) -> str:
    """A sampler's name in ComfyUI's menus."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    return name.removeprefix("sample_").removesuffix("_function")


def find_prediction(noise: Any) -> Prediction:
    """What sigma means to a model: of its `model_sampling`."""
    return "flow" if FLOW in [kind.__name__ for kind in type(noise).__mro__] else "noise"


def find_output(noise: Any) -> Output | None:
    """What a model gives for its own input: of its `model_sampling`."""
    kinds = [kind.__name__ for kind in type(noise).__mro__]
    return next((OUTPUTS[kind] for kind in kinds if kind in OUTPUTS), None)


def set_options(preset: Preset, **options: Any) -> Preset:
    """A preset with some of its options chosen."""
    return replace(preset, build=partial(preset.build, **options))


def choose_plan(choice: PlanChoice, run: RunDescription) -> Chosen:
    """The plan that a choice means for a run; none where everything is computed."""
    given, found = _find_tuned(choice, run)
    name = given if isinstance(given, str) else given.name
    if not run.calls:
        why = f" ({run.trouble})" if run.trouble else ""
        unknown = f"how often {run.sampler} calls the model is not known before{why}"
        return Chosen(name, reason=unknown)
    try:
        source = find_source(given)
        wanted = None if isinstance(source, Preset) else source.steps
        first, steps = run.place_in_whole(wanted)
        source = find_tuned_here(source, run.sampler, steps, run.sigmas) or source
        fits = choice.mismatch == "stretch"
        if not (fits or isinstance(source, Preset) or source.steps == steps):
            return Chosen(name, reason=_explain_mismatch(source.name, source.steps, steps))
        schedule = place_calls(
            run.calls, run.sigmas, run.prediction, first=first, steps=steps, output=run.output
        )
        if schedule is None:
            return Chosen(name, reason=f"{run.sampler} does not call the model step by step")
        own = NAMES.get(run.sampler, run.sampler) if isinstance(source, Preset) else run.sampler
        whole = (first, steps) == (0, len(run.sigmas) - 1)
        levels = _list_levels(schedule) if whole else ()
        # Presets that are tuned for a sampler are of whole steps, in any model.
        tuned = isinstance(source, Preset) and source.by_sampler
        context = PlanContext(
            steps,
            sampler=own,
            adds_noise=run.adds_noise,
            anatomy=WHOLE if tuned or run.blocks is None else run.blocks.anatomy,
            guidance=run.cfg,
            strength=1 - first / steps,
            log_snr=levels,
        )
        resolved = resolve_plan(source, context, fit=fits)
    except LeansdError as error:
        return Chosen(name, reason=str(error))
    blocks = run.blocks if explain_unplayable(resolved.plan, steps) else None
    notes = (*found, *resolved.notes)
    return Chosen(resolved.plan.name, resolved.plan, schedule, blocks, notes)


def _explain_mismatch(name: str, wanted: int, steps: int) -> str:
    return (
        f"plan {name} is for {wanted} steps, this run has {steps}: set the node to stretch it, or "
        f"run {wanted} steps"
    )


def _find_tuned(
    choice: PlanChoice, run: RunDescription
) -> tuple[str | Plan | Preset, tuple[str, ...]]:
    """What a choice means, where it is `auto`, and what is to be said of that."""
    if choice.source != AUTO:
        return choice.source, ()
    plan = None
    if choice.library is not None:
        purpose = Purpose(choice.model, run.sampler, run.sigmas, run.cfg)
        plan = choice.library.find_tuned(purpose)
    if plan is not None:
        return plan, ()
    note = f"nothing was tuned for this model, sampler, sigmas and cfg: preset {FALLBACK} instead"
    return FALLBACK, (note,)


def find_tuned_here(
    source: Source, sampler: str, steps: int, sigmas: Sequence[float]
) -> Plan | None:
    """The plan of a preset that was tuned in ComfyUI's own sampler.

    That of the nearest step count, and of those the one whose schedule is most like these sigmas.
    """
    if not isinstance(source, Preset) or steps <= FEW_STEPS:
        return None
    rows = [row for row in _load_presets() if row["sampler"] == sampler]
    rows = [row for row in rows if source.name in row["plans"]]
    if not rows:
        return None
    row = min(
        rows,
        key=lambda each: (
            abs(math.log((len(each["sigmas"]) - 1) / steps)),
            _compare_schedules(each["sigmas"], sigmas),
        ),
    )
    # For any weights and guidance: what they were tuned on says nothing of where they are used.
    tuned = Tuned(sampler, unet="", log_snr=list_log_snr(row["sigmas"][:-1]))
    return replace(Plan.from_dict(row["plans"][source.name]), tuned=tuned)


def _compare_schedules(one: Sequence[float], other: Sequence[float]) -> float:
    """How far two lists of sigmas are apart: in logarithms, at the same shares of their runs."""
    return sum(
        abs(math.log(_take_share(one, place / 8)) - math.log(_take_share(other, place / 8)))
        for place in range(1, 8)
    )


def _take_share(sigmas: Sequence[float], share: float) -> float:
    return max(float(sigmas[round(share * (len(sigmas) - 1))]), 1e-4)


@cache
def _load_presets() -> list[dict[str, Any]]:
    return json.loads(PRESETS.read_text(encoding="utf-8")) if PRESETS.exists() else []


def _list_levels(schedule: CallSchedule) -> tuple[float, ...]:
    """log-SNR at the first call of each step."""
    firsts = {row: call for call, row in reversed(list(enumerate(schedule.rows)))}
    return tuple(schedule.log_snr[firsts[row]] for row in sorted(firsts))


def _find_place(noise: Any, sigma: float) -> float:
    """Where a sigma lies in a model's own time: 1 at its most noise, 0 without any."""
    if sigma <= 0:
        return 0.0
    most, least = float(noise.sigma_max), float(noise.sigma_min)
    if sigma >= most * 0.999:
        return 1.0
    if sigma <= least:
        return 0.0
    begin, here, last = (
        float(noise.timestep(torch.tensor(float(each)))) for each in (most, sigma, least)
    )
    place = (here - last) / (begin - last) if begin != last else math.nan
    return min(max(place, 0.0), 1.0) if math.isfinite(place) else 1.0


class _StandIn:
    """What a sampler takes for the guided model, as far as it looks at more than its answers."""

    def __init__(self, denoise: Any, patcher: Any) -> None:
        self._denoise = denoise
        noise = patcher.get_model_object("model_sampling")
        inner = _Holder(model_sampling=noise)
        self.inner_model = _Holder(inner_model=inner, model_patcher=patcher)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **options: Any) -> torch.Tensor:
        given = options.get("model_options") or {}
        asked = given.get("sampler_post_cfg_function", ())
        denoised = self._denoise(x, sigma, asked=asked)
        for told in asked:
            # Samplers that want the unconditional part beside the guided one ask for it so.
            denoised = told(
                {
                    "denoised": denoised, "cond_denoised": denoised, "uncond_denoised": denoised,
                    "input": x, "sigma": sigma, "cond_scale": 1.0, "model_options": given,
                    "cond": None, "uncond": None, "model": None,
                }
            )  # fmt: skip
        return denoised


class _Holder:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def bind_sampler(patcher: Any, sampler: Any) -> Sample | None:
    """A sampler object of ComfyUI as a function of denoiser, noise and sigmas.

    Args:
        patcher: the model that it will be for; samplers ask it what kind of noise it has.
    """
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        return None
    options: Mapping[str, Any] = getattr(sampler, "extra_options", {})

    def sample(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = {"model_options": {"transformer_options": {}}, "seed": 0}
        return function(
            _StandIn(denoise, patcher), x, sigmas,
            extra_args=given, callback=None, disable=True, **options,
        )  # fmt: skip

    return sample

"""Profiling a pipeline on this machine: every unit where it runs, whole calls, and the stages.

All units are timed inside the calls of one probing run, which computes everything, cuts the UNet
at several depths, leaves out whole steps, and runs half the guidance batch; so what is measured is
what happens under plans, caches and all. Repeats are whole probing runs, so a slow spell of the
machine hits every unit alike, and medians pass over it.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from leansd.anatomy.reading import read_anatomy
from leansd.drawing import default_size
from leansd.errors import LeansdError
from leansd.evaluation.cost import (
    CostModel,
    GuidedRows,
    Observed,
    fit_overheads,
    get_batch,
    name_gated,
    scale_calls,
)
from leansd.evaluation.inner_timing import CallLaps, RunLaps, check_timing, measure_peaks, time_run
from leansd.evaluation.timing import check_count, time_cases
from leansd.plans.address import get_block
from leansd.plans.anatomy import HEAD, STEM, Anatomy
from leansd.plans.plan import Plan
from leansd.plans.row import ATTENDS, Guidance, Row
from leansd.runtime.engine import list_followers

PROMPT = "a red apple"


def profile(
    pipe: Any,
    *,
    call: Mapping[str, Any] | None = None,
    pictures: int = 1,
    size: tuple[int, int] | None = None,
    repeats: int = 5,
    subject: str | None = None,
    attend: Sequence[str] = (),
    on_run: Callable[[], None] = lambda: None,
) -> CostModel:
    """Measure what everything in a pipeline costs on the device that it is on.

    Args:
        pipe: any that `leansd.inherit` takes.
        call: further arguments of the pipeline, such as `guidance_scale`, or a prompt, prompt
            embeddings or an image to use. A call without guidance gives a model of runs without it;
            image-to-image is timed at full strength, where it runs every step.
        pictures: pictures drawn at once.
        size: width and height in pixels; the pipeline's own by default.
        repeats: timed probing runs, after one short run to warm up.
        subject: the model's name in records.
        attend: self-attentions to time by GRI and in full as well, for plans that gate them.
        on_run: called after each probing run.

    Returns:
        Seconds of units, blocks, calls and stages, and what predicts the time of any plan.

    Raises:
        LeansdError: the pipeline follows a plan already, or does not call its UNet once a step.
    """
    probe = prepare_probe(
        pipe, call=call, pictures=pictures, size=size, subject=subject, attend=attend
    )
    runs: list[RunLaps] = []
    for _ in range(check_count(repeats, "repeats")):
        runs.append(probe.run())
        on_run()
    return probe.model_costs(runs)


@dataclass(frozen=True)
class Probe:
    """A pipeline that is warm, and the run to time it by."""

    pipe: Any
    subject: str
    anatomy: Anatomy
    plan: Plan
    arguments: Mapping[str, Any]
    pictures: int
    size: tuple[int, int]
    peaks: Mapping[str, int]

    @property
    def is_guided(self) -> bool:
        return bool(getattr(self.pipe, "do_classifier_free_guidance", False))

    def run(self, on_call: Callable[[], None] = lambda: None) -> RunLaps:
        arguments = {**self.arguments, "num_inference_steps": self.plan.steps}
        return time_run(self.pipe, self.plan, arguments, anatomy=self.anatomy, on_call=on_call)

    def model_costs(self, runs: Sequence[RunLaps]) -> CostModel:
        """The cost model that fits these probing runs."""
        cost = CostModel(
            subject=self.subject,
            pictures=self.pictures,
            size=self.size,
            units=_take_medians(lap for run in runs for lap in _list_unit_laps(run)),
            blocks=_take_medians(lap for run in runs for lap in _list_block_laps(run)),
            output_bytes=runs[0].output_bytes,
            peak_bytes=self.peaks,
        )
        # The first call also compiles the plan; that is a cost of the run.
        first, *others = [_observe(laps) for laps in zip(*(run.calls for run in runs), strict=True)]
        cost = fit_overheads(cost, others)
        cost = scale_calls(
            cost,
            median(
                sum(lap.seconds for lap in run.calls[1:]) / cost.predict_unet(run.program.calls[1:])
                for run in runs
            ),
        )
        late = max(0.0, first.seconds - cost.predict_call(first.call))
        gaps = [call.gap for run in runs for call in run.calls if call.gap is not None]
        per_step = median(gaps)
        return replace(
            cost,
            text=median(run.text for run in runs),
            decode=median(run.decode for run in runs),
            per_step=per_step,
            other=late + max(0.0, median(_find_rest(run, per_step) for run in runs)),
        )


def prepare_probe(
    pipe: Any,
    *,
    call: Mapping[str, Any] | None = None,
    pictures: int = 1,
    size: tuple[int, int] | None = None,
    subject: str | None = None,
    attend: Sequence[str] = (),
    on_unit: Callable[[str, float], None] = lambda at, share: None,
) -> Probe:
    """Run a pipeline once for a step, which warms it up, and lay out its probing run.

    Args:
        on_unit: told the address of each unit that has run, and the share of them.
    """
    if list_followers(pipe.unet):
        raise LeansdError(
            "already attached: the UNet follows a plan; leave that `with` block first, or call "
            "leansd.release_"
        )
    check_timing(torch.device(pipe.device))
    anatomy = read_anatomy(pipe.unet)
    Plan.full(1).attend(*attend, by="gri", at=0).resolve_gates(anatomy)
    arguments = make_arguments(pipe, call or {}, check_count(pictures, "pictures"), size)
    seen: set[str] = set()

    def tell(at: str) -> None:
        seen.add(at)
        on_unit(at, len(seen) / len(anatomy.units))

    peaks = measure_peaks(pipe, {**arguments, "num_inference_steps": 1}, anatomy, tell)
    # Whether a pipeline guides is known once it has been called.
    guided = bool(getattr(pipe, "do_classifier_free_guidance", False))
    return Probe(
        pipe=pipe,
        subject=subject or type(pipe).__name__,
        anatomy=anatomy,
        plan=make_probing_plan(anatomy, guided=guided, attend=attend),
        arguments=arguments,
        pictures=pictures,
        size=size or default_size(pipe),
        peaks=peaks,
    )


_OWN_ARGUMENTS = ("generator", "num_inference_steps", "timesteps", "sigmas")


def make_arguments(
    pipe: Any, call: Mapping[str, Any], pictures: int, size: tuple[int, int] | None
) -> dict[str, Any]:
    """The arguments of a pipeline for `pictures` pictures of `size` (width, height).

    Times do not depend on the noise, and the probing run has steps of its own, so what a call says
    of them is left out. Latents of one picture are those of every picture.
    """
    call = {name: value for name, value in call.items() if name not in _OWN_ARGUMENTS}
    arguments: dict[str, Any] = {"num_images_per_prompt": pictures}
    latents = call.get("latents")
    if latents is not None and "num_images_per_prompt" not in call:
        call["latents"] = latents.repeat_interleave(pictures, dim=0)
    if not {"prompt", "prompt_embeds"} & set(call):
        arguments["prompt"] = PROMPT
    if size is not None:
        arguments |= {"width": size[0], "height": size[1]}
    takes_strength = "strength" in inspect.signature(pipe.__call__).parameters
    return arguments | dict(call) | ({"strength": 1.0} if takes_strength else {})


def time_decoder(probe: Probe, vae: Any, *, rounds: int) -> float:
    """Median seconds in which `vae` would decode the pipeline's latents, all pictures of a run."""
    width, height = (side // probe.pipe.vae_scale_factor for side in probe.size)
    channels = vae.config.latent_channels
    latents = torch.zeros(
        probe.pictures, channels, height, width, device=vae.device, dtype=vae.dtype
    )

    @torch.no_grad()
    def decode(_: int) -> None:
        vae.decode(latents)

    return time_cases({"decode": decode}, rounds=rounds, device=vae.device)["decode"].median


def make_probing_plan(anatomy: Anatomy, *, guided: bool, attend: Sequence[str] = ()) -> Plan:
    """A run whose calls differ in all that the cost of a call depends on.

    Its first and its last call keep nothing, the others inherit from the second. Where
    self-attentions are gated, calls that compute everything follow, one for each attention.
    """
    last = anatomy.up_blocks - 1
    encoder = ["stem", *(block for block in anatomy.blocks if not block.startswith("up"))]
    cuts: list[tuple[str, ...]] = [
        (f"up{last}.l1",),
        (f"up{last - 1}",) if last else ("mid",),
        ("up0.l0",),
        tuple(encoder),
        ("head",),
    ]
    if any(part.at.endswith(".ca") for part in anatomy.parts):
        cuts.append(("*.ca",))
    halves: list[tuple[str, ...]] = [(f"up{last}.l1",), tuple(encoder), ()] if guided else [()]
    plan = Plan.full(2 + len(cuts) + len(halves), name="probing")
    for step, patterns in enumerate((*cuts, *halves), start=2):
        plan = plan.inherit(*patterns, at=step)
    plan = plan.guide("inherit", at=range(2 + len(cuts), plan.steps)) if guided else plan
    batches: tuple[Guidance, ...] = ("compute", "inherit") if guided else ("compute",)
    further = [
        Row(guidance=each, attend=dict.fromkeys(attend, by))
        for each in batches
        for by in ATTENDS
        if attend
    ]
    return replace(plan, rows=(*plan.rows, *further))


def _observe(laps: Sequence[CallLaps]) -> Observed:
    """Medians of one call of all probing runs; what is besides the units is paired with them."""
    call = laps[0].call
    besides = [lap.seconds - sum(lap.inside[at] for at in call.pattern.computed) for lap in laps]
    return Observed(call, median(lap.seconds for lap in laps), median(besides))


def _find_rest(run: RunLaps, per_step: float) -> float:
    """What a run spent outside calls, stages and steps."""
    loop = sum(call.seconds for call in run.calls) + len(run.calls) * per_step
    return run.whole - loop - run.text - run.decode


Lapped = tuple[str, GuidedRows, float]


def _list_unit_laps(run: RunLaps) -> Iterable[Lapped]:
    """Units and parts where they were computed whole, no part copied in or out, or gated."""
    for laps in run.calls:
        call, inside = laps.call, laps.inside
        changed = (*call.pattern.parts, *call.keeps, *call.gates)
        broken = {at.rsplit(".", 2)[0] for at in changed}
        for at in call.pattern.active - broken:
            gate = call.gates.get(at)
            yield name_gated(at, gate) if gate else at, get_batch(call), inside[at]


def _list_block_laps(run: RunLaps) -> Iterable[Lapped]:
    """What blocks spent besides their units, where those only computed: no copy is in it."""
    for laps in run.calls:
        call, inside, pattern = laps.call, laps.inside, laps.call.pattern
        copies = {get_block(at) for at in (*call.keeps, *pattern.inherited, *pattern.parts)}
        copies |= {STEM, HEAD}  # units of their own
        units: defaultdict[str, float] = defaultdict(float)
        for at in pattern.computed:
            units[get_block(at)] += inside[at]
        for block, spent in units.items():
            if block in inside and block not in copies:
                yield block, get_batch(call), max(0.0, inside[block] - spent)


def _take_medians(laps: Iterable[Lapped]) -> dict[str, dict[GuidedRows, float]]:
    table: dict[str, dict[GuidedRows, list[float]]] = {}
    for at, batch, seconds in laps:
        table.setdefault(at, {}).setdefault(batch, []).append(seconds)
    return {
        at: {batch: median(values) for batch, values in times.items()}
        for at, times in table.items()
    }

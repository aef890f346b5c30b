"""Predicted against measured, plans that had no part in a cost model; and what a profile says.

Probing runs and held-out runs alternate, so that a slow spell of the machine is in what the model
is made from as well as in what it is held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from typing import Any

from leansd.evaluation.cost import CostModel
from leansd.evaluation.inner_timing import RunLaps, time_run
from leansd.evaluation.profile import Probe
from leansd.evaluation.records import Record
from leansd.evaluation.runs import FULL
from leansd.evaluation.timing import Ratio, Timing, check_count, compare_timings, take_turns
from leansd.plans.anatomy import Anatomy
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import Program
from leansd.plans.plan import Plan
from leansd.plans.presets import SPEED_PRESETS, preset
from leansd.plans.resolve import PlanContext, resolve_plan
from leansd.text import Table

PROBING = "probing"
"""The run that a cost model is made from, among those that it is held against."""


@dataclass(frozen=True)
class Prediction:
    """One plan's UNet time, as predicted and as measured."""

    plan: Plan
    predicted: float
    """Seconds in the UNet, all calls of a run."""
    measured: Timing
    """The seconds that were measured, one a round."""
    predicted_speedup: float
    """Over the full run, UNet alone."""
    measured_speedup: Ratio

    @property
    def ratio(self) -> float:
        """Predicted over measured seconds: 1 is right, more is pessimistic."""
        return self.predicted / self.measured.median

    @property
    def speedup_ratio(self) -> float:
        """Predicted over measured speed-up: 1 is right, more is optimistic."""
        return self.predicted_speedup / self.measured_speedup.median


def hold_out(anatomy: Anatomy, steps: int, *, guided: bool, sampler: str = "") -> dict[str, Plan]:
    """The full run and plans of every kind, none of which the probing run follows."""
    blocks, context = anatomy.up_blocks, PlanContext(steps, sampler, anatomy=anatomy)
    plans = {
        name: resolve_plan(name, context, force=True).plan for name in (FULL, "balanced", "turbo")
    }
    plans["deepcache"] = preset("deepcache", steps, blocks=blocks, interval=2)
    plans["encoder"] = preset("encoder", steps, blocks=blocks, keys=range(0, steps, 2))
    plans["whole steps"] = Plan.every(2, cut="head", steps=steps)
    if guided:
        others = range(1, steps, 2)
        plans["guidance"] = Plan.full(steps).guide("inherit", at=others)
    return {name: plan.rename(name) for name, plan in plans.items()}


def check_predictions(
    probe: Probe,
    plans: Mapping[str, Plan],
    *,
    rounds: int,
    on_progress: Callable[[str, float], None] = lambda name, share: None,
) -> tuple[CostModel, tuple[Prediction, ...]]:
    """Profile a pipeline, and hold the model against runs of `plans`, the first of them full.

    Without plans there is only the profile.
    Runs end with latents: the decoder has no part in what is compared.

    Args:
        on_progress: told what runs and the share of all UNet calls that is done, after each call.
    """
    steps = sum(each.steps for each in (probe.plan, *plans.values()))
    total = check_count(rounds, "repeats") * steps
    calls = count(1)

    def time_held_out(plan: Plan, on_call: Callable[[], None]) -> RunLaps:
        last = {"num_inference_steps": plan.steps, "output_type": "latent"}
        return time_run(probe.pipe, plan, {**probe.arguments, **last}, on_call=on_call)

    cases = {PROBING: probe.run}
    cases |= {name: partial(time_held_out, plan) for name, plan in plans.items()}
    runs: dict[str, list[RunLaps]] = {name: [] for name in cases}
    for _, name in take_turns(list(cases), rounds):
        runs[name].append(cases[name](lambda name=name: on_progress(name, next(calls) / total)))
    cost = probe.model_costs(runs.pop(PROBING))
    full = next(iter(runs.values()), [])
    return cost, tuple(_judge(cost, plan, runs[name], full) for name, plan in plans.items())


def list_prediction_records(
    predictions: Sequence[Prediction], circumstances: Mapping[str, Any]
) -> list[Record]:
    """Predicted and measured seconds and speed-ups; `circumstances` are fields of every record."""
    records: list[Record] = []
    for each in predictions:
        case: dict[str, Any] = {
            **circumstances,
            "plan": each.plan.name,
            "fingerprint": each.plan.fingerprint,
            "steps": each.plan.steps,
            "repeats": len(each.measured.seconds),
        }
        seconds, speedup = each.measured.seconds, each.measured_speedup
        spread: dict[str, Any] = {"low": min(seconds), "high": max(seconds)}
        ratio: dict[str, Any] = {"low": speedup.low, "high": speedup.high}
        records += [
            Record(**case, metric="unet_seconds", value=each.measured.median, unit="s", **spread),
            Record(**case, metric="predicted_unet_seconds", value=each.predicted, unit="s"),
            Record(**case, metric="unet_speedup", value=speedup.median, unit="x", **ratio),
            Record(**case, metric="predicted_unet_speedup", value=each.predicted_speedup, unit="x"),
        ]
    return records


def find_worst(predictions: Sequence[Prediction]) -> float:
    """The largest relative error of a predicted speed-up: 0.05 is five per cent."""
    return max(abs(each.speedup_ratio - 1) for each in predictions)


def _judge(
    cost: CostModel, plan: Plan, runs: Sequence[RunLaps], full: Sequence[RunLaps]
) -> Prediction:
    measured, base = (
        Timing(tuple(sum(call.seconds for call in run.calls) for run in each))
        for each in (runs, full)
    )
    program = runs[0].program
    return Prediction(
        plan=plan,
        predicted=cost.predict_unet(program.calls),
        measured=measured,
        predicted_speedup=cost.predict_unet_speedup(program),
        measured_speedup=compare_timings(base, measured),
    )


# -- what a profile says ---------------------------------------------------------------------------

EXAMPLE = "balanced"
"""The preset whose run is split beside the full one's."""


@dataclass(frozen=True)
class OtherVae:
    """Another autoencoder in the pipeline's place."""

    name: str
    decode: float
    """Seconds for all pictures of a run."""
    is_trained: bool


@dataclass(frozen=True)
class Gain:
    """How many times faster a plan makes the UNet and the whole call; both over the full run."""

    plan: Plan
    unet: float
    run: float
    run_with_vae: float | None
    """With the other autoencoder, over the full run with the pipeline's own."""


@dataclass(frozen=True)
class Profiled:
    """A profile with what it was made for."""

    cost: CostModel
    anatomy: Anatomy
    """With multiply-accumulates."""
    steps: int
    """UNet calls of the runs that are split and compared."""
    predictions: tuple[Prediction, ...]
    repeats: int
    circumstances: dict[str, str]
    vae: OtherVae | None = None
    sampler: str = ""
    """Short name of the sampler that presets are for."""

    def resolve(self, name: str) -> Plan:
        """The plan of a preset for these runs."""
        context = PlanContext(self.steps, self.sampler, anatomy=self.anatomy)
        return resolve_plan(name, context).plan

    def compile(self, plan: Plan) -> Program:
        return compile_plan(plan, self.anatomy, guided=self.cost.is_guided)

    @cached_property
    def gains(self) -> tuple[Gain, ...]:
        """What plans gain: no plan at all, the speed presets, and DeepCache's schedule."""
        names = ("full", *SPEED_PRESETS, "deepcache")
        return tuple(self._predict_gain(self.resolve(name)) for name in names)

    def _predict_gain(self, plan: Plan) -> Gain:
        program = self.compile(plan)
        with_vae = None
        if self.vae is not None:
            other = replace(self.cost, decode=self.vae.decode)
            with_vae = self.cost.predict_full_run(self.steps) / other.predict_run(program)
        return Gain(
            plan,
            unet=self.cost.predict_unet_speedup(program),
            run=self.cost.predict_speedup(program),
            run_with_vae=with_vae,
        )

    def split(self, plan: Plan) -> dict[str, float]:
        """Seconds of a whole run by stage."""
        cost = self.cost
        return {
            "text encoder": cost.text,
            "UNet": cost.predict_unet(self.compile(plan).calls),
            "scheduler": self.steps * cost.per_step,
            "VAE decoder": cost.decode,
            "other": cost.other,
        }

    @cached_property
    def full(self) -> Plan:
        return Plan.full(self.steps)

    @cached_property
    def example(self) -> Plan:
        return self.resolve(EXAMPLE)


def tabulate_blocks(profiled: Profiled) -> Table:
    """Blocks and ends: milliseconds of both batches, shares of time and of multiply-accumulates."""
    cost, anatomy = profiled.cost, profiled.anatomy
    rows: list[tuple[str, float, float, int]] = []
    for block in ("stem", *anatomy.blocks, "head"):
        units = anatomy.select(block)
        own = cost.blocks.get(block, {})
        whole, half = (
            sum(cost.units[unit.at].get(batch, 0.0) for unit in units) + own.get(batch, 0.0)
            for batch in ("whole", "half")
        )
        rows.append((block, whole, half, units.macs))
    fixed = cost.fixed
    rows.append(("fixed", fixed["whole"], fixed.get("half", 0.0), 0))
    total = sum(row[1] for row in rows)
    return Table(
        ("block", "whole batch", "half batch", "time", "MACs"),
        tuple(
            (
                name,
                show_milliseconds(whole),
                show_milliseconds(half) if cost.is_guided else "–",
                f"{whole / total:.1%}",
                f"{macs / (anatomy.macs or 1):.1%}",
            )
            for name, whole, half, macs in rows
        ),
    )


def tabulate_split(profiled: Profiled) -> Table:
    """The stages of a whole call, in full and under a preset."""
    full, lean = profiled.split(profiled.full), profiled.split(profiled.example)
    totals = sum(full.values()), sum(lean.values())
    rows = [
        *((name, full[name], lean[name]) for name in full),
        ("whole call", *totals),
    ]
    return Table(
        ("stage", "full", "share", EXAMPLE, "share"),
        tuple(
            (
                name,
                show_seconds(first),
                f"{first / totals[0]:.1%}",
                show_seconds(second),
                f"{second / totals[1]:.1%}",
            )
            for name, first, second in rows
        ),
    )


def tabulate_gains(profiled: Profiled) -> Table:
    """What each preset gains, of the UNet and of the whole call."""
    vae = profiled.vae
    return Table(
        ("plan", "UNet", "whole call", *(("other VAE",) if vae is not None else ())),
        tuple(
            (
                gain.plan.name,
                f"{gain.unet:.2f}x",
                f"{gain.run:.2f}x",
                *((f"{gain.run_with_vae:.2f}x",) if gain.run_with_vae is not None else ()),
            )
            for gain in profiled.gains
        ),
    )


def tabulate_predictions(predictions: Iterable[Prediction]) -> Table:
    """UNet seconds and speed-up of held-out plans, predicted and measured."""
    return Table(
        ("plan", "predicted", "measured", "ratio", "predicted", "measured speed-up", "ratio"),
        tuple(
            (
                each.plan.name,
                show_seconds(each.predicted),
                show_seconds(each.measured.median),
                f"{each.ratio:.3f}",
                f"{each.predicted_speedup:.2f}x",
                str(each.measured_speedup),
                f"{each.speedup_ratio:.3f}",
            )
            for each in predictions
        ),
    )


def show_milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms" if seconds < 1 else f"{seconds * 1000:.0f} ms"


def show_seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds < 10 else f"{seconds:.1f} s"

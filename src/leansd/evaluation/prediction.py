"""Predicted against measured: plans that had no part in a cost model, run in turns with its probe.

Probing runs and held-out runs alternate, so that a slow spell of the machine is in what the model
is made from as well as in what it is held against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from leansd.evaluation.cost import CostModel
from leansd.evaluation.inner_timing import RunLaps, check_count, time_run
from leansd.evaluation.profile import Probe
from leansd.evaluation.records import Record
from leansd.evaluation.runs import FULL
from leansd.evaluation.timing import Ratio, Timing, compare_timings, rotate
from leansd.plans.anatomy import Anatomy
from leansd.plans.plan import Plan
from leansd.plans.presets import preset


@dataclass(frozen=True)
class Prediction:
    """One plan's UNet time, as predicted and as measured."""

    plan: Plan
    predicted: float
    """Seconds in the UNet, all calls of a run."""
    measured: Timing
    """The same as measured, one a round."""
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
    blocks = anatomy.up_blocks
    plans = {
        name: preset(name, steps, blocks=blocks, sampler=sampler)
        for name in (FULL, "balanced", "turbo")
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
    probes: list[RunLaps] = []
    runs: dict[str, list[RunLaps]] = {name: [] for name in plans}
    names = list(plans)
    steps = sum(each.steps for each in (probe.plan, *plans.values()))
    total = check_count(rounds, "repeats") * steps
    calls = count(1)

    def tell(name: str) -> Callable[[], None]:
        return lambda: on_progress(name, next(calls) / total)

    for turn in range(rounds):
        probes.append(probe.run(tell("probing")))
        for name in rotate(names, turn):
            runs[name].append(_run_latents(probe, plans[name], tell(name)))
    cost = probe.model_costs(probes)
    return cost, tuple(_judge(cost, plans[name], runs[name], runs[names[0]]) for name in names)


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


def _run_latents(probe: Probe, plan: Plan, on_call: Callable[[], None]) -> RunLaps:
    last = {"num_inference_steps": plan.steps, "output_type": "latent"}
    return time_run(probe.pipe, plan, {**probe.arguments, **last}, on_call=on_call)


def _judge(
    cost: CostModel, plan: Plan, runs: Sequence[RunLaps], full: Sequence[RunLaps]
) -> Prediction:
    measured, base = (_sum_calls(each) for each in (runs, full))
    program = runs[0].program
    return Prediction(
        plan=plan,
        predicted=cost.predict_unet(program.calls),
        measured=measured,
        predicted_speedup=cost.predict_unet_speedup(program),
        measured_speedup=compare_timings(base, measured),
    )


def _sum_calls(runs: Sequence[RunLaps]) -> Timing:
    return Timing(tuple(sum(call.seconds for call in run.calls) for run in runs))

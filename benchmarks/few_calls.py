"""Few UNet calls held to the full run: tuned plans, and the same with their mixes fitted.

    python benchmarks/few_calls.py [--plans turbo,fast or FRONT.json] [--calls 96]
        [--iterations 50] [--sampler unipc] [--guidance 7.5] [--ingredients mixing,lanes]
        [--model runs/second/model]

Mixes are fitted on two thirds of the calls, prompts in turns with a noise each, and all is measured
on the last third, against the full run: the mean of the pictures' PSNR and the PSNR of their mean
error. Beside them, as many steps of the sampler and of UniPC. By `--begin` fits begin with other
things than the plan: as many plain steps, which is a bespoke solver without our key steps, or lines
between even steps. By `--ingredients` the fit is done with little and with one thing more each time
(`INGREDIENTS`). Records go to `benchmarks/results/few-calls.jsonl`; a stopped fit goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from leansd.anatomy.reading import read_anatomy
from leansd.cli.terminal import hush_libraries
from leansd.emoji.prompts import THINGS
from leansd.errors import LeansdError
from leansd.evaluation.fidelity import psnr
from leansd.evaluation.prompt_sets import GUIDANCE
from leansd.evaluation.records import Record, get_field, put_records, stamp
from leansd.evaluation.runs import CallSet, run_calls
from leansd.loading import EMBEDDED, load
from leansd.plans.anatomy import HEAD
from leansd.plans.plan import Plan
from leansd.plans.presets import preset
from leansd.runtime.samplers import make_scheduler
from leansd.text import suggest_name
from leansd.tuning.front import read_plans
from leansd.tuning.mix_fitting import FitState, MixConfig, MixFit
from leansd.tuning.mixing import draw_lines
from leansd.tuning.run_starts import RunStart, record_starts
from leansd.tuning.sampler_map import PlanMap, read_sampler

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "few-calls.jsonl"
RUNS = ROOT / "runs" / "few-calls"
PLACE = ("sampler", "steps", "guidance", "calls", "unet_calls")
"""What tells records of one plan apart."""
SEED = 7_000_000
RIVAL = "unipc"
FEW = 32
"""Runs that are fitted to where `calls` is no ingredient."""


@dataclass(frozen=True)
class Ingredients:
    """What a fit is given besides the weights of the outputs."""

    lanes: bool = False
    """Weights of their own for the difference of the guidance lanes."""
    calls: bool = False
    """All the runs there are, not few."""
    start: bool = False
    """Where it begins: the tuned plan, not plain forecasts at the same key steps."""

    def make_start(self, plan: Plan) -> Plan:
        if self.start:
            return plan
        return Plan.between(plan.keys, cut=HEAD, steps=plan.steps, how="forecast")


INGREDIENTS = {
    "mixing": Ingredients(),
    "lanes": Ingredients(lanes=True),
    "calls": Ingredients(calls=True),
    "start": Ingredients(start=True),
}
"""Mixing by itself, and each of the others beside it alone."""
ALL = Ingredients(lanes=True, calls=True, start=True)


def list_plans(names: str, steps: int, sampler: str) -> Iterator[tuple[str, Plan]]:
    """Tuned plans by name: presets, or those of a front that inherit."""
    for name in names.split(","):
        if not Path(name).is_file():
            yield name, preset(name, steps, sampler=sampler)
            continue
        for plan in read_plans(name):
            if plan.steps == steps:
                yield f"tuned, {len(plan.keys)} calls", plan


def _name_lines(plan: Plan, what: str) -> Plan:
    return plan.rename(f"{what}, {len(plan.keys)} calls")


BEGIN: dict[str, Callable[[Plan], Plan]] = {
    "plan": lambda plan: plan,
    "steps": lambda plan: Plan.full(len(plan.keys), name=f"{len(plan.keys)} steps"),
    "lines": lambda plan: _name_lines(draw_lines(plan, plan.steps)[0], "lines"),
    "open-lines": lambda plan: _name_lines(draw_lines(plan, plan.steps)[1], "open lines"),
}
"""Where a fit with all ingredients begins."""


def list_fits(
    plan: Plan, ingredients: Sequence[str], begin: Sequence[str]
) -> Iterator[tuple[str, Plan, Ingredients]]:
    """What is fitted for a plan: a label, the plan that the fit begins with, and with what.

    Raises:
        LeansdError: there is no such ingredient, or no such beginning.
    """
    for each in ingredients:
        alone = "nothing else" if each == "mixing" else f"{each} alone"
        chosen = _choose("ingredient", INGREDIENTS, each)
        yield f"{plan.name}, mixed, {alone}", chosen.make_start(plan), chosen
    for each in begin if not ingredients else ():
        begun = _choose("beginning", BEGIN, each)(plan)
        yield f"{begun.name}, mixed", begun, ALL


def _choose(what: str, table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        raise LeansdError(f"no {what} {name!r}{suggest_name(name, table)}")
    return table[name]


def average(pictures: torch.Tensor, goals: torch.Tensor) -> dict[str, float]:
    """Both means, in dB."""
    each = psnr(pictures, goals).double()
    return {
        "psnr": float(each.mean()),
        "psnr_of_mean_error": float(-10 * (10 ** (-each / 10)).mean().log10()),
    }


def fit(
    pipe: Any, plan: Plan, starts: Sequence[RunStart], steps: int, config: MixConfig, folder: Path
) -> tuple[Plan, dict[str, float]]:
    """The plan with its mixes, fitted to full runs of so many steps, and the seconds it took.

    A fit that was stopped and goes on does not know them.
    """
    sampler = read_sampler(pipe.scheduler, plan.steps)
    fitting = MixFit(
        pipe.unet,
        PlanMap.of(plan, sampler, read_anatomy(pipe.unet)),
        starts,
        sampler.begin / read_sampler(pipe.scheduler, steps).begin,
        config,
    )
    case = f"{plan.fingerprint}-{len(starts)}-{config.iterations}-{config.floor:g}"
    case += f"-g{starts[0].scale:g}" + ("" if config.lanes else "-no-lanes")
    path, state = folder / f"{case}.json", None
    if path.exists():
        state = FitState.decode(json.loads(path.read_text()))
        fitting.measure_spans()
    fitting.spending = fitting.plan_memory()
    print(f"{plan.name}: {fitting.spending}", flush=True)

    def watch(state: FitState, error: float) -> None:
        path.write_text(json.dumps(state.encode()))
        if state.iteration % 5 == 0:
            print(
                f"{plan.name}: {state.iteration} of {config.iterations}, {error:.2f} dB", flush=True
            )

    started = time.perf_counter()
    mixed = fitting.run(state, watch)
    spent = {"seconds": round(time.perf_counter() - started, 1)}
    return mixed, spent if state is None else {}


def main(
    plans: Annotated[
        str, typer.Option(help="Presets to start from, or the file of a front: all of its plans.")
    ] = "turbo,fast",
    sampler: str = "dpm++2m",
    steps: int = 30,
    calls: Annotated[int, typer.Option(min=12)] = 96,
    iterations: int = 50,
    guidance: float = GUIDANCE,
    ingredients: Annotated[
        str, typer.Option(help=f"Fit with little: any of {', '.join(INGREDIENTS)}.")
    ] = "",
    begin: Annotated[str, typer.Option(help=f"Where fits begin: {', '.join(BEGIN)}.")] = "plan",
    floor: Annotated[float, typer.Option(help="Added to errors before the logarithm.")] = 0.0,
    model: str = EMBEDDED,
) -> None:
    hush_libraries()
    subject = model if model == EMBEDDED else Path(model).parent.name
    folder = RUNS if model == EMBEDDED else RUNS / subject
    folder.mkdir(parents=True, exist_ok=True)
    pipe: Any = load(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(pipe, sampler)
    settings = {"guidance_scale": guidance}
    asked = [THINGS[place % len(THINGS)] for place in range(calls)]
    count = calls * 2 // 3
    scale = "" if guidance == GUIDANCE else f"-g{guidance:g}"
    kept = folder / f"starts-{sampler}-{steps}-{calls}{scale}.pt"
    if kept.exists():
        raw, goals = torch.load(kept, weights_only=True)
        starts = [RunStart(**each) for each in raw]
    else:
        starts, pictures = record_starts(
            pipe, CallSet(asked, seed=SEED, batch=8, settings=settings), steps
        )
        goals = pictures[count:]
        torch.save(([vars(each) for each in starts[:count]], goals), kept)
    held = asked[count:]
    shared: dict[str, Any] = {
        **stamp(pipe.device),
        "subject": subject, "unit": "dB", "seed": SEED, "steps": steps, "sampler": sampler,
        "guidance": guidance, "calls": calls, "held_out": len(held),
    }  # fmt: skip

    def measure(name: str, plan: Plan | None, run: int, own: Any = None, **facts: Any) -> None:
        drawn = run_calls(
            pipe,
            CallSet(held, seed=SEED + count, batch=8, settings=settings),
            run,
            plan,
            scheduler=own,
        ).pictures
        found = average(drawn, goals)
        print(name, found, flush=True)
        records = [
            Record(
                **shared, plan=name, fingerprint="" if plan is None else plan.fingerprint,
                metric=metric, value=value, **facts,
            )
            for metric, value in found.items()
        ]  # fmt: skip
        put_records(
            RESULTS,
            records,
            lambda each: (
                each.subject, each.plan, each.metric,
                *(get_field(each, name) for name in PLACE),
            ),
        )  # fmt: skip

    for name, plan in list_plans(plans, steps, sampler):
        keys = len(plan.keys)
        measure(f"{keys} steps", None, keys, unet_calls=keys)
        measure(
            f"{keys} steps of {RIVAL}", None, keys, make_scheduler(pipe, RIVAL), unet_calls=keys
        )
        measure(name, plan, steps, unet_calls=keys)
        chosen = [each for each in ingredients.split(",") if each]
        for label, begun, each in list_fits(plan.rename(name), chosen, begin.split(",")):
            label += f", floor {floor:g}" if floor else ""
            config = MixConfig(iterations=iterations, floor=floor, lanes=each.lanes)
            fitted = starts[: count if each.calls else min(FEW, count)]
            mixed, spent = fit(pipe, begun.rename(label), fitted, steps, config, folder)
            replace(mixed, name=label).save(folder / f"{label}{scale}.json")
            facts = {"iterations": iterations, "fitted": len(fitted), **spent}
            measure(label, mixed, mixed.steps, unet_calls=keys, **facts)


if __name__ == "__main__":
    typer.run(main)

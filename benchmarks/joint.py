"""Net, inheritance, guidance, step count and GRI searched together, against each of them alone.

    python benchmarks/joint.py [--net light=emoji-light] [--sampler dpm++2m]

Rivals that switch nets: T-Stitch's shares (arXiv 2402.14167), each at every step count, and lists
of nets as OMS-DPM (arXiv 2306.08860) has them, found by evolution over nets and step counts with
as many runs for each speed as the joint search may take. Everything is chosen on one set of calls
by predicted time; then what was chosen runs on calls held out, all in turns. What cannot reach a
speed is not in the records of that speed. Records go to `benchmarks/results/joint.jsonl`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import UNet2DConditionModel

from leansd.anatomy.reading import read_anatomy
from leansd.cli.terminal import hush_libraries
from leansd.emoji.prompts import THINGS
from leansd.evaluation.cost import CostModel
from leansd.evaluation.fidelity import psnr
from leansd.evaluation.profile import profile
from leansd.evaluation.prompt_sets import GUIDANCE
from leansd.evaluation.records import (
    Record,
    load_records,
    put_records,
    stamp,
    write_records,
)
from leansd.evaluation.runs import CallSet, RunOutputs, run_calls
from leansd.evaluation.timing import compare_timings, time_cases
from leansd.loading import load, load_unet
from leansd.plans.compile import compile_plan
from leansd.plans.plan import Plan
from leansd.plans.presets import preset
from leansd.plans.row import OWN
from leansd.runtime.nets import match_nets
from leansd.runtime.samplers import make_scheduler
from leansd.tuning import tune

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "joint.jsonl"
RUNS = ROOT / "runs" / "joint"
GATED = ("dn0.*.sa", "up3.*.sa")
SPEEDS = (2.0, 3.0, 4.0)
SPARE, LEAST_SPARE = 1.03, 1.02
"""Plans are sought so much faster than they shall be, for predictions are off by as much; costs are
counted in ticks, so that what is found may be a little slower."""
CALLS, SEED = 8, 3_000_000
DECIDING, MEASURED = 10_000, 20_000
"""How far off are the seeds of the calls that decide, as in tuning, and of those measured."""
POPULATION, GENERATIONS = 8, 4
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Arena:
    """One pipeline with its nets, and what plans cost and lose there."""

    pipe: Any
    nets: Mapping[str, UNet2DConditionModel]
    cost: CostModel
    steps: int
    sampler: str

    @property
    def fitting(self) -> Sequence[str]:
        return THINGS[: 8 * CALLS : 8]

    @property
    def deciding(self) -> Sequence[str]:
        return THINGS[4 : 8 * CALLS : 8]

    @property
    def measured(self) -> Sequence[str]:
        return THINGS[1 : 8 * CALLS : 2]

    @cached_property
    def _company(self) -> Any:
        return match_nets(self.pipe.unet, self.nets).nets

    @cached_property
    def _anatomy(self) -> Any:
        return read_anatomy(self.pipe.unet)

    def predict(self, plan: Plan) -> float:
        """How many times faster than the full run."""
        program = compile_plan(plan, self._anatomy, nets=self._company)
        return self.cost.predict_full_run(self.steps) / self.cost.predict_run(program)

    def run(self, plan: Plan, calls: Sequence[str], seed: int) -> RunOutputs:
        settings = {"guidance_scale": GUIDANCE}
        return run_calls(
            self.pipe,
            CallSet(calls, seed=seed, batch=CALLS, settings=settings),
            plan.steps,
            plan,
            nets=self.nets,
        )

    @cached_property
    def _goals(self) -> dict[int, torch.Tensor]:
        return {}

    @cached_property
    def _known(self) -> dict[tuple[str, int], float]:
        return {}

    def score(self, plan: Plan) -> float:
        """Mean over the calls to seek by, in dB."""
        return self._score(plan, self.fitting, SEED)

    def _score(self, plan: Plan, calls: Sequence[str], seed: int) -> float:
        if seed not in self._goals:
            self._goals[seed] = self.run(Plan.full(self.steps), calls, seed).pictures
        key = plan.fingerprint, seed
        if key not in self._known:
            pictures = self.run(plan, calls, seed).pictures
            self._known[key] = float(psnr(pictures, self._goals[seed]).mean())
        return self._known[key]

    def choose(self, plans: Sequence[Plan], speed: float) -> Plan | None:
        """The closest of those that are so fast, on the calls that decide."""
        fast = [plan for plan in plans if self.predict(plan) >= speed * LEAST_SPARE]
        seed = SEED + DECIDING
        return max(fast, key=lambda plan: self._score(plan, self.deciding, seed), default=None)


# -- the search, with all axes and with one --------------------------------------------------------


def tune_axes(arena: Arena, name: str, **axes: Any) -> Callable[[float], Plan | None]:
    """A search over some axes, for every speed at once."""
    axes = {"cost": arena.cost, "nets": arena.nets, "attend": GATED, **axes}
    front = tune(
        arena.pipe,
        arena.fitting,
        held_out=arena.deciding,
        steps=arena.steps,
        settings={"guidance_scale": GUIDANCE},
        speeds=[speed * SPARE for speed in SPEEDS],
        seed=SEED,
        sampler=arena.sampler,
        journal=RUNS / f"{name}-{arena.sampler}-{arena.steps}.jsonl",
        tell=lambda text, share: print(f"{name}: {text}", flush=True),
        **axes,
    )
    plans = [point.plan for point in (*front.points, *front.dominated)]
    return lambda speed: arena.choose(plans, speed)


def search_together(arena: Arena) -> Callable[[float], Plan | None]:
    return tune_axes(arena, "together")


ALONE: Mapping[str, Any] = {"nets": {}, "attend": ()}


def search_inheritance(arena: Arena) -> Callable[[float], Plan | None]:
    """Key steps with forecasts between, at the full step count; they run the whole UNet."""
    return tune_axes(arena, "inheritance", cost=_price_whole(arena), grids=(1.0,), **ALONE)


def search_inheritance_and_steps(arena: Arena) -> Callable[[float], Plan | None]:
    """The two strongest axes, to see what the others add."""
    return tune_axes(arena, "inheritance-steps", cost=_price_whole(arena), **ALONE)


def _price_whole(arena: Arena) -> CostModel:
    """Costs without that of half a batch, so that nothing forecasts guidance."""
    whole = {key: value for key, value in arena.cost.fixed.items() if key != "half"}
    return replace(arena.cost, fixed=whole)


def take_fewer_steps(arena: Arena) -> Callable[[float], Plan | None]:
    plans = [Plan.full(count, name=f"{count} steps") for count in range(2, arena.steps + 1)]

    def choose(speed: float) -> Plan | None:
        fast = [plan for plan in plans if arena.predict(plan) >= speed]
        return max(fast, key=lambda plan: plan.steps, default=None)

    return choose


def forecast_guidance(arena: Arena) -> Callable[[float], Plan | None]:
    """At every second step from some step on."""
    plans = [
        Plan.full(arena.steps).guide("forecast", at=range(start, arena.steps, 2))
        for start in range(2, arena.steps, 4)
    ]
    return lambda speed: arena.choose(plans, speed)


def switch_nets(arena: Arena) -> Callable[[float], Plan | None]:
    """One share of the steps by one net, early or late, at the full step count."""
    plans = [
        preset(name, arena.steps, share=share, net=net)
        for name in ("light-early", "light-late")
        for share in SHARES
        for net in arena.nets
    ]
    return lambda speed: arena.choose(plans, speed)


def gate_attention(arena: Arena) -> Callable[[float], Plan | None]:
    plan = Plan.full(arena.steps).attend(*GATED, by="gri", at=range(arena.steps))
    return lambda speed: arena.choose([plan], speed)


# -- rivals that switch nets -----------------------------------------------------------------------


def stitch(arena: Arena) -> Callable[[float], Plan | None]:
    """T-Stitch: each share at the most steps that are fast enough."""

    def choose(speed: float) -> Plan | None:
        plans: list[Plan] = []
        for share in SHARES:
            for net in arena.nets:
                fits = (
                    plan
                    for count in range(arena.steps, 1, -1)
                    if arena.predict(
                        plan := preset("tstitch-exact", count, share=share, net=net)
                    ) >= speed * SPARE
                )  # fmt: skip
                plans += filter(None, [next(fits, None)])
        return arena.choose(plans, speed)

    return choose


def evolve_lists(arena: Arena) -> Callable[[float], Plan | None]:
    """OMS-DPM: a net for every step and how many steps there are, by evolution under a budget."""
    names = [OWN, *arena.nets]

    def build(genes: tuple[str, ...]) -> Plan:
        return preset("turns", len(genes), names=genes)

    def choose(speed: float) -> Plan | None:
        draw = random.Random(SEED)

        def fits(genes: tuple[str, ...]) -> bool:
            return arena.predict(build(genes)) >= speed * SPARE

        def shorten(genes: list[str]) -> tuple[str, ...]:
            """Within the budget: lighter where that helps, shorter where it must be."""
            while len(genes) > 1 and not fits(tuple(genes)):
                heavy = [place for place, name in enumerate(genes) if name == OWN]
                if heavy and draw.random() < 0.5:
                    genes[draw.choice(heavy)] = draw.choice(names[1:])
                else:
                    genes.pop(draw.randrange(len(genes)))
            return tuple(genes)

        def mutate(genes: tuple[str, ...]) -> tuple[str, ...]:
            child = list(genes)
            child[draw.randrange(len(child))] = draw.choice(names)
            if draw.random() < 0.5:
                child.insert(draw.randrange(len(child) + 1), draw.choice(names))
            return shorten(child)

        def fill(first: str, then: str) -> tuple[str, ...]:
            """Half of one net and half of another, as many steps as the budget has."""
            made = (
                (first,) * (count // 2) + (then,) * (count - count // 2)
                for count in range(arena.steps, 1, -1)
            )
            return next(genes for genes in made if fits(genes))

        # Beside chance what anybody would try: each net alone, and the light ones first.
        pool = [fill(name, name) for name in names]
        pool += [fill(name, OWN) for name in names[1:]]
        pool += [
            shorten([draw.choice(names) for _ in range(arena.steps)])
            for _ in range(POPULATION - len(pool))
        ]
        for _ in range(GENERATIONS):
            pool.sort(key=lambda genes: -arena.score(build(genes)))
            pool = pool[: POPULATION // 2]
            pool += [mutate(draw.choice(pool)) for _ in range(POPULATION // 2)]
        plans = [build(genes) for genes in pool if fits(genes)]
        return arena.choose(plans, speed)

    return choose


CONTESTANTS: Mapping[str, Callable[[Arena], Callable[[float], Plan | None]]] = {
    "together": search_together,
    "inheritance alone": search_inheritance,
    "inheritance and step count": search_inheritance_and_steps,
    "fewer steps alone": take_fewer_steps,
    "guidance alone": forecast_guidance,
    "nets alone": switch_nets,
    "GRI alone": gate_attention,
    "T-Stitch": stitch,
    "OMS-DPM": evolve_lists,
}


def keep_cost(pipe: Any, nets: Mapping[str, UNet2DConditionModel]) -> CostModel:
    """What everything costs: measured once, and then what was measured."""
    cost = keep_profile("own", pipe, attend=GATED)
    own, found = pipe.unet, {}
    for name, unet in nets.items():
        pipe.unet = unet
        found[name] = keep_profile(name, pipe)
    pipe.unet = own
    return replace(cost, nets=found)


def keep_profile(name: str, pipe: Any, attend: Sequence[str] = ()) -> CostModel:
    path = RUNS / f"cost-{name}.jsonl"
    if not path.exists():
        settings = {"guidance_scale": GUIDANCE}
        cost = profile(pipe, call=settings, pictures=CALLS, repeats=3, attend=attend)
        write_records(path, cost.list_records(stamp(pipe.device)))
    return CostModel.from_records(load_records(path))


def measure(
    arena: Arena, chosen: Mapping[tuple[str, float], Plan], shared: dict[str, Any]
) -> Iterator[Record]:
    """What was chosen, on calls that had no part in it, all in turns: a batch a round."""
    seed = SEED + MEASURED
    rounds = len(arena.measured) // CALLS
    full = Plan.full(arena.steps, name="full")
    plans = {plan.fingerprint: plan for plan in (full, *chosen.values())}
    drawn: dict[str, list[torch.Tensor]] = {key: [] for key in plans}

    def make_case(plan: Plan) -> Callable[[int], None]:
        def case(number: int) -> None:
            start = number * CALLS
            calls = arena.measured[start : start + CALLS]
            drawn[plan.fingerprint].append(arena.run(plan, calls, seed + start).pictures)

        return case

    timings = time_cases(
        {key: make_case(plan) for key, plan in plans.items()}, rounds=rounds, warmup=0
    )
    pictures = {key: torch.cat(batches) for key, batches in drawn.items()}
    for (name, speed), plan in chosen.items():
        ratio = compare_timings(timings[full.fingerprint], timings[plan.fingerprint])
        close = psnr(pictures[plan.fingerprint], pictures[full.fingerprint])
        nets = ",".join(f"{net or 'own'}:{count}" for net, count in count_nets(plan).items())
        base = {
            **shared, "plan": name, "fingerprint": plan.fingerprint, "goal": speed, "seed": seed,
            "plan_steps": plan.steps, "keys": len(plan.keys), "nets": nets,
            "forecast_guidance": sum(row.guidance == "forecast" for row in plan.rows),
            "gated": sum(bool(row.attend) for row in plan.rows),
            "predicted": arena.predict(plan),
        }  # fmt: skip
        yield Record(
            **base, metric="speedup", value=ratio.median, unit="x", low=ratio.low,
            high=ratio.high, rounds=rounds,
        )  # fmt: skip
        yield Record(
            **base, metric="psnr", value=float(close.mean()), unit="dB",
            low=float(close.min()), high=float(close.max()),
        )  # fmt: skip


def count_nets(plan: Plan) -> dict[str, int]:
    """Key steps of every net."""
    counts: dict[str, int] = {}
    for row in plan.rows:
        if row.is_key:
            counts[row.net] = counts.get(row.net, 0) + 1
    return counts


def main(
    net: Annotated[list[str], typer.Option(help="NAME=FOLDER")] = ["light=emoji-light"],  # noqa: B006
    sampler: Annotated[list[str], typer.Option()] = ["dpm++2m", "ddim"],  # noqa: B006
    steps: int = 30,
) -> None:
    hush_libraries()
    pipe: Any = load("emoji", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    nets = {name: load_unet(path, device="cpu") for name, path in (each.split("=") for each in net)}
    cost = keep_cost(pipe, nets)
    begin = time.time()
    for name in sampler:
        pipe.scheduler = make_scheduler(pipe, name)
        arena = Arena(pipe, nets, cost, steps, name)
        chosen: dict[tuple[str, float], Plan] = {}
        for contestant, prepare in CONTESTANTS.items():
            choose = prepare(arena)
            for speed in SPEEDS:
                if plan := choose(speed):
                    chosen[contestant, speed] = plan
                    print(f"{time.time() - begin:.0f} s  {contestant} {speed:g}x", flush=True)
        shared = {**stamp("cpu"), "subject": "emoji", "sampler": name, "steps": steps,
                  "guidance": GUIDANCE, "pictures": len(arena.measured)}  # fmt: skip
        records = list(measure(arena, chosen, shared))
        put_records(RESULTS, records, lambda record: getattr(record, "sampler", None))
        for record in records:
            print(record.plan, getattr(record, "goal", ""), record.metric, round(record.value, 2))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)

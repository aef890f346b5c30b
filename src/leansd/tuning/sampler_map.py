"""A plan of whole steps as a linear map, read by running its sampler on one-hot vectors.

Everything that a sampler makes is a sum over the noise that a run begins with and what the UNet
gave, so a plan that forecasts whole steps is one matrix: a row for the latents before each key step
and one for the last latents, a column for the start and for every key step's output. The columns
are those of `Mix`: x_T, the guided outputs e, and the differences of the lanes d = c - u.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from leansd.core.devices import seed_generator
from leansd.core.outputs import find_method, list_correction, list_weights
from leansd.core.schedule import CallSchedule
from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, Anatomy
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import Call
from leansd.plans.methods import METHODS, Mix
from leansd.plans.plan import Plan
from leansd.runtime.clock import lay_out_run, read_schedule

Matrix: TypeAlias = np.ndarray
DIGITS = 9
"""Digits of weights in plans."""
LEAST_WEIGHT = 1e-9
"""Outputs with less of a weight than this have none: DDIM's last, where its noise level is the
one before it."""


@dataclass(frozen=True, eq=False)
class SamplerMap:
    """A sampler of n steps, one call each, as the sum that it is."""

    schedule: CallSchedule
    start: Matrix
    """[n + 1]: how much of the noise that a pipeline draws is in the latents before each call."""
    response: Matrix
    """[n + 1, n]: how much of the output of call j is in the latents before call k."""
    scales: Matrix
    """[n]: what the UNet is given for latents of one."""

    @property
    def begin(self) -> float:
        """What the UNet is given at first for noise of one."""
        return float(self.start[0] * self.scales[0])

    @property
    def weighed(self) -> int:
        """The steps up to the last whose output has a weight at the end."""
        return count_weighed(self.response)


def count_weighed(response: Matrix) -> int:
    """The steps up to the last whose output has a weight at the end, by a response [n + 1, n]."""
    return int(max(np.flatnonzero(np.abs(response[-1]) > LEAST_WEIGHT), default=-1)) + 1


def read_sampler(scheduler: Any, steps: int) -> SamplerMap:
    """Run a copy of a scheduler on impulses, in double precision.

    Raises:
        LeansdError: it is not linear, adds noise, or calls the UNet more than once a step.
    """
    double = lay_out_run(scheduler, steps)
    schedule = read_schedule(double)
    count = len(double.timesteps)
    if schedule.steps != count or len(set(schedule.moments)) != count:
        raise LeansdError(f"{_name(scheduler)} calls the UNet more than once in some steps")
    # One impulse a call, one at the start, nothing at all, and numbers for a test.
    draw = np.random.default_rng(0)
    given = np.zeros((count, count + 3))
    given[:, :count] = np.eye(count)
    given[:, -1] = draw.normal(size=count)
    begin = np.zeros(count + 3)
    begin[count] = begin[-1] = float(getattr(double, "init_noise_sigma", 1.0))
    seen, scales = run_scheduler(double, double.timesteps, given, begin)
    if np.abs(seen[:, count + 1]).max() > 0:
        raise LeansdError(
            f"{_name(scheduler)} adds noise at every step; what it draws is not known to a plan"
        )
    start, response = seen[:, count], seen[:, :count]
    foreseen = start + response @ given[:, -1]
    if np.abs(seen[:, -1] - foreseen).max() > 1e-4 * np.abs(foreseen).max():
        raise LeansdError(
            f"{_name(scheduler)} is not linear in the UNet's outputs: rows are sums of them; take "
            "a sampler without thresholding or clip_sample"
        )
    return SamplerMap(schedule, start, response, scales)


def run_scheduler(
    scheduler: Any, timesteps: torch.Tensor, outputs: Matrix, begin: Matrix
) -> tuple[Matrix, Matrix]:
    """Runs of single pixels at once: their samples [n + 1, k], and what the UNet is given for one.

    What the scheduler draws of its own is the same for all of them.

    Args:
        outputs: [n, k], of the UNet at each time step.
        begin: [k], the first samples.
    """
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    options: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = [seed_generator(0) for _ in begin]
    sample = torch.from_numpy(begin).reshape(-1, 1, 1, 1)
    rows, scales = [sample], list[float]()
    for timestep, given in zip(timesteps, outputs, strict=True):
        scales.append(float(scale(torch.ones(1, 1, 1, 1, dtype=torch.float64), timestep)))
        output = torch.from_numpy(given).reshape(-1, 1, 1, 1)
        sample = scheduler.step(output, timestep, sample, **options)[0].double()
        rows.append(sample)
    return torch.stack(rows)[:, :, 0, 0, 0].numpy(), np.array(scales)


def _name(scheduler: Any) -> str:
    return type(scheduler).__name__


@dataclass(frozen=True, eq=False)
class PlanMap:
    """A plan of whole steps on a sampler. Shapes: m key steps, 1 + 2 m columns."""

    sampler: SamplerMap
    plan: Plan
    calls: tuple[Call, ...]
    keys: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, sampler: SamplerMap, anatomy: Anatomy) -> PlanMap:
        """The map of a plan.

        Raises:
            LeansdError: it does more than forecast whole steps from one sampler's key steps.
        """
        why = explain_unfit(plan)
        if why:
            raise LeansdError(f"plan {plan.name} {why}")
        calls = compile_plan(plan, anatomy).calls
        keys = tuple(call.index for call in calls if HEAD in call.pattern.active)
        return cls(sampler, plan, calls, keys)

    @property
    def ends(self) -> tuple[int, ...]:
        """Where each row's latents are: before the next key step, and at last at the end."""
        return (*self.keys[1:], len(self.calls))

    @property
    def _width(self) -> int:
        return 1 + 2 * len(self.keys)

    def list_columns(self, place: int) -> list[int]:
        """The columns that are known at a key step by its place: x_T, e and d up to it."""
        e = range(1, 2 + place)
        return [0, *e, *(len(self.keys) + each for each in e)]

    def build_rows(self) -> Matrix:
        """[m, 1 + 2 m]: the latents at `ends`, as this plan has them."""
        given = np.zeros((len(self.calls), self._width))
        for call in self.calls:
            given[call.index] = self._make_output(call)
        return np.stack([self._look(given, end) for end in self.ends])

    def lead_to(self, rows: Matrix) -> Plan:
        """The plan with the mixes that lead the latents to these rows [m, 1 + 2 m]."""
        bare = replace(self, plan=self.plan.correct(dict.fromkeys(self.keys, 0.0)))
        return bare.plan.mix(bare.find_mixes(rows))

    def find_mixes(self, rows: Matrix) -> dict[int, Mix]:
        """The mixes, by step, that lead the latents to these rows [m, 1 + 2 m].

        Raises:
            LeansdError: the sampler gives some key step's output no weight, so nothing leads there.
        """
        self.require_weights()
        given = np.zeros((len(self.calls), self._width))
        for call in self.calls:
            if call.index not in self.keys:
                given[call.index] = self._make_output(call)
        mixes: dict[int, Mix] = {}
        for place, (key, end) in enumerate(zip(self.keys, self.ends, strict=True)):
            weight = self.sampler.response[end, key]
            given[key] = (rows[place] - self._look(given, end)) / weight
            mixes[key] = self._read_mix(given[key], place)
        return mixes

    def require_weights(self) -> None:
        """Say so where the sampler gives some key step's output no weight.

        Raises:
            LeansdError: it does.
        """
        for key, end in zip(self.keys, self.ends, strict=True):
            if abs(self.sampler.response[end, key]) <= LEAST_WEIGHT:
                raise LeansdError(f"the sampler gives the output of step {key} no weight")

    def _look(self, given: Matrix, call: int) -> Matrix:
        """The latents before a call, for what the sampler is given at all calls."""
        latents = self.sampler.response[call, :call] @ given[:call]
        # Noise of one is what the UNet is given, over `begin`.
        latents[0] += self.sampler.start[call] / self.sampler.begin
        return latents

    def _make_output(self, call: Call) -> Matrix:
        """What the sampler is given at a call."""
        made, schedule = np.zeros(self._width), self.sampler.schedule
        row = self.plan.rows[call.index]
        place = self.keys.index(call.index) if call.index in self.keys else None
        if place is None:
            method, sources = find_method(call, HEAD), call.sources[HEAD][0]
            weights = list_weights(method, sources, call.index, schedule)
        elif row.mix is not None:
            own = (row.mix.start, *row.mix.guided, *(row.mix.difference or (0.0,) * (place + 1)))
            made[self.list_columns(place)] = own
            return made
        else:
            sources = call.corrects[0] if call.corrects else ()
            lead, *weights = list_correction(call, sources, schedule) if sources else [1.0]
            made[1 + place] = lead
        for kept, weight in zip(sources, weights, strict=True):
            made[1 + self.keys.index(kept.call)] += weight
        return made

    def _read_mix(self, made: Matrix, place: int) -> Mix:
        start, *others = (float(f"{each:.{DIGITS}g}") for each in made[self.list_columns(place)])
        difference = others[place + 1 :]
        return Mix(start, tuple(others[: place + 1]), tuple(difference) if any(difference) else ())


def explain_unfit(plan: Plan) -> str:
    """Why rows cannot be fitted to a plan, as a clause; empty where they can."""
    hows = {how for row in plan.rows for how in row.inherit.values()}
    if plan.drift is not None:
        return "decides by its pictures what it computes"
    if any(set(row.inherit) - {HEAD} for row in plan.rows):
        return "inherits inside the UNet"
    if any(METHODS[how].takes_input for how in hows):
        return "inherits more than outputs"
    if plan.guides:
        return "leaves a guidance lane out"
    if plan.nets or any(row.attend for row in plan.rows):
        return "runs other nets or gates"
    return ""


def stack_features(columns: Sequence[torch.Tensor]) -> Matrix:
    """Tensors as rows of numbers, in double precision."""
    return torch.stack([each.detach().flatten() for each in columns]).cpu().double().numpy()

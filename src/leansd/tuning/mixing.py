"""Mixes for the plans that a tuning found: fitted on calls of their own, kept where they help.

A call is a prompt with a fresh noise. Mixes have some hundred weights, so they need more calls than
the search; a third of these has no part in the fit and decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leansd.errors import LeansdError
from leansd.evaluation.fidelity import psnr
from leansd.evaluation.runs import CallSet, PipelineCall, expand_calls
from leansd.files import writing
from leansd.plans import keysteps
from leansd.plans.anatomy import HEAD
from leansd.plans.plan import Plan
from leansd.tuning.host import PipelineHost
from leansd.tuning.mix_fitting import FitState, MixConfig, MixFit
from leansd.tuning.run_starts import RunStart, record_starts
from leansd.tuning.sampler_map import PlanMap, SamplerMap, explain_unfit, read_sampler
from leansd.tuning.trials import Journal

MOST_CALLS, MOST_SHARE = 12, 0.65
"""Plans with more UNet calls than both say lose little, and their fits take long."""
FEWEST, FEWEST_PROMPTS = 24, 8
FRESH = 1_000_000
"""How far off the seeds of these calls are from those of the search."""
SAVED_EVERY = 5
"""Iterations."""

FIT_SHARES = (0.75, 0.5, 0.25)
"""Of a fit, where all of it gives to easy pictures what it takes from hard ones."""

Say = Callable[[str, float], None]
"""Told what goes on, and what share of the work for a plan is done with it."""


def choose_mix_calls(
    wanted: int | Sequence[PipelineCall], fitted: Sequence[PipelineCall]
) -> list[PipelineCall]:
    """The calls that mixes are fitted on: those given, or so many of the tuning's in turns.

    Raises:
        LeansdError: there are too few, or they repeat too few prompts.
    """
    if isinstance(wanted, int):
        calls = [fitted[place % len(fitted)] for place in range(wanted)]
    else:
        calls = list(wanted)
    if not calls:
        return calls
    if len(calls) < FEWEST:
        raise LeansdError(
            f"{len(calls)} calls are too few to fit mixes: give at least {FEWEST}; 200 to 320 do it"
        )
    different = {str(sorted(each.items())) for each in map(_describe, calls)}
    if len(different) < FEWEST_PROMPTS:
        raise LeansdError(
            f"{len(calls)} calls to fit mixes on repeat {len(different)} prompts: give at least "
            f"{FEWEST_PROMPTS} different ones"
        )
    return calls


def _describe(call: PipelineCall) -> dict[str, Any]:
    (told,) = expand_calls([call])
    return {
        name: each.flatten().tolist() if isinstance(each, Tensor) else each
        for name, each in told.items()
    }


def draw_lines(plan: Plan, weighed: int) -> tuple[Plan, Plan]:
    """Lines through as many UNet calls at even distances: up to the last that has a weight, and
    closer together with that one made up, too."""
    calls = len(plan.keys)
    ended, open_ended = (keysteps.short_first(weighed, count) for count in (calls, calls + 1))
    draw = partial(Plan.between, cut=HEAD, steps=plan.steps, how="forecast")
    return draw(ended), draw(open_ended[:-1])


def list_starts(plan: Plan, weighed: int) -> list[Plan]:
    """Plans of as many UNet calls that a fit begins with: where it ends hangs on that.

    Beside the plan, lines where they lead over three steps at most and the plan has none, and plain
    steps where gaps are so long that nothing leads over them.

    Args:
        weighed: the steps up to the last whose output has a weight at the end.
    """
    calls, starts = len(plan.keys), [plan]
    has_lines = any(row.inherit.get(HEAD) == "forecast" for row in plan.rows)
    if 3 * calls >= plan.steps and calls < weighed and not has_lines:
        starts += draw_lines(plan, weighed)
    starts += [Plan.full(calls)] if 5 * calls <= plan.steps else []
    return starts


@dataclass(frozen=True)
class Nearness:
    """How near a plan's pictures are, in dB."""

    mean: float
    """Mean over the pictures."""
    of_mean_error: float
    """Of their mean squared error, which the hard ones make."""

    def beats(self, other: Nearness) -> bool:
        return self.mean > other.mean and self.of_mean_error > other.of_mean_error


@dataclass(eq=False)
class PlanMixer:
    """Fits mixes to plans of one pipeline; the full runs are made when they are first needed."""

    host: PipelineHost
    calls: Sequence[PipelineCall]
    """The calls that mixes are fitted on; the last third of them checks."""
    seed: int
    """The seed of the first call."""
    steps: int
    """Steps of the full run."""
    journal: Journal
    config: MixConfig = field(default_factory=MixConfig)

    def improve(self, plan: Plan, say: Say) -> Plan | None:
        """The best plan with mixes, where pictures that had no part in it are nearer by both means.

        None where no mixes help, or there are none for such a plan.
        """
        most = max(MOST_CALLS, MOST_SHARE * plan.steps)
        if len(plan.keys) > most or explain_unfit(plan):
            return None
        if not self._is_recorded:
            say(f"running {len(self.calls)} more calls in full to fit mixes on", 0.0)
        bar = self._measure(plan)
        nearer: list[tuple[float, Plan]] = []
        starts = list_starts(plan, self._read(plan.steps).weighed)
        # The weights of a row are solved for by that of its own output.
        starts = [each for each in starts if each.keys[-1] < self._read(each.steps).weighed]
        share = 1 / max(1, len(starts))
        for start in starts:
            levels = self.host.respond(start.steps).describe_levels(self.host.tuned)
            mixed = self._mix(
                replace(start, name=plan.name, tuned=levels),
                lambda text, done: say(text, done * share),
            )
            for each in self._soften(start, mixed) if start is plan else [mixed]:
                found = self._measure(each)
                if found.beats(bar):
                    nearer.append((found.mean, each))
                    break
        say(f"mixes of {plan.name} {'help' if nearer else 'do not help'}", 0.0)
        return max(nearer, key=lambda each: each[0])[1] if nearer else None

    def _read(self, steps: int) -> SamplerMap:
        """The sampler at a step count."""
        return read_sampler(self.host.pipe.scheduler, steps)

    def _mix(self, start: Plan, say: Say) -> Plan:
        key = f"{start.fingerprint} mixed"
        known = self.journal.values.get(key)
        if known is None:
            known = {"plan": self._fit(start, say).to_dict()}
            self.journal.note_value(key, known)
        return Plan.from_dict(known["plan"])

    def _soften(self, plan: Plan, mixed: Plan) -> Iterator[Plan]:
        """The mixed plan, and then less and less of what sets it off from the plan it began with.

        Errors that point different ways make a smaller one in between.
        """
        yield mixed
        sampler = self._read(plan.steps)
        begun, ended = (PlanMap.of(each, sampler, self.host.anatomy) for each in (plan, mixed))
        first, last = begun.build_rows(), ended.build_rows()
        for share in FIT_SHARES:
            softened = begun.lead_to((1 - share) * first + share * last)
            yield replace(softened, name=mixed.name, tuned=mixed.tuned)

    def _measure(self, plan: Plan) -> Nearness:
        """On the pictures that had no part in the fit."""
        key = f"{plan.fingerprint} beside mixes"
        known = self.journal.values.get(key)
        if known is None:
            first = self._fitted
            held = self.calls[first:]
            drawn, _ = self.host.draw(held, plan.steps, plan, seed=self.seed + first)
            each = psnr(drawn.pictures, self._runs[1][first:]).double()
            error = (10 ** (-each / 10)).mean()
            known = asdict(Nearness(float(each.mean()), float(-10 * error.log10())))
            self.journal.note_value(key, known)
        return Nearness(**known)

    def _fit(self, plan: Plan, say: Say) -> Plan:
        sampler, full = self._read(plan.steps), self._read(self.steps)
        fit = MixFit(
            self.host.pipe.unet,
            PlanMap.of(plan, sampler, self.host.anatomy),
            self._runs[0][: self._fitted],
            begin=sampler.begin / full.begin,
            config=self.config,
        )
        fit.spending = fit.plan_memory()
        say(f"fitting mixes of {plan.name}: {fit.spending}", 0.0)
        key, state = f"{plan.fingerprint} mixing", None
        saved = self.journal.values.get(key)
        if saved is not None:
            fit.measure_spans()
            state = FitState.decode(saved)
        started, begun = time.monotonic(), state.iteration if state is not None else 0

        def watch(state: FitState, error: float) -> None:
            if state.iteration % SAVED_EVERY == 0:
                self.journal.note_value(key, state.encode())
            each = (time.monotonic() - started) / (state.iteration - begun)
            left = each * (self.config.iterations - state.iteration)
            say(
                f"mixes of {plan.name}: {state.iteration} of {self.config.iterations}, "
                f"{left / 60:.0f} min left",
                1 / self.config.iterations,
            )

        mixed = fit.run(state, watch)
        return replace(mixed, name=f"{plan.name}, mixed")

    @property
    def _is_recorded(self) -> bool:
        return "_runs" in vars(self) or (self._file is not None and self._file.exists())

    @cached_property
    def _runs(self) -> tuple[list[RunStart], Tensor]:
        """The full runs: where they began, and their pictures; kept in a file for the next time."""
        if self._file is not None and self._file.exists():
            case, starts, pictures = torch.load(
                self._file, map_location=self.host.pipe.device, weights_only=True
            )
            if case == self.journal.case:
                return [RunStart(**each) for each in starts], pictures
        host = self.host
        starts, pictures = record_starts(
            host.pipe, CallSet(self.calls, self.seed, host.batch, host.settings), self.steps
        )
        if self._file is not None:
            with writing(self._file) as draft:
                torch.save((self.journal.case, [vars(each) for each in starts], pictures), draft)
        return starts, pictures

    @property
    def _file(self) -> Path | None:
        path = self.journal.path
        return None if path is None else path.with_suffix(".runs.pt")

    @property
    def _fitted(self) -> int:
        """How many calls are fitted on: all but the last third, which decides."""
        return len(self.calls) * 2 // 3

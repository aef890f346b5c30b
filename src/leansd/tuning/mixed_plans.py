"""Mixes for the plans that a tuning found: fitted on calls of their own, kept where they help.

A call is a prompt with a fresh noise. Mixes have some hundred weights, so they need more calls than
the search; a third of these has no part in the fit and decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leansd.errors import LeansdError
from leansd.evaluation.fidelity import psnr
from leansd.evaluation.runs import PipelineCall, expand_calls
from leansd.plans.plan import Plan
from leansd.tuning.mix_fitting import FitState, MixConfig, MixFit
from leansd.tuning.pipeline_host import PipelineHost
from leansd.tuning.run_starts import RunStart, record_starts
from leansd.tuning.sampler_map import PlanMap, SamplerMap, explain_unfit, read_sampler
from leansd.tuning.trials import Journal

MOST_CALLS = 12
"""Plans with more UNet calls lose so little that weights fitted to few pictures gain nothing."""
FEWEST, FEWEST_PROMPTS = 24, 8
FRESH = 1_000_000
"""How far off the seeds of these calls are from those of the search."""
SAVED_EVERY = 5
"""Iterations."""

Say = Callable[[str], None]


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


@dataclass(eq=False)
class PlanMixer:
    """Fits mixes to plans of one pipeline; the full runs are made when they are first needed."""

    host: PipelineHost
    calls: Sequence[PipelineCall]
    """Those that mixes are fitted on, and the last third of them checked."""
    seed: int
    """Of the first of them."""
    steps: int
    """Of the full run."""
    journal: Journal
    config: MixConfig = field(default_factory=MixConfig)

    def improve(self, plan: Plan, say: Say) -> Plan | None:
        """The plan with mixes, where pictures that had no part in it are nearer by both means."""
        why = explain_unfit(plan)
        if len(plan.keys) > MOST_CALLS or why:
            return None
        known = self.journal.find_value(f"{plan.fingerprint} mixed")
        if known is None:
            mixed = self._fit(plan, say)
            verdict = self._is_nearer(mixed, plan)
            known = {"plan": mixed.to_dict(), "nearer": verdict}
            self.journal.note_value(f"{plan.fingerprint} mixed", known)
        say(f"mixes of {plan.name} {'help' if known['nearer'] else 'do not help'}")
        return Plan.from_dict(known["plan"]) if known["nearer"] else None

    def _fit(self, plan: Plan, say: Say) -> Plan:
        pipe = self.host.pipe
        sampler = read_sampler(pipe.scheduler, plan.steps)
        if not self._is_recorded:
            say(f"running {len(self.calls)} more calls in full to fit mixes on")
        fit = MixFit(
            pipe.unet,
            PlanMap.of(plan, sampler, self.host.anatomy),
            self._split(self._runs[0])[0],
            begin=sampler.begin / self._full.begin,
            config=self.config,
        )
        fit.spending = fit.plan_memory()
        say(f"fitting mixes of {plan.name}: {fit.spending}")
        key, state = f"{plan.fingerprint} mixing", None
        saved = self.journal.find_value(key)
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
                f"{left / 60:.0f} min left"
            )

        mixed = fit.run(state, watch)
        return replace(mixed, name=f"{plan.name}, mixed")

    @property
    def _is_recorded(self) -> bool:
        return "_runs" in vars(self) or (self._file is not None and self._file.exists())

    @cached_property
    def _full(self) -> SamplerMap:
        return read_sampler(self.host.pipe.scheduler, self.steps)

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
            host.pipe,
            self.calls,
            self.steps,
            seed=self.seed,
            batch=host.batch,
            settings=host.settings,
        )
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_suffix(".part")
            torch.save((self.journal.case, [vars(each) for each in starts], pictures), part)
            part.replace(self._file)
        return starts, pictures

    @property
    def _file(self) -> Path | None:
        path = self.journal.path
        return None if path is None else path.with_suffix(".runs.pt")

    def _split(self, every: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Two thirds to fit on, and the last third, which decides."""
        count = len(every) * 2 // 3
        return list(every[:count]), list(every[count:])

    def _is_nearer(self, mixed: Plan, plan: Plan) -> bool:
        """Whether both the mean of the pictures' dB and the dB of the mean error grow."""
        held = self._split(self.calls)[1]
        place = len(self.calls) - len(held)
        goals, ratios = self._runs[1][place:], list[Tensor]()
        for each in (mixed, plan):
            drawn, _ = self.host.draw(held, each.steps, each, seed=self.seed + place)
            ratios.append(psnr(drawn.pictures, goals).double())
        ours, theirs = ratios
        errors = [(10 ** (-each / 10)).mean() for each in ratios]
        return bool(ours.mean() > theirs.mean() and errors[0] < errors[1])

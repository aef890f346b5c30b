"""Tuning a pipeline: propose plans in the error model, try the best, let unseen calls decide.

1. The full run, at the step count asked for and at a few smaller ones, calibrates an error model;
   so does what key steps may run instead: other nets, GRI, guidance forecast.
2. Dynamic programming in it proposes key steps and forecasts for every speed, under measured time.
3. The best proposals run, their corrections fitted on the way; around the best of each speed, key
   steps are moved while that helps.
4. Calls that had no part in this help to decide between the best step counts, and say how close
   plans and plain runs of fewer steps are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from diffusers import UNet2DConditionModel

from leansd.errors import LeansdError
from leansd.evaluation.cost import CostModel
from leansd.evaluation.profile import profile
from leansd.evaluation.runs import PipelineCall, expand_calls
from leansd.plans.anatomy import WHOLE
from leansd.plans.compile import compile_plan
from leansd.plans.plan import Plan
from leansd.runtime.attachment import NO_NETS
from leansd.tuning.error_model import PROBES, Calibration, ErrorModel, calibrate
from leansd.tuning.front import Front, Point
from leansd.tuning.host import Host, PipelineHost, measure_whole_cost
from leansd.tuning.mix_fitting import MixConfig
from leansd.tuning.mixing import FRESH, PlanMixer, choose_mix_calls
from leansd.tuning.sampler_map import read_sampler
from leansd.tuning.space import (
    FEWER,
    FINALISTS,
    FULL,
    Candidate,
    Variant,
    list_noisy_regimes,
    list_regimes,
    list_variants,
    measure_deviation,
    propose,
)
from leansd.tuning.trials import Journal, Trial, TrialRunner, polish, try_plan

FEWEST_CALLS = 4
SPEEDS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0)
GRIDS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3)
"""Step counts that plans are sought for, as shares of the full run's."""


REGIMES = 4
"""About how many there are."""
MIXING = 45
"""About how many runs of the calls the mixes of a plan take."""
POLISHING = 8
"""About how many runs it takes to fit all corrections of a plan together."""

Tell: TypeAlias = Callable[[str, float], None]
"""Told in a few words what goes on, and the share of the work that is done."""


@dataclass
class Progress:
    """Counts runs of the calls; how many a speed will take is known only after it."""

    tell: Tell
    tries: int
    speeds: int
    grids: int
    mixes: bool = False
    done: float = 0.0

    @property
    def _first(self) -> int:
        # Profiling counts as two runs, the held-out full run as one.
        return 2 + len(PROBES) + self.grids + 1

    @property
    def _each(self) -> int:
        tried = self.grids + (REGIMES - 1) * FEWER + self.tries
        return tried + FINALISTS * (POLISHING + 1) + 1 + (MIXING if self.mixes else 0)

    def add(self, text: str, runs: float = 1) -> None:
        self.done += runs
        self._say(text)

    def end_speed(self, place: int) -> None:
        self.done = self._first + (place + 1) * self._each
        self._say("next speed" if place + 1 < self.speeds else "done")

    def _say(self, text: str) -> None:
        self.tell(text, min(1.0, self.done / (self._first + self.speeds * self._each)))


@dataclass(frozen=True)
class TuneConfig:
    """How plans are sought; see `tune` for what each is."""

    steps: int = 30
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    speeds: Sequence[float] = SPEEDS
    grids: Sequence[float] = GRIDS
    speedup: float | None = None
    ms: float | None = None
    tries: int = 6
    seed: int = 0
    batch: int = 8
    nets: Mapping[str, UNet2DConditionModel] = field(
        default_factory=dict[str, UNet2DConditionModel]
    )
    attend: Sequence[str] = ()

    def __post_init__(self) -> None:
        slow = [speed for speed in (*self.speeds, self.speedup) if speed is not None and speed <= 1]
        if slow:
            raise LeansdError(
                f"a plan {slow[0]:g} times as fast is no gain: give a speed-up above 1"
            )
        if self.ms is not None and not self.ms > 0:
            raise LeansdError(f"a call of {self.ms:g} ms: give a number of milliseconds above 0")
        if self.tries < 0:
            raise LeansdError(f"{self.tries} tries: give 0 or more")

    @property
    def counts(self) -> list[int]:
        """The step counts that plans may have, the full run's first."""
        return sorted(
            {self.steps, *(max(2, round(share * self.steps)) for share in self.grids)}, reverse=True
        )

    @property
    def wanted_speeds(self) -> int:
        return len(self.speeds) + (self.speedup is not None) + (self.ms is not None)


def tune(
    pipe: Any,
    calls: Sequence[PipelineCall],
    *,
    steps: int = 30,
    held_out: Sequence[PipelineCall] | None = None,
    settings: Mapping[str, Any] | None = None,
    speeds: Sequence[float] = SPEEDS,
    grids: Sequence[float] = GRIDS,
    speedup: float | None = None,
    ms: float | None = None,
    tries: int = 6,
    seed: int = 0,
    batch: int = 8,
    nets: Mapping[str, UNet2DConditionModel] = NO_NETS,
    attend: Sequence[str] = (),
    mixes: int | Sequence[PipelineCall] = 0,
    cost: CostModel | None = None,
    sampler: str = "",
    journal: str | Path | None = None,
    tell: Tell = lambda text, share: None,
) -> Front:
    """Find plans for the pipeline with its present scheduler.

    Errors are taken to be linear in the UNet's outputs, as schedulers are; corrections compare with
    UniPC (arXiv 2302.04867). What the error model proposes, runs decide.

    Args:
        calls: prompts, or dicts of pipeline arguments; each gives one picture. The pipeline may
            have a transformer in the place of a UNet: then plans are of whole steps.
        steps: of the full run that plans are to be like.
        held_out: calls that decide; by default every third of `calls`, which are then not tuned on.
        settings: arguments that all calls share, such as `guidance_scale`.
        speeds: how many times faster than the full run plans are sought for.
        grids: step counts that plans may have, as shares of the full run's.
        speedup: one more speed, the one that is wanted.
        ms: milliseconds of the whole call that are wanted; one more speed as well.
        tries: moves of key steps that are tried for each speed.
        seed: of the first picture.
        batch: pictures drawn at once.
        nets: UNets by name that plans may switch to.
        attend: self-attentions, addresses or globs, that plans may compute by GRI.
        mixes: further calls, each with a fresh noise, on which mixes of plans with few UNet calls
            are fitted (`leansd.tuning.mixing`); a number takes the calls tuned on in turns.
            200 to 320 make good ones; 0 fits none.
        cost: of `leansd.profile`, with `attend` and with the nets' own in `nets`; measured here by
            default.
        sampler: its name in the front; the scheduler's class by default.
        journal: a file that remembers every plan tried, so that a stopped tuning goes on.
        tell: told in a few words what goes on, and the share of the work that is done.

    Raises:
        LeansdError: there are too few calls, the sampler cannot be tuned for, or what is wanted
            cannot be reached by any plan.
    """
    fitted, checked = split_calls(calls, held_out)
    further = choose_mix_calls(mixes, fitted)
    config = TuneConfig(
        steps, dict(settings or {}), speeds, grids, speedup, ms, tries, seed, batch, nets, attend
    )
    host = PipelineHost(pipe, batch, config.settings, nets, sampler)
    if host.respond(steps).denoising is not None:
        # Fewer steps draw other noises, and so other pictures.
        config = replace(config, grids=(1.0,))
    progress = Progress(tell, tries, config.wanted_speeds, len(grids), bool(further))
    case = {
        **host.describe(),
        "steps": steps,
        "seed": seed,
        "calls": expand_calls(fitted),
        "held out": expand_calls(checked),
        "attend": list(attend),
    }
    known = Journal.open(journal, case)
    mixer = None
    if further and host.anatomy is WHOLE:
        raise LeansdError("mixes are fitted through a UNet: tune a transformer without")
    if further:
        read_sampler(pipe.scheduler, steps)
        own = Journal.open(journal, {"case": known.case, "mixes": expand_calls(further)})
        mixer = PlanMixer(host, further, seed + FRESH, steps, own, MixConfig(seed=seed))
    cost = _measure_costs(host, config, fitted, cost or known.cost, known, progress)
    return tune_host(Tuning(host, config, fitted, checked, cost, known, progress, mixer))


@dataclass(frozen=True)
class Tuning:
    """All that a search for plans goes by."""

    host: Host
    config: TuneConfig
    fitted: Sequence[PipelineCall]
    """The calls that plans are tuned on."""
    checked: Sequence[PipelineCall]
    """The calls that decide."""
    cost: CostModel
    """What a call costs there."""
    journal: Journal
    progress: Progress
    mixer: PlanMixer | None = None
    """Fits mixes to plans with few calls."""


def tune_host(tuning: Tuning) -> Front:
    """Find plans for whatever draws."""
    host, config = tuning.host, tuning.config
    tuner = _Tuner.prepare(tuning)
    points: list[Point] = []
    every = sorted({*config.speeds, *tuner.list_goals()})
    for place, candidates in enumerate(tuner.propose(every)):
        points += tuner.seek(every[place], candidates)
        tuning.progress.end_speed(place)
    return Front.of(host.tuned.unet, host.tuned.sampler, config.steps, points)


def _measure_costs(
    host: PipelineHost,
    config: TuneConfig,
    calls: Sequence[PipelineCall],
    cost: CostModel | None,
    journal: Journal,
    progress: Progress,
) -> CostModel:
    """What the pipeline costs here, and each net in its UNet's place, where that is not known."""
    pipe = host.pipe
    example = {**expand_calls(calls)[0], **config.settings}
    pictures = min(config.batch, len(calls))
    if cost is None and host.anatomy is WHOLE:
        progress.add("timing a run", 0)
        cost = measure_whole_cost(host, calls, config.steps)
        journal.note_cost(cost, pipe.device)
    elif cost is None:
        progress.add("profiling", 0)
        cost = profile(pipe, call=example, pictures=pictures, attend=config.attend)
        journal.note_cost(cost, pipe.device)
    for name in (name for name in config.nets if name not in cost.nets):
        other = copy.copy(pipe)
        other.unet = config.nets[name]
        own = profile(other, call=example, pictures=pictures)
        journal.note_cost(own, pipe.device, name)
        cost = replace(cost, nets={**cost.nets, name: own})
    progress.add("profiled", 2)
    return cost


def _pick_finalists(
    tried: Sequence[tuple[Trial, Candidate]],
) -> list[tuple[Trial, Candidate]]:
    """The best of the best step counts, best first.

    The more steps a plan has, the more closely it is fitted to the calls that it is tuned on.
    """
    best: dict[int, tuple[Trial, Candidate]] = {}
    for each in sorted(tried, key=lambda each: -each[0].psnr):
        best.setdefault(each[0].plan.steps, each)
    return list(best.values())[:FINALISTS]


def split_calls(
    calls: Sequence[PipelineCall], held_out: Sequence[PipelineCall] | None
) -> tuple[list[PipelineCall], list[PipelineCall]]:
    """The calls to tune on and those that decide."""
    if held_out is not None:
        if not calls or not held_out:
            raise LeansdError("give at least one call to tune on and one held out")
        return list(calls), list(held_out)
    if len(calls) < FEWEST_CALLS:
        raise LeansdError(
            f"{len(calls)} calls are too few to tune on some and check on others: give at least "
            f"{FEWEST_CALLS}; 16 make a good start"
        )
    return (
        [call for place, call in enumerate(calls) if place % 3 != 2],
        [call for place, call in enumerate(calls) if place % 3 == 2],
    )


@dataclass(frozen=True, kw_only=True)
class _Tuner(Tuning):
    variants: tuple[Variant, ...]
    fit: TrialRunner
    check: TrialRunner
    calibrations: list[Calibration]
    """The full run of every step count, that of all steps first."""

    @classmethod
    def prepare(cls, tuning: Tuning) -> _Tuner:
        """Calibrate on the full run of every step count."""
        host, config, progress = tuning.host, tuning.config, tuning.progress
        variants = (FULL,)
        if host.respond(config.steps).denoising is None:
            variants = list_variants(tuning.cost, host.anatomy, host.nets, config.attend)
        check = TrialRunner(host, tuning.checked, config.seed + 10_000)
        calibrations: list[Calibration] = []
        for count in config.counts:
            main = calibrations[0] if calibrations else None
            found = calibrate(host, tuning.fitted, count, seed=config.seed, like=main)
            calibrations.append(found)
            progress.add(f"ran {count} steps in full", 1 if main else 1 + len(PROBES))
        fit = TrialRunner(host, tuning.fitted, config.seed, calibrations[0].finals)
        check = replace(check, goals=check.run(config.steps).require_finite())
        progress.add("ran the held-out calls in full")
        return cls(
            **vars(tuning), variants=variants, fit=fit, check=check, calibrations=calibrations
        )

    def propose(self, speeds: Sequence[float]) -> list[list[Candidate]]:
        """What to try for each speed."""
        if self.calibrations[0].adds_noise:
            regimes = list_noisy_regimes(self.cost, self.host.anatomy)
        else:
            regimes = list_regimes(self.cost, self.host.anatomy, self.variants)
        whole = self.cost.predict_full_run(self.calibrations[0].count)

        def tell(text: str) -> None:
            self.progress.add(text, 0)

        return propose(self._build_models(), regimes, self.cost, whole, speeds, tell)

    def _build_models(self) -> list[ErrorModel]:
        """Measure what key steps may run instead of the whole UNet, at every step count."""
        goal = self.calibrations[0].finals.latents.double()
        forecasts = [place for place, each in enumerate(self.variants) if each.forecasts]
        models: list[ErrorModel] = []
        for calibration in self.calibrations:
            error = float((calibration.finals.latents.double() - goal).square().mean())
            wrong = [measure_deviation(each, self.fit, calibration) for each in self.variants[1:]]
            if wrong:
                ways = f"{len(wrong)} cheaper ways" if len(wrong) > 1 else self.variants[1].name
                self.progress.add(f"ran {calibration.steps} steps by {ways}", 0)
            models.append(ErrorModel.of(calibration, wrong, forecasts, error))
        return models

    def list_goals(self) -> list[float]:
        """What is wanted as speeds, where any run is so fast."""
        count, ms = self.calibrations[0].count, self.config.ms
        whole, least = self.cost.predict_full_run(count), self.cost.predict_full_run(1)
        speeds = self.config.speedup, None if ms is None else whole * 1000 / ms
        wanted = [speed for speed in speeds if speed is not None]
        for speed in wanted:
            if speed > whole / least:
                raise LeansdError(
                    f"{speed:.2f}x, {whole / speed * 1000:.0f} ms, cannot be reached: a single "
                    f"UNet call and what no plan touches take {least * 1000:.0f} ms, "
                    f"{whole / least:.2f}x"
                )
        return [speed for speed in wanted if speed > 1]

    # -- one speed ---------------------------------------------------------------------------

    def seek(self, speed: float, candidates: Sequence[Candidate]) -> list[Point]:
        """The best plan found for a speed, and the plain run of as many steps as it allows."""
        tried = [(self._try(each), each) for each in candidates]
        points = [
            self._check(Plan.full(count, name=f"{count} steps"))
            for count in self._list_plain(speed)
        ]
        finals: list[tuple[float, Point]] = []
        for place, (trial, candidate) in enumerate(_pick_finalists(tried)):
            trial = trial if place else self._improve(trial, candidate)
            trial = self._polish(trial)
            tuned = self._find_calibration(trial.plan.steps).describe_levels(self.host.tuned)
            point = self._check(replace(trial.plan, name=f"tuned {speed:.3g}x", tuned=tuned))
            # Over all calls: the held-out ones alone are too few to tell near plans apart.
            ours, theirs = len(self.fit.calls), len(self.check.calls)
            finals.append((ours * trial.psnr + theirs * point.psnr, point))
        if finals:
            best = max(finals, key=lambda each: each[0])[1]
            points.append(best)
            if self.mixer is not None:
                mixed = self.mixer.improve(
                    best.plan, lambda text, share: self.progress.add(text, MIXING * share)
                )
                points += [] if mixed is None else [self._check(mixed)]
        return points

    def _find_calibration(self, steps: int) -> Calibration:
        return next(each for each in self.calibrations if each.steps == steps)

    def _list_plain(self, speed: float) -> list[int]:
        """The most steps of a plain run that is so fast."""
        full = self.calibrations[0]
        left = self.cost.predict_full_run(full.count) / speed - self.cost.overhead_per_run
        calls = left / (self.cost.per_step + self.cost.full_call)
        count = int(calls * full.steps / full.count + 0.02)
        return [count] if count >= 1 else []

    def _count_calls(self, steps: int) -> int:
        """UNet calls of a run: image-to-image makes fewer than it has steps."""
        full = self.calibrations[0]
        known = {each.steps: each.count for each in self.calibrations}
        return known.get(steps, max(1, full.count * steps // full.steps))

    def _try(self, candidate: Candidate) -> Trial:
        plan = candidate.build()
        known = self.journal.find(plan)
        if known is not None:
            return known
        trial = try_plan(plan, self.fit, candidate.model.calibration)
        self.journal.note(plan, trial)
        self.progress.add(f"{plan.steps} steps, {len(plan.keys)} in full: {trial.psnr:.2f} dB")
        return trial

    def _improve(self, trial: Trial, candidate: Candidate) -> Trial:
        """Try neighbours, the most promising in the model first, and go on from any better one."""
        left, tried = self.config.tries, {candidate.proposal.segments}
        while left > 0:
            ranked = sorted(
                (
                    each
                    for each in candidate.list_neighbours()
                    if each.proposal.segments not in tried
                ),
                key=lambda each: each.error,
            )
            if not ranked:
                break
            for neighbour in ranked[:left]:
                left -= 1
                tried.add(neighbour.proposal.segments)
                other = self._try(neighbour)
                if other.psnr > trial.psnr:
                    trial, candidate = other, neighbour
                    break
            else:
                break
        return trial

    def _polish(self, trial: Trial) -> Trial:
        known = self.journal.find(trial.plan, "polished")
        if known is None:
            known = polish(trial, self.fit, self._find_calibration(trial.plan.steps))
            self.journal.note(trial.plan, known, "polished")
        self.progress.add(f"corrections fitted together: {known.psnr:.2f} dB", POLISHING)
        return known

    def _check(self, plan: Plan) -> Point:
        """A plan on the held-out calls."""
        known = self.journal.find(plan, "held out")
        if known is None:
            known = Trial(plan, self.check.score(self.check.run(plan.steps, plan)))
            self.journal.note(plan, known, "held out")
        self.progress.add(f"held out: {plan.name} {known.psnr:.2f} dB")
        start = plan.steps - self._count_calls(plan.steps)
        program = compile_plan(plan, self.host.anatomy, nets=self.host.nets, start=start)
        seconds = self.cost.predict_run(program)
        whole = self.cost.predict_full_run(self.calibrations[0].count)
        return Point(plan, whole / seconds, seconds * 1000, known.psnr)

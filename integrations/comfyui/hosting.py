"""ComfyUI's samplers as a host of tunings, and what Lean Tune makes of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leansd.core import Sample, adds_noise, list_log_snr, measure_response, probe_calls
from leansd.errors import LeansdError
from leansd.evaluation.cost import CostModel
from leansd.evaluation.runs import PipelineCall, RunOutputs
from leansd.plans.anatomy import HEAD, WHOLE
from leansd.plans.plan import Plan, Tuned
from leansd.tuning.front import Front
from leansd.tuning.host import Course, SchedulerRun, Seen, Steer
from leansd.tuning.trials import Journal
from leansd.tuning.tuner import Progress, Tell, TuneConfig, Tuning, split_calls, tune_host

from .choosing import PlanChoice, bind_sampler, find_prediction, name_sampler
from .playing import PlanOnModel, RunReport

Draw = Callable[[Any, int, torch.Tensor], torch.Tensor]
"""`(model, seed, sigmas)` -> the latents [B, C, H, W] of one run."""
Decode = Callable[[torch.Tensor], torch.Tensor]
"""Pictures [B, 3, H, W] from 0 to 1 of latents [B, C, H, W]."""
TAP = "leansd_tap"
"""Key of the wrappers that watch."""


def show_latents(latents: torch.Tensor) -> torch.Tensor:
    """Where there is no decoder: the channels of latents [B, C, H, W], one below the other."""
    grey = (latents.float() / 8 + 0.5).clamp(0, 1).flatten(1, -2)
    return grey[:, None].expand(-1, 3, -1, -1)


@dataclass
class _Tap:
    """Watches one run at its sampler's side, and steers it."""

    steer: Callable[[int, Seen], torch.Tensor] | None = None
    samples: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    """The latents [B, C, H, W] that each call was made with, and those at the end."""
    outputs: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    """What each call gave: guided noise, or flow."""
    sigmas: list[float] = field(default_factory=list[float])

    def attach(self, model: Any) -> Any:
        clone = model.clone()
        for kind, wrapper in (("sampler_sample", self.wrap_run), ("predict_noise", self.wrap_call)):
            clone.remove_wrappers_with_key(kind, TAP)
            clone.add_wrapper_with_key(kind, TAP, wrapper)
        return clone

    def wrap_run(self, executor: Any, *args: Any, **options: Any) -> Any:
        last = executor(*args, **options)
        self.samples.append(last.detach().float().clone())
        return last

    def wrap_call(self, executor: Any, x: Any, sigma: Any, *args: Any) -> Any:
        here = float(sigma.reshape(-1)[0])
        denoised = executor(x, sigma, *args)
        output = (x - denoised) / here
        if self.steer is not None:
            output = self.steer(len(self.outputs), Seen(here, x, output, x))
            denoised = x - here * output
        self.samples.append(x.detach().float().clone())
        self.outputs.append(output.detach().float().clone())
        self.sigmas.append(here)
        return denoised

    def list_seen(self) -> SchedulerRun:
        return [
            Seen(sigma, sample, output, previous)
            for sigma, sample, output, previous in zip(
                self.sigmas, self.samples[:-1], self.outputs, self.samples[1:], strict=True
            )
        ]


class SamplerHost:
    """A model with conditionings and a sampler of ComfyUI; a call is a run from one seed.

    A sampler's own noise is that of the run's seed, so it is the same in every run of a call.
    """

    anatomy = WHOLE
    nets: dict[str, Any] = {}  # noqa: RUF012 - a host of one net

    def __init__(
        self,
        model: Any,
        sampler: Any,
        sigmas: torch.Tensor,
        cfg: float,
        draw: Draw,
        *,
        digest: str,
        request: str = "",
        decode: Decode = show_latents,
        thin_out: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ) -> None:
        """Args:
        digest: of the model's weights.
        request: a digest of what is drawn: conditionings, latents, what else is on the model.
        thin_out: makes a schedule of fewer steps, for plain runs of them.
        """
        self._model, self._draw, self._decode = model, draw, decode
        self._sampler, self._sigmas, self._thin_out = sampler, sigmas, thin_out
        self._request = request
        self.steps = len(sigmas) - 1
        prediction = find_prediction(model.get_model_object("model_sampling"))
        levels = list_log_snr([float(each) for each in sigmas[:-1].tolist()], prediction)
        rounded = tuple(round(level, 4) for level in levels)
        self.tuned = Tuned(name_sampler(sampler), digest, cfg, rounded)
        self._bases: dict[tuple[int, int], list[torch.Tensor]] = {}
        """By steps and seed: the latents after each call, less what outputs make of them."""
        self._courses: dict[int, Course] = {}

    def describe(self) -> dict[str, Any]:
        told = {"sampler": self.tuned.sampler, "unet": self.tuned.unet, "cfg": self.tuned.guidance}
        told |= {"request": self._request, "latents": self._decode is show_latents}
        return {**told, "sigmas": self._sigmas.tolist()}

    def respond(self, steps: int, calls: int | None = None) -> Course:
        if steps not in self._courses:
            sigmas = [float(each) for each in self._lay_out(steps).tolist()]
            sample = bind_sampler(self._model, self._sampler)
            found = probe_calls(sample, sigmas) if sample is not None else ()
            if sample is None or len(found) != steps:
                raise LeansdError(
                    f"{self.tuned.sampler} calls the model {len(found) or 'an unknown number of'} "
                    f"times in {steps} steps: tuning is for samplers with one call a step"
                )
            if _asks_for_parts(sample, sigmas):
                raise LeansdError(
                    f"{self.tuned.sampler} steps along the unconditional part of the model's "
                    "output, too, which tuning does not follow: take the sampler without cfg_pp"
                )
            prediction = find_prediction(self._model.get_model_object("model_sampling"))
            log_snr = torch.tensor(list_log_snr(found, prediction)).double().numpy()
            response = measure_response(sample, sigmas).numpy()
            # What the tap takes for outputs says what they are of: latents - sigma * output.
            weights = np.array([(1.0, -sigma) for sigma in found])
            noisy = adds_noise(sample, sigmas)
            self._courses[steps] = Course(steps, log_snr, response, weights if noisy else None)
        return self._courses[steps]

    def draw(
        self,
        calls: Sequence[PipelineCall],
        steps: int,
        plan: Plan | None = None,
        *,
        seed: int,
        steer: Steer | None = None,
    ) -> tuple[RunOutputs, list[SchedulerRun]]:
        runs: list[SchedulerRun] = []
        latents: list[torch.Tensor] = []
        pictures: list[torch.Tensor] = []
        seconds: list[float] = []
        for place in range(len(calls)):
            last, run, report = self._draw_one(steps, plan, seed + place, place, steer)
            runs.append(run)
            latents.append(last.float().cpu())
            pictures.append(self._decode(last).float().cpu())
            seconds.append(report.seconds)
        ends = RunOutputs(torch.cat(latents), torch.cat(pictures), tuple(seconds))
        return ends, runs

    def _draw_one(
        self, steps: int, plan: Plan | None, seed: int, place: int, steer: Steer | None
    ) -> tuple[torch.Tensor, SchedulerRun, RunReport]:
        tap, lean = _Tap(), PlanOnModel(PlanChoice(plan or Plan.full(steps), "compute in full"))
        if steer is not None:
            tap.steer = self._make_steer(tap, steps, seed, place, steer)
        last = self._draw(tap.attach(lean.attach(self._model)), seed, self._lay_out(steps))
        assert lean.last is not None
        if lean.last.full:
            raise LeansdError(f"plans cannot be tried here: {lean.last.full}")
        run = tap.list_seen()
        if steer is None and plan is None:
            self._bases[steps, seed] = self._find_bases(steps, run)
        return last, run, lean.last

    def _make_steer(
        self, tap: _Tap, steps: int, seed: int, place: int, steer: Steer
    ) -> Callable[[int, Seen], torch.Tensor]:
        response = self.respond(steps).response

        def go_on(index: int, seen: Seen) -> torch.Tensor:
            def foresee(other: torch.Tensor) -> torch.Tensor:
                """What the sampler will make of an output: its answer is linear and known."""
                row = response[index + 1]
                outputs = [*tap.outputs, other]
                made = sum(float(row[at]) * each for at, each in enumerate(outputs))
                return self._bases[steps, seed][index] + made

            return steer(place, index, seen, foresee)

        return go_on

    def _find_bases(self, steps: int, run: SchedulerRun) -> list[torch.Tensor]:
        response = self.respond(steps).response
        return [
            seen.previous
            - sum(float(response[index + 1][at]) * run[at].output for at in range(index + 1))
            for index, seen in enumerate(run)
        ]

    def _lay_out(self, steps: int) -> torch.Tensor:
        if steps == self.steps:
            return self._sigmas
        if self._thin_out is None:
            raise LeansdError(f"the sigmas are of {self.steps} steps, not {steps}")
        return self._thin_out(self._sigmas, steps)

    def measure_cost(self, seed: int = 0) -> CostModel:
        """What a call that runs the model takes here, and one that is forecast."""
        half = Plan.full(self.steps).inherit(HEAD, at=range(1, self.steps, 2), how="reuse")
        _, _, report = self._draw_one(self.steps, half, seed, 0, None)
        computed = report.whole_seconds / max(report.computed, 1)
        spared = max(report.calls - report.computed, 1)
        nothing = max(report.seconds - report.whole_seconds, 1e-6) / spared
        return CostModel.of_whole_calls(
            self.tuned.unet, pictures=1, size=(0, 0), computed=computed, forecast=nothing
        )


def _asks_for_parts(sample: Sample, sigmas: Sequence[float]) -> bool:
    """Whether a sampler looks at the halves of a guided output by themselves."""
    found: list[Any] = []

    def denoise(x: torch.Tensor, sigma: torch.Tensor, asked: Sequence[Any] = ()) -> torch.Tensor:
        found.extend(asked)
        return torch.zeros_like(x)

    sample(denoise, torch.zeros(1, 1, 1, 1), torch.tensor(list(sigmas)))
    return bool(found)


@dataclass(frozen=True)
class TuneWish:
    """What a user wants of a tuning."""

    speed: float = 2.0
    """How many times faster sampling is to be; of several speeds where `least_psnr` decides."""
    least_psnr: float = 0.0
    """dB to the full run that the plan must keep; 0 where the speed decides."""
    seeds: int = 6
    """Runs that plans are tuned and judged on."""
    tries: int = 4
    """Moves of computed steps that are tried."""
    seed: int = 0

    @property
    def speeds(self) -> tuple[float, ...]:
        return (self.speed,) if not self.least_psnr else (1.25, 1.5, 2.0, 2.5, 3.0)


def tune_sampler(
    host: SamplerHost, wish: TuneWish, journal: str | Path | None, tell: Tell
) -> tuple[Plan, Front]:
    """The plan that meets a wish, and the front that it is from.

    Args:
        journal: a file of what was tried, so that a stopped tuning goes on.

    Raises:
        LeansdError: the sampler cannot be tuned for, or no plan meets the wish.
    """
    front = find_front(host, wish, wish.speeds, journal, tell)
    if wish.least_psnr:
        return front.at(psnr=wish.least_psnr), front
    return find_fastest(front, wish.speed), front


def find_front(
    host: SamplerHost,
    wish: TuneWish,
    speeds: Sequence[float],
    journal: str | Path | None,
    tell: Tell,
) -> Front:
    """The best plans for some speeds.

    Raises:
        LeansdError: the sampler cannot be tuned for.
    """
    host.respond(host.steps)
    config = TuneConfig(
        steps=host.steps, speeds=speeds, grids=(1.0,), tries=wish.tries, seed=wish.seed
    )
    fitted, checked = split_calls([f"seed {place}" for place in range(wish.seeds)], None)
    facts = {**host.describe(), "seeds": wish.seeds, "seed": wish.seed}
    progress = Progress(tell, wish.tries, len(speeds), 1)
    known = Journal.open(journal, facts)
    cost = host.measure_cost(wish.seed)
    return tune_host(Tuning(host, config, fitted, checked, cost, known, progress))


def find_fastest(front: Front, speed: float) -> Plan:
    """The plan of a front for a speed that was sought, also where fewer steps are as near.

    Raises:
        LeansdError: there is none.
    """
    lean = [each for each in (*front.points, *front.dominated) if not each.is_plain]
    named = [each.plan for each in lean if each.plan.name == f"tuned {speed:.3g}x"]
    if not named:
        raise LeansdError(f"no plan is {speed:g} times as fast: the model's own calls are too few")
    return named[0]

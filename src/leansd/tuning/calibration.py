"""Calibration: what a sampler's full run says about every plan of the same run.

A scheduler is linear in the UNet's outputs, with the same few numbers for every pixel. So where a
plan replaces outputs by combinations of earlier ones, what that does to the latents is a linear
combination of the full run's outputs, and its size follows from their inner products: an n by n
matrix for n steps, whatever the pictures' size. No plan has to be run to be judged in this model.

What the model leaves out is that the UNet answers to the changed latents; how much a disturbance
at some step still matters at the end is therefore measured (`error_gain`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from leansd.evaluation.runs import PipelineCall, RunOutputs
from leansd.tuning.host import Host
from leansd.tuning.scheduler_hook import SchedulerRun, Seen, Steer, Step

Draw: TypeAlias = Callable[[Steer | None], tuple[RunOutputs, list[SchedulerRun]]]
"""Draws the calls, steered or not."""

PROBES = (0.1, 0.35, 0.6, 0.85)
"""Where in a run disturbances are tried, as shares of its steps."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """The full run of some calls, seen from the scheduler's side.

    Shapes: n UNet calls.
    """

    steps: int
    """Step count of the sampler; image-to-image makes fewer calls than that."""
    log_snr: np.ndarray
    """At every call, [n]."""
    products: np.ndarray
    """Mean products of the guided outputs of every two calls, [n, n]."""
    response: np.ndarray
    """[n + 1, n]: how much of the output of call j is in the sample before call k."""
    error_gain: np.ndarray
    """[n + 1]: squared error in the final latents for each squared error before call k."""
    runs: tuple[SchedulerRun, ...]
    finals: RunOutputs

    @property
    def outputs(self) -> np.ndarray:
        """The guided outputs of every call, of all runs together, [n, numbers]."""
        return stack_outputs(self.runs)

    @property
    def count(self) -> int:
        """UNet calls of a run."""
        return len(self.log_snr)


def calibrate(
    host: Host,
    calls: Sequence[PipelineCall],
    steps: int,
    *,
    seed: int,
    like: Calibration | None = None,
) -> Calibration:
    """Run the calls in full, and see.

    Args:
        like: a calibration at another step count whose `error_gain` serves here, too.

    Raises:
        LeansdError: the sampler calls the UNet more than once a step, or adds noise of its own.
    """
    host.respond(steps)

    def draw(steer: Steer | None = None) -> tuple[RunOutputs, list[SchedulerRun]]:
        return host.draw(calls, steps, seed=seed, steer=steer)

    finals, runs = draw()
    finals.require_finite()
    course = host.respond(steps, len(runs[0]))
    error_gain = (
        _measure_error_gain(runs, draw)
        if like is None
        else _borrow_error_gain(like, course.log_snr)
    )
    outputs = stack_outputs(runs)
    products = outputs @ outputs.T / outputs.shape[1]
    return Calibration(
        steps=course.steps,
        log_snr=course.log_snr,
        products=products,
        response=course.response,
        error_gain=error_gain,
        runs=tuple(runs),
        finals=finals,
    )


def stack_outputs(runs: Sequence[SchedulerRun]) -> np.ndarray:
    """The guided outputs of every call, of all runs together, [n, numbers], double precision."""
    outputs = [
        torch.cat([run[place].output.flatten() for run in runs]) for place in range(len(runs[0]))
    ]
    return torch.stack(outputs).cpu().double().numpy()


def _borrow_error_gain(like: Calibration, log_snr: np.ndarray) -> np.ndarray:
    """Another calibration's error_gain at these places in log-SNR, [n + 1]."""
    inside = np.interp(log_snr, like.log_snr, like.error_gain[:-1])
    return np.append(inside, 1.0)


def _measure_error_gain(runs: Sequence[SchedulerRun], draw: Draw) -> np.ndarray:
    """How squared errors in the sample before each call grow or shrink till the end, [n + 1].

    At a few steps the run's output is replaced by the one before, which is the kind of error that
    plans make; between them the logarithm is interpolated.
    """
    count = len(runs[0])
    places = sorted({max(1, round(share * (count - 1))) for share in PROBES})
    known: dict[int, float] = {}
    for place in places:
        disturbed: list[float] = []
        arrived: list[float] = []
        for mine, reference in zip(_disturb(place, draw), runs, strict=True):
            at = min(place + 1, count - 1)
            disturbed.append(_square(mine[at].sample - reference[at].sample))
            arrived.append(_square(mine[-1].previous - reference[-1].previous))
        known[place + 1] = sum(arrived) / max(sum(disturbed), 1e-30)
    logs = np.interp(np.arange(count + 1), [*known, count], [*np.log(list(known.values())), 0.0])
    return np.exp(logs)


def _disturb(place: int, draw: Draw) -> list[SchedulerRun]:
    """Runs whose output at one step is that of the step before."""
    before: list[torch.Tensor] = []

    def steer(run: int, index: int, seen: Seen, step: Step) -> torch.Tensor:
        if index == place:
            return before[-1]
        before[:] = [seen.output]
        return seen.output

    return draw(steer)[1]


def _square(difference: torch.Tensor) -> float:
    return float(difference.cpu().double().square().sum())

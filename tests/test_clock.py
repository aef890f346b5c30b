"""The clock on real schedulers: every UNet call is placed without reading its time step."""

from typing import Any

import diffusers
import pytest
import torch

from leansd.core.schedule import assign_rows
from leansd.runtime.clock import SchedulerClock, find_in_storage, read_schedule

STEPS = 10
OPTIONS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Sampler -> (options, rows of its UNet calls).
ONE_EACH = tuple(range(STEPS))
TWO_EACH = tuple(call // 2 for call in range(2 * STEPS - 1))
SAMPLERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "DDIMScheduler": ({}, ONE_EACH),
    "DDPMScheduler": ({}, ONE_EACH),
    "PNDMScheduler": ({"skip_prk_steps": True}, (0, *ONE_EACH)),
    "LMSDiscreteScheduler": ({}, ONE_EACH),
    "EulerDiscreteScheduler": ({"use_karras_sigmas": True}, ONE_EACH),
    "EulerAncestralDiscreteScheduler": ({}, ONE_EACH),
    "HeunDiscreteScheduler": ({}, TWO_EACH),
    "KDPM2DiscreteScheduler": ({}, TWO_EACH),
    "KDPM2AncestralDiscreteScheduler": ({}, TWO_EACH),
    "DPMSolverMultistepScheduler": ({"use_karras_sigmas": True}, ONE_EACH),
    "DPMSolverSinglestepScheduler": ({}, ONE_EACH),
    "UniPCMultistepScheduler": ({}, ONE_EACH),
    "DEISMultistepScheduler": ({}, ONE_EACH),
    "LCMScheduler": ({}, ONE_EACH),
}


class Pipe:
    def __init__(self, name: str) -> None:
        options, self.rows = SAMPLERS[name]
        self.scheduler = getattr(diffusers, name)(**OPTIONS, **options)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_call_is_placed(name: str) -> None:
    pipe = Pipe(name)
    clock = SchedulerClock(pipe)
    for _ in range(2):
        pipe.scheduler.set_timesteps(STEPS)
        ticks = [clock.locate(t) for t in pipe.scheduler.timesteps]
        assert [tick.index for tick in ticks if tick] == list(range(len(pipe.rows)))
        assert [tick.starts for tick in ticks if tick] == [True] + [False] * (len(pipe.rows) - 1)
        course = ticks[0].schedule if ticks[0] else None
        assert course is not None
        assert course.rows == pipe.rows
        assert course.steps == STEPS
        rising = [course.log_snr[i + 1] - course.log_snr[i] for i in range(len(pipe.rows) - 1)]
        # KDPM2's inner steps go to and fro; all others only ever forward.
        assert name.startswith("KDPM2") or min(rising) >= 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_late_start_is_seen(name: str) -> None:
    """Image-to-image hands over the tail of the time steps."""
    pipe = Pipe(name)
    clock = SchedulerClock(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    begin = 4 * getattr(pipe.scheduler, "order", 1)
    first = clock.locate(next(iter(pipe.scheduler.timesteps[begin:])))
    assert first is not None
    assert (first.index, first.starts) == (begin, True)


def test_time_steps_that_are_no_views_are_found_by_value() -> None:
    pipe = Pipe("HeunDiscreteScheduler")
    clock = SchedulerClock(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    values = pipe.scheduler.timesteps.tolist()
    assert [tick.index for tick in map(clock.locate, values) if tick] == list(range(2 * STEPS - 1))
    clones = [t.clone() for t in pipe.scheduler.timesteps]
    ticks = [tick for tick in map(clock.locate, clones) if tick]
    assert [tick.index for tick in ticks] == list(range(2 * STEPS - 1))
    assert ticks[0].starts
    assert clock.locate(12345) is None


def test_batched_time_steps_are_views() -> None:
    timesteps = torch.arange(10)
    assert [find_in_storage(t.expand(3), timesteps) for t in timesteps] == list(range(10))
    assert find_in_storage(timesteps[4:][2], timesteps[3:]) == 3
    assert find_in_storage(timesteps[1], timesteps[3:]) is None
    assert find_in_storage(torch.tensor(4), timesteps) is None


def test_log_snr_is_of_the_noise_schedule() -> None:
    scheduler = diffusers.DDIMScheduler(**OPTIONS)
    scheduler.set_timesteps(5)
    course = read_schedule(scheduler)
    alphas = scheduler.alphas_cumprod[scheduler.timesteps]
    expected = torch.log(alphas / (1 - alphas))
    assert course.log_snr == pytest.approx(expected.tolist(), rel=1e-5)


def test_unknown_call_patterns_get_no_rows() -> None:
    runge_kutta = assign_rows(12 + 7, 10)
    assert runge_kutta == (0,) * 4 + (1,) * 4 + (2,) * 4 + (3, 4, 5, 6, 7, 8, 9)
    assert assign_rows(14, 10) is None
    assert assign_rows(14, 10, order=2) is None

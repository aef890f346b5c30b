"""Samplers of the suite: how to make each, and what it is known to do with its steps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers

Rows = Callable[[int], tuple[int, ...]]
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def one_each(steps: int) -> tuple[int, ...]:
    return tuple(range(steps))


def two_each(steps: int) -> tuple[int, ...]:
    """Two UNet calls a step, but one in the last."""
    return tuple(call // 2 for call in range(2 * steps - 1))


def two_first(steps: int) -> tuple[int, ...]:
    return (0, *range(steps))


@dataclass(frozen=True)
class Sampler:
    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    rows: Rows = one_each
    """Step of each UNet call in a run of so many steps."""
    custom: bool = False
    """Whether it takes a list of time steps."""

    @property
    def order(self) -> int:
        """UNet calls that image-to-image leaves out for each step that it leaves out."""
        return 2 if self.rows is two_each else 1

    def make(self, **changes: Any) -> Any:
        return getattr(diffusers, self.kind)(**SCHEDULE, **self.options, **changes)


KARRAS = {"use_karras_sigmas": True}
SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddim", "DDIMScheduler", {"clip_sample": False, "steps_offset": 1}),
        Sampler("ddpm", "DDPMScheduler", {"clip_sample": False}, custom=True),
        Sampler("pndm", "PNDMScheduler", {"skip_prk_steps": True}, two_first),
        Sampler("lms", "LMSDiscreteScheduler"),
        Sampler("lms-karras", "LMSDiscreteScheduler", KARRAS),
        Sampler("euler", "EulerDiscreteScheduler", custom=True),
        Sampler("euler-karras", "EulerDiscreteScheduler", KARRAS),
        Sampler("euler-a", "EulerAncestralDiscreteScheduler"),
        Sampler("heun", "HeunDiscreteScheduler", {}, two_each, custom=True),
        Sampler("heun-karras", "HeunDiscreteScheduler", KARRAS, two_each),
        Sampler("kdpm2", "KDPM2DiscreteScheduler", {}, two_each),
        Sampler("kdpm2-a", "KDPM2AncestralDiscreteScheduler", KARRAS, two_each),
        Sampler("dpm++-2m", "DPMSolverMultistepScheduler", custom=True),
        Sampler("dpm++-2m-karras", "DPMSolverMultistepScheduler", KARRAS),
        Sampler(
            "dpm++-2m-sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}
        ),
        Sampler("dpm++-sde", "DPMSolverSDEScheduler", {"noise_sampler_seed": 7}, two_each),
        Sampler("dpm++-2s", "DPMSolverSinglestepScheduler", custom=True),
        Sampler("unipc", "UniPCMultistepScheduler"),
        Sampler("unipc-karras", "UniPCMultistepScheduler", KARRAS),
        Sampler("deis", "DEISMultistepScheduler"),
        Sampler("lcm", "LCMScheduler", {"clip_sample": False}, custom=True),
    )
}

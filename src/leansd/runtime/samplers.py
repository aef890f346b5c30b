"""Samplers by short name: a scheduler class of diffusers and the options that make it that one."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from leansd.errors import LeansdError
from leansd.plans.presets.tuned import NOISY
from leansd.runtime.clock import is_flow
from leansd.text import suggest_name


@dataclass(frozen=True)
class Sampler:
    """A row of the table."""

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    is_flow: bool = False
    """Whether it is for models that predict a flow (SD3, FLUX, Sana), not noise."""


SPACINGS: Sequence[str] = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Settings of a scheduler by which noise levels are not as time steps have them."""
_EVEN: Mapping[str, Any] = dict.fromkeys(SPACINGS, False)
"""Noise levels as time steps have them. Plans tuned for one spacing are poor at another."""
_KARRAS = {**_EVEN, "use_karras_sigmas": True}
_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler"),
    "ddpm": Sampler("DDPMScheduler"),
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": Sampler("LMSDiscreteScheduler"),
    "euler": Sampler("EulerDiscreteScheduler", _EVEN),
    "euler-a": Sampler("EulerAncestralDiscreteScheduler"),
    "heun": Sampler("HeunDiscreteScheduler"),
    "kdpm2": Sampler("KDPM2DiscreteScheduler"),
    "dpm++2m": Sampler("DPMSolverMultistepScheduler", {**_2M, **_EVEN}),
    "dpm++2m-karras": Sampler("DPMSolverMultistepScheduler", {**_2M, **_KARRAS}),
    "dpm++sde": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Sampler("UniPCMultistepScheduler", _EVEN),
    "deis": Sampler("DEISMultistepScheduler"),
    "flow-euler": Sampler("FlowMatchEulerDiscreteScheduler", is_flow=True),
    "flow-heun": Sampler("FlowMatchHeunDiscreteScheduler", is_flow=True),
    "flow-dpm++2m": Sampler(
        "DPMSolverMultistepScheduler",
        {**_2M, "use_karras_sigmas": False, **_FLOW},
        is_flow=True,
    ),
    "flow-unipc": Sampler("UniPCMultistepScheduler", _FLOW, is_flow=True),
}


def set_sampler(pipe: DiffusionPipeline, name: str) -> None:
    """Give a pipeline the sampler `name`, on the noise schedule it was trained with."""
    pipe.scheduler = make_scheduler(pipe, name)


def make_scheduler(pipe: DiffusionPipeline, name: str) -> Any:
    """The scheduler of sampler `name`, on the noise schedule that a pipeline was trained with.

    Raises:
        LeansdError: there is no such sampler, or it is for models that predict something else.
    """
    row = SAMPLERS[check_sampler(name)]
    if row.is_flow != is_flow(pipe.scheduler):
        what, not_what = ("a flow", "noise") if row.is_flow else ("noise", "a flow")
        fitting = list_samplers(pipe.scheduler)
        raise LeansdError(
            f"sampler {name} is for models that predict {what}, and this "
            f"{type(pipe).__name__} predicts {not_what}: choose from {', '.join(fitting)}"
        )
    scheduler = getattr(diffusers, row.scheduler)
    config, options = dict(pipe.scheduler.config), dict(row.options)
    # The same number by two names: diffusers carries neither over to the other.
    shifts = [config.pop(key) for key in _SHIFTS if key in config]
    known = inspect.signature(scheduler).parameters
    options |= {key: shifts[0] for key in _SHIFTS if shifts and key in known}
    return scheduler.from_config(config, **options)


_SHIFTS = ("shift", "flow_shift")


def list_samplers(scheduler: Any) -> tuple[str, ...]:
    """Samplers for models that predict the same as that of this scheduler: noise, or a flow."""
    return tuple(name for name, row in SAMPLERS.items() if row.is_flow == is_flow(scheduler))


def check_sampler(name: str) -> str:
    """The name itself if there is such a sampler."""
    if name not in SAMPLERS:
        raise LeansdError(f"no sampler {name!r}{suggest_name(name, SAMPLERS)}")
    return name


def parse_course(text: str) -> tuple[str, int]:
    """`dpm++2m:150` as a sampler and its steps."""
    name, colon, steps = text.rpartition(":")
    if not colon or not steps.isdecimal() or int(steps) < 1:
        raise LeansdError(f"{text!r} is not a sampler with its steps: give one as in dpm++2m:150")
    return check_sampler(name), int(steps)


def name_sampler(pipe: DiffusionPipeline) -> str:
    """The short name of a pipeline's scheduler where the table has it, else its class."""
    scheduler, config = type(pipe.scheduler).__name__, pipe.scheduler.config
    fitting = {name: SAMPLERS[name] for name in list_samplers(pipe.scheduler)}
    # The row with most options first: a bare row also matches what its variants describe.
    for name, row in sorted(fitting.items(), key=lambda item: -len(item[1].options)):
        if row.scheduler == scheduler and all(config.get(k) == v for k, v in row.options.items()):
            return name
    return scheduler


def require_convergence(name: str) -> None:
    """Refuse a sampler whose runs do not near one picture as their steps grow more."""
    if name in NOISY:
        raise LeansdError(
            f"{name} draws noise at every step, so more steps give another picture and there is no "
            "converged run: use --reference full, or another sampler"
        )

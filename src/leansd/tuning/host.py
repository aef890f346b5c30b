"""What a tuning needs of whoever draws: runs to watch and steer, and the sampler's answer to them.

Pipelines of diffusers are one host (`pipeline_host`); a node in another program can be one, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from leansd.evaluation.runs import PipelineCall, RunOutputs
from leansd.plans.anatomy import Anatomy
from leansd.plans.liveness import Net
from leansd.plans.plan import Plan, Tuned
from leansd.tuning.scheduler_hook import SchedulerRun, Steer


@dataclass(frozen=True, eq=False)
class Course:
    """A sampler's run of n calls, with one call a step."""

    steps: int
    """Step count of the sampler; image-to-image makes fewer calls than that."""
    log_snr: np.ndarray
    """At every call, [n]."""
    response: np.ndarray
    """[n + 1, n]: how much of the output of call j is in the sample before call k."""


class Host(Protocol):
    """Draws calls, each to one picture; call `i` from the noise of `seed + i`."""

    @property
    def anatomy(self) -> Anatomy:
        """Of the denoiser that plans are for."""
        ...

    @property
    def nets(self) -> Mapping[str, Net]:
        """Others that plans may switch to."""
        ...

    @property
    def tuned(self) -> Tuned:
        """What plans found here are tuned for."""
        ...

    def draw(
        self,
        calls: Sequence[PipelineCall],
        steps: int,
        plan: Plan | None = None,
        *,
        seed: int,
        steer: Steer | None = None,
    ) -> tuple[RunOutputs, list[SchedulerRun]]:
        """The ends of the runs, and what was seen of every run at every step.

        Args:
            steer: asked for the guided output to go on with at every step.
        """
        ...

    def respond(self, steps: int, calls: int | None = None) -> Course:
        """How the sampler answers to the outputs that it is given.

        Args:
            calls: of a run, where it starts late.

        Raises:
            LeansdError: it calls the denoiser several times a step, or what it adds of its own
                cannot be told apart.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """What tells a tuning here from any other, as plain values."""
        ...

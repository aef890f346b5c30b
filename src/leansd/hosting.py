"""A plan for one run of another program; what adapters (`integrations/`) have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leansd.errors import LeansdError
from leansd.plans.resolve import PlanContext, resolve_plan
from leansd.runtime.attachment import Attachment, inherit
from leansd.runtime.context import describe_runs


class HostedRun:
    """One call of a host's pipeline: it follows a plan where that can be, and else runs in full.

    A plan that does not suit the run is no error of the host's, which draws its picture anyway.
    """

    def __init__(self, pipe: Any, source: str | Path, steps: int) -> None:
        """Args:
        source: the name of a preset, or the path of a plan file.
        steps: of the sampler, as the pipeline will be called with.
        """
        self.plan = ""
        """The name of the plan that is followed; empty where none is."""
        self.identity = ""
        """That plan's name and fingerprint."""
        self.reason = ""
        """Why all is computed, in words; empty where a plan is followed."""
        self._attachment: Attachment | None = None
        try:
            attachment = inherit(pipe, source)
            plan = resolve_plan(source, describe_runs(pipe, PlanContext(steps))).plan
            if plan.mixes:  # refused in the midst of a run, where it cannot be followed
                raise LeansdError(
                    f"plan {plan.name} mixes outputs, and it is not known what the program does to "
                    "latents between steps"
                )
            self._attachment = attachment.attach()
            self.plan, self.identity = plan.name, plan.identity
        except LeansdError as error:
            self.reason = str(error)

    def close(self) -> str:
        """Release the pipeline; says what the run did."""
        attachment, self._attachment = self._attachment, None
        if attachment is None:
            return f"computed in full, because {self.reason or 'it was released'}"
        try:
            return str(attachment.report())
        except LeansdError:  # the host failed before the first call
            return f"plan {self.plan}: nothing ran"
        finally:
            attachment.release()

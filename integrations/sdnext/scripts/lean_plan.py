"""Lean Plan for SD.Next: a panel that chooses the plan of every run.

SD.Next draws with pipelines of diffusers, and makes another one for every task. So a plan is
attached once the arguments of a pipeline's call are made, and released when SD.Next takes its own
modifiers off that pipeline again, which it does after an error, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from modules import script_callbacks, scripts  # of SD.Next  # pyright: ignore

from leansd.hosting import HostedRun
from leansd.ui.panel import OFF, lay_out_panel, read_choice

LOG = logging.getLogger("sd")
"""SD.Next's own; it shows no other."""
CHOICE = "lean_plan"
"""Where what is drawn (`p`) keeps its plan; copies of it, as for details, have it along."""
OWN = "lean_plan_own"
"""Where a function that is put around one of SD.Next's keeps that one."""


class Passes:
    """The passes of SD.Next, one after the other; what it knows of the one that runs."""

    def __init__(self) -> None:
        self.run: HostedRun | None = None

    def hook(self, host: Any) -> None:
        """See every pass of `modules.processing_diffusers` begin and end; twice is once."""
        for name, around in {"set_pipeline_args": self.begin, "process_post": self.end}.items():
            found = getattr(host, name)
            hooked = partial(around, getattr(found, OWN, found))
            setattr(hooked, OWN, hooked.args[0])
            setattr(host, name, hooked)

    def begin(self, own: Callable[..., Any], p: Any, model: Any, **named: Any) -> Any:
        """The arguments of a pipeline's call; the pipeline follows the plan from here on."""
        self.close()
        arguments = own(p=p, model=model, **named)
        source = getattr(p, CHOICE, None)
        if source is None:
            return arguments
        if named.get("desc") == "Refiner":
            LOG.info("Lean Plan: the refiner's pass is computed in full")
            return arguments
        self.run = HostedRun(model, source, count_steps(arguments, p))
        if self.run.plan:
            p.extra_generation_params["Lean Plan"] = self.run.identity
        return arguments

    def end(self, own: Callable[..., Any], *args: Any, **named: Any) -> Any:
        self.close()
        return own(*args, **named)

    def close(self) -> None:
        """Release the pipeline, and say what was done."""
        run, self.run = self.run, None
        if run is not None:
            LOG.info("Lean Plan: %s", run.close())


def count_steps(arguments: dict[str, Any], p: Any) -> int:
    """The sampler's steps of a pipeline's call, of which one from a picture runs a part."""
    given = next((arguments[each] for each in ("timesteps", "sigmas") if arguments.get(each)), ())
    return len(given) or arguments.get("num_inference_steps") or p.steps


PASSES = Passes()


class LeanPlanScript(scripts.Script):
    """The panel."""

    def title(self) -> str:
        return "Lean Plan"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        return lay_out_panel()

    def process(self, p: Any, plan: str = OFF, file: str = "", **_: Any) -> None:
        """Keep the choice with what is drawn; its passes are still to come."""
        # Not before: this module of SD.Next asks for a model when it is imported.
        from modules import processing_diffusers  # pyright: ignore

        PASSES.hook(processing_diffusers)
        setattr(p, CHOICE, read_choice(plan, file))


# After every picture, also where a pass has failed before its pipeline was called.
script_callbacks.on_after_process(lambda p: PASSES.close())

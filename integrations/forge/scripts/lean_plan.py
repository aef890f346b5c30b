"""Lean Plan for Forge and reForge: a panel under the prompt that chooses the plan of every run.

The model's answers are what Forge's wrapper gives: denoised latents. Plans say how noise is
forecast, so both are turned into each other, by the latents and their sigma.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from modules import scripts  # of Forge  # pyright: ignore[reportMissingImports]

from leansd.core import Player, Prediction, find_denoised_output, lay_out_calls, list_log_snr
from leansd.errors import LeansdError
from leansd.plans.anatomy import WHOLE
from leansd.plans.plan import Plan
from leansd.plans.resolve import PlanContext, find_source, resolve_plan
from leansd.ui.panel import OFF, lay_out_panel, read_choice

LOG = logging.getLogger("leansd")
SAMPLERS = {
    "Euler": "euler",
    "Euler a": "euler-a",
    "LMS": "lms",
    "DPM++ 2M": "dpm++2m",
    "DPM++ 2M SDE": "dpm++sde",
    "DPM++ 3M SDE": "dpm++3m-sde",
}
"""Samplers that call the model once a step, by their names in plans; others run in full."""
NEAR = 1e-3
"""How far, as a share, the sigma that a run starts at may lie from one of its schedule."""


def find_prediction(unet: Any) -> Prediction:
    """What sigma means to a model of Forge (a predictor) or of reForge (as in ComfyUI)."""
    model = getattr(unet, "model", None)
    told = getattr(getattr(model, "predictor", None), "prediction_type", "")
    kinds = [kind.__name__ for kind in type(getattr(model, "model_sampling", None)).__mro__]
    return "flow" if told == "const" or "CONST" in kinds else "noise"


class ForgeRun:
    """One sampling pass under a plan."""

    def __init__(
        self, plan: Plan, sigmas: Sequence[float], prediction: Prediction = "noise"
    ) -> None:
        self.plan, self.sigmas = plan, list(sigmas)
        self.prediction: Prediction = prediction
        self.player: Player | None = None
        self.call = self.first = -1
        self.reason = ""
        """Why everything is computed, in words."""

    def attach(self, unet: Any) -> Any:
        """A clone of Forge's UNet whose calls follow the plan."""
        clone = unet.clone()
        before = clone.model_options.get("model_function_wrapper")

        def wrap(apply_model: Callable[..., torch.Tensor], args: Mapping[str, Any]) -> torch.Tensor:
            def compute() -> torch.Tensor:
                if before is not None:
                    return before(apply_model, args)
                return apply_model(args["input"], args["timestep"], **args["c"])

            return self.run_model(args["input"], args["timestep"], args["cond_or_uncond"], compute)

        clone.set_model_unet_function_wrapper(wrap)
        clone.set_model_sampler_post_cfg_function(self.end_call)
        return clone

    def run_model(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        places: Sequence[int],
        compute: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Denoised latents [conds * B, C, H, W] of one batch at sigma [conds * B]."""
        if self.call < 0:
            self._begin(float(sigma.reshape(-1)[0]))  # the one value that is read in a run
        if max(Counter(places).values(), default=0) > 1:
            self._compute_all("several prompts are joined")
        if self.player is None:
            return compute()
        keys: tuple[Hashable, ...] = tuple(places)
        return self.player.play_denoised(self.call, latents, sigma, compute, keys)

    def end_call(self, args: Mapping[str, Any]) -> torch.Tensor:
        """Called once a step, when all conditionings are there: the run's clock."""
        self.call += 1
        return args["denoised"]

    def _begin(self, sigma: float) -> None:
        places = [each for each, own in enumerate(self.sigmas) if abs(own - sigma) <= NEAR * own]
        self.call = self.first = places[0] if places else 0
        if not places:
            self._compute_all("the run starts at a sigma that is none of its schedule")
            return
        output = find_denoised_output(self.prediction)
        schedule = lay_out_calls(self.sigmas, self.prediction, output=output)
        self.player = Player(self.plan, schedule)
        self.reason = self.player.reason

    def _compute_all(self, why: str) -> None:
        self.reason, self.player = why, None

    def close(self) -> str:
        """Keep nothing; says what the run did."""
        player, self.player = self.player, None
        if player is None:
            return f"{self.plan.name}: computed in full, because {self.reason or 'nothing ran'}"
        player.clear()
        return f"{self.plan.name}: {player.describe()}"


class LeanPlanScript(scripts.Script):
    """The panel."""

    def __init__(self) -> None:
        super().__init__()
        self.run: ForgeRun | None = None

    def title(self) -> str:
        return "Lean Plan"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        return lay_out_panel()

    def process_before_every_sampling(
        self, p: Any, plan: str = OFF, file: str = "", **_: Any
    ) -> None:
        """Attach the plan to the UNet of the pass that begins."""
        self._finish()
        source = read_choice(plan, file)
        if source is None:
            return
        if p.sampler_name not in SAMPLERS or not hasattr(p.sampler, "get_sigmas"):
            LOG.warning("Lean Plan: %s runs in full: only %s follow plans", p.sampler_name,
                        ", ".join(SAMPLERS))  # fmt: skip
            return
        steps = (getattr(p, "is_hr_pass", False) and p.hr_second_pass_steps) or p.steps
        sigmas = [float(each) for each in p.sampler.get_sigmas(p, steps).tolist()]
        objects = p.sd_model.forge_objects
        prediction = find_prediction(objects.unet)
        try:
            # As of any denoiser whose inside is not known: what is not tuned is said.
            context = PlanContext(
                len(sigmas) - 1,
                SAMPLERS[p.sampler_name],
                anatomy=WHOLE,
                guidance=getattr(p, "cfg_scale", None),
                log_snr=list_log_snr(sigmas[:-1], prediction),
            )
            resolved = resolve_plan(find_source(source), context, fit=True)
        except LeansdError as error:
            LOG.warning("Lean Plan: computed in full: %s", error)
            return
        for note in resolved.notes:
            LOG.warning("Lean Plan: %s", note)
        self.run = ForgeRun(resolved.plan, sigmas, prediction)
        objects.unet = self.run.attach(objects.unet)
        p.extra_generation_params["Lean Plan"] = resolved.plan.identity

    def postprocess(self, p: Any, processed: Any, *_: Any) -> None:
        """Say what was done, and keep nothing."""
        self._finish()

    def _finish(self) -> None:
        if self.run is not None:
            LOG.info("Lean Plan: %s", self.run.close())
        self.run = None

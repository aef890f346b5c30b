"""Pictures from a pipeline: one request type for the command line, the page and bulk jobs."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from leansd.core.devices import seed_generator
from leansd.errors import LeansdError
from leansd.plans.plan import Plan
from leansd.runtime import Attachment, Report, inherit
from leansd.runtime.attachment import NO_NETS
from leansd.runtime.context import find_denoiser, name_guidance
from leansd.runtime.finite import NOT_FINITE, FiniteWatch

OnStep = Callable[[int, int], None]

LARGE = 1024
"""The side in pixels of pictures of pipelines that do not say theirs, such as Z-Image's."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw. `None` leaves a choice to the pipeline."""

    prompt: str
    negative: str | None = None
    seed: int = 0
    steps: int = 30
    guidance: float | None = None
    size: tuple[int, int] | None = None  # width, height
    init: Image.Image | None = None
    strength: float = 0.8

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise LeansdError(f"{self.steps} steps: at least 1 is needed")
        if not 0 < self.strength <= 1:
            raise LeansdError(
                f"strength {self.strength:g} lies outside (0, 1]: "
                "near 0 keeps the picture, 1 redraws it"
            )
        if self.init is not None:
            check_strength(self.strength, self.steps)

    @property
    def arguments(self) -> dict[str, Any]:
        """What a pipeline is called with for this picture alone, but for steps and seed."""
        arguments: dict[str, Any] = {"prompt": self.prompt}
        if self.negative is not None:
            arguments["negative_prompt"] = self.negative
        if self.init is not None:
            arguments["image"] = self.init
        return arguments | self.shared

    @property
    def shared(self) -> dict[str, Any]:
        """The arguments that are the same for all requests of a kind."""
        shared: dict[str, Any] = {}
        if self.guidance is not None:
            shared["guidance_scale"] = self.guidance
        if self.init is not None:
            shared["strength"] = self.strength
        elif self.size is not None:
            shared |= dict(zip(("width", "height"), self.size, strict=True))
        return shared

    @property
    def kind(self) -> tuple[object, ...]:
        """What requests that are drawn in one call have in common."""
        return (
            self.negative is None,
            self.steps,
            self.guidance,
            self.size,
            self.init is None,
            self.strength if self.init is not None else None,
        )


@dataclass
class Painting:
    """A picture, how long the whole pipeline took, and the run where a plan was followed."""

    image: Image.Image
    seconds: float
    run: Attachment | None = None
    fault: str = ""
    """Why there is nothing to see in the picture; empty where there is."""

    @cached_property
    def report(self) -> Report | None:
        """The run's report, made when asked for: counting takes time that is not the run's."""
        return self.run.report() if self.run is not None else None


def paint(
    pipe: DiffusionPipeline,
    request: Request,
    plan: Plan | None = None,
    on_step: OnStep | None = None,
    nets: Mapping[str, UNet2DConditionModel] = NO_NETS,
) -> Painting:
    """Draws one picture; without a plan nothing of this package touches the pipeline."""
    return paint_together(pipe, [request], plan, on_step, nets)[0]


def find_scale(pipe: Any, asked: float | None = None) -> float | None:
    """The guidance scale of calls: the one that is asked for, or the pipeline's own."""
    if asked is not None:
        return asked
    known = inspect.signature(type(pipe).__call__).parameters.get(name_guidance(pipe))
    return None if known is None or known.default is None else float(known.default)


def fit_arguments(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call as a pipeline takes them: `guidance_scale` by the name that guides there.

    Where that is another, nothing is guided without a negative prompt: it becomes a blank.
    """
    fitted, name = dict(arguments), name_guidance(pipe)
    if name == "guidance_scale":
        return fitted
    scale = fitted[name] = find_scale(pipe, fitted.pop("guidance_scale", fitted.get(name)))
    is_bare = "prompt" in fitted and not any(each.startswith("negative") for each in fitted)
    if is_bare and scale is not None and scale > 1:
        prompt = fitted["prompt"]
        fitted["negative_prompt"] = " " if isinstance(prompt, str) else [" "] * len(prompt)
    return fitted


def follow_steps(pipe: Any, follow: Callable[[int, int, Any], None]) -> dict[str, Any]:
    """Options of a call by which `follow(step, steps, latents)` is told of every step, from 1 on.

    There are none where a pipeline tells nobody.
    """

    def tell(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        follow(step + 1, pipe.num_timesteps, tensors.get("latents"))
        return tensors

    def tell_plainly(step: int, timestep: Any, latents: Any) -> None:
        follow(step + 1, len(pipe.scheduler.timesteps), latents)

    # The latter is PixArt's.
    ways = {"callback_on_step_end": tell, "callback": tell_plainly}
    known = inspect.signature(type(pipe).__call__).parameters
    found = next((name for name in ways if name in known), None)
    if found is None and any(each.kind is each.VAR_KEYWORD for each in known.values()):
        found = "callback_on_step_end"  # all is handed on to a pipeline's own call
    return {} if found is None else {found: ways[found]}


def paint_together(
    pipe: Any,
    requests: Sequence[Request],
    plan: Plan | None = None,
    on_step: OnStep | None = None,
    nets: Mapping[str, UNet2DConditionModel] = NO_NETS,
) -> list[Painting]:
    """Draws requests of one kind in one call; each has the seconds of all."""
    first = requests[0]
    watch = _Watch(on_step)
    each_own = [each.arguments for each in requests]
    options: dict[str, Any] = {
        **{name: [own[name] for own in each_own] for name in each_own[0]},
        **first.shared,
        "num_inference_steps": first.steps,
        "generator": [seed_generator(each.seed) for each in requests],
    }
    options |= follow_steps(pipe, watch)
    start = time.perf_counter()
    following = inherit(pipe, plan, nets=nets) if plan is not None else nullcontext()
    with torch.no_grad(), following as run:
        output = pipe(**fit_arguments(pipe, options))
    seconds = time.perf_counter() - start
    flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(requests)
    bad = watch.find_bad(len(requests))
    return [
        Painting(image, seconds, run, find_fault(image, step, watch.total, is_hidden=bool(hidden)))
        for image, step, hidden in zip(output.images, bad, flagged, strict=True)
    ]


class _Watch:
    """Follows a call step by step, and remembers whose latents are finite."""

    def __init__(self, on_step: OnStep | None) -> None:
        self.on_step = on_step
        self.total = 0
        self._finite = FiniteWatch()

    def __call__(self, step: int, total: int, latents: Any) -> None:
        self.total = total
        if isinstance(latents, torch.Tensor):
            self._finite.note(latents)
        if self.on_step is not None:
            self.on_step(step, total)

    def find_bad(self, pictures: int) -> list[int]:
        """The first step, from 1, after which each picture's latents are not finite; 0 for none."""
        first = [0] * pictures
        for step, finite in enumerate(self._finite.read(), start=1):
            # Latents that are not one a picture are those of all.
            rows = finite if len(finite) == pictures else [all(finite)] * pictures
            first = [at or step * (not row) for at, row in zip(first, rows, strict=True)]
        return first


def find_fault(image: Any, step: int = 0, steps: int = 0, *, is_hidden: bool = False) -> str:
    """Why there is nothing to see in a picture, as `Painting.fault` says it.

    Args:
        step: of `steps`, after which its latents were not finite; 0 for none.
        is_hidden: whether a safety checker says so.
    """
    if step:
        return f"its latents {NOT_FINITE} (NaN or Inf) from step {step} of {steps} on"
    if is_hidden:
        return "the model's safety checker blacked it out: use another prompt or seed"
    if not isinstance(image, Image.Image):
        return ""
    extremes = image.convert("RGB").getextrema()
    if any(low != high for low, high in extremes):  # type: ignore[misc]
        return ""
    return (
        "all its pixels are equal though its latents are finite, as where the autoencoder "
        "overflows in half precision: use --dtype float32 or another --vae"
    )


def explain_fault(
    pipe: DiffusionPipeline, request: Request, painting: Painting, plan: Plan | None
) -> str:
    """Says what is wrong with a picture and what to do, after a full run of the same request."""
    if NOT_FINITE not in painting.fault:
        return painting.fault
    precision = str(pipe.dtype).removeprefix("torch.")
    remedy = "whole weights" if precision == "float32" else "--dtype float32"
    if plan is None or plan.rows == Plan.full(plan.steps).rows:
        return f"{painting.fault}; the model itself fails in {precision}, in full: use {remedy}"
    full = paint(pipe, request)
    if full.fault:
        return f"{painting.fault}; so does the full run: use {remedy}"
    return f"{painting.fault}; the full run is sound: use --plan full or a slower plan"


def check_strength(strength: float, steps: int) -> None:
    """Refuses a share of steps that leaves none to run.

    Raises:
        LeansdError: it does.
    """
    if int(steps * strength) < 1:
        raise LeansdError(
            f"strength {strength:g} of {steps} steps leaves no step to run: "
            f"use --strength {1 / steps:.2g} or more, or more steps"
        )


def describe_report(report: Report) -> dict[str, int | float]:
    """The numbers of a run's report, for JSON."""
    return {
        "calls": report.calls,
        "computed": report.computed,
        "inherited": report.inherited,
        "idle": report.idle,
        "bytes_kept": report.bytes_kept,
        "predicted_speedup": round(report.predicted_speedup, 4),
        "measured_speedup": round(report.measured_speedup, 4),
        "unet_seconds": round(report.seconds, 4),
    }


def default_size(pipe: Any) -> tuple[int, int]:
    """The width and height a pipeline draws when it is not told."""
    config = find_denoiser(pipe).config
    side = config.get("sample_size") or getattr(pipe, "default_sample_size", None)
    side = side or LARGE // pipe.vae_scale_factor
    height, width = (side, side) if isinstance(side, int) else side
    return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor


def place_init(pipe: DiffusionPipeline, request: Request) -> Request:
    """A request with its picture cut to the size that is drawn."""
    if request.init is None:
        return request
    size = request.size or default_size(pipe)
    return replace(request, init=ImageOps.fit(request.init, size, Image.Resampling.LANCZOS))


def parse_size(text: str) -> tuple[int, int]:
    """`512` or `768x512` as width and height."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None:
        raise LeansdError(f"size {text!r} is not a size: give 512 or, width first, 768x512")
    width = int(match[1])
    height = int(match[2] or width)
    if width % 8 or height % 8 or not width or not height:
        raise LeansdError(f"size {width}x{height}: both sides must be positive multiples of 8")
    return width, height


def open_picture(path: str | Path) -> Image.Image:
    """Reads a picture file as RGB, whole."""
    path = Path(path)
    if not path.exists():
        raise LeansdError(f"no picture at {path}: give the path of a PNG, JPEG or WebP file")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise LeansdError(f"{path} is not a readable picture: give a PNG, JPEG or WebP") from error


def encode_png(image: Image.Image, facts: Mapping[str, Any] | None = None) -> bytes:
    """A picture as the bytes of a PNG file that carries `facts` as text chunks."""
    info = PngInfo()
    for name, value in (facts or {}).items():
        if value is not None:
            info.add_text(name, str(value))
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()

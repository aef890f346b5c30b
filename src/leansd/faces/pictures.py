"""Pictures: asking a pipeline for one, under a plan or without, and keeping it with its facts."""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from leansd.errors import LeansdError
from leansd.files import write_file
from leansd.plans.plan import Plan
from leansd.runtime import Attachment, Report, inherit
from leansd.runtime.inheritance import NO_NETS

OnStep = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw. `None` leaves a choice to the pipeline."""

    prompt: str
    negative: str = ""
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
        if self.init is not None and int(self.steps * self.strength) < 1:
            raise LeansdError(
                f"strength {self.strength:g} of {self.steps} steps leaves no step to run: "
                f"use --strength {1 / self.steps:.2g} or more, or more steps"
            )


@dataclass
class Painting:
    """A picture, how long the whole pipeline took, and the run where a plan was followed."""

    image: Image.Image
    seconds: float
    run: Attachment | None = None

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
    """Draw one picture; without a plan nothing of this package touches the pipeline."""
    options: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative or None,
        "num_inference_steps": request.steps,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
    }
    if request.guidance is not None:
        options["guidance_scale"] = request.guidance
    if request.init is not None:
        options |= {"image": request.init, "strength": request.strength}
    elif request.size is not None:
        options |= dict(zip(("width", "height"), request.size, strict=True))
    if on_step is not None:
        options["callback_on_step_end"] = _follow(on_step)
    start = time.perf_counter()
    with inherit(pipe, plan, nets=nets) if plan is not None else nullcontext() as run:
        image = pipe(**options).images[0]
    seconds = time.perf_counter() - start
    return Painting(image, seconds, run)


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


def default_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """The width and height a pipeline draws when it is not told."""
    side = pipe.unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor


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
    """Read a picture file as RGB, whole."""
    path = Path(path)
    if not path.exists():
        raise LeansdError(f"no picture at {path}: give the path of a PNG, JPEG or WebP file")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise LeansdError(f"{path} is not a readable picture: give a PNG, JPEG or WebP") from error


def fit_picture(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture at exactly `size`."""
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def save_picture(path: str | Path, image: Image.Image, facts: Mapping[str, Any]) -> Path:
    """Write a PNG that carries `facts` as text chunks."""
    info = PngInfo()
    for name, value in facts.items():
        if value is not None:
            info.add_text(name, str(value))
    return write_file(path, encode_png(image, info))


def encode_png(image: Image.Image, info: PngInfo | None = None) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def name_file(prompt: str, plan: str, seed: int) -> str:
    """`a-red-apple.balanced.seed0.png`: the same request gives the same name."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "picture"
    return f"{slug}.{re.sub(r'[^A-Za-z0-9_-]+', '-', plan)}.seed{seed}.png"


def _follow(on_step: OnStep) -> Callable[..., dict[str, Any]]:
    def call(pipe: DiffusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        on_step(step + 1, pipe.num_timesteps)
        return tensors

    return call

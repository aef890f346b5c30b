"""From samples to latents and conditions, by a pipeline's own networks.

Pictures are encoded; latents of prompts are drawn by the teacher, once for each prompt and seed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from io import BytesIO
from struct import error as StructError
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image, ImageOps
from torch import Tensor

from leansd.anatomy.reading import fingerprint_module
from leansd.errors import LeansdError
from leansd.incubation.data.batches import Conditioning
from leansd.incubation.data.sample_cache import Latents
from leansd.incubation.data.samples import Flaw, Sample, cut, digest
from leansd.incubation.noise import hash_words, make_generator
from leansd.runtime.samplers import make_scheduler

CAPTIONS = 64
"""Captions that are encoded at once."""
# What Pillow raises for files that are no pictures, cut off or absurdly large.
_UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError),
    *(OverflowError, StructError, zlib.error, Image.DecompressionBombError),
)


class PictureEncoder:
    """Encodes pictures: the shorter side scaled to the resolution, the middle cut out.

    An encoder describes as JSON values what latents follow from besides the samples, and gives the
    latents of each sample, on the CPU, or why there are none.

    Args:
        resolution: the side, in pixels.
        flip: encode the mirrored picture too.
        batch: pictures that the autoencoder takes at once.
    """

    def __init__(
        self, pipe: DiffusionPipeline, resolution: int, *, flip: bool = False, batch: int = 8
    ) -> None:
        self.vae: Any = pipe.vae
        step = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if resolution < step or resolution % step:
            raise LeansdError(
                f"a resolution of {resolution} px does not come out even in the latents: give a "
                f"multiple of {step}"
            )
        config = self.vae.config
        self.shift = config.get("shift_factor") or 0.0
        self.scale = config.get("scaling_factor") or 1.0
        self.pipe, self.resolution, self.flip, self.batch = pipe, resolution, flip, batch

    def describe(self) -> dict[str, Any]:
        return {
            "latents": "encoded",
            "vae": fingerprint_module(self.vae),
            "scale": [self.shift, self.scale],
            "resolution": self.resolution,
            "flip": self.flip,
        }

    def encode(self, samples: Sequence[Sample]) -> list[Latents | Flaw]:
        with ThreadPoolExecutor(os.cpu_count()) as readers:  # Pillow decodes without the lock
            read = list(readers.map(lambda each: read_picture(each, self.resolution), samples))
        good = [each[0] for each in read if not isinstance(each, Flaw)]
        encoded = iter(self._encode(torch.stack(good)) if good else [])
        sized = has_sizes(self.pipe)
        return [
            each
            if isinstance(each, Flaw)
            else check_latents(sample, *next(encoded), each[1] if sized else None)
            for sample, each in zip(samples, read, strict=True)
        ]

    @torch.no_grad()
    def _encode(self, pictures: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Mean and standard deviation of each of some pictures [B, 3, H, W] of 8 bits."""
        vae = self.vae
        with _in_safe_precision(vae):
            pixels = pictures.to(vae.device).float() / 127.5 - 1
            means, stds = [], []
            for view in (pixels, pixels.flip(-1)) if self.flip else (pixels,):
                encoded = vae.encode(view.to(vae.dtype))
                spread = getattr(encoded, "latent_dist", None)
                mean = encoded.latents if spread is None else spread.mean
                means.append((mean.float() - self.shift) * self.scale)
                stds.append(None if spread is None else spread.std.float() * self.scale)
        mean = torch.stack(means, 1).cpu()
        if stds[0] is None:
            return [(each, None) for each in mean]
        return list(zip(mean, torch.stack(stds, 1).cpu(), strict=True))


class TeacherSampler:
    """Draws latents with the teacher, each from noise of its own prompt and seed.

    But for rounding, it does not matter what is drawn beside it.

    Args:
        resolution: the side of the picture, in pixels.
        sampler: a name of `leansd.runtime.samplers`.
        batch: drawings at once.
    """

    def __init__(
        self,
        pipe: Any,
        resolution: int,
        *,
        steps: int = 25,
        guidance: float = 7.5,
        sampler: str = "dpm++2m",
        batch: int = 8,
    ) -> None:
        self.pipe, self.resolution, self.batch = pipe, resolution, batch
        self.facts = {"steps": steps, "guidance": guidance, "sampler": sampler}
        self.scheduler = make_scheduler(pipe, sampler)

    def describe(self) -> dict[str, Any]:
        # Not diffusers' own notes: the order of one is another in every process.
        config = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        return {
            "latents": "drawn",
            "unet": fingerprint_module(self.pipe.unet),
            "schedule": digest({"config": str(sorted(config.items()))}),
            "resolution": self.resolution,
            **self.facts,
        }

    def encode(self, samples: Sequence[Sample]) -> list[Latents | Flaw]:
        side, own = self.resolution, self.pipe.scheduler
        self.pipe.scheduler = self.scheduler
        try:
            drawn = self.pipe(
                prompt=[each.captions[0] for each in samples],
                generator=[
                    make_generator("draw", each.content, each.captions[0], by=hash_words)
                    for each in samples
                ],
                num_inference_steps=self.facts["steps"],
                guidance_scale=self.facts["guidance"],
                height=side,
                width=side,
                output_type="latent",
            ).images
        finally:
            self.pipe.scheduler = own
        time_ids = make_time_ids((side, side), (0, 0), side) if has_sizes(self.pipe) else None
        return [
            check_latents(sample, latents[None], None, time_ids)
            for sample, latents in zip(samples, drawn.float().cpu(), strict=True)
        ]


def check_latents(
    sample: Sample, mean: Tensor, std: Tensor | None, time_ids: Tensor | None
) -> Latents | Flaw:
    """Latents [F, C, h, w] of a sample, unless they are not finite."""
    if not mean.isfinite().all() or (std is not None and not std.isfinite().all()):
        return Flaw(sample.key, "its latents are not finite")
    return Latents(mean, std, {} if time_ids is None else {"time_ids": time_ids})


class TextEncoder:
    """Encodes captions as the pipeline does."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe

    def describe(self) -> dict[str, Any]:
        modules = [getattr(self.pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
        words = str(sorted(self.pipe.tokenizer.get_vocab().items()))
        return {
            "text": [fingerprint_module(module) for module in modules if module is not None],
            "tokenizer": sha256(words.encode()).hexdigest()[:16],
        }

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Conditioning:
        """A row each caption, on the CPU."""
        rows = [embed(self.pipe, list(some)) for some in cut(captions, CAPTIONS)]
        added = {name: torch.cat([each.added[name] for each in rows]) for name in rows[0].added}
        return Conditioning(torch.cat([each.text for each in rows]), added)

    @torch.no_grad()
    def encode_empty(self) -> Conditioning:
        """What stands for no prompt, as the unconditional half of a guided call has it."""
        empty = embed(self.pipe, [""])
        if not self.pipe.config.get("force_zeros_for_empty_prompt", False):
            return empty
        added = {name: torch.zeros_like(rows) for name, rows in empty.added.items()}
        return Conditioning(torch.zeros_like(empty.text), added)


def embed(pipe: Any, captions: list[str]) -> Conditioning:
    """What a pipeline's UNet is given for captions, on the CPU.

    Raises:
        LeansdError: it encodes its prompts in another way than Stable Diffusion.
    """
    if isinstance(pipe, StableDiffusionPipeline):
        return Conditioning(pipe.encode_prompt(captions, pipe.device, 1, False)[0].cpu())
    if isinstance(pipe, StableDiffusionXLPipeline):
        encode: Any = pipe.encode_prompt
        text, _, pooled, _ = encode(captions, device=pipe.device, do_classifier_free_guidance=False)
        return Conditioning(text.cpu(), {"text_embeds": pooled.cpu()})
    raise LeansdError(
        f"{type(pipe).__name__} encodes its prompts in a way that is not known here: Stable "
        "Diffusion 1.x, 2.x and SDXL can be incubated"
    )


def has_sizes(pipe: DiffusionPipeline) -> bool:
    """Whether the UNet is told the picture's size and where it was cut: SDXL's time ids."""
    return pipe.unet.config.addition_embed_type == "text_time"


def make_time_ids(size: tuple[int, int], corner: tuple[int, int], resolution: int) -> Tensor:
    """SDXL's time ids: the size before scaling, where the picture was cut, its size now; [6]."""
    return torch.tensor([*size, *corner, resolution, resolution], dtype=torch.float32)


def read_picture(sample: Sample, resolution: int) -> tuple[Tensor, Tensor] | Flaw:
    """Pixels of 8 bits, [3, H, W], with transparency on white; and the time ids."""
    try:
        with Image.open(BytesIO(sample.content)) as opened:
            image = _flatten(ImageOps.exif_transpose(opened))
    except _UNREADABLE as error:
        said = str(error).partition(" <")[0]  # an object's address is another in every process
        return Flaw(sample.key, f"unreadable picture: {said}")
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    size = sample.size or (image.height, image.width)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)
    return pixels, make_time_ids(size, (top, left), resolution)


def _flatten(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


@contextmanager
def _in_safe_precision(vae: Any) -> Iterator[None]:
    """Autoencoders that say so overflow in half precision."""
    dtype = vae.dtype
    if dtype != torch.float16 or not vae.config.get("force_upcast", False):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)

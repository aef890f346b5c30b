"""The table: what users run, a line each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback

import leansd
from conformance.models import (
    SIDE,
    draw_mask,
    draw_picture,
    inpaint_unet,
    load_ip_adapter,
    make_pipeline,
    sd2_unet,
    small_unet,
    tiny_adapter,
    tiny_controlnet,
    tiny_lora,
    two_adapters,
    xl_unet,
)
from tiny import WIDTH, tiny_unet

STEPS = 5


@dataclass(frozen=True)
class Call:
    """One call of a pipeline: its arguments, and what they mean for the course of the run."""

    arguments: Mapping[str, Any]
    strength: float = 1.0
    """Share of the steps that image-to-image takes."""
    restarts: tuple[int, ...] = ()
    """UNet calls whose batch differs from that of the call before."""
    guided: tuple[bool, ...] = (True,)
    """Whether the batch has an unconditional half, at the start and from each restart on."""


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[Any], Any]
    """Makes the pipeline around a scheduler."""
    calls: tuple[Call, ...]
    """Made one after the other on the same pipeline and attachment."""
    samplers: tuple[str, ...] = ("ddim",)
    plans: tuple[str, ...] = ("full", "reuse")
    schedule: Mapping[str, Any] = field(default_factory=dict)
    controls: int | None = None
    """Runs of the ControlNet in a call, where they are not those of the whole encoder."""


def text(**arguments: Any) -> Call:
    return Call({"prompt": "a cat"} | arguments)


def image(strength: float, **arguments: Any) -> Call:
    return Call(
        {"prompt": "a cat", "image": draw_picture(), "strength": strength} | arguments, strength
    )


def painting(strength: float = 1.0) -> Call:
    return image(strength, mask_image=draw_mask(), height=SIDE, width=SIDE)


def cutoff(kind: type[Any]) -> Call:
    """Guidance is switched off after 40 % of the steps."""
    call = text(
        callback_on_step_end=kind(cutoff_step_ratio=0.4),
        callback_on_step_end_tensor_inputs=kind.tensor_inputs,
    )
    return Call(call.arguments, restarts=(3,), guided=(True, False))


def unguided() -> Call:
    return Call({"prompt": "a cat", "guidance_scale": 1.0}, guided=(False,))


def build_sd(scheduler: Any) -> Any:
    return make_pipeline("StableDiffusionPipeline", small_unet(), scheduler)


def build_sd_whole(scheduler: Any) -> Any:
    return make_pipeline("StableDiffusionPipeline", tiny_unet(), scheduler)


def build_sd2(scheduler: Any) -> Any:
    return make_pipeline("StableDiffusionPipeline", sd2_unet(), scheduler)


def build_xl(scheduler: Any) -> Any:
    return make_pipeline("StableDiffusionXLPipeline", xl_unet(), scheduler)


def build_without_mid(scheduler: Any) -> Any:
    """As distilled UNets are, BK-SDM's small one among them."""
    return make_pipeline("StableDiffusionPipeline", small_unet(mid_block_type=None), scheduler)


def build_cut(scheduler: Any) -> Any:
    """Cut to what a plain config says."""
    unet, _ = leansd.operate(tiny_unet(), "bk-tiny")
    return make_pipeline("StableDiffusionPipeline", unet, scheduler)


def build_light(scheduler: Any) -> Any:
    """Cut to what no plain config says: an attention less, unequal counts of layers."""
    surgery = leansd.Surgery("odd").drop("up3.l1.attn", "dn2.down", "up0.up", "up0.l1")
    unet, _ = leansd.operate(tiny_unet(), surgery)
    return make_pipeline("StableDiffusionPipeline", unet, scheduler)


def build_freeu(scheduler: Any) -> Any:
    pipe = build_sd(scheduler)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    return pipe


def build_lora(scheduler: Any) -> Any:
    pipe = build_sd(scheduler)
    pipe.load_lora_weights(tiny_lora(pipe.unet, "to_q", "to_v", "conv1"))
    return pipe


def build_lora_on_stem(scheduler: Any) -> Any:
    pipe = build_sd(scheduler)
    pipe.load_lora_weights(tiny_lora(pipe.unet, "conv_in", "conv_out", "downsamplers.0.conv"))
    return pipe


def build_ip_adapter(scheduler: Any) -> Any:
    return load_ip_adapter(build_sd(scheduler))


def build_controlnet(scheduler: Any, nets: int = 1, kind: str = "StableDiffusionControlNet") -> Any:
    unet = xl_unet() if "XL" in kind else small_unet()
    controlnets = [tiny_controlnet(unet, seed) for seed in range(nets)]
    controlnet = controlnets if nets > 1 else controlnets[0]
    return make_pipeline(f"{kind}Pipeline", unet, scheduler, controlnet=controlnet)


def build_adapter(scheduler: Any, make: Callable[..., Any] = tiny_adapter) -> Any:
    unet = small_unet()
    return make_pipeline("StableDiffusionAdapterPipeline", unet, scheduler, adapter=make(unet))


def as_kind(name: str, make_unet: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda scheduler: make_pipeline(name, make_unet(), scheduler)


def in_dtype(dtype: torch.dtype) -> Callable[[Any], Any]:
    """Narrow: a CPU convolves in half precision seven times as slowly."""
    narrow = partial(small_unet, block_out_channels=(16, 32))
    return lambda scheduler: as_kind("StableDiffusionPipeline", narrow)(scheduler).to(dtype)


BOTH = ("ddim", "heun")
FEATURE_PLANS = ("full", "reuse", "deep", "residual", "forecast")
PICTURE_PLANS = ("denoised", "denoised-guidance")
GUIDANCE_PLANS = ("guidance", "guidance-forecast", "gate")
ALL_PLANS = (*FEATURE_PLANS, "parts", *GUIDANCE_PLANS, *PICTURE_PLANS)
PICTURES = [draw_picture(1), draw_picture(2)]
CASES = {
    case.name: case
    for case in (
        Case("sd1", build_sd_whole, (text(),), ("ddim",), ALL_PLANS),
        Case("sd2-v", build_sd2, (text(),), ("ddim", "heun", "dpm++-2m-karras"),
             (*FEATURE_PLANS[:3], "denoised"),
             {"prediction_type": "v_prediction"}),
        Case("xl", build_xl, (text(),), ("euler",), ALL_PLANS),
        Case("xl-heun", build_xl, (text(),), ("heun",), FEATURE_PLANS[:3]),
        Case("no-mid", build_without_mid, (text(),)),
        Case("cut", build_cut, (text(),)),
        Case("light", build_light, (text(),), plans=("full", "reuse", "residual", "parts")),
        Case("guidance-off", build_sd, (unguided(), text(guidance_scale=7.5)),
             plans=("full", "reuse", *GUIDANCE_PLANS)),
        Case("guidance-rescale", build_sd, (text(guidance_rescale=0.7),),
             plans=("full", "reuse", *GUIDANCE_PLANS)),
        Case("images-per-prompt", build_sd, (text(num_images_per_prompt=2),),
             plans=("full", "reuse", *GUIDANCE_PLANS)),
        Case("batch-and-size", build_sd, (
            text(),
            text(prompt=["a cat", "a dog"]),
            text(height=SIDE * 2, width=SIDE),
        )),
        Case("cutoff", build_sd, (cutoff(SDCFGCutoffCallback), text()),
             plans=(*FEATURE_PLANS[:3], "parts", "guidance", "gate")),
        Case("cutoff-xl", build_xl, (cutoff(SDXLCFGCutoffCallback),), ("euler",)),
        Case("img2img", as_kind("StableDiffusionImg2ImgPipeline", small_unet),
             (image(0.5), image(0.75)), ("ddim", "heun", "pndm", "dpm++-2m-karras", "euler-a"),
             ("full", "reuse", "residual", "forecast")),
        Case("img2img-xl", as_kind("StableDiffusionXLImg2ImgPipeline", xl_unet),
             (image(0.5), image(0.75)), BOTH),
        Case("inpaint-9", as_kind("StableDiffusionInpaintPipeline", inpaint_unet),
             (painting(), painting(0.6)), BOTH, FEATURE_PLANS[:3]),
        Case("inpaint-4", as_kind("StableDiffusionInpaintPipeline", small_unet),
             (painting(0.6), painting())),
        Case("inpaint-xl", as_kind("StableDiffusionXLInpaintPipeline", xl_unet),
             (painting(0.6), painting(0.99))),
        Case("controlnet", build_controlnet, (text(image=PICTURES[0]),), BOTH, ALL_PLANS),
        Case("controlnet-window", build_controlnet,
             (text(image=PICTURES[0], control_guidance_end=0.7),), controls=4),
        Case("controlnet-guess", build_controlnet, (text(image=PICTURES[0], guess_mode=True),)),
        Case("controlnet-two", lambda scheduler: build_controlnet(scheduler, 2),
             (text(image=PICTURES, controlnet_conditioning_scale=[0.5, 0.8]),)),
        Case("controlnet-xl",
             lambda scheduler: build_controlnet(scheduler, 1, "StableDiffusionXLControlNet"),
             (text(image=PICTURES[0]),)),
        Case("t2i-adapter", build_adapter, (text(image=PICTURES[0]),), plans=ALL_PLANS),
        Case("t2i-adapter-heun", build_adapter, (text(image=PICTURES[0]),), ("heun",)),
        Case("t2i-adapter-two", lambda scheduler: build_adapter(scheduler, two_adapters),
             (text(image=PICTURES, adapter_conditioning_scale=[0.5, 0.5]),)),
        Case("ip-adapter", build_ip_adapter,
             (text(ip_adapter_image_embeds=[torch.ones(2, 1, WIDTH)]),), plans=ALL_PLANS),
        Case("lora", build_lora,
             (text(), text(cross_attention_kwargs={"scale": 0.3})), plans=ALL_PLANS),
        Case("lora-on-stem", build_lora_on_stem, (text(),)),
        Case("freeu", build_freeu, (text(),), plans=ALL_PLANS),
        Case("freeu-heun", build_freeu, (text(),), ("heun",)),
        Case("bf16", in_dtype(torch.bfloat16), (text(),), plans=ALL_PLANS),
        Case("fp16", in_dtype(torch.float16), (text(),), plans=ALL_PLANS),
    )
}  # fmt: skip
"""A case of one sampler is about something that no sampler has a part in."""

"""Which pipelines follow which kinds of plans: tried on tiny nets, written to a page.

    make compatibility      writes docs/compatibility.md, and tries what is not on it yet
    make compatibility ALL=1    tries all of them anew: minutes

A pipeline is made of whatever parts its class asks for, and called with whatever it takes. What it
draws under a plan is one of `OUTCOMES`.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines import pag
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import leansd
from conformance.cases import CASES
from conformance.models import (
    SIDE,
    draw_mask,
    draw_picture,
    small_unet,
    tiny_adapter,
    tiny_controlnet,
    tiny_projecting_text_encoder,
    xl_unet,
)
from conformance.reference import PLANS as EXACT_PLANS
from conformance.samplers import SAMPLERS
from leansd.errors import LeansdError
from leansd.plans import Plan
from tiny import WIDTH, tiny_text_encoder, tiny_tokenizer, tiny_vae

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
STEPS = 4
EQUAL, RUNS, FULL, REFUSED = "bit-equal", "runs", "in full", "refused"
OUTCOMES = {
    EQUAL: "the same bits as without a plan, which is what a full plan must give",
    RUNS: "the plan is followed: what it leaves out is not computed",
    FULL: "every call computes everything: the picture is the plain one, and the report says why",
    REFUSED: "an error before anything runs, with the reason; plain runs are not touched",
}
PLANS: Mapping[str, Callable[[int], tuple[Plan, Any]]] = {
    "full plan": lambda last: (Plan.full(STEPS), False),
    "whole steps": lambda last: (
        Plan.between([0, 1, 3], cut="head", steps=STEPS, how="forecast"), False
    ),
    "cut": lambda last: (Plan.every(2, cut=f"up{last}.l1", steps=STEPS), False),
    "guidance": lambda last: (Plan.full(STEPS).guide("inherit", at=[2, 3]), False),
    "adaptive": lambda last: (
        Plan.every(STEPS, cut=f"up{last}.l1", steps=STEPS).guard("sample", threshold=9.0), False
    ),
    "compiled": lambda last: (Plan.every(2, cut=f"up{last}.l1", steps=STEPS), {"backend": "eager"}),
}  # fmt: skip
"""By column: for so many up blocks the plan, and what it is compiled with."""


@dataclass(frozen=True)
class Kind:
    """A pipeline's class and what it needs besides what every pipeline gets."""

    name: str
    make_unet: Callable[[], Any] = small_unet
    call: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """Made from the UNet."""
    sampler: str = "ddim"

    def open(self) -> Any:
        """The pipeline, silent."""
        kind = getattr(diffusers, self.name, None) or getattr(pag, self.name)
        unet = self.make_unet()
        wanted = inspect.signature(kind.__init__).parameters
        made = {
            name: make(unet) for name, make in {**PARTS, **self.parts}.items() if name in wanted
        }
        pipe: Any = kind(unet=unet, scheduler=SAMPLERS[self.sampler].make(), **made)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: Any) -> torch.Tensor:
        """What one call gives, as numbers."""
        wanted = inspect.signature(type(pipe).__call__).parameters
        options = {name: value for name, value in CALL.items() if name in wanted}
        output = pipe(**(options | dict(self.call)), generator=torch.Generator().manual_seed(3))
        first = output[0]
        return first if isinstance(first, torch.Tensor) else torch.as_tensor(first)


def tiny_vision(unet: Any) -> CLIPVisionModelWithProjection:
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, projection_dim=WIDTH, intermediate_size=WIDTH, image_size=SIDE,
        num_hidden_layers=1, num_attention_heads=2, patch_size=8,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def xl_adapter(unet: Any) -> diffusers.T2IAdapter:
    torch.manual_seed(0)
    channels = list(unet.config.block_out_channels)
    return diffusers.T2IAdapter(
        channels=channels, num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter_xl"
    ).eval()


PARTS: Mapping[str, Callable[[Any], Any]] = {
    "vae": lambda unet: tiny_vae(),
    "text_encoder": lambda unet: tiny_text_encoder(),
    "tokenizer": lambda unet: tiny_tokenizer(),
    "text_encoder_2": lambda unet: tiny_projecting_text_encoder(),
    "tokenizer_2": lambda unet: tiny_tokenizer(),
    "controlnet": tiny_controlnet,
    "adapter": tiny_adapter,
    "image_encoder": tiny_vision,
    "feature_extractor": lambda unet: None,
    "safety_checker": lambda unet: None,
    "requires_safety_checker": lambda unet: False,
    "requires_aesthetics_score": lambda unet: False,
    "add_watermarker": lambda unet: False,
    "low_res_scheduler": lambda unet: SAMPLERS["ddpm"].make(),
    "pag_applied_layers": lambda unet: "mid",
}
CALL: Mapping[str, Any] = {
    "prompt": "a cat",
    "image": draw_picture(),
    "mask_image": draw_mask(),
    "control_image": draw_picture(2),
    "height": SIDE,
    "width": SIDE,
    "strength": 1.0,
    "num_inference_steps": STEPS,
    "output_type": "latent",
}

xl = partial(xl_unet)
with_picture = partial(small_unet, in_channels=8)
LATE = {"strength": 0.8}
KINDS = {
    kind.name: kind
    for kind in (
        Kind("StableDiffusionPipeline"),
        Kind("StableDiffusionImg2ImgPipeline"),
        Kind("StableDiffusionInpaintPipeline", partial(small_unet, in_channels=9)),
        Kind("StableDiffusionInstructPix2PixPipeline", with_picture),
        Kind("StableDiffusionDepth2ImgPipeline", partial(small_unet, in_channels=5),
             {"depth_map": torch.rand(1, SIDE, SIDE)}, {"depth_estimator": lambda unet: None}),
        Kind("StableDiffusionUpscalePipeline",
             partial(small_unet, in_channels=7, num_class_embeds=1000)),
        Kind("StableDiffusionImageVariationPipeline",
             parts={"feature_extractor": lambda unet: CLIPImageProcessor(crop_size=SIDE, size=SIDE)}
             ),
        Kind("StableDiffusionControlNetPipeline"),
        Kind("StableDiffusionControlNetImg2ImgPipeline"),
        Kind("StableDiffusionControlNetInpaintPipeline"),
        Kind("StableDiffusionAdapterPipeline"),
        Kind("StableDiffusionPAGPipeline"),
        Kind("StableDiffusionPAGImg2ImgPipeline"),
        Kind("StableDiffusionPAGInpaintPipeline"),
        Kind("StableDiffusionControlNetPAGPipeline"),
        Kind("StableDiffusionControlNetPAGInpaintPipeline"),
        Kind("StableDiffusionPanoramaPipeline", call={"width": 2 * SIDE}),
        Kind("StableDiffusionSAGPipeline"),
        Kind("StableDiffusionPipelineSafe"),
        Kind("StableDiffusionGLIGENPipeline", partial(small_unet, attention_type="gated"),
             {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]}),
        Kind("LatentConsistencyModelPipeline", partial(small_unet, time_cond_proj_dim=32),
             sampler="lcm"),
        Kind("LatentConsistencyModelImg2ImgPipeline", partial(small_unet, time_cond_proj_dim=32),
             sampler="lcm"),
        Kind("MarigoldDepthPipeline", with_picture,
             {"processing_resolution": 0, "match_input_resolution": False, "output_type": "pt"}),
        Kind("StableDiffusionXLPipeline", xl),
        Kind("StableDiffusionXLImg2ImgPipeline", xl),
        Kind("StableDiffusionXLInpaintPipeline", xl, LATE),
        Kind("StableDiffusionXLInstructPix2PixPipeline", partial(xl, in_channels=8)),
        Kind("StableDiffusionXLControlNetPipeline", xl),
        Kind("StableDiffusionXLControlNetImg2ImgPipeline", xl),
        Kind("StableDiffusionXLControlNetInpaintPipeline", xl, LATE),
        Kind("StableDiffusionXLAdapterPipeline", xl, parts={"adapter": xl_adapter}),
        Kind("StableDiffusionXLPAGPipeline", xl),
        Kind("StableDiffusionXLPAGImg2ImgPipeline", xl),
        Kind("StableDiffusionXLPAGInpaintPipeline", xl, LATE),
        Kind("StableDiffusionXLControlNetPAGPipeline", xl),
        Kind("StableDiffusionXLControlNetPAGImg2ImgPipeline", xl),
    )
}  # fmt: skip
"""A pipeline a line."""


def try_pipeline(kind: Kind) -> dict[str, str]:
    """The outcome of every kind of plan, by column; a plan that is followed is followed again."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        pipe = kind.open()
        plain = kind.draw(pipe)
        last = len(pipe.unet.config.up_block_types) - 1
        return {column: _try_plan(kind, pipe, plain, *make(last)) for column, make in PLANS.items()}


def _try_plan(kind: Kind, pipe: Any, plain: torch.Tensor, plan: Plan, compile: Any) -> str:
    try:
        with leansd.inherit(pipe, plan, compile=compile) as run:
            drawn, again = kind.draw(pipe), kind.draw(pipe)
    except LeansdError:
        return REFUSED
    report = run.report()
    assert torch.equal(drawn, again), f"{kind.name}: a second run differs"
    assert drawn.isfinite().all(), f"{kind.name}: {plan.name} gives no numbers"
    assert torch.equal(kind.draw(pipe), plain), f"{kind.name}: leaving {plan.name} leaves something"
    if plan.rows == Plan.full(STEPS).rows:
        assert torch.equal(drawn, plain), f"{kind.name}: a full plan is not the plain run"
        return EQUAL
    if report.full_calls < report.calls or report.guarded:
        return RUNS
    assert torch.equal(drawn, plain), f"{kind.name}: {plan.name} is in full, and not the plain run"
    return FULL


# -- the page ----------------------------------------------------------------------------------

UNETS = ("UNet2DConditionModel", "DreamLiteUNetModel")
"""The class that plans are for, and one that is derived from it."""
ELSEWHERE = {"StableDiffusionAttendAndExcitePipeline"}
"""Tried by `test_neighbours`: it takes long."""
OTHER_BLOCKS = {"StableDiffusionLatentUpscalePipeline": "a UNet of K-blocks"}
"""Pipelines whose own UNet has blocks that are not read, and what those are."""


HEADS = re.compile(
    r"^class (\w+)|^    def __init__(\(.*?\))(?: -> .*?)?:$", re.MULTILINE | re.DOTALL
)
"""The name of a class, or the arguments that one is made with; whole files take long to parse."""


@cache
def list_pipelines() -> dict[str, str]:
    """Every class in diffusers' pipelines that is made with a `unet`, and what that may be."""
    home = Path(diffusers.__file__).parent / "pipelines"
    found: dict[str, str] = {}
    for path in sorted(home.rglob("pipeline_*.py")):
        name = ""
        for kind, arguments in HEADS.findall(path.read_text(encoding="utf-8")):
            name = kind or name
            if " unet:" in arguments:
                made: Any = ast.parse(f"def make{arguments}: ...").body[0]
                given = {each.arg: each.annotation for each in made.args.args}
                found[name] = ast.unparse(given["unet"])
    return found


def write_page(outcomes: Mapping[str, Mapping[str, str]]) -> str:
    """The page, of the outcomes of all that was tried."""
    every = list_pipelines()
    others = {name: unet for name, unet in every.items() if not is_readable(name, unet)}
    left = sorted(every.keys() - others.keys() - outcomes.keys() - ELSEWHERE)
    kinds = sorted({OTHER_BLOCKS.get(name, unet) for name, unet in others.items()})
    lines = [
        "# What works with what",
        "Here you see, before you try, what a pipeline of diffusers does under each kind of plan. "
        "The page is made by the",
        "tests (`make compatibility`): every pipeline was built with tiny nets, run plainly, under "
        "the plan, twice, and once more",
        "after leaving it. What is not listed as refused also loads LoRAs, IP-Adapters, other "
        "samplers and half precision as below.",
        "",
        f"{len(outcomes)} pipelines of diffusers {diffusers.__version__}:",
        "",
        *tabulate(["pipeline", *PLANS], [[name, *row.values()] for name, row in outcomes.items()]),
        "",
        *(f"- **{name}**: {meaning}." for name, meaning in OUTCOMES.items()),
        "",
        "Guidance is computed in full wherever a batch is not an unconditional and a conditional "
        "half: three-way batches",
        "(InstructPix2Pix, perturbed attention), several calls a step (panoramas), pipelines that "
        "do not say that they guide. What looks",
        "into the UNet or differentiates it (SAG, Attend-and-Excite) runs in full. `compiled` is "
        "`compile=True` with the cut plan.",
        "",
        "## Held to brute force, bit for bit",
        "They are drawn as if every unit were computed and overwritten afterwards; forecasts agree "
        "to rounding.",
        "",
        *tabulate(
            ["what", "samplers", *EXACT_PLANS],
            [
                [
                    each.name,
                    ", ".join(each.samplers),
                    *("yes" if plan in each.plans else "–" for plan in EXACT_PLANS),
                ]
                for each in CASES.values()
            ],
        ),
        "",
        f"All {len(SAMPLERS)} samplers run the full, reuse, forecast and gate plans: "
        f"{', '.join(SAMPLERS)}.",
        "",
        "## Refused by name",
        "An attachment says which UNet it has found; nothing is changed.",
        "",
        *(
            f"- {kind.replace(' | ', ' or ')}: "
            + ", ".join(n for n, u in others.items() if OTHER_BLOCKS.get(n, u) == kind)
            for kind in kinds
        ),
        "",
        "## Not tried here",
        "They have a UNet of the same class, so a full plan and whole steps should work; what "
        "cannot be told apart is computed in full.",
        "",
        ", ".join(left) + ".",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def is_readable(name: str, unet: str) -> bool:
    """Whether a pipeline's own UNet is one that plans are for."""
    return unet in UNETS and name not in OTHER_BLOCKS


def tabulate(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [list(heads), ["---"] * len(heads), *map(list, rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def read_page(text: str) -> dict[str, dict[str, str]]:
    """The outcomes that a page tells."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {
        name: dict(zip(PLANS, outcomes, strict=True))
        for name, *outcomes in rows
        if name in KINDS and len(outcomes) == len(PLANS)
    }


if __name__ == "__main__":
    known = {} if "--all" in sys.argv else read_page(PAGE.read_text(encoding="utf-8"))
    outcomes = {name: known.get(name) or try_pipeline(kind) for name, kind in KINDS.items()}
    PAGE.write_text(write_page(outcomes), encoding="utf-8")

"""Counting every kind of UNet that diffusers' pipelines use, in every precision and wrapping.

What a user would notice: a report, a preview, a table of costs never ends in a traceback, and its
numbers are those of the call that really runs.
"""

import math
import warnings
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel, UNetMotionModel
from diffusers.models import embeddings
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import leansd
from leansd.anatomy import count_macs, counting, make_inputs
from leansd.errors import LeansdError
from leansd.report.nets import report_surgery
from tiny import LATENT, WIDTH, shallow_unet, tiny_pipeline, tiny_unet, tiny_xl_unet

SIMPLE: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 8,
    "layers_per_block": 1,
}
"""The blocks of DeepFloyd and Kandinsky."""

TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}

# Every way in which `UNet2DConditionModel` can be configured to take or embed conditions: name and
# changes to a shallow UNet.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "class numbers": {"num_class_embeds": 10},
    "class time step": {"class_embed_type": "timestep"},
    "class identity": {"class_embed_type": "identity"},
    "class identity of a width": {"class_embed_type": "identity", "time_embedding_dim": 64},
    "class identity, fourier": {"class_embed_type": "identity", "time_embedding_type": "fourier"},
    "class projection": {
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 24,
    },
    "class simple projection": {
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 24,
    },
    "class concatenated (x4 upscaler)": {
        "class_embed_type": "timestep",
        "class_embeddings_concat": True,
        "num_class_embeds": 1000,
    },
    "added text": {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
    "added text, projected (DeepFloyd)": {
        **SIMPLE,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
        "encoder_hid_dim": 48,
        "encoder_hid_dim_type": "text_proj",
    },
    "added text and time (SDXL)": TEXT_TIME,
    "added text and image (Kandinsky 2.1)": {
        **SIMPLE,
        "addition_embed_type": "text_image",
        "encoder_hid_dim": 48,
        "encoder_hid_dim_type": "text_image_proj",
    },
    "added image (Kandinsky 2.2)": {
        **SIMPLE,
        "addition_embed_type": "image",
        "encoder_hid_dim": 48,
        "encoder_hid_dim_type": "image_proj",
        "resnet_time_scale_shift": "scale_shift",
    },
    "added hint (Kandinsky 2.2 ControlNet)": {
        **SIMPLE,
        "in_channels": 8,
        "addition_embed_type": "image_hint",
        "encoder_hid_dim": 48,
        "encoder_hid_dim_type": "image_proj",
    },
    "text projected (Kolors)": {**TEXT_TIME, "encoder_hid_dim": 48},
    "text and image projected": {
        "encoder_hid_dim": 48,
        "encoder_hid_dim_type": "text_image_proj",
    },
    "image projected": {"encoder_hid_dim": 48, "encoder_hid_dim_type": "image_proj"},
    "guidance embedded (LCM)": {"time_cond_proj_dim": 16},
    "time by fourier": {"time_embedding_type": "fourier"},
    "time activations": {"time_embedding_act_fn": "silu", "timestep_post_act": "silu"},
    "inpainting": {"in_channels": 9},
    "centred": {"center_input_sample": True},
    "other kernels": {"conv_in_kernel": 1, "conv_out_kernel": 5},
    "no norm at the end": {"norm_num_groups": 4, "norm_eps": 1e-6},
    "gated (GLIGEN)": {"attention_type": "gated"},
    "widths by block": {"cross_attention_dim": (24,)},
    "attention without text": {
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
        "attention_head_dim": 8,
    },
    "only cross-attention": {"only_cross_attention": True},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "resnet_skip_time_act": True},
    "attention in single precision": {"upcast_attention": True},
    "cross-attention norm": {**SIMPLE, "cross_attention_norm": "group_norm"},
}


PLAN = leansd.Plan.every(2, cut="head", steps=4)


def count_really(unet: UNet2DConditionModel, inputs: dict[str, Any]) -> int:
    """Multiply-accumulates of a call that really runs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_is_counted_as_it_runs(name: str) -> None:
    unet = shallow_unet(**CONFIGURATIONS[name])
    inputs = make_inputs(unet, size=(LATENT, LATENT), tokens=5)
    really = count_really(unet, inputs)
    anatomy = leansd.dissect(unet.half(), latent=LATENT, tokens=5)
    assert (anatomy.uncounted, anatomy.macs) == ("", really)
    assert make_inputs(unet, size=(LATENT, LATENT))["sample"].dtype == torch.float16


def project_images(kind: str) -> nn.Module:
    """The part of an IP-Adapter that embeds pictures, tiny."""
    small = {"hidden_dims": 32, "depth": 1, "dim_head": 8, "heads": 2, "num_queries": 4}
    match kind:
        case "plain":
            return embeddings.ImageProjection(24, WIDTH, 4)
        case "full":
            return embeddings.IPAdapterFullImageProjection(24, WIDTH)
        case "plus":
            return embeddings.IPAdapterPlusImageProjection(24, WIDTH, **small)
        case "face":
            return embeddings.IPAdapterFaceIDImageProjection(24, WIDTH, num_tokens=4)
        case _:
            return embeddings.IPAdapterFaceIDPlusImageProjection(
                32, WIDTH, id_embeddings_dim=24, num_tokens=4, **small
            )


def give_images(unet: UNet2DConditionModel, *kinds: str) -> UNet2DConditionModel:
    """Hang IP-Adapters on `unet` as diffusers' loader does."""
    processors: dict[str, Any] = {}
    for name in list(unet.attn_processors):
        module = unet.get_submodule(name.removesuffix(".processor"))
        if name.endswith("attn2.processor"):
            processors[name] = IPAdapterAttnProcessor2_0(
                module.inner_dim, WIDTH, num_tokens=[4] * len(kinds), scale=[1.0] * len(kinds)
            )
        else:
            processors[name] = AttnProcessor2_0()
    if unet.encoder_hid_proj is not None:
        unet.text_encoder_hid_proj = unet.encoder_hid_proj
    unet.set_attn_processor(processors)
    layers = [project_images(kind) for kind in kinds]
    unet.encoder_hid_proj = embeddings.MultiIPAdapterImageProjection(layers)
    unet.config["encoder_hid_dim_type"] = "ip_image_proj"
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    return unet


@pytest.mark.parametrize(
    ("kinds", "changes"),
    [
        (("plain",), {}),
        (("full",), {}),
        (("plus",), {}),
        (("face",), {}),
        (("plain", "plus"), {}),
        (("plain",), TEXT_TIME),
        (("plain",), {**TEXT_TIME, "encoder_hid_dim": 48}),
    ],
)
def test_image_adapters_are_counted_as_they_run(
    kinds: tuple[str, ...], changes: dict[str, Any]
) -> None:
    unet = give_images(shallow_unet(**changes), *kinds)
    really = count_really(unet, make_inputs(unet, size=(LATENT, LATENT), tokens=5))
    assert count_macs(unet, latent=LATENT, tokens=5).total == really
    assert count_macs(unet.half(), latent=LATENT, tokens=5).total == really
    assert really > count_macs(shallow_unet(**changes), latent=LATENT, tokens=5).total


def test_face_adapter_that_keeps_its_images_is_counted() -> None:
    unet = give_images(shallow_unet(), "face plus").half()
    macs = count_macs(unet, latent=LATENT).total
    unet.encoder_hid_proj.image_projection_layers[0].clip_embeds = torch.zeros(1, 2, 257, 32)
    assert (
        macs == count_macs(unet, latent=LATENT).total > count_macs(shallow_unet(), latent=8).total
    )


class Int8Linear(nn.Module):
    """A quantised layer as libraries build them: another class, weights packed, no meta kernel."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = old.in_features, old.out_features
        self.register_buffer("packed", old.weight.detach().mul(64).char().flatten())
        self.bias = old.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.is_meta:
            raise NotImplementedError("no kernel on the meta device")
        weight = self.packed.view(self.out_features, self.in_features).to(inputs.dtype) / 64
        return nn.functional.linear(inputs, weight, self.bias)


class PackedLinear(nn.Linear):
    """A quantised layer as bitsandbytes builds them: a linear layer whose weight has no shape."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel here")


def quantise(unet: UNet2DConditionModel, kind: str) -> UNet2DConditionModel:
    if kind == "torch":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(unet, {nn.Linear}, dtype=torch.qint8)
    for module in list(unet.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear:
                continue
            if kind == "int8":
                setattr(module, name, Int8Linear(child))
            else:
                packed = PackedLinear(child.in_features, child.out_features, child.bias is not None)
                weight = torch.zeros(child.weight.numel() // 2, 1, dtype=torch.uint8)
                packed.weight = nn.Parameter(weight, requires_grad=False)
                setattr(module, name, packed)
    return unet


@pytest.mark.parametrize("kind", ["int8", "packed", "torch"])
def test_quantised_layers_are_counted_as_plain_ones(kind: str) -> None:
    expected = count_macs(shallow_unet(), latent=LATENT)
    assert count_macs(quantise(shallow_unet(), kind), latent=LATENT).by_path == expected.by_path


def differentiate(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A gradient pass, and a module that keeps what it computed."""
    kept = unet(**make_inputs(unet, size=(LATENT, LATENT))).sample
    kept.mean().backward()
    unet.mid_block.kept = kept  # type: ignore[union-attr]
    return unet


def hook(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Hooks that read values, which there are none of on the meta device."""

    def read(module: nn.Module, args: Any, output: Any = None) -> None:
        assert args[0].sum().item() == args[0].sum().item()

    for module in unet.down_blocks[0].resnets:  # type: ignore[union-attr]
        module.register_forward_hook(read)
        module.register_forward_pre_hook(read)
    return unet


def patch(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A forward that somebody else replaced on one module."""
    block = unet.mid_block
    plain = block.forward  # type: ignore[union-attr]
    block.forward = lambda *args, **options: plain(*args, **options)  # type: ignore
    return unet


def store_small(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Weights kept in eight bits and cast when they are needed."""
    unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    return unet


STATES = {
    "after gradients": differentiate,
    "with hooks": hook,
    "patched": patch,
    "layerwise casting": store_small,
    "compiled": torch.compile,
    "compiled in place": lambda unet: (unet.compile(), unet)[1],
    "blocks compiled": lambda unet: (unet.compile_repeated_blocks(), unet)[1],
    "data parallel": nn.DataParallel,
    "sliced": lambda unet: (unet.set_attention_slice(1), unet)[1],
    "fused": lambda unet: (unet.fuse_qkv_projections(), unet)[1],
    "FreeU": lambda unet: (unet.enable_freeu(0.9, 0.2, 1.2, 1.4), unet)[1],
    "channels last": lambda unet: unet.to(memory_format=torch.channels_last),
    "mixed": lambda unet: (unet.half(), unet.conv_in.float(), unet.time_embedding.float(), unet)[3],
}


@pytest.mark.parametrize("state", STATES)
def test_state_of_a_unet_changes_no_count(state: str) -> None:
    expected = count_macs(shallow_unet(), latent=LATENT).total
    unet = STATES[state](shallow_unet())
    assert leansd.dissect(unet, latent=LATENT).macs == expected
    assert count_macs(unet, latent=LATENT).total == expected


def test_a_structure_is_counted_once_and_a_change_of_it_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: list[int] = []
    count = counting._count

    def see(*given: Any) -> dict[str, int]:
        counts = count(*given)
        counted.append(counts[""])
        return counts

    monkeypatch.setattr(counting, "_count", see)
    monkeypatch.setattr(counting, "_KNOWN", {})
    unet: Any = shallow_unet()
    first = count_macs(unet, latent=LATENT)
    assert count_macs(shallow_unet(seed=1).half(), latent=LATENT) == first
    assert counted == [first.total]
    assert count_macs(unet, latent=2 * LATENT).total == counted[1] > first.total
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_out.append(nn.Linear(32, 32))
    assert count_macs(unet, latent=LATENT).total == counted[2]
    unet.mid_block.resnets[0].skip_time_act = True
    count_macs(unet, latent=LATENT)
    unet.mid_block.resnets[0].nonlinearity.own = lambda: None  # cannot be compared
    for _ in range(2):
        count_macs(unet, latent=LATENT)
    assert len(counted) == 6


class Uncountable(nn.SiLU):
    """An activation that looks at values."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.mean().item() > 1e9:
            raise ValueError("too bright")
        return super().forward(input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_report_is_written_in_every_precision(dtype: torch.dtype) -> None:
    pipe = tiny_pipeline().to(dtype=dtype)
    run = leansd.inherit_(pipe, PLAN)
    pipe("a cat", num_inference_steps=4, output_type="latent")
    report = run.report()
    assert report.predicted_speedup > 1
    assert "predicted" in str(report)


def test_what_cannot_be_counted_fails_no_report() -> None:
    unet = tiny_unet()
    unet.time_embedding.act = Uncountable()
    anatomy = leansd.dissect(unet, latent=LATENT)
    assert anatomy.macs == 0
    assert anatomy.uncounted.startswith("not counted, because ")
    assert anatomy.uncounted in str(anatomy)
    with pytest.raises(LeansdError, match="not counted, because"):
        count_macs(unet, latent=LATENT)
    pipe = tiny_pipeline(unet=unet)
    run = leansd.inherit_(pipe, PLAN)
    pipe("a cat", num_inference_steps=4, output_type="latent")
    report = run.report()
    assert math.isnan(report.predicted_speedup)
    assert "not counted, because" in str(report)
    seen = leansd.preview(unet, "bk-base", latent=LATENT)
    assert f"MACs        {anatomy.uncounted}" in str(seen)
    assert "an unknown part of the work" in str(report_surgery(seen, "tiny").summary)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_surgery_is_previewed_in_half_precision(dtype: torch.dtype) -> None:
    single, half = (
        leansd.preview(unet, "bk-base", latent=LATENT)
        for unet in (tiny_unet(), tiny_unet().to(dtype))
    )
    assert half.before.macs == single.before.macs > half.after.macs == single.after.macs


K_BLOCKS: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"),
    "mid_block_type": None,
    "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"),
    "attention_head_dim": 8,
    "layers_per_block": 2,
}


def test_unets_that_cannot_be_read_are_refused_by_name() -> None:
    refused: list[tuple[Any, str]] = [
        (shallow_unet(**K_BLOCKS), "down_blocks.0 is a KDownBlock2D, which is not known here"),
        (
            UNet2DModel(
                block_out_channels=(32,),
                down_block_types=("DownBlock2D",),
                up_block_types=("UpBlock2D",),
            ),
            r"UNet2DModel \(unconditional generation\) is no UNet2DConditionModel",
        ),
        (
            UNetMotionModel(
                block_out_channels=(32,),
                down_block_types=("DownBlockMotion",),
                up_block_types=("UpBlockMotion",),
                cross_attention_dim=WIDTH,
                norm_num_groups=8,
                num_attention_heads=2,
                motion_num_attention_heads=2,
            ),
            r"UNetMotionModel \(AnimateDiff\) is no UNet2DConditionModel",
        ),
        (tiny_pipeline(), r"a pipeline \(its UNet is `pipe.unet`\)"),
        (None, "NoneType is no UNet2DConditionModel"),
        ("sd15", "str is no UNet2DConditionModel"),
    ]
    for model, sentence in refused:
        with pytest.raises(LeansdError, match=sentence):
            leansd.dissect(model)
        with pytest.raises(LeansdError, match=sentence):
            leansd.preview(model, "bk-base")


def test_xl_topology_is_counted_in_half_precision() -> None:
    assert count_macs(tiny_xl_unet().half()).total == count_macs(tiny_xl_unet()).total


def test_surgery_is_previewed_with_an_adapter_loaded() -> None:
    unet = give_images(tiny_unet(), "plain").half()
    seen = leansd.preview(unet, "bk-base", latent=LATENT)
    assert seen.before.macs > leansd.dissect(tiny_unet(), latent=LATENT).macs
    assert seen.after.macs == leansd.preview(tiny_unet(), "bk-base", latent=LATENT).after.macs


def test_swapped_arguments_are_told() -> None:
    unet: Any = shallow_unet()
    sentence = "not a UNet2DConditionModel; the UNets come first, then the surgery"
    for call in (leansd.preview, leansd.operate):
        with pytest.raises(LeansdError, match=sentence):
            call("bk-base", unet)

"""A double of ComfyUI's UNet: its lists of blocks, its names of layers, around diffusers' own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from tiny import WIDTH, tiny_unet


class Layer(nn.Module):
    """One layer of diffusers in the place of one of ComfyUI."""

    def __init__(self, inner: Any, given: int, made: int) -> None:
        super().__init__()
        self.inner, self.channels, self.out_channels = inner, given, made


class ResBlock(Layer):
    updown = False

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return self.inner(x, emb)


class SpatialTransformer(Layer):
    def forward(self, x: torch.Tensor, context: torch.Tensor, options: Any) -> torch.Tensor:
        return self.inner(x, encoder_hidden_states=context, return_dict=False)[0]


class Downsample(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Upsample(Layer):
    def forward(self, x: torch.Tensor, size: Any = None) -> torch.Tensor:
        return self.inner(x, size)


def _wrap_layer(block: Any, number: int) -> list[nn.Module]:
    resnet = block.resnets[number]
    found: list[nn.Module] = [ResBlock(resnet, resnet.in_channels, resnet.out_channels)]
    if getattr(block, "attentions", None):
        width = resnet.out_channels
        found.append(SpatialTransformer(block.attentions[number], width, width))
    return found


class UNetModel(nn.Module):
    """A UNet of diffusers, run as ComfyUI runs its own: layer by layer, patches in between."""

    def __init__(self, unet: UNet2DConditionModel | None = None) -> None:
        super().__init__()
        self.unet: Any = unet if unet is not None else tiny_unet()
        self.text = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(2))
        self.calls, self.dtype = 0, torch.float32
        given: list[nn.Module] = [nn.ModuleList([self.unet.conv_in])]
        for block in self.unet.down_blocks:
            given += [nn.ModuleList(_wrap_layer(block, each)) for each in range(len(block.resnets))]
            if block.downsamplers:
                width = block.resnets[-1].out_channels
                given.append(nn.ModuleList([Downsample(block.downsamplers[0], width, width)]))
        self.input_blocks = nn.ModuleList(given)
        mid = self.unet.mid_block
        closing = ResBlock(mid.resnets[1], mid.resnets[1].in_channels, mid.resnets[1].out_channels)
        self.middle_block = nn.ModuleList([*_wrap_layer(mid, 0), closing])
        made: list[nn.Module] = []
        for block in self.unet.up_blocks:
            layers = [_wrap_layer(block, each) for each in range(len(block.resnets))]
            if block.upsamplers:
                width = block.resnets[-1].out_channels
                layers[-1].append(Upsample(block.upsamplers[0], width, width))
            made += [nn.ModuleList(each) for each in layers]
        self.output_blocks = nn.ModuleList(made)
        self.out = nn.ModuleList([self.unet.conv_norm_out, self.unet.conv_act, self.unet.conv_out])

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        with torch.no_grad():
            return super().__call__(*args, **options)

    def find_text(self, context: torch.Tensor) -> torch.Tensor:
        """Text states [B, tokens, width] of the conditionings' numbers [B]."""
        return self.text * context.view(-1, 1, 1).to(self.text)

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, y: Any = None,
        control: Any = None, transformer_options: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        self.calls += 1
        options = transformer_options or {}
        told = options.get("patches", {})
        text = self.find_text(context)
        emb = self.unet.time_embedding(self.unet.time_proj(timesteps).to(x.dtype))
        h, skips = x, list[torch.Tensor]()
        for block in self.input_blocks:
            h = self._run(block, h, emb, text)
            for patch in told.get("input_block_patch", ()):
                h = patch(h, options)
            skips.append(h)
        h = self._run(self.middle_block, h, emb, text)
        for block in self.output_blocks:
            skip = skips.pop()
            added = control["output"].pop() if control is not None and control["output"] else None
            if added is not None:
                skip += added
            for patch in told.get("output_block_patch", ()):
                h, skip = patch(h, skip, options)
            h = self._run(block, torch.cat([h, skip], dim=1), emb, text)
        for layer in self.out:
            h = layer(h)
        return h

    def _run(self, block: Any, h: Any, emb: Any, text: Any) -> torch.Tensor:
        for layer in block:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, text, {})
            else:
                h = layer(h)
        return h


class Residual:
    """A ControlNet for it, that counts how often it runs."""

    def __init__(self) -> None:
        self.runs = 0

    def get_control(self, x: torch.Tensor) -> dict[str, list[torch.Tensor | None]]:
        self.runs += 1
        side = x.shape[-1]
        # For the skips of the stem and of the first block, which are taken last.
        ours = [0.1 * torch.ones(x.shape[0], 32, side, side) for _ in range(2)]
        return {"output": [*ours, *[None] * 10]}

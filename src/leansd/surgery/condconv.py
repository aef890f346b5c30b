"""Conditional convolution: kernels mixed anew for each call, A-SDM's capacity for shallow layers.

A convolution keeps its own kernel and has experts, kernels of the layers that were dropped or of
others like them. With a routing `a` it convolves with

    own + sum over k of a[k] * (expert[k] - own)

(CondConv, arXiv 1904.04971, around an own kernel; experts of other layers, arXiv 2406.00210). At
`a = 0`, where routers start, that is the convolution as it was, bit for bit.

There are three ways to compute it. Where the whole batch has one routing, the kernels are merged
first, and the convolution costs what a plain one does.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional as F

from leansd.errors import LeansdError


class Convolution(Protocol):
    """A way to compute a conditional convolution; `geometry` is that of `conv2d`."""

    def __call__(
        self,
        inputs: torch.Tensor,
        own: torch.Tensor,
        experts: torch.Tensor,
        routing: torch.Tensor,
        bias: torch.Tensor | None = None,
        **geometry: Any,
    ) -> torch.Tensor:
        """Inputs [B, I, H, W], own [O, I, h, w], experts [K, O, I, h, w], routing [R, K]."""
        ...


def merge_kernels(own: torch.Tensor, experts: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
    """Kernels [R, O, I, h, w]: `own` [O, I, h, w] and `experts` [K, O, I, h, w] by routing [R, K].

    It is linear in the routing, so the mean of kernels is the kernel of the mean routing.
    """
    own_share = 1 - routing.sum(1, keepdim=True)
    return (own.flatten() * own_share + routing @ experts.flatten(1)).unflatten(1, own.shape)


def convolve_merged(
    inputs: torch.Tensor,
    own: torch.Tensor,
    experts: torch.Tensor,
    routing: torch.Tensor,
    bias: torch.Tensor | None = None,
    **geometry: Any,
) -> torch.Tensor:
    """One kernel for the whole batch: a routing of one row."""
    (kernel,) = merge_kernels(own, experts, routing)
    return F.conv2d(inputs, kernel, bias, **geometry)


def convolve_grouped(
    inputs: torch.Tensor,
    own: torch.Tensor,
    experts: torch.Tensor,
    routing: torch.Tensor,
    bias: torch.Tensor | None = None,
    **geometry: Any,
) -> torch.Tensor:
    """A kernel for each sample, as the groups of one convolution: no more products than plain."""
    kernels = merge_kernels(own, experts, routing)
    joined = F.conv2d(
        inputs.flatten(0, 1).unsqueeze(0), kernels.flatten(0, 1), groups=len(kernels), **geometry
    )
    outputs = joined.squeeze(0).unflatten(0, (len(kernels), -1))
    return outputs if bias is None else outputs + bias[:, None, None]


def convolve_stacked(
    inputs: torch.Tensor,
    own: torch.Tensor,
    experts: torch.Tensor,
    routing: torch.Tensor,
    bias: torch.Tensor | None = None,
    **geometry: Any,
) -> torch.Tensor:
    """What each expert adds to the own kernel's output, weighed afterwards.

    It computes K + 1 times the products, all in dense convolutions, and needs no kernel for each
    sample: for training, where each sample has a time step of its own.
    """
    differences = (experts - own).flatten(0, 1)
    added = F.conv2d(inputs, differences, **geometry).unflatten(1, (len(experts), -1))
    weighed = (routing[:, :, None, None, None] * added).sum(1)
    return F.conv2d(inputs, own, bias, **geometry) + weighed


def pick_convolution(routing: torch.Tensor) -> Convolution:
    """The way that suits a routing [R, K] here and now."""
    if routing.shape[0] == 1:
        return convolve_merged
    # The number of groups would be a constant of a trace, and with it the batch.
    if torch.is_grad_enabled() or torch.jit.is_tracing():
        return convolve_stacked
    return convolve_grouped


class CondConv2d(nn.Conv2d):
    """A convolution with `experts` [K, O, I, h, w] beside its own kernel.

    Without experts it is a plain one, which is what peft makes the LoRAs of a convolution of. A
    LoRA is added to the output whatever the routing; fused, it becomes part of the own kernel only.
    """

    experts: nn.Parameter | None

    def __init__(self, *args: Any, experts: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.experts = _copy_kernel(self.weight, experts) if experts else None

    @classmethod
    def take_over(cls, conv: nn.Conv2d, experts: int) -> CondConv2d:
        """`conv` with experts, which start as copies of its kernel; its tensors stay its own.

        Raises:
            LeansdError: it has groups, or pads with anything but zeros.
        """
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise LeansdError("only convolutions of one group and zero padding can have experts")
        conditional = cls(**_describe_convolution(conv))
        conditional.weight, conditional.bias = conv.weight, conv.bias
        conditional.experts = _copy_kernel(conv.weight, experts)
        return conditional

    def forward(self, input: torch.Tensor, routing: torch.Tensor | None = None) -> torch.Tensor:
        """`input` [B, I, H, W] convolved as the routing [R, K] says, R being 1 or B."""
        if routing is None or self.experts is None:
            return super().forward(input)
        convolve = pick_convolution(routing)
        return convolve(
            input,
            self.weight,
            self.experts,
            routing,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )


def _copy_kernel(kernel: torch.Tensor, count: int) -> nn.Parameter:
    copies = kernel.detach().expand(count, *kernel.shape).clone()
    return nn.Parameter(copies, requires_grad=kernel.requires_grad)


def _describe_convolution(conv: nn.Conv2d) -> dict[str, Any]:
    """The arguments that make a convolution of the same shape, without memory of its own."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    shape = {name: getattr(conv, name) for name in names}
    return {**shape, "bias": conv.bias is not None, "device": "meta"}


SHARED = ("norm1", "time_emb_proj", "norm2", "dropout", "nonlinearity", "conv_shortcut")
"""The modules of a ResNet that do not convolve 3 x 3."""


class CondConvResnet(ResnetBlock2D):
    """A ResNet whose two convolutions have experts and share one router.

    It takes over the modules of `resnet`, and their names: what a plain ResNet's weights are
    called, its own are called. `router` takes features [B, C, H, W] and time embedding [R, T].
    """

    def __init__(self, resnet: ResnetBlock2D, router: nn.Module, experts: int) -> None:
        check_resnet(resnet)
        with torch.device("meta"):
            super().__init__(**_describe_resnet(resnet))
        for name in SHARED:
            setattr(self, name, getattr(resnet, name))
        self.conv1 = CondConv2d.take_over(resnet.conv1, experts)
        self.conv2 = CondConv2d.take_over(resnet.conv2, experts)
        self.router = router
        self.train(resnet.training)

    def forward(
        self, input_tensor: torch.Tensor, temb: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Features [B, C, H, W] from `input_tensor` [B, I, H, W] and `temb` [B or 1, T]."""
        routing = self.router(input_tensor, temb)
        hidden = self.conv1(self.nonlinearity(self.norm1(input_tensor)), routing)
        if self.time_emb_proj is not None:
            active = temb if self.skip_time_act else self.nonlinearity(temb)
            hidden = hidden + self.time_emb_proj(active)[:, :, None, None]
        hidden = self.dropout(self.nonlinearity(self.norm2(hidden)))
        hidden = self.conv2(hidden, routing)
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return (shortcut + hidden) / self.output_scale_factor


def check_resnet(resnet: ResnetBlock2D) -> None:
    """Raise a `LeansdError` unless `resnet` is one that can have experts."""
    if resnet.up or resnet.down:
        raise LeansdError("a ResNet that changes the size of its features cannot have experts")
    if resnet.time_embedding_norm != "default":
        raise LeansdError(f"a ResNet with {resnet.time_embedding_norm} time embedding cannot")


def _describe_resnet(resnet: ResnetBlock2D) -> dict[str, Any]:
    """The arguments that make a ResNet of the same shape."""
    time = resnet.time_emb_proj
    return {
        "in_channels": resnet.in_channels,
        "out_channels": resnet.out_channels,
        "dropout": resnet.dropout.p,
        "temb_channels": None if time is None else time.in_features,
        "groups": resnet.norm1.num_groups,
        "groups_out": resnet.norm2.num_groups,
        "eps": resnet.norm1.eps,
        "skip_time_act": resnet.skip_time_act,
        "output_scale_factor": resnet.output_scale_factor,
        "use_in_shortcut": resnet.conv_shortcut is not None,
    }

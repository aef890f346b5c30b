"""`condconv`, CLME-CondConv: kernels mixed anew for each call, A-SDM's capacity for shallow layers.

A convolution keeps its own kernel and has experts, kernels of the layers that were dropped or of
others like them. With a routing `a` it convolves with

    own + sum over k of a[k] * (expert[k] - own)

(CondConv, arXiv 1904.04971, around an own kernel; experts of other layers, arXiv 2406.00210). At
`a = 0`, where routers start, that is the convolution as it was, bit for bit.

There are three ways to compute it. Where the whole batch has one routing, the kernels are merged
first, and the convolution costs what a plain one does.

CLME is A-SDM's cross-layer multi-expert: what is left of a thinned block mixes the kernels of all
layers that the block had.

A router gives a routing [R, K], one row for the whole batch or one for each sample, between -1 and
1 for each of K experts. It starts at zero everywhere; its last layer learns from the first step,
for what that layer reads is not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional as F

from leansd.errors import LeansdError
from leansd.plans.anatomy import Anatomy, Unit
from leansd.surgery.lineage import Origin
from leansd.surgery.parts import AddressedUNet, Options, Replacement
from leansd.surgery.parts.experts import (
    Inputs,
    align_resnet,
    fit_kernel,
    list_donors,
    read_inputs,
)
from leansd.text import refuse_unknown


class Kernels(NamedTuple):
    """What a conditional convolution convolves with."""

    own: torch.Tensor
    """[O, I, h, w]."""
    experts: torch.Tensor
    """[K, O, I, h, w]."""
    bias: torch.Tensor | None = None
    geometry: Mapping[str, Any] = MappingProxyType({})
    """Stride, padding and dilation of `conv2d`."""


Convolution = Callable[[torch.Tensor, Kernels, torch.Tensor], torch.Tensor]
"""A way to compute one: inputs [B, I, H, W], kernels, routing [R, K]."""


def merge_kernels(own: torch.Tensor, experts: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
    """Kernels [R, O, I, h, w]: `own` [O, I, h, w] and `experts` [K, O, I, h, w] by routing [R, K].

    It is linear in the routing, so the mean of kernels is the kernel of the mean routing.
    """
    own_share = 1 - routing.sum(1, keepdim=True)
    return (own.flatten() * own_share + routing @ experts.flatten(1)).unflatten(1, own.shape)


def convolve_merged(inputs: torch.Tensor, by: Kernels, routing: torch.Tensor) -> torch.Tensor:
    """One kernel for the whole batch: a routing of one row."""
    (kernel,) = merge_kernels(by.own, by.experts, routing)
    return F.conv2d(inputs, kernel, by.bias, **by.geometry)


def convolve_grouped(inputs: torch.Tensor, by: Kernels, routing: torch.Tensor) -> torch.Tensor:
    """A kernel for each sample, as the groups of one convolution: no more products than plain."""
    kernels = merge_kernels(by.own, by.experts, routing)
    rows, groups = inputs.flatten(0, 1).unsqueeze(0), len(kernels)
    joined = F.conv2d(rows, kernels.flatten(0, 1), groups=groups, **by.geometry)
    outputs = joined.squeeze(0).unflatten(0, (groups, -1))
    return outputs if by.bias is None else outputs + by.bias[:, None, None]


def convolve_stacked(inputs: torch.Tensor, by: Kernels, routing: torch.Tensor) -> torch.Tensor:
    """What each expert adds to the own kernel's output, weighed afterwards.

    It computes K + 1 times the products, all in dense convolutions, and needs no kernel for each
    sample: for training, where each sample has a time step of its own.
    """
    differences = (by.experts - by.own).flatten(0, 1)
    added = F.conv2d(inputs, differences, **by.geometry).unflatten(1, (len(by.experts), -1))
    weighed = (routing[:, :, None, None, None] * added).sum(1)
    return F.conv2d(inputs, by.own, by.bias, **by.geometry) + weighed


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.experts = None

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
        copies = conv.weight.detach().expand(experts, *conv.weight.shape).clone()
        conditional.experts = nn.Parameter(copies, requires_grad=conv.weight.requires_grad)
        return conditional

    def forward(self, input: torch.Tensor, routing: torch.Tensor | None = None) -> torch.Tensor:
        """`input` [B, I, H, W] convolved as the routing [R, K] says, R being 1 or B."""
        if routing is None or self.experts is None:
            return super().forward(input)
        geometry = {name: getattr(self, name) for name in ("stride", "padding", "dilation")}
        kernels = Kernels(self.weight, self.experts, self.bias, geometry)
        return pick_convolution(routing)(input, kernels, routing)


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


WIDTH = 64
"""Hidden units of a router by time."""


class TimeRouter(nn.Module):
    """A routing from the time embedding alone: as many rows as that has."""

    def __init__(self, channels: int, experts: int, width: int = WIDTH) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, width)
        self.output = _make_zero(nn.Linear(width, experts))

    def forward(self, features: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """The routing [R, K] for `temb` [R, C]; `features` are not read."""
        return torch.tanh(self.output(F.silu(self.hidden(F.silu(temb)))))


class ImageRouter(nn.Module):
    """A routing from the features, averaged over the picture, as in CondConv (arXiv 1904.04971)."""

    def __init__(self, channels: int, experts: int) -> None:
        super().__init__()
        self.output = _make_zero(nn.Linear(channels, experts))

    def forward(self, features: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
        """The routing [B, K] for `features` [B, C, H, W]; `temb` is not read."""
        return torch.tanh(self.output(features.mean((2, 3))))


def _make_zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


ROUTERS: Mapping[str, Callable[[Any, int], nn.Module]] = {
    "time": lambda resnet, experts: TimeRouter(resnet.time_emb_proj.in_features, experts),
    "image": lambda resnet, experts: ImageRouter(resnet.in_channels, experts),
}
"""What a routing can follow from, by name: makes the router of a ResNet and so many experts."""


def build_router(routing: str, resnet: ResnetBlock2D, experts: int) -> nn.Module:
    """A router of `experts` experts for `resnet`, on its device and in its dtype.

    Raises:
        LeansdError: there is no such routing, or `resnet` has no time embedding to route by.
    """
    if routing not in ROUTERS:
        raise LeansdError(f"no routing {routing!r} (there are {', '.join(ROUTERS)})")
    if routing == "time" and resnet.time_emb_proj is None:
        raise LeansdError("a ResNet without a time embedding cannot be routed by time")
    return ROUTERS[routing](resnet, experts).to(resnet.conv1.weight)


@torch.no_grad()
def fill_experts(
    resnet: CondConvResnet, mine: Inputs, donors: Sequence[tuple[ResnetBlock2D, Inputs]]
) -> None:
    """Make the donors' kernels the experts of `resnet`, in their order.

    Each donor comes with its input channels; `mine` are those of `resnet`.

    Raises:
        LeansdError: there are not as many donors as experts, or a kernel does not fit.
    """
    firsts, seconds = resnet.conv1.experts, resnet.conv2.experts
    assert firsts is not None  # a conditional ResNet has experts
    assert seconds is not None
    if len(donors) != len(firsts):
        raise LeansdError(f"{len(donors)} donors for {len(firsts)} experts")
    for index, (donor, theirs) in enumerate(donors):
        first = fit_kernel(resnet.conv1.weight, donor.conv1.weight, mine, theirs)
        inner = Inputs(resnet.out_channels), Inputs(donor.out_channels)
        second = fit_kernel(resnet.conv2.weight, donor.conv2.weight, *inner)
        firsts[index].copy_(first)
        seconds[index].copy_(second)


OPTIONS = ("donors", "source", "routing", "align")
"""`donors` (addresses or globs, the block that it lies in if none is given) of the net `source`
(its own if none is given); `routing` by `time` or `image`; whether to `align` them first."""


def validate(unit: Unit, options: Options) -> None:
    """Refuse what is no ResNet, and options that are none."""
    if unit.kind != "resnet":
        raise LeansdError(f"{unit.at} is no ResNet; condconv is for the likes of *.res")
    refuse_unknown("condconv", options, OPTIONS)
    routing = options.get("routing", "time")
    if routing not in ROUTERS:
        raise LeansdError(f"condconv has no routing {routing!r}; there are {', '.join(ROUTERS)}")
    if not isinstance(options.get("align", False), bool):
        raise LeansdError("condconv's align is true or false")


def resolve_options(origin: Origin, options: Options, anatomies: Mapping[str, Anatomy]) -> Options:
    """All options of one place: its donors by their full addresses, without what it comes from."""
    net = options.get("source", origin.net)
    if net not in anatomies:
        raise LeansdError(f"no net {net!r} to take experts from: there are {', '.join(anatomies)}")
    donors = options.get("donors", origin.at.split(".")[0])
    own = origin.at if net == origin.net else None
    anatomy = anatomies[net]
    found = list_donors(anatomy, [donors] if isinstance(donors, str) else donors, own)
    width = anatomies[origin.net][origin.at].channels[1]
    for at in found:
        if anatomy[at].channels[1] != width:
            raise LeansdError(
                f"{at} gives {anatomy[at].channels[1]} channels and {origin.at} {width}; donors "
                "must give as many"
            )
    return {
        "donors": list(found),
        "source": net,
        "routing": options.get("routing", "time"),
        "align": options.get("align", False),
    }


def build(net: AddressedUNet, at: str, options: Options) -> None:
    """Give a ResNet experts, copies of its own kernels, and a router."""
    path = net.anatomy[at].path
    resnet: Any = net.find(at)
    try:
        check_resnet(resnet)
        experts = len(options["donors"])
        router = build_router(options["routing"], resnet, experts)
        conditional = CondConvResnet(resnet, router, experts)
    except LeansdError as error:
        raise LeansdError(f"{at}: {error}") from None
    net.unet.set_submodule(path, conditional)


def inherit(
    student: AddressedUNet,
    at: str,
    nets: Mapping[str, AddressedUNet],
    origin: Origin,
    options: Options,
) -> None:
    """Make the donors' kernels its experts."""
    source = nets[options["source"]]
    resnet: Any = student.find(at)
    mine = read_inputs(student.anatomy, at)
    donors: list[tuple[Any, Inputs]] = [
        (source.find(donor), read_inputs(source.anatomy, donor)) for donor in options["donors"]
    ]
    if options["align"]:
        donors = [(align_resnet(donor, resnet, read, mine), read) for donor, read in donors]
    fill_experts(resnet, mine, donors)


REPLACEMENT = Replacement(validate, build, inherit, resolve_options)

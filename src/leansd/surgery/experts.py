"""Experts: which kernels of other layers a convolution can use, and where they fit.

The layers of an up block read different numbers of channels, the hidden state first, then the skip.
A donor's kernel fits where its hidden or its skip channels are as many as the convolution's own;
elsewhere the expert keeps the own kernel. The ResNets' inner convolutions all fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.resnet import ResnetBlock2D

from leansd.errors import LeansdError
from leansd.plans.anatomy import Anatomy
from leansd.surgery.condconv import CondConvResnet


@dataclass(frozen=True, slots=True)
class Inputs:
    """The input channels of a ResNet: those of the hidden state, then those of its skip."""

    hidden: int
    skip: int = 0

    def match(self, donor: Inputs) -> tuple[tuple[slice, slice], ...]:
        """The parts that `donor` has as well: (own channels, the donor's channels) of each."""
        parts: list[tuple[slice, slice]] = []
        if self.hidden == donor.hidden:
            parts.append((slice(0, self.hidden), slice(0, donor.hidden)))
        if self.skip == donor.skip and self.skip:
            own = slice(self.hidden, self.hidden + self.skip)
            parts.append((own, slice(donor.hidden, donor.hidden + donor.skip)))
        return tuple(parts)


def read_inputs(anatomy: Anatomy, at: str) -> Inputs:
    """The input channels of the unit at address `at`."""
    unit = anatomy.by_address[at]
    skip = sum(anatomy.by_address[other].channels[1] for other in unit.reads[1:])
    return Inputs(unit.channels[0] - skip, skip)


def list_donors(anatomy: Anatomy, patterns: Sequence[str], own: str | None) -> tuple[str, ...]:
    """The ResNets of `anatomy` under addresses or globs, without `own`, in running order.

    Raises:
        LeansdError: an address matches nothing, or no ResNet is left.
    """
    chosen = {unit.at for pattern in patterns for unit in anatomy.select(pattern)}
    donors = tuple(
        unit.at for unit in anatomy if unit.kind == "resnet" and unit.at in chosen - {own}
    )
    if not donors:
        besides = f" besides {own}" if own else ""
        raise LeansdError(f"{', '.join(patterns)}: no ResNet to take experts from{besides}")
    return donors


def fit_kernel(
    own: torch.Tensor, donor: torch.Tensor, mine: Inputs, theirs: Inputs
) -> torch.Tensor:
    """The expert [O, I, h, w] that a donor's kernel [O, J, h, w] makes for `own` [O, I, h, w].

    Raises:
        LeansdError: the kernels differ in size or in output channels.
    """
    if own.shape[0] != donor.shape[0] or own.shape[2:] != donor.shape[2:]:
        raise LeansdError(
            f"a kernel {tuple(donor.shape)} cannot be an expert of one of {tuple(own.shape)}: "
            "output channels and size must be the same"
        )
    expert = own.detach().clone()
    for here, there in mine.match(theirs):
        expert[:, here] = donor.detach()[:, there].to(expert)
    return expert


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
    # A conditional ResNet has experts.
    assert firsts is not None
    assert seconds is not None
    if len(donors) != len(firsts):
        raise LeansdError(f"{len(donors)} donors for {len(firsts)} experts")
    for index, (donor, theirs) in enumerate(donors):
        first = fit_kernel(resnet.conv1.weight, donor.conv1.weight, mine, theirs)
        inner = Inputs(resnet.out_channels), Inputs(donor.out_channels)
        second = fit_kernel(resnet.conv2.weight, donor.conv2.weight, *inner)
        firsts[index].copy_(first)
        seconds[index].copy_(second)

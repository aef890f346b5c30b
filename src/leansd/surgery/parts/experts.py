"""Experts: which kernels of other layers a convolution can use, where they fit, and their order.

The layers of an up block read different numbers of channels, the hidden state first, then the skip.
A donor's kernel fits where its hidden or its skip channels are as many as the convolution's own;
elsewhere the expert keeps the own kernel. The ResNets' inner convolutions all fit.

The channels between the two convolutions of a ResNet come in an order of their own in every layer,
so that mixing the kernels of two layers mixes channels that have nothing to do with each other. A
permutation of the inner channels that keeps the groups of their GroupNorm together changes nothing
but their order; alignment is the one that makes the kernels as similar as they can be.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch.nn import functional as F

from leansd.errors import LeansdError
from leansd.plans.anatomy import Anatomy


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


def align_resnet(
    donor: ResnetBlock2D, to: ResnetBlock2D, theirs: Inputs, mine: Inputs
) -> ResnetBlock2D:
    """A copy of `donor` with its inner channels in the order most similar to those of `to`.

    `theirs` and `mine` are the input channels of the two.

    Raises:
        LeansdError: they differ in inner channels or groups, or scipy is missing.
    """
    groups = donor.norm2.num_groups
    if donor.out_channels != to.out_channels or groups != to.norm2.num_groups:
        raise LeansdError(
            f"{donor.out_channels} inner channels in {groups} groups cannot be aligned to "
            f"{to.out_channels} in {to.norm2.num_groups}"
        )
    if to.conv1.weight.is_meta:
        return donor  # a shape has no order of channels
    similarity = compare_channels(to, donor, mine, theirs)
    return permute_inner(donor, match_channels(similarity, groups))


@torch.no_grad()
def compare_channels(
    own: ResnetBlock2D, donor: ResnetBlock2D, mine: Inputs, theirs: Inputs
) -> torch.Tensor:
    """How similar each inner channel of `own` is to each of `donor` [C, C].

    The sum of the cosines of what writes them (the first convolution, where the inputs match, and
    the time embedding) and of what reads them (the second convolution).
    """
    pairs = [(own.conv2.weight.transpose(0, 1), donor.conv2.weight.transpose(0, 1))]
    for here, there in mine.match(theirs):
        pairs.append((own.conv1.weight[:, here], donor.conv1.weight[:, there]))
    if own.time_emb_proj is not None and donor.time_emb_proj is not None:
        pairs.append((own.time_emb_proj.weight, donor.time_emb_proj.weight))
    return torch.stack([_compare_rows(*pair) for pair in pairs]).sum(0)


def _compare_rows(own: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
    rows = F.normalize(own.flatten(1).float(), dim=1)
    return rows @ F.normalize(donor.flatten(1).float(), dim=1).to(rows).T


def match_channels(similarity: torch.Tensor, groups: int) -> torch.Tensor:
    """For each own channel the donor's that takes its place [C], groups kept together.

    Every pair of groups is matched channel by channel, then the groups by what that gives; both
    are linear assignments, so the result is the best that there is.
    """
    size = similarity.shape[0] // groups
    blocks = similarity.unflatten(1, (groups, size)).unflatten(0, (groups, size)).transpose(1, 2)
    inside = [[_assign(block) for block in row] for row in blocks]
    places = torch.arange(size)
    gains = torch.tensor(
        [
            [float(blocks[own, donor][places, inside[own][donor]].sum()) for donor in range(groups)]
            for own in range(groups)
        ]
    )
    chosen = _assign(gains).tolist()
    return torch.cat([donor * size + inside[own][donor] for own, donor in enumerate(chosen)])


def _assign(gains: torch.Tensor) -> torch.Tensor:
    """The column for each row, each used once, with the largest sum of gains [N, N]."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise LeansdError('aligning experts needs scipy: pip install "leansd[train]"') from error
    _, columns = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    return torch.as_tensor(columns)


@torch.no_grad()
def permute_inner(resnet: ResnetBlock2D, order: torch.Tensor) -> ResnetBlock2D:
    """A copy of `resnet` whose inner channel i is its channel `order[i]`."""
    permuted = copy.deepcopy(resnet)
    for tensor in _list_inner(permuted):
        tensor.copy_(tensor[order.to(tensor.device)])
    return permuted


def _list_inner(resnet: ResnetBlock2D) -> Iterator[torch.Tensor]:
    """Views of all that is indexed by inner channel, that index first."""
    for module in (resnet.conv1, resnet.time_emb_proj, resnet.norm2):
        if module is not None:
            yield from module.parameters()
    yield resnet.conv2.weight.transpose(0, 1)

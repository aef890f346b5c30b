"""Alignment: a ResNet's inner channels put into the order of another's, its function unchanged.

The channels between the two convolutions of a ResNet come in an order of their own in every layer,
so that mixing the kernels of two layers mixes channels that have nothing to do with each other. A
permutation of the inner channels that keeps the groups of their GroupNorm together changes nothing
but their order; this one makes the kernels as similar as they can be.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch.nn import functional as F

from leansd.errors import LeansdError
from leansd.surgery.experts import Inputs


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

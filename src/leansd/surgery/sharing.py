"""Weights that two UNets have in common, held once.

An assembled student has its teacher's deep part, so beside its teacher it costs what is its own.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn


@torch.no_grad()
def share_weights(unet: UNet2DConditionModel, other: UNet2DConditionModel) -> int:
    """Let a UNet hold another's tensors wherever they are the same, bit for bit.

    Afterwards it is on the other's device, in its precision. What is shared must not be trained;
    moving one of the two to another device gives it tensors of its own again.

    Returns:
        the bytes that are held once now.
    """
    # That of `nn.Module`: diffusers' own warns where it has nothing to warn of.
    nn.Module.to(unet, dtype=other.dtype)
    there: dict[object, list[nn.Parameter]] = {}
    for parameter in other.parameters():
        there.setdefault(_sign(parameter), []).append(parameter)
    shared = 0
    for parameter in unet.parameters():
        twin = _find_twin(parameter, there.get(_sign(parameter), []))
        if twin is None:
            parameter.data = parameter.data.to(other.device)
        else:
            parameter.data = twin.data
            shared += parameter.nbytes
    nn.Module.to(unet, device=other.device)  # buffers
    return shared


def _find_twin(tensor: Tensor, candidates: list[nn.Parameter]) -> nn.Parameter | None:
    for each in candidates:
        if torch.equal(each.to(tensor.device), tensor):
            return each
    return None


def _sign(tensor: Tensor) -> object:
    """What tensors that are equal have in common, and others hardly ever."""
    return tuple(tensor.shape), tuple(tensor.detach().flatten()[:4].tolist())

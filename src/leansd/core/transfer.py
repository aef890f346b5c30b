"""What devices do each in their own way: taking tensors in, and numbers of double precision."""

from __future__ import annotations

import torch


def send(
    tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The tensor on a device; work that is under way there goes on meanwhile.

    CUDA copies from ordinary memory once all work before it is done, and the host waits for that.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, dtype, non_blocking=True)
    return tensor.to(device, dtype)


WITHOUT_DOUBLES = ("mps",)
"""Kinds of devices that have no double precision: Apple's."""


def make_exact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the most precise type that its device has."""
    single = tensor.device.type in WITHOUT_DOUBLES
    return tensor.to(torch.float32 if single else torch.float64)

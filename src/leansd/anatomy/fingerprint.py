"""Which weights a network has, in sixteen hex digits."""

from __future__ import annotations

from hashlib import sha256

import torch

SAMPLED = 64
"""Values of every weight that a fingerprint looks at."""


def fingerprint_module(module: torch.nn.Module) -> str:
    """Sixteen hex digits of a network: its class, the shapes and a sample of all its weights.

    The same in single and in half precision.
    """
    digest = sha256(type(module).__name__.encode())
    for key, value in module.state_dict().items():
        digest.update(f"{key} {list(value.shape)}".encode())
        digest.update(encode_tensor(sample_weight(value).half()))
    return digest.hexdigest()[:16]


def sample_weight(value: torch.Tensor) -> torch.Tensor:
    """Some values of a weight, evenly spread; training changes them all."""
    if value.is_meta or not value.numel():
        return torch.empty(0, dtype=value.dtype)
    flat = value.reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLED)]


def encode_tensor(value: torch.Tensor) -> bytes:
    """The values of a tensor as bytes."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

"""Fingerprints of networks, pipelines and pipeline calls: what a drawn picture follows from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import singledispatch
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from leansd.anatomy.reading import encode_tensor, sample_weight
from leansd.errors import LeansdError
from leansd.version import __version__


def fingerprint_pipe(pipe: DiffusionPipeline) -> str:
    """Sixteen hex digits of a pipeline: its classes, the shapes and a sample of all its weights.

    Adapter scales and other switches that change no weight are not seen.
    """
    digest = sha256(f"{type(pipe).__name__} {pipe.device.type} {_versions()}".encode())
    for name, part in sorted(pipe.components.items()):
        digest.update(f"{name} {type(part).__name__}".encode())
        if isinstance(part, torch.nn.Module):
            for key, value in part.state_dict().items():
                digest.update(f"{key} {list(value.shape)} {value.dtype}".encode())
                digest.update(encode_tensor(sample_weight(value)))
    return digest.hexdigest()[:16]


def fingerprint_case(facts: Mapping[str, Any]) -> str:
    """Sixteen hex digits of what all pictures of a case share."""
    return sha256(describe(dict(facts))).hexdigest()[:16]


def fingerprint_call(arguments: Mapping[str, Any], seed: int) -> str:
    """Sixteen hex digits of one call.

    Raises:
        LeansdError: an argument is of a kind that has no fingerprint.
    """
    return sha256(describe({**arguments, "seed": seed})).hexdigest()[:16]


@singledispatch
def describe(value: Any) -> bytes:
    """The content of an argument as bytes: equal content, equal bytes."""
    raise LeansdError(
        f"an argument of type {type(value).__name__} cannot be told from another, so its pictures "
        "cannot be kept: leave `keep` out"
    )


@describe.register(str)
@describe.register(int)
@describe.register(float)
@describe.register(type(None))
def _(value: str | float | None) -> bytes:
    return json.dumps(value).encode()


@describe.register
def _(value: Tensor) -> bytes:
    return f"{value.dtype} {list(value.shape)}".encode() + encode_tensor(value)


@describe.register
def _(value: np.ndarray) -> bytes:
    return f"{value.dtype} {list(value.shape)}".encode() + value.tobytes()


@describe.register
def _(value: Image) -> bytes:
    return f"{value.mode} {value.size}".encode() + value.tobytes()


@describe.register(list)
@describe.register(tuple)
def _(value: Sequence[Any]) -> bytes:
    return b"[" + b",".join(sha256(describe(item)).digest() for item in value) + b"]"


@describe.register
def _(value: dict) -> bytes:
    return b"{" + describe([[str(key), value[key]] for key in sorted(value)]) + b"}"


def _versions() -> str:
    return f"leansd {__version__}, torch {version('torch')}, diffusers {version('diffusers')}"

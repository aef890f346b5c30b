"""What an extractor is: a network that looks at pictures, and the file that its weights are in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from leansd.errors import LeansdError
from leansd.scoring.samples import Shown

Look: TypeAlias = Callable[[Shown], Mapping[str, Tensor]]
"""Pictures to what is seen in them: tensors by name, each [n, ...]."""


@dataclass(frozen=True)
class Extractor:
    """A network that scores are made from.

    Attributes:
        weights: what its weights are and where they come from, in words.
        find: the weights where they are on this machine already.
        open: the network, from its weights, on a device.
        name: what tables call it, by its weights and their fingerprint.
        form: of the path of the weights, a file or a folder.
    """

    weights: str
    find: Callable[[], Path | None]
    open: Callable[[Path, torch.device], Look]
    name: Callable[[Path, str], str]
    form: str = "file"


def fingerprint_weights(path: Path) -> str:
    """Sixteen hex digits of a file, or of all files of a folder."""
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    whole = sha256()
    for each in files:
        if path.is_dir():
            whole.update(each.name.encode())
        with each.open("rb") as file:
            while block := file.read(2**20):
                whole.update(block)
    return whole.hexdigest()[:16]


def require_weights(name: str, extractor: Extractor, path: Path | None) -> Path:
    """Where an extractor's weights are.

    Raises:
        LeansdError: they are not there.
    """
    if path is None:
        raise LeansdError(
            f"no weights of {name}: it needs {extractor.weights}; give its "
            f"{extractor.form} by --weights {name}=PATH"
        )
    if not path.exists():
        raise LeansdError(f"no weights of {name} at {path}: it needs {extractor.weights}")
    return path

"""Sources of samples by the kind that a recipe's `data` names.

A new kind is a module with an `open_source(data, setting)`, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from leansd.errors import LeansdError
from leansd.incubation.batches import Source
from leansd.incubation.paired import PairedSource
from leansd.incubation.recipe import DataSettings

SOURCES: Mapping[str, str] = {
    "random": "leansd.incubation.random_latents",
    "drawn": "leansd.incubation.cached_data",
    "folder": "leansd.incubation.cached_data",
    "shards": "leansd.incubation.cached_data",
}


@dataclass(frozen=True)
class DataSetting:
    """What a source is opened with besides its options."""

    pipe: Any
    """The teacher's pipeline: its VAE, text encoders and sampler."""
    folder: Path
    """The run's, for what has no other place."""
    device: torch.device
    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None
    """For all processes."""
    note: Callable[[str], None] = lambda message: None


def open_source(data: DataSettings, setting: DataSetting) -> Source:
    """The source that a recipe names.

    Raises:
        LeansdError: there is none of that kind, or not with these options.
    """
    if data.kind not in SOURCES:
        near = get_close_matches(data.kind, SOURCES, n=1)
        offer = f"did you mean {near[0]}?" if near else f"there are {', '.join(SOURCES)}"
        raise LeansdError(f"data: no kind {data.kind!r}; {offer}")
    source: Source = import_module(SOURCES[data.kind]).open_source(data, setting)
    return PairedSource(source) if data.paired else source

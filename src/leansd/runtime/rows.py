"""The rows of a batch, sorted by picture.

A batch holds its lanes one after the other, and each lane every picture in turn, so that a picture
of a batch of `count` has the rows `place`, `place + count` and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch


def split_rows(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Views of the rows [lanes, ...] of each picture of a batch [lanes * count, ...]."""
    return [tensor[place::count] for place in range(count)]


def join_rows(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    """The batch [lanes * count, ...] of pictures [lanes, ...]; undoes `split_rows`."""
    if len(pictures) == 1:
        return pictures[0]
    return torch.stack(list(pictures), dim=1).flatten(0, 1)


def map_rows(inputs: Any, batch: int, take: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """(Nested) arguments with every tensor of `batch` rows replaced by what `take` makes of it."""
    if isinstance(inputs, torch.Tensor):
        return take(inputs) if inputs.ndim > 0 and inputs.shape[0] == batch else inputs
    if isinstance(inputs, Mapping):
        named = cast(Mapping[Any, Any], inputs)
        return {key: map_rows(value, batch, take) for key, value in named.items()}
    if isinstance(inputs, list | tuple):
        mapped = [map_rows(value, batch, take) for value in cast(Sequence[Any], inputs)]
        return mapped if isinstance(inputs, list) else tuple(mapped)
    return inputs

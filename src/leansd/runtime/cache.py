"""What outputs of units look like, and the rows of a batch by picture."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel

from leansd.plans.anatomy import Anatomy


@dataclass(frozen=True, slots=True)
class Shape:
    """What a unit's output looks like, so that a placeholder can stand in for it."""

    size: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    in_tuple: bool
    """Transformers return a tuple of one tensor."""

    @classmethod
    def of(cls, output: Any) -> Shape:
        tensor = unwrap(output)
        return cls(tensor.shape, tensor.dtype, tensor.device, isinstance(output, tuple))

    def wrap(self, tensor: torch.Tensor) -> Any:
        return (tensor,) if self.in_tuple else tensor

    def make_placeholder(self, batch: int, *, writable: bool) -> torch.Tensor:
        """NaN in this shape: nobody reads it, and if somebody did it would show.

        It takes no memory unless it has to be `writable`, for code that works in place (FreeU,
        T2I-Adapter).
        """
        size = (batch, *self.size[1:])
        if writable:
            return torch.full(size, torch.nan, dtype=self.dtype, device=self.device)
        return torch.full((), torch.nan, dtype=self.dtype, device=self.device).expand(size)


class OutputShapes:
    """What the units of a UNet give, told by the size of its sample."""

    def __init__(self, unet: UNet2DConditionModel, anatomy: Anatomy) -> None:
        self._rows: dict[str, tuple[int, int, bool]] = {}
        for unit in (*anatomy.units, *anatomy.parts):
            takes = inspect.signature(unet.get_submodule(unit.path).forward).parameters
            self._rows[unit.at] = unit.channels[1], unit.scale, "return_dict" in takes
        self._scale = max(unit.scale for unit in anatomy)
        # Padded on all sides, a downsampler halves and rounds up.
        self._rounds_up = unet.config.get("downsample_padding") == 1

    def suit(self, sample: torch.Tensor) -> bool:
        """Whether they are known for this sample [B, C, H, W]."""
        return self._rounds_up or all(side % self._scale == 0 for side in sample.shape[-2:])

    def make_shapes(self, sample: torch.Tensor) -> dict[str, Shape]:
        """The shape of each unit's output; of a part's, only whether it is in a tuple."""
        batch, _, height, width = sample.shape
        return {
            at: Shape(
                (batch, channels, -(-height // scale), -(-width // scale)),
                sample.dtype,
                sample.device,
                in_tuple,
            )
            for at, (channels, scale, in_tuple) in self._rows.items()
        }


def unwrap(output: Any) -> torch.Tensor:
    """The tensor of a unit's output."""
    return output[0] if isinstance(output, tuple) else output


# -- the rows of a batch, sorted by picture --------------------------------------------------------
# A batch holds its lanes one after the other, and each lane every picture in turn, so that a
# picture of a batch of `count` has the rows `place`, `place + count` and so on.


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

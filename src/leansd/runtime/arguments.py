"""The arguments of a UNet call, what outputs of units look like, the rows of a batch by picture."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel

from leansd.core.outputs import make_placeholder
from leansd.plans.anatomy import HEAD, Anatomy

ARGUMENTS = tuple(inspect.signature(UNet2DConditionModel.forward).parameters)[1:]
"""Names of the arguments of a UNet, in their order."""
POSITIONAL = ("sample", "timestep", "encoder_hidden_states")
"""Arguments that are handed on by position, as hooks of others expect them."""


@dataclass(frozen=True)
class UNetArguments:
    """The arguments of one UNet call, read once."""

    named: Mapping[str, Any]
    """The arguments that were given, by name."""

    @classmethod
    def bind(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> UNetArguments:
        return cls({**dict(zip(ARGUMENTS, args, strict=False)), **kwargs})

    @property
    def is_complete(self) -> bool:
        return "sample" in self.named and "timestep" in self.named

    @property
    def sample(self) -> torch.Tensor:
        """The UNet's input [B, C, H, W]."""
        return self.named["sample"]

    @property
    def timestep(self) -> Any:
        return self.named["timestep"]

    @property
    def text(self) -> torch.Tensor | None:
        """The text states [B, tokens, width]."""
        return self.named.get("encoder_hidden_states")

    @property
    def in_dataclass(self) -> bool:
        """Whether the output is wanted in a dataclass, not in a tuple."""
        return self.named.get("return_dict", True)

    @property
    def adds_in_place(self) -> bool:
        """Whether the UNet's forward will add a T2I-Adapter's features in place."""
        if self.named.get("down_intrablock_additional_residuals") is not None:
            return True
        return (
            self.named.get("down_block_additional_residuals") is not None
            and self.named.get("mid_block_additional_residual") is None
        )

    def replace(self, **named: Any) -> UNetArguments:
        return UNetArguments({**self.named, **named})

    def call(self, forward: Callable[..., Any]) -> Any:
        """What `forward` makes of them."""
        first = [self.named[name] for name in POSITIONAL if name in self.named]
        others = {name: each for name, each in self.named.items() if name not in POSITIONAL}
        return forward(*first, **others)


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
        """What stands for an output of this shape that nobody reads, for `batch` rows."""
        size = (batch, *self.size[1:])
        return make_placeholder(size, self.dtype, self.device, writable=writable)


class OutputShapes:
    """What the units of a UNet give, told by the size of its sample."""

    def __init__(self, unet: UNet2DConditionModel, anatomy: Anatomy) -> None:
        self._rows: dict[str, tuple[int, int, bool]] = {}
        for unit in (*anatomy.units, *anatomy.parts):
            takes = inspect.signature(unet.get_submodule(unit.path).forward).parameters
            self._rows[unit.at] = unit.channels[1], unit.scale, "return_dict" in takes
        self._latents = anatomy[HEAD].channels[1]
        self._scale = max(unit.scale for unit in anatomy)
        # Padded on all sides, a downsampler halves and rounds up.
        self._rounds_up = unet.config.get("downsample_padding") == 1

    def suit(self, sample: torch.Tensor) -> bool:
        """Whether they are known for this sample [B, C, H, W]."""
        return self._rounds_up or all(side % self._scale == 0 for side in sample.shape[-2:])

    def pick_latents(self, sample: torch.Tensor) -> torch.Tensor:
        """The channels [B, C, H, W] of the UNet's input that its output stands for."""
        return sample[:, : self._latents]

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

"""Outputs of units by address, and units fed with another UNet's: both by patched forwards.

A tapped UNet stays patched while it is trained, since gradient checkpointing calls its units again
on the way back. Unless it is watched or fed, its units run as they were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from leansd.anatomy import read_anatomy
from leansd.plans.address import get_block
from leansd.plans.anatomy import HEAD, Anatomy, Unit
from leansd.runtime.hooks import Forward, ForwardHooks

Features = dict[str, Tensor]
"""Outputs [B, C, h, w] of units by address."""


class FeatureTaps:
    """The outputs of some units of a UNet, while it is watched.

    Raises:
        LeansdError: an address is no unit's.
    """

    def __init__(self, unet: UNet2DConditionModel, addresses: Collection[str]) -> None:
        anatomy = read_anatomy(unet)
        modules = {at: unet.get_submodule(anatomy[at].path) for at in addresses}
        self._features: Features | None = None
        self._hooks = ForwardHooks(modules, self._keep)

    @contextmanager
    def watching(self) -> Iterator[Features]:
        """Outputs of the call within, filled as it runs."""
        self._features = features = {}
        try:
            yield features
        finally:
            self._features = None

    def release(self) -> None:
        """Leave the UNet as it was."""
        self._hooks.release()

    def _keep(self, at: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if self._features is not None:  # transformers wrap theirs
            first = output[0] if isinstance(output, tuple) else output
            self._features[at] = getattr(first, "sample", first)
        return output


class TeacherInputs:
    """A student that computes only the blocks that it trains, on the teacher's features.

    Units that are not trained give the output of the teacher's unit that they stand for, the head
    apart; a unit that reads another block's output is given the teacher's. No gradient then leaves
    a block, but for what the head gives back.

    Args:
        trained: addresses of units.
        stands_for: the teacher's unit that each unit of the student stands for.
    """

    def __init__(
        self, unet: UNet2DConditionModel, trained: Collection[str], stands_for: Mapping[str, str]
    ) -> None:
        self.anatomy = read_anatomy(unet)
        self.trained = frozenset(trained)
        self.stands_for = stands_for
        self.given: Mapping[str, Tensor] | None = None
        """The teacher's outputs to run on; without them the UNet computes all of itself.

        They must outlive the call: gradient checkpointing reads them again on the way back.
        """
        modules = {
            unit.at: unet.get_submodule(unit.path)
            for unit in self.anatomy
            if unit.at != HEAD and (unit.at not in self.trained or list_foreign(unit))
        }
        self._hooks = ForwardHooks(modules, self._feed)

    @property
    def addresses(self) -> tuple[str, ...]:
        """The teacher's units whose outputs are needed."""
        outside = {unit.at for unit in self.anatomy if unit.at not in self.trained}
        read = {at for unit in self.anatomy if unit.at in self.trained for at in list_foreign(unit)}
        return tuple(dict.fromkeys(self.stands_for[at] for at in (outside - {HEAD}) | read))

    def release(self) -> None:
        """Leave the UNet as it was."""
        self._hooks.release()

    def _feed(self, at: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        given = self.given
        if given is None:
            return forward(*args, **kwargs)
        if at not in self.trained:
            features = given[self.stands_for[at]]
            # In the form that a unit's caller takes: transformers are asked for a tuple.
            return (features,) if kwargs.get("return_dict") is False else features
        unit = self.anatomy[at]
        others = {each: given[self.stands_for[each]] for each in list_foreign(unit)}
        return forward(replace_inputs(self.anatomy, unit, args[0], others), *args[1:], **kwargs)


def list_foreign(unit: Unit) -> tuple[str, ...]:
    """What a unit reads of other blocks."""
    return tuple(at for at in unit.reads if get_block(at) != get_block(unit.at))


def list_boundary(anatomy: Anatomy, block: str) -> tuple[str, ...]:
    """The units of a block whose outputs leave it, skips included."""
    read = {at for unit in anatomy for at in list_foreign(unit)}
    return tuple(unit.at for unit in anatomy if unit.at in read and get_block(unit.at) == block)


def replace_inputs(
    anatomy: Anatomy, unit: Unit, inputs: Tensor, others: Mapping[str, Tensor]
) -> Tensor:
    """A unit's input [B, C, h, w], the hidden state and then the skip, with `others` in it."""
    skips = [anatomy[at].channels[1] for at in unit.reads[1:]]
    own = inputs.split([unit.channels[0] - sum(skips), *skips], dim=1)
    parts = [
        others.get(at, part).to(inputs.dtype) for at, part in zip(unit.reads, own, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

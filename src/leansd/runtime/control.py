"""ControlNets under a plan: a step that skips the encoder skips the ControlNet, too.

A ControlNet is a copy of the UNet's encoder and mid block; a skipped step that still ran it in full
would not be fast. It runs at the calls at which the whole encoder runs, and between them gives the
residuals of its last run. Of those, only the ones that somebody reads are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from leansd.plans.anatomy import Anatomy
from leansd.plans.liveness import Call, Program
from leansd.runtime.store import Shape
from leansd.runtime.weave import Weave


@dataclass(frozen=True)
class Prospect:
    """The UNet call that is to come, and the program that it is part of."""

    index: int
    program: Program


Foresee = Callable[[Any], Prospect | None]
"""From a time step; None where nobody knows."""


@dataclass
class Memory:
    """One ControlNet run: the residuals that are read before the next, shapes of the others."""

    circumstances: object
    shapes: list[Shape]
    tensors: dict[int, torch.Tensor]


class Control:
    """Woven around a pipeline's ControlNet (or several as one) while the pipeline is attached."""

    def __init__(self, anatomy: Anatomy, controlnet: nn.Module, foresee: Foresee) -> None:
        self._anatomy = anatomy
        self._foresee = foresee
        self._memories: dict[int, Memory] = {}
        self._here = (-1, -1)
        self.runs = 0
        """How often the ControlNet itself ran."""
        self._weave = Weave({"control": controlnet}, self._around)

    def release(self) -> None:
        self._weave.release()
        self._memories.clear()

    @property
    def bytes_kept(self) -> int:
        return sum(
            tensor.nbytes
            for memory in self._memories.values()
            for tensor in memory.tensors.values()
        )

    def _around(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        prospect = self._foresee(timestep)
        if prospect is None or kwargs.get("return_dict", True):
            self._memories.clear()
            self.runs += 1
            return forward(*args, **kwargs)
        ordinal = self._count(prospect.index)
        scale = repr(kwargs.get("conditioning_scale"))
        circumstances = (sample.shape, sample.dtype, sample.device, scale)
        memory = self._memories.get(ordinal)
        fits = memory is not None and memory.circumstances == circumstances
        if memory is not None and fits and not runs_control(prospect.program[prospect.index]):
            if not list_reads(self._anatomy, prospect):
                del self._memories[ordinal]
            return self._give(memory)
        self.runs += 1
        residuals = forward(*args, **kwargs)
        tensors = [*residuals[0], residuals[1]]
        reads = list_reads(self._anatomy, prospect)
        kept = {place: tensors[place].detach().clone() for place in reads}
        self._memories[ordinal] = Memory(circumstances, [Shape.of(each) for each in tensors], kept)
        return residuals

    def _count(self, index: int) -> int:
        """Which of the calls at this step it is: guidance branches may be called apart."""
        last, ordinal = self._here
        if index < last:
            self._memories.clear()
        ordinal = ordinal + 1 if index == last else 0
        self._here = (index, ordinal)
        return ordinal

    def _give(self, memory: Memory) -> tuple[list[torch.Tensor], torch.Tensor]:
        given = [
            memory.tensors[place].clone()
            if place in memory.tensors
            else shape.make_placeholder(shape.size[0], writable=False)
            for place, shape in enumerate(memory.shapes)
        ]
        return given[:-1], given[-1]


def runs_control(call: Call) -> bool:
    """Whether the whole encoder is computed, so that the ControlNet has to be as well."""
    pattern = call.pattern
    skipped = [*pattern.inherited, *pattern.idle]
    return not any(at.startswith("dn") for at in skipped)


def list_reads(anatomy: Anatomy, prospect: Prospect) -> set[int]:
    """Places of the residuals that are read after this call and before the next ControlNet run.

    The residuals are added to the skips, in their order, and the last of them to the mid block's
    output.
    """
    readers = list_readers(anatomy)
    places: set[int] = set()
    program = prospect.program
    for call in program.calls[prospect.index - program.start + 1 :]:
        if runs_control(call):
            break
        computed = call.pattern.computed
        places.update(place for place, at in enumerate(readers) if at in computed)
    return places


def list_readers(anatomy: Anatomy) -> Sequence[str]:
    """For every skip in the order they are made, the unit that reads it; last, the mid's reader."""
    ups = [unit for unit in anatomy if unit.at.startswith("up") and len(unit.reads) == 2]
    by_skip = {unit.reads[1]: unit.at for unit in ups}
    skips = [unit.at for unit in anatomy if unit.at in by_skip]
    return [*(by_skip[at] for at in skips), ups[0].at]

"""ControlNets under a plan: a step that skips the encoder skips the ControlNet, too.

A ControlNet is a copy of the UNet's encoder and mid block; a skipped step that still ran it in full
would not be fast. It runs at the calls at which the whole encoder runs, and between them gives the
residuals of its last run. Of those, only the ones that somebody reads are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from leansd.plans.anatomy import Anatomy
from leansd.plans.liveness import NO_NETS, Call, Net, Program
from leansd.plans.row import OWN
from leansd.runtime.engine import find_attachment
from leansd.runtime.store import Shape
from leansd.runtime.weave import Weave

if TYPE_CHECKING:
    from leansd.runtime.attachment import Attachment


@dataclass(frozen=True)
class Prospect:
    """The UNet call that is to come, and the program that it is part of."""

    index: int
    program: Program
    starts: bool
    """Whether a new run begins with it."""


@dataclass
class Memory:
    """A ControlNet run: the residuals that are still to be read, and the shapes of all."""

    circumstances: object
    shapes: list[Shape]
    tensors: dict[int, torch.Tensor]


class ControlRun:
    """The state of a ControlNet in one run of one pipeline."""

    def __init__(self) -> None:
        self.calls = 0
        self.runs = 0
        """How many of the calls ran the ControlNet."""
        self.begun = False
        """Whether the UNet has been called in this run."""
        self.memories: dict[int, Memory] = {}
        """By the place of the call in its step: guidance branches may be called apart."""
        self._here = (-1, -1)

    @property
    def bytes_kept(self) -> int:
        memories = self.memories.values()
        return sum(tensor.nbytes for memory in memories for tensor in memory.tensors.values())

    def count(self, index: int) -> int:
        """Which of the calls at this step it is."""
        last, ordinal = self._here
        ordinal = ordinal + 1 if index == last else 0
        self._here = (index, ordinal)
        self.calls += 1
        return ordinal


class Control:
    """Woven around a ControlNet (or several as one) while pipelines with it are attached."""

    def __init__(self, anatomy: Anatomy, controlnet: nn.Module) -> None:
        self.attachments: tuple[Attachment, ...] = ()
        self.weave = Weave({"control": controlnet}, self._around)
        self._anatomy = anatomy

    def _around(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        attachment = find_attachment(self.attachments, timestep)
        prospect = attachment.foresee(timestep) if attachment is not None else None
        if attachment is None or prospect is None or kwargs.get("return_dict", True):
            return forward(*args, **kwargs)
        run = attachment.get_control_run(prospect)
        ordinal = run.count(prospect.index)
        scale = repr(kwargs.get("conditioning_scale"))
        circumstances = (sample.shape, sample.dtype, sample.device, scale)
        reads = list_reads(self._anatomy, prospect, attachment.company.nets)
        memory = run.memories.get(ordinal)
        fits = memory is not None and memory.circumstances == circumstances
        if memory is not None and fits and not runs_control(prospect.program[prospect.index]):
            given = _give(memory)
            memory.tensors = {place: memory.tensors[place] for place in reads}
            return given
        run.runs += 1
        residuals = forward(*args, **kwargs)
        tensors = [*residuals[0], residuals[1]]
        kept = {place: tensors[place].detach().clone() for place in reads}
        run.memories[ordinal] = Memory(circumstances, [Shape.of(each) for each in tensors], kept)
        return residuals


def _give(memory: Memory) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The residuals again; placeholders where nobody reads them."""
    given = [
        memory.tensors[place].clone()
        if place in memory.tensors
        else shape.make_placeholder(shape.size[0], writable=False)
        for place, shape in enumerate(memory.shapes)
    ]
    return given[:-1], given[-1]


_CONTROLS: WeakValueDictionary[int, Control] = WeakValueDictionary()
"""By the id of the ControlNet, which the weave keeps alive."""
_LOCK = threading.Lock()


def attach_control(attachment: Attachment, anatomy: Anatomy) -> Control | None:
    """Weave the ControlNet of the attachment's pipeline, if it has one and it is not woven yet."""
    controlnet = getattr(attachment.pipe, "controlnet", None)
    if not isinstance(controlnet, nn.Module):
        return None
    with _LOCK:
        control = _CONTROLS.get(id(controlnet))
        if control is None:
            control = _CONTROLS[id(controlnet)] = Control(anatomy, controlnet)
        control.attachments += (attachment,)
        return control


def detach_control(attachment: Attachment, control: Control) -> None:
    """Undo `attach_control`; after the last one the ControlNet is as it was."""
    with _LOCK:
        control.attachments = tuple(each for each in control.attachments if each is not attachment)
        if not control.attachments:
            control.weave.release()
            for key in [key for key, each in _CONTROLS.items() if each is control]:
                del _CONTROLS[key]


def runs_control(call: Call) -> bool:
    """Whether the whole encoder is computed, so that the ControlNet has to be as well."""
    pattern = call.pattern
    skipped = [*pattern.inherited, *pattern.idle]
    return not any(at.startswith("dn") for at in skipped)


def list_reads(anatomy: Anatomy, prospect: Prospect, nets: Mapping[str, Net] = NO_NETS) -> set[int]:
    """Places of the residuals that are read after this call and before the next ControlNet run.

    The residuals are added to the skips, in their order, and the last of them to the mid block's
    output. Another net takes those of the skips that it has.
    """
    there = {OWN: anatomy, **{name: net.anatomy for name, net in nets.items()}}
    own = list(find_readers(anatomy))
    places: set[int] = set()
    program = prospect.program
    for call in program.calls[prospect.index - program.start + 1 :]:
        if runs_control(call):
            break
        readers = find_readers(there[call.net])
        computed = call.pattern.computed
        places.update(
            place for place, at in enumerate(own) if at in readers and readers[at] in computed
        )
    return places


def find_readers(anatomy: Anatomy) -> dict[str, str]:
    """For every skip in the order they are made, the unit that reads it; last, the mid's reader."""
    ups = [unit for unit in anatomy if unit.at.startswith("up") and len(unit.reads) == 2]
    by_skip = {unit.reads[1]: unit.at for unit in ups}
    skips = {unit.at: by_skip[unit.at] for unit in anatomy if unit.at in by_skip}
    return {**skips, "mid": ups[0].at}

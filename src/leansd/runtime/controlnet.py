"""ControlNets under a plan: a step that skips the encoder skips the ControlNet, too.

A ControlNet is a copy of the UNet's encoder and mid block; a skipped step that still ran it in full
would not be fast. It runs at the calls at which the whole encoder runs, and between them gives the
residuals of its last run. Of those, only the ones that somebody reads are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from leansd.anatomy.reading import read_anatomy
from leansd.errors import LeansdError
from leansd.plans.anatomy import Anatomy
from leansd.plans.liveness import Call, Net, Program
from leansd.plans.row import OWN
from leansd.runtime.arguments import Shape, UNetArguments
from leansd.runtime.hooks import ForwardHooks
from leansd.runtime.report import RunStats
from leansd.runtime.watch import Conditions

DOWN_RESIDUALS = "down_block_additional_residuals"
MID_RESIDUAL = "mid_block_additional_residual"


@dataclass
class _Residuals:
    """A ControlNet run: the residuals that are still to be read, and the shapes of all."""

    batch: tuple[object, ...]
    conditions: Conditions
    shapes: list[Shape]
    tensors: dict[int, torch.Tensor]

    def give(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The residuals again; placeholders where nobody reads them."""
        given = [
            self.tensors[place].clone()
            if place in self.tensors
            else shape.make_placeholder(shape.size[0], writable=False)
            for place, shape in enumerate(self.shapes)
        ]
        return given[:-1], given[-1]


@dataclass
class ControlResiduals:
    """The state of a ControlNet in one run of one pipeline."""

    stats: RunStats
    branches: dict[int, _Residuals] = field(default_factory=dict[int, _Residuals])
    """Residuals by the place of the call in its step: guidance branches may be called apart."""
    index: int = -1
    ordinal: int = 0
    replay: Callable[[], Any] | None = None
    """Runs the ControlNet after all, where the last call of it gave what was kept."""

    def count(self, index: int) -> int:
        """Which of the calls at this step it is."""
        self.ordinal = self.ordinal + 1 if index == self.index else 0
        self.index = index
        self.stats.control_calls += 1
        return self.ordinal


@dataclass(frozen=True)
class UpcomingCall:
    """The UNet call that is to come, and the program that it is part of."""

    index: int
    program: Program
    residuals: ControlResiduals
    nets: Mapping[str, Net]
    """The others that the program runs."""
    is_full: bool = False
    """Whether everything is computed, whatever the program says."""
    keeps_all: bool = False
    """Whether it is not certain yet which residuals will be read."""


class ControlHook:
    """Around a ControlNet (or several as one) while pipelines with it are attached."""

    def __init__(
        self,
        anatomy: Anatomy,
        controlnet: nn.Module,
        find_follower: Callable[[tuple[Any, ...], Any], Any],
    ) -> None:
        """
        Args:
            anatomy: of the pipeline's UNet.
            find_follower: tells whose call one at a time step is.
        """
        self._anatomy = anatomy
        self._find_follower = find_follower
        self.followers: tuple[Any, ...] = ()
        """The followers whose pipelines have the ControlNet."""
        self.hooks = ForwardHooks({"control": controlnet}, self._around)

    def _around(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = UNetArguments.bind(args, kwargs)
        wanted_tuple = arguments.is_complete and not kwargs.get("return_dict", True)
        follower = None
        if wanted_tuple:
            follower = self._find_follower(self.followers, arguments.timestep)
        coming: UpcomingCall | None = follower.peek(arguments) if follower is not None else None
        if coming is None:
            return forward(*args, **kwargs)
        state = coming.residuals
        ordinal = state.count(coming.index)
        sample = arguments.sample
        batch = (sample.shape, sample.dtype, sample.device)
        conditions = Conditions(arguments.named)
        reads = list_reads(self._anatomy, coming)
        last = state.branches.get(ordinal)
        runs = coming.is_full or runs_control(coming.program[coming.index])
        fits = last is not None and last.batch == batch
        if last is not None and fits and not (runs or conditions.find_change(last.conditions)):
            given = last.give()
            state.replay = lambda: forward(*args, **kwargs)
            last.tensors = {place: last.tensors[place] for place in reads}
            return given
        state.stats.control_runs += 1
        state.replay = None
        residuals = forward(*args, **kwargs)
        tensors = [*residuals[0], residuals[1]]
        places = range(len(tensors)) if coming.keeps_all else reads
        kept = {place: tensors[place].detach().clone() for place in places}
        shapes = [Shape.of(each) for each in tensors]
        state.branches[ordinal] = _Residuals(batch, conditions, shapes, kept)
        return residuals


def complete_residuals(state: ControlResiduals, arguments: UNetArguments) -> UNetArguments:
    """The arguments of a UNet call that turned out to be a full one after the ControlNet's call.

    Of the residuals that it gave, only those are real that the plan would have read.
    """
    if state.replay is None or arguments.named.get(MID_RESIDUAL) is None:
        return arguments
    state.stats.control_runs += 1
    down, mid = state.replay()
    state.replay = None
    batch = arguments.named[MID_RESIDUAL].shape[0]

    def fit(residual: torch.Tensor) -> torch.Tensor:
        # In guess mode the unconditional half gets zeros.
        half = residual.shape[0] != batch
        return torch.cat([torch.zeros_like(residual), residual]) if half else residual

    return arguments.replace(**{DOWN_RESIDUALS: [*map(fit, down)], MID_RESIDUAL: fit(mid)})


def select_residuals(
    arguments: UNetArguments, own: UNet2DConditionModel, unet: UNet2DConditionModel
) -> UNetArguments:
    """A call's arguments with a ControlNet's residuals for the skips that another UNet has.

    A ControlNet made for the pipeline's own UNet has one for each of its skips; the other takes
    those of the same addresses.
    """
    residuals = arguments.named.get(DOWN_RESIDUALS)
    if residuals is None:
        return arguments
    mine, theirs = (list(find_readers(read_anatomy(each)))[:-1] for each in (own, unet))
    if len(residuals) != len(mine) or mine == theirs:
        return arguments
    missing = [at for at in theirs if at not in mine]
    if missing:
        raise LeansdError(
            f"the ControlNet has nothing for {missing[0]}, which the pipeline's own UNet has not"
        )
    return arguments.replace(**{DOWN_RESIDUALS: [residuals[mine.index(at)] for at in theirs]})


def runs_control(call: Call) -> bool:
    """Whether the whole encoder is computed, so that the ControlNet has to be as well."""
    pattern = call.pattern
    skipped = [*pattern.inherited, *pattern.idle]
    return not any(at.startswith("dn") for at in skipped)


def list_reads(anatomy: Anatomy, coming: UpcomingCall) -> set[int]:
    """Places of the residuals that are read after this call and before the next ControlNet run.

    The residuals are added to the skips, in their order, and the last of them to the mid block's
    output. Another net takes those of the skips that it has.
    """
    there = {OWN: anatomy, **{name: net.anatomy for name, net in coming.nets.items()}}
    own = list(find_readers(anatomy))
    places: set[int] = set()
    program = coming.program
    for call in program.calls[coming.index - program.start + 1 :]:
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

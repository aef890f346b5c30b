"""What full runs begin and end with, picture by picture, and the UNet called again from there.

The calls of a pipeline are differentiated through, which pipelines forbid, so the UNet is called
apart from them, with the arguments that each run began with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from leansd.core.devices import send
from leansd.core.outputs import guide
from leansd.errors import LeansdError
from leansd.evaluation.runs import CallSet, run_calls
from leansd.runtime.arguments import UNetArguments, join_rows, map_rows
from leansd.runtime.clock import SchedulerClock
from leansd.runtime.guidance import find_scale, guides, has_two_halves
from leansd.runtime.hooks import ForwardHooks

RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


@dataclass(frozen=True)
class RunStart:
    """One picture of a full run."""

    named: Mapping[str, Any]
    """The arguments of its first UNet call; tensors have a row for each lane."""
    lanes: int
    scale: float
    """The guidance scale; 1 where there is one lane."""
    goal: Tensor
    """What the run ended with, [C, H, W]."""


def record_starts(
    pipe: Any,
    calls: CallSet,
    steps: int,
) -> tuple[list[RunStart], Tensor]:
    """Run calls in full; their starts, and their pictures [N, 3, H, W].

    Raises:
        LeansdError: a run ends with numbers that are none, begins late, or has a ControlNet.
    """
    clock = SchedulerClock(pipe)
    begun: list[tuple[Mapping[str, Any], int, int, float]] = []

    def around(_: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = UNetArguments.bind(args, kwargs)
        tick = clock.locate(arguments.timestep)
        if tick is None or not tick.starts:
            return forward(*args, **kwargs)
        why = _explain_odd(pipe, arguments, tick.index)
        if why:
            raise LeansdError(f"rows cannot be fitted to these calls: {why}")
        rows = arguments.sample.shape[0]
        lanes = 2 if has_two_halves(pipe, arguments.sample) else 1
        named = {name: arguments.named[name] for name in arguments.named if name != "timestep"}
        kept = map_rows(named, rows, lambda each: each.detach().clone())
        scale = find_scale(pipe) if lanes == 2 else 1.0
        begun.append((kept, rows // lanes, lanes, scale))
        return forward(*args, **kwargs)

    with ForwardHooks({"unet": pipe.unet}, around):
        finals = run_calls(pipe, calls, steps)
    if not finals.latents.isfinite().all():
        raise LeansdError("a full run ends with numbers that are none (NaN): try another precision")
    goals = iter(finals.latents.float())
    starts = [
        RunStart(_pick_rows(named, lanes * count, place, count), lanes, scale, next(goals))
        for named, count, lanes, scale in begun
        for place in range(count)
    ]
    return starts, finals.pictures


def _explain_odd(pipe: Any, arguments: UNetArguments, index: int) -> str:
    if index:
        return f"a run begins at step {index}, and rows count on its first"
    if any(arguments.named.get(name) is not None for name in RESIDUALS):
        return "a ControlNet or an adapter answers to the latents of every step"
    if guides(pipe) and not has_two_halves(pipe, arguments.sample):
        return "which rows of a batch are whose is not known"
    return ""


def _pick_rows(named: Mapping[str, Any], rows: int, place: int, count: int) -> Mapping[str, Any]:
    return map_rows(named, rows, lambda each: each[place::count].clone())


@dataclass(frozen=True)
class StartBatch:
    """Some pictures, to be taken through a plan together."""

    named: Mapping[str, Any]
    lanes: int
    scale: float
    begin: Tensor
    """What the UNet is given at first, [B, C, H, W], single precision."""
    goals: Tensor
    """[B, C, H, W]."""

    @classmethod
    def of(cls, starts: Sequence[RunStart], device: Any, begin: float = 1.0) -> StartBatch:
        """The batch of some pictures; `begin` scales what they start from."""
        first = starts[0]
        named = _join([each.named for each in starts], first.lanes, device)
        goals = send(torch.stack([each.goal for each in starts]), device)
        sample = named["sample"][-len(starts) :, : goals.shape[1]].float()
        return cls(named, first.lanes, first.scale, sample * begin, goals)

    def call(self, unet: nn.Module, latents: Tensor, timestep: Any) -> tuple[Tensor, ...]:
        """The guided output [B, C, H, W], and the difference of the lanes where there are two."""
        given = self.named["sample"]
        whole = torch.cat([latents.to(given.dtype)] * self.lanes)
        if given.shape[1] > whole.shape[1]:
            whole = torch.cat([whole, given[:, whole.shape[1] :]], dim=1)
        named = {**self.named, "return_dict": False}
        del named["sample"]
        noise = unet(whole, timestep, **named)[0].float()
        if self.lanes == 1:
            return (noise,)
        rest, cond = noise.chunk(2)
        guided = guide(rest, cond, self.scale)
        return guided.output, cast(Tensor, guided.difference)


def _join(parts: Sequence[Any], lanes: int, device: Any) -> Any:
    """Nested arguments of several pictures as those of a batch, on a device."""
    first = parts[0]
    if isinstance(first, Tensor):
        has_rows = first.ndim > 0 and first.shape[0] == lanes
        return send(
            join_rows([cast(Tensor, each) for each in parts]) if has_rows else first, device
        )
    if isinstance(first, Mapping):
        named = cast(Sequence[Mapping[str, Any]], parts)
        return {key: _join([each[key] for each in named], lanes, device) for key in named[0]}
    if isinstance(first, list | tuple):
        listed = cast(Sequence[Sequence[Any]], parts)
        return [_join(each, lanes, device) for each in zip(*listed, strict=True)]
    return first


@contextmanager
def keep_weights(unet: nn.Module) -> Iterator[None]:
    """No gradients for weights meanwhile, only for what runs through them."""
    wanted = [each for each in unet.parameters() if each.requires_grad]
    for each in wanted:
        each.requires_grad_(False)
    try:
        yield
    finally:
        for each in wanted:
            each.requires_grad_(True)


@contextmanager
def recompute_blocks(unet: Any) -> Iterator[None]:
    """Every layer computed again for its gradient, meanwhile."""
    was_on = unet.is_gradient_checkpointing
    unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if not was_on:
            unet.disable_gradient_checkpointing()


# -- memory ----------------------------------------------------------------------------------------


@dataclass
class _Counter:
    """Counts what autograd would keep, and keeps nothing."""

    known: dict[int, StorageWeakRef] = field(default_factory=dict[int, StorageWeakRef])
    bytes: int = 0

    def pack(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        before = self.known.get(storage._cdata)
        # Where one is gone, for nobody keeps it here, another may have its place.
        if before is None or before.expired():
            self.known[storage._cdata] = StorageWeakRef(storage)
            self.bytes += storage.nbytes()

    def unpack(self, _: None) -> Tensor:
        raise LeansdError("what was only counted cannot be differentiated")


def count_saved(unet: nn.Module, call: Callable[[], Iterable[Tensor]]) -> int:
    """Bytes that the gradient of a call keeps besides the weights; the call itself keeps none."""
    weights = [each.untyped_storage() for each in unet.parameters()]
    counter = _Counter({each._cdata: StorageWeakRef(each) for each in weights})
    with torch.enable_grad(), saved_tensors_hooks(counter.pack, counter.unpack):
        list(call())
    return counter.bytes


def find_free_memory(device: torch.device) -> int:
    """Bytes that are free where a device computes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 8 * 2**30  # of a system that does not say

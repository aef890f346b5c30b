"""What a stage goes on from: optimizer, averages, checkpoints, and what the teacher made before.

A checkpoint is whole or not there: a folder that is written beside its place and moved there in one
go. All processes take part, since with sharded states each holds a part of it. A kill leaves the
one before as it was. What cannot be read or written is a LeansdError that says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leansd.core.devices import send
from leansd.errors import LeansdError, read_cause
from leansd.files import OLD, PARTIAL, discard, writing
from leansd.incubation.data.batches import Batch
from leansd.incubation.noise import NoiseDraw
from leansd.incubation.recipe import SCHEDULES, Stage, TrainerSettings
from leansd.incubation.step import TeacherBatch

# -- the optimizer and averages --------------------------------------------------------------------


def build_optimizer(
    settings: TrainerSettings, parameters: Iterable[nn.Parameter], rate: float
) -> torch.optim.Optimizer:
    """The optimizer that a recipe names.

    Raises:
        LeansdError: it needs what is not installed.
    """
    kind = torch.optim.AdamW
    if settings.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit as kind  # type: ignore[import-not-found]
        except ImportError as error:
            raise LeansdError(
                "optimizer adamw8bit needs bitsandbytes and a CUDA device: install it, or take "
                "adamw"
            ) from error
    return kind(list(parameters), lr=rate, betas=settings.betas, weight_decay=settings.weight_decay)


def find_rate(stage: Stage, step: int) -> float:
    """The learning rate of a step: up in a line at first, then by the stage's schedule.

    A function of the step alone: schedulers have a state, which a checkpoint would have to keep.
    """
    warmup = min(1.0, (step + 1) / (stage.warmup + 1))
    return stage.learning_rate * (warmup * SCHEDULES[stage.decay](step / stage.steps))


def list_trained(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: each for name, each in net.named_parameters() if each.requires_grad}


class Ema:
    """An exponential moving average of what trains of a net, by name.

    diffusers' `EMAModel` zips a list of averages to parameters by place and torch's `AveragedModel`
    copies all that is frozen; the one says nothing once the net is another, the other is twice it.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors = {name: each.detach().clone() for name, each in list_trained(net).items()}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Move towards the net's present parameters; short runs forget where they began."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        trained = list_trained(net)
        present = [trained[name].detach() for name in self.tensors]
        torch._foreach_lerp_(list(self.tensors.values()), present, 1 - decay)

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """The net with averaged parameters, within."""
        trained = list_trained(net)
        own = {name: trained[name].detach().clone() for name in self.tensors}
        self.copy_to(net)
        try:
            yield
        finally:
            _copy(own, trained)

    def copy_to(self, net: nn.Module) -> None:
        """Give the net the averaged parameters, for good."""
        _copy(self.tensors, list_trained(net))

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Go on from saved averages.

        Raises:
            LeansdError: they are those of another net.
        """
        if tensors.keys() != self.tensors.keys():
            odd = sorted(tensors.keys() ^ self.tensors.keys())
            raise LeansdError(f"saved averages are another net's: {odd[0]} is in one of them only")
        _copy(tensors, self.tensors)
        self.updates = updates


@torch.no_grad()
def _copy(sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    for name, tensor in sources.items():
        targets[name].copy_(tensor)


def read_peak(device: torch.device) -> dict[str, float]:
    """The most that tensors took on a GPU since this was last asked, in GiB; nothing elsewhere."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak_gib": peak / 2**30}


# -- on disk ---------------------------------------------------------------------------------------

_NAME = re.compile(r"step-(\d+)")
_AVERAGE = "average.safetensors"


@contextmanager
def reporting(what: str, last: Path | None = None) -> Iterator[None]:
    """Say in a sentence what could not be written, and what is intact."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, LeansdError) as error:
        intact = f"; {last} is whole: make room and resume" if last is not None else ""
        raise LeansdError(f"{what}: {read_cause(error)}{intact}") from error


@dataclass(frozen=True)
class Position:
    """Where a stage is."""

    step: int
    stream: Mapping[str, Any]
    skipped: int = 0
    row: int = 0
    """Steps skipped since the last good one."""
    sums: Mapping[str, float] = field(default_factory=dict[str, float])
    """Sums of what was not logged yet, over `count` steps."""
    count: int = 0


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage."""

    folder: Path
    keep: int

    def find_last(self) -> Path | None:
        """The newest whole one."""
        return max(self._list(), default=None)

    def clean(self) -> None:
        """Take away what a kill left half-written or half-deleted."""
        for ending in (PARTIAL, OLD):
            for path in self.folder.glob("*" + ending):
                shutil.rmtree(path, ignore_errors=True)

    def save(self, accelerator: Accelerator, ema: Ema | None, position: Position) -> None:
        """Write one, with the state of all processes; those before stay if that fails."""
        whole = self.folder / f"step-{position.step:08d}"
        partial = whole.with_name(whole.name + PARTIAL)
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        said = f"cannot write a checkpoint into {self.folder}", self.find_last()
        with reporting(*said):
            try:
                partial.mkdir(parents=True, exist_ok=True)
                accelerator.save_state(str(partial))
                rank = accelerator.process_index
                (partial / f"position-{rank}.json").write_text(json.dumps(vars(position)))
                if ema is not None and accelerator.is_main_process:
                    save_file(ema.tensors, partial / _AVERAGE)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk has room again
                raise
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with reporting(*said):
                discard(whole)
                os.replace(partial, whole)
                for old in self._list()[: -self.keep]:
                    discard(old)
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator, ema: Ema | None, path: Path) -> Position:
        """Go on from one of as many processes."""
        file = path / f"position-{accelerator.process_index}.json"
        if len(list(path.glob("position-*.json"))) != accelerator.num_processes:
            raise LeansdError(
                f"{path} was written by another number of processes than "
                f"{accelerator.num_processes}; resume with as many"
            )
        try:
            accelerator.load_state(str(path))
            position = Position(**json.loads(file.read_text()))
            averages = {} if ema is None else load_file(path / _AVERAGE)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise LeansdError(f"cannot read the checkpoint {path}: {error}") from error
        if ema is not None:
            ema.load(averages, updates=position.step - position.skipped)
        return position

    def _list(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))


@dataclass(frozen=True)
class TeacherCache:
    """What the teacher made of a stage's first batches, for the steps after them.

    The teacher is the larger part of a decoupled step. With its tensors on disk it runs for the
    first `steps` steps only; all later ones learn from those batches again, noise included.
    """

    folder: Path
    steps: int
    rank: int = 0

    def load(self, step: int, part: int, device: torch.device) -> TeacherBatch:
        """The batch that a step after the first ones learns from again."""
        path = self._name(step, part)
        try:
            kept = load_file(path)
            return unpack_batch({name: send(tensor, device) for name, tensor in kept.items()})
        except (OSError, SafetensorError, KeyError) as error:
            raise LeansdError(
                f"cannot read {path}, which holds what the teacher made of a batch: {error}; "
                "remove the stage's folder and resume"
            ) from error

    def keep(self, step: int, part: int, taught: TeacherBatch) -> None:
        """Write one; whole, or not at all."""
        with (
            reporting(f"cannot keep the teacher's tensors in {self.folder}"),
            writing(self._name(step, part)) as partial,
        ):
            save_file(pack_batch(taught), partial)

    def clear(self) -> None:
        """Take all of it away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _name(self, step: int, part: int) -> Path:
        return self.folder / f"step-{step % self.steps:08d}-{part}-{self.rank}.safetensors"


def pack_batch(taught: TeacherBatch) -> dict[str, Tensor]:
    """Plain tensors by name; `unpack_batch` gives the batch back, bit for bit."""
    batch = taught.batch
    tensors = {"latents": batch.latents, "text": batch.text, **taught.draw._asdict()}
    tensors |= {"noised": taught.noised, "output": taught.output}
    tensors |= {f"added.{name}": tensor for name, tensor in batch.added.items()}
    tensors |= {f"features.{at}": tensor for at, tensor in taught.features.items()}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def unpack_batch(tensors: Mapping[str, Tensor]) -> TeacherBatch:
    """The batch that was packed; what its samples are called is forgotten."""

    def pick(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }

    return TeacherBatch(
        Batch(tensors["latents"], tensors["text"], pick("added.")),
        NoiseDraw(tensors["timesteps"], tensors["noise"]),
        tensors["noised"],
        tensors["output"],
        pick("features."),
    )


def read_processes() -> PartialState:
    """Which of how many processes this is, as `accelerate launch` has started it.

    Without the flag accelerate takes each of several processes on CPUs for the only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))

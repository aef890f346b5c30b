"""What the teacher made of a stage's first batches, kept on disk for the steps after them.

The teacher is the larger part of a decoupled step. With its tensors on disk it runs for the first
`steps` steps only; all later ones learn from those batches again, noise included.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from leansd.errors import LeansdError
from leansd.incubation.batches import Batch
from leansd.incubation.checkpoints import PARTIAL, reporting
from leansd.incubation.learning import Example
from leansd.incubation.noise import Draw


@dataclass(frozen=True)
class TeacherCache:
    """The examples of one process in one stage."""

    folder: Path
    steps: int
    rank: int = 0

    def load(self, step: int, part: int, device: torch.device) -> Example:
        """The example that a step after the first ones learns from again.

        Raises:
            LeansdError: it cannot be read.
        """
        path = self._name(step, part)
        try:
            return unpack(load_file(path, str(device)))
        except (OSError, SafetensorError, KeyError) as error:
            raise LeansdError(
                f"cannot read {path}, which holds what the teacher made of a batch: {error}; "
                "remove the stage's folder and resume"
            ) from error

    def keep(self, step: int, part: int, example: Example) -> None:
        """Write one; whole, or not at all.

        Raises:
            LeansdError: it cannot be written.
        """
        path = self._name(step, part)
        partial = path.with_name(path.name + PARTIAL)
        with reporting(f"cannot keep the teacher's tensors in {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(pack(example), partial)
            partial.replace(path)

    def clear(self) -> None:
        """Take all of it away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _name(self, step: int, part: int) -> Path:
        return self.folder / f"step-{step % self.steps:08d}-{part}-{self.rank}.safetensors"


def pack(example: Example) -> dict[str, Tensor]:
    """Plain tensors by name; `unpack` gives the example back, bit for bit."""
    batch, draw = example.batch, example.draw
    tensors = {
        "latents": batch.latents,
        "text": batch.text,
        "timesteps": draw.timesteps,
        "noise": draw.noise,
        "noised": example.noised,
        "output": example.output,
    }
    tensors |= {f"added.{name}": tensor for name, tensor in batch.added.items()}
    tensors |= {f"features.{at}": tensor for at, tensor in example.features.items()}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def unpack(tensors: dict[str, Tensor]) -> Example:
    """The example that was packed; what its samples are called is forgotten."""
    return Example(
        Batch(tensors["latents"], tensors["text"], _pick(tensors, "added.")),
        Draw(tensors["timesteps"], tensors["noise"]),
        tensors["noised"],
        tensors["output"],
        _pick(tensors, "features."),
    )


def _pick(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }

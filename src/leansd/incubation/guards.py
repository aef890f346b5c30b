"""What happens to a step whose loss or gradient is not a finite number."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from leansd.errors import LeansdError
from leansd.incubation.losses.outcome import Outcome

MOST = 5
"""Steps in a row that may be skipped."""


@dataclass
class Guard:
    """Counts skipped steps, and stops a run that goes nowhere."""

    folder: Path
    most: int = MOST
    skipped: int = 0
    """In all."""
    row: int = 0
    """Since the last good step."""

    def pass_step(self) -> None:
        """A step was good."""
        self.row = 0

    def skip_step(self, step: int) -> None:
        """A step was not.

        Raises:
            LeansdError: too many in a row were not.
        """
        self.skipped += 1
        self.row += 1
        if self.row >= self.most:
            raise LeansdError(
                f"{self.row} steps in a row, up to {step}, gave no finite loss or gradient; their "
                f"batches lie in {self.folder}. Lower the learning rate, or train in bf16"
            )

    def dump(self, outcome: Outcome, step: int, rank: int) -> Path:
        """Write the batch that a step failed on."""
        path = self.folder / f"step-{step:08d}-rank-{rank}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "latents": outcome.batch.latents,
            "text": outcome.batch.text,
            "timesteps": outcome.timesteps,
            "noised": outcome.noised,
            "student": outcome.student,
            "teacher": outcome.teacher,
        }
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            path,
            {"keys": "\n".join(outcome.batch.keys)},
        )
        return path


def is_finite(*values: torch.Tensor) -> bool:
    """Whether all of them are numbers; waits for the device."""
    return bool(torch.stack([value.detach().float().isfinite().all() for value in values]).all())

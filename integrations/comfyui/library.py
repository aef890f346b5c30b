"""A user's plans: files in one folder, and those that Lean Tune has found, by what they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from leansd.anatomy.reading import encode_tensor, fingerprint_module, sample_weight
from leansd.errors import LeansdError
from leansd.plans.plan import Plan

AUTO = "auto"
"""As a plan: what was tuned for this model, sampler, sigmas and guidance."""
TUNED = "tuned"
"""The folder in the user's folder of plans that tuned ones lie in."""
MANY = 2**22
"""Values of a tensor: of those that have more, some are looked at."""


@dataclass(frozen=True)
class Purpose:
    """What a plan is tuned for."""

    model: str
    """Digest of the weights."""
    sampler: str
    sigmas: tuple[float, ...]
    cfg: float

    @property
    def file_name(self) -> str:
        told = " ".join(f"{sigma:.4g}" for sigma in self.sigmas)
        digest = sha256(told.encode()).hexdigest()[:8]
        steps = len(self.sigmas) - 1
        return f"{self.model[:12]}-{self.sampler}-{steps}-{digest}-cfg{self.cfg:g}.json"


def digest_checkpoint(patcher: Any) -> str:
    """Of the weights that a checkpoint has, whatever LoRAs are in them while they are loaded."""
    prefix = "diffusion_model."
    module = patcher.object_patches_backup.get(prefix[:-1], patcher.model.diffusion_model)
    originals = {
        name.removeprefix(prefix): kept.weight
        for name, kept in patcher.backup.items()
        if name.startswith(prefix)
    }
    return fingerprint_module(module, originals)


def digest_values(given: Any) -> str:
    """Of whatever nodes hand on: tensors by their values, numbers and texts, objects by class."""
    if isinstance(given, torch.Tensor):
        values = given if given.numel() < MANY else sample_weight(given)
        told = f"{list(given.shape)}".encode() + encode_tensor(values.float())
    elif isinstance(given, Mapping):
        told = digest_values([each for pair in sorted(given.items()) for each in pair]).encode()
    elif isinstance(given, list | tuple):
        told = " ".join(map(digest_values, given)).encode()
    elif isinstance(given, str | int | float | None):
        told = repr(given).encode()
    else:
        # An adapter of a LoRA keeps its weights by that name.
        inside = digest_values(getattr(given, "weights", None))
        told = f"{type(given).__name__} {inside}".encode()
    return sha256(told).hexdigest()[:16]


class PlanLibrary:
    """The folder of a user's plans."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def list_files(self) -> list[str]:
        """The plan files that a user keeps, by name."""
        return sorted(path.name for path in self.folder.glob("*.json"))

    def find_path(self, name: str) -> Path:
        """The path of a plan by its file's name.

        Raises:
            LeansdError: the name leads out of the folder.
        """
        path = self.folder / name
        if path.name != name or not name.strip("."):
            raise LeansdError(
                f"{name!r} is no file name: give one without folders, as my-plan.json"
            )
        return path if path.suffix == ".json" else path.with_name(f"{name}.json")

    def save(self, name: str, plan: Plan) -> Path:
        """Keep a plan under a name."""
        path = self.find_path(name)
        plan.save(path)
        return path

    def find_tuned(self, purpose: Purpose) -> Plan | None:
        """What was tuned for a purpose; None where nothing was, or the file is damaged."""
        try:
            return Plan.load(self.folder / TUNED / purpose.file_name)
        except LeansdError:
            return None

    def save_tuned(self, purpose: Purpose, plan: Plan) -> Path:
        path = self.folder / TUNED / purpose.file_name
        plan.save(path)
        return path


def list_choices(library: PlanLibrary, presets: Sequence[str]) -> list[str]:
    """What a user may pick as a plan: presets, then files."""
    return [AUTO, *presets, *library.list_files()]

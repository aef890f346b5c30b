"""Extraction: what networks see in a set of pictures, part by part, kept in files.

Files are named by all that they follow from, so that a stopped extraction goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeAlias
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from leansd.cluster import RunTasks, TaskKind
from leansd.errors import LeansdError
from leansd.evaluation.extractors import EXTRACTORS, Extract, batch_samples
from leansd.evaluation.picture_sets import (
    ExtractionTask,
    PictureBytes,
    PictureGroup,
    PictureSet,
    digest,
    read_task,
)
from leansd.evaluation.quality import Gaussian, fold_gaussian
from leansd.files import write_file
from leansd.loading import find_device

POOLED = "pooled"
"""The features that sets are compared by."""

# -- kept features ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """What extractors saw of a set.

    Attributes:
        folder: where it is kept.
        marks: fingerprints of the extractors, by name, with how pictures are resized for them.
    """

    folder: Path
    pictures: PictureSet
    marks: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.pictures.folder.resolve().name

    @property
    def count(self) -> int:
        return len(self.pictures)

    def list_missing(self, extractors: Sequence[str]) -> list[ExtractionTask]:
        """What is still to be looked at."""
        missing: list[ExtractionTask] = []
        for part in self.pictures.parts:
            left = tuple(each for each in extractors if not self._locate(part, each).is_file())
            if left and part.entries:
                missing.append(ExtractionTask(part, left))
        return missing

    def keep(self, task: ExtractionTask, seen: ExtractedFeatures) -> None:
        for extractor, values in seen.items():
            content = {name: value.contiguous() for name, value in values.items()}
            write_file(self._locate(task.part, extractor), save(content))

    def read(self, extractor: str, name: str = POOLED) -> Iterator[Tensor]:
        """One kind of features [n, ...], part by part, in the order of the set."""
        for part in self.pictures.parts:
            if not part.entries:
                continue
            path = self._locate(part, extractor)
            try:
                with safe_open(path, framework="pt") as file:
                    yield file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise LeansdError(f"{path} is damaged: remove it, and run again") from error

    def read_all(self, extractor: str, name: str = POOLED) -> Tensor:
        """One kind of features of the whole set, [n, ...]."""
        return torch.cat(list(self.read(extractor, name)))

    def locate_gaussian(self, extractor: str) -> Path:
        """The file of the set's Gaussian."""
        facts = f"{self.pictures.fingerprint} {POOLED}", extractor, self.marks[extractor]
        return self.folder / f"{digest(facts)}.safetensors"

    def get_gaussian(self, extractor: str) -> Gaussian:
        """The Gaussian of the set's pooled features, which is kept too."""
        path = self.locate_gaussian(extractor)
        if not path.is_file():
            save_statistics(path, fold_gaussian(self.read(extractor)), self.marks[extractor])
        return load_statistics(path).gaussian

    def _locate(self, part: PictureGroup, extractor: str) -> Path:
        """The file of one part: another picture or other weights, and it is another file."""
        facts = part.fingerprint, extractor, self.marks[extractor]
        return self.folder / f"{digest(facts)}.safetensors"


@dataclass(frozen=True)
class Statistics:
    """A Gaussian from a file, in the place of pictures.

    Attributes:
        mark: of the extractor that it was made with; empty where nobody says.
        marks: of the extractors here.
    """

    name: str
    gaussian: Gaussian
    mark: str = ""
    marks: Mapping[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.gaussian.count

    def get_gaussian(self, extractor: str) -> Gaussian:
        """The Gaussian.

        Raises:
            LeansdError: it was made with other weights, or of pictures resized otherwise.
        """
        if self.mark not in ("", self.marks[extractor]):
            raise LeansdError(
                f"{self.name} was made by another network or resize than {extractor} here: give "
                "the pictures themselves by --reference FOLDER"
            )
        return self.gaussian


def save_statistics(path: Path, gaussian: Gaussian, mark: str) -> Path:
    """Write a Gaussian as safetensors."""
    content = {
        "mean": gaussian.mean,
        "covariance": gaussian.covariance,
        "count": torch.tensor(gaussian.count),
    }
    return write_file(path, save(content, metadata={"extractor": mark}))


def load_statistics(path: str | Path, marks: Mapping[str, str] | None = None) -> Statistics:
    """Read a Gaussian: ours, or an `.npz` of `mu` and `sigma` as pytorch-fid and others write it.

    Raises:
        LeansdError: the file is not there or holds something else.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise LeansdError(
            f"no statistics in {path}: give a folder of pictures, or a file of statistics that "
            f"ends in {' or '.join(READERS)}"
        )
    try:
        return Statistics(path.name, *reader(path), marks or {})
    except FileNotFoundError as error:
        raise LeansdError(f"no reference at {path}: there is neither folder nor file") from error
    except (OSError, ValueError, KeyError, SafetensorError, BadZipFile) as error:
        raise LeansdError(f"{path} holds no statistics that can be read: {error}") from error


def _read_own(path: Path) -> tuple[Gaussian, str]:
    with safe_open(path, framework="pt") as file:
        mark = (file.metadata() or {}).get("extractor", "")
    kept = load_file(path)
    return Gaussian(int(kept["count"]), kept["mean"], kept["covariance"]), mark


def _read_arrays(path: Path) -> tuple[Gaussian, str]:
    with np.load(path, allow_pickle=False) as kept:
        mean, covariance = (torch.from_numpy(kept[name]).double() for name in ("mu", "sigma"))
    return Gaussian(0, mean, covariance), ""


READERS: dict[str, Callable[[Path], tuple[Gaussian, str]]] = {
    ".safetensors": _read_own,
    ".npz": _read_arrays,
}


# -- looking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExtractionConfig:
    """How features are extracted. Plain values only: it travels to other machines."""

    weights: Mapping[str, str] = field(default_factory=dict)
    """Paths by the names of the extractors."""
    size: int | None = None
    """What the middle square of every picture is made first, in pixels."""
    batch: int = 32
    threads: int = 0
    """Threads of torch on a CPU, on which its sums depend; 0 for as many as there are."""
    device: str | None = None


ExtractedFeatures: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""Tensors [n, ...] by extractor and name."""
RunExtraction: TypeAlias = RunTasks[ExtractionConfig, ExtractionTask, ExtractedFeatures]


class Extraction:
    """Has the networks, each from its first use on."""

    def __init__(self, config: ExtractionConfig) -> None:
        self.config = config
        self.device = find_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self._open = cache(self._open_extractor)

    def __call__(
        self, task: tuple[Sequence[PictureBytes], Sequence[str]]
    ) -> dict[str, dict[str, Tensor]]:
        """What extractors see in some pictures; who shares a batch follows from them alone."""
        samples, extractors = task
        seen: dict[str, dict[str, list[Tensor]]] = {name: {} for name in extractors}
        for batch in batch_samples(samples, self.config.batch, self.config.size):
            for name in extractors:
                for kind, values in self._open(name)(batch).items():
                    seen[name].setdefault(kind, []).append(values.float())
        return {
            name: {kind: torch.cat(parts) for kind, parts in kinds.items()}
            for name, kinds in seen.items()
        }

    def _open_extractor(self, name: str) -> Extract:
        return EXTRACTORS[name].open(Path(self.config.weights[name]), self.device)


EXTRACTION = TaskKind[ExtractionConfig, ExtractionTask, ExtractedFeatures](Extraction, read_task)
"""Looking at parts, here or on Ray; files are read where the command runs."""

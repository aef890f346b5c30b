"""What a set is held against: other pictures, or the statistics of some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from leansd.errors import LeansdError
from leansd.evaluation.frechet import Gaussian
from leansd.scoring.features import Features, Statistics


class Reference(Protocol):
    """What metrics ask of a reference."""

    @property
    def name(self) -> str: ...

    @property
    def count(self) -> int:
        """Pictures; 0 where nobody says."""
        ...

    @property
    def features(self) -> Features | None:
        """What was seen of its pictures, where there are pictures."""
        ...

    def get_gaussian(self, extractor: str, name: str) -> Gaussian: ...

    def get_features(self, extractor: str, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Pictured:
    """Pictures, seen or still to be seen."""

    features: Features

    @property
    def name(self) -> str:
        return self.features.pictures.folder.resolve().name

    @property
    def count(self) -> int:
        return len(self.features.pictures)

    def get_gaussian(self, extractor: str, name: str) -> Gaussian:
        """Their Gaussian."""
        return self.features.get_gaussian(extractor, name)

    def get_features(self, extractor: str, name: str) -> Tensor:
        """All features [n, d]."""
        return torch.cat(list(self.features.read(extractor, name)))


@dataclass(frozen=True)
class Summarised:
    """A file of statistics, without the pictures."""

    path: Path
    statistics: Statistics
    marks: Mapping[str, str]
    features: None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def count(self) -> int:
        return self.statistics.gaussian.count

    def get_gaussian(self, extractor: str, name: str) -> Gaussian:
        """The Gaussian.

        Raises:
            LeansdError: it was made with other weights, or of pictures resized otherwise.
        """
        if self.statistics.mark not in ("", self.marks[extractor]):
            raise LeansdError(
                f"{self.path} was made by another network or resize than {extractor} here: give "
                "the pictures themselves by --reference FOLDER"
            )
        return self.statistics.gaussian

    def get_features(self, extractor: str, name: str) -> Tensor:
        """None: statistics do not have them.

        Raises:
            LeansdError: always.
        """
        raise LeansdError(
            f"precision and recall need the reference's pictures, and {self.path} has only "
            "statistics: give --reference FOLDER"
        )

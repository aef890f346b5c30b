"""Looking at pictures part by part, in this process: one network of each kind, opened once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from leansd.loading import find_device
from leansd.scoring.extractors import EXTRACTORS
from leansd.scoring.extractors.extractor import Look
from leansd.scoring.features import Features
from leansd.scoring.pictures import Part
from leansd.scoring.reading import Sample, read_samples
from leansd.scoring.samples import show_samples


@dataclass(frozen=True)
class Manner:
    """How pictures are looked at. Plain values only: it travels to other machines."""

    weights: Mapping[str, str] = field(default_factory=dict)
    """Paths by the names of the extractors."""
    size: int | None = None
    """What the middle square of every picture is made first, in pixels."""
    batch: int = 32
    threads: int = 0
    """Of torch on a CPU, whose sums depend on them; 0 for as many as there are."""
    device: str | None = None


@dataclass(frozen=True)
class Task:
    """A part, and who is still to look at it."""

    part: Part
    extractors: tuple[str, ...]


Seen: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""By extractor and name, tensors [n, ...]."""
Work: TypeAlias = Callable[[Manner, Sequence[Task]], Iterable[tuple[Task, Seen]]]
"""Looks at parts, in any order."""


class Looker:
    """Has the networks, each from its first use on."""

    def __init__(self, manner: Manner) -> None:
        self.manner = manner
        self.device = find_device(manner.device)
        if manner.threads:
            torch.set_num_threads(manner.threads)
        self._opened: dict[str, Look] = {}

    def look(self, samples: Sequence[Sample], extractors: Sequence[str]) -> Seen:
        """What extractors see in some pictures; who shares a batch follows from them alone."""
        seen: dict[str, dict[str, list[Tensor]]] = {name: {} for name in extractors}
        for shown in show_samples(samples, self.manner.batch, self.manner.size):
            for name in extractors:
                for kind, values in self._open(name)(shown).items():
                    seen[name].setdefault(kind, []).append(values.float())
        return {
            name: {kind: torch.cat(parts) for kind, parts in kinds.items()}
            for name, kinds in seen.items()
        }

    def _open(self, name: str) -> Look:
        if name not in self._opened:
            path = Path(self.manner.weights[name])
            self._opened[name] = EXTRACTORS[name].open(path, self.device)
        return self._opened[name]


def look_here(manner: Manner, tasks: Sequence[Task]) -> Iterator[tuple[Task, Seen]]:
    """One part after the other."""
    looker = Looker(manner)
    for task in tasks:
        yield task, looker.look(read_samples(task.part.entries), task.extractors)


def fill_features(
    features: Features,
    extractors: Sequence[str],
    manner: Manner,
    *,
    work: Work = look_here,
    on_part: Callable[[Part], None] = lambda part: None,
) -> None:
    """Look at what has not been looked at yet, and keep each part as it comes.

    Raises:
        LeansdError: a picture or weights cannot be read; what was seen before is kept.
    """
    tasks = [Task(*each) for each in features.list_missing(list(extractors))]
    for task, seen in work(manner, tasks) if tasks else ():
        for name, values in seen.items():
            features.put(task.part, name, values)
        on_part(task.part)

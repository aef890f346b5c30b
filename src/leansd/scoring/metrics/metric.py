"""What a metric is: a number, or several, of what one extractor saw in a set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from torch import Tensor

from leansd.errors import LeansdError
from leansd.scoring.features import Features
from leansd.scoring.references import Reference


class Against(Enum):
    """What a set is held against."""

    PROMPTS = "prompts"
    NOTHING = "nothing"
    GAUSSIAN = "statistics"
    FEATURES = "pictures"
    PARTNERS = "partners"

    @property
    def needs_reference(self) -> bool:
        return self in (Against.GAUSSIAN, Against.FEATURES, Against.PARTNERS)


@dataclass(frozen=True)
class Score:
    """One number of a set.

    Attributes:
        metric: as records have it; names of the tiny CLIP's say so.
        title: as tables have it.
        values: what it is the mean of, one a picture [n]; None where it is of the whole set.
        spread: after ±, by the name of what it is.
    """

    metric: str
    title: str
    value: float
    values: Tensor | None = None
    spread: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, float | int | str] = field(default_factory=dict)


Compute: TypeAlias = Callable[[Features, Reference | None], Sequence[Score]]


@dataclass(frozen=True)
class Metric:
    """How numbers are made.

    Attributes:
        extractor: whose features they are made from.
        meaning: for readers, in a sentence, with its source.
    """

    extractor: str
    against: Against
    compute: Compute
    meaning: str


def require_reference(reference: Reference | None) -> Reference:
    """The reference.

    Raises:
        LeansdError: there is none.
    """
    if reference is None:
        raise LeansdError("nothing to compare with: give --reference FOLDER or STATISTICS")
    return reference


def summarise_values(metric: str, title: str, values: Tensor) -> Score:
    """The mean of values [n], with its standard error."""
    exact = values.double()
    spread = {"standard_error": float(exact.std() / len(exact) ** 0.5)} if len(exact) > 1 else {}
    return Score(metric, title, float(exact.mean()), values, spread)

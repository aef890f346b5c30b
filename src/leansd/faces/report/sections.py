"""What a report is made of. A new kind of section is a class here and a macro in the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from PIL.Image import Image

from leansd.measuring.tables import Table


@dataclass(frozen=True)
class Prose:
    """Paragraphs of plain text."""

    title: str
    paragraphs: Sequence[str]
    kind: ClassVar[str] = "prose"


@dataclass(frozen=True)
class Listing:
    """A table, with notes under it."""

    title: str
    table: Table
    notes: Sequence[str] = ()
    kind: ClassVar[str] = "listing"


@dataclass(frozen=True)
class Drawing:
    """One SVG drawing; `alt` says in words what it shows."""

    svg: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Chart:
    """One drawing or several small ones side by side."""

    title: str
    drawings: Sequence[Drawing]
    notes: Sequence[str] = ()
    kind: ClassVar[str] = "chart"


@dataclass(frozen=True)
class Grid:
    """Pictures under column heads; every row has a name and a remark."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[Image]]]
    notes: Sequence[str] = ()
    kind: ClassVar[str] = "grid"


Section: TypeAlias = Prose | Listing | Chart | Grid

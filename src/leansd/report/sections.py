"""What a report is made of. A new kind of section is a class here and a macro in the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from PIL.Image import Image

from leansd.evaluation.records import Record
from leansd.text import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    """One figure; `alt` says in words what it shows."""

    name: str
    """Of its files, and no other's in the report."""
    figure: Figure
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Chart:
    """One drawing or several side by side."""

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


@dataclass(frozen=True)
class Origin:
    """Where a report comes from: what stands in its head."""

    command: str
    """The command line that makes it again."""
    facts: Mapping[str, str]
    """Device, versions and time (`leansd.evaluation.records.stamp`)."""

    @property
    def place(self) -> str:
        """The device; what was counted on the meta device ran nowhere."""
        device = self.facts["device"]
        return "on no device: nothing ran" if device.startswith("meta") else device


@dataclass(frozen=True)
class Attachment:
    """A file that a page carries, to be saved from it."""

    name: str
    content: str
    about: str


@dataclass(frozen=True)
class Report:
    """All that a page says."""

    title: str
    summary: str
    """What came out, in a sentence that no engineer is needed for."""
    measured: str
    """What was measured or looked at, in a line."""
    sections: Sequence[Section]
    origin: Origin
    attachments: Sequence[Attachment] = ()
    reload: int = 0
    """Seconds after which the page opens itself again; 0 for never."""
    drawings: tuple[Drawing, ...] = field(init=False)
    """Of all sections."""

    def __post_init__(self) -> None:
        charts = [section for section in self.sections if isinstance(section, Chart)]
        drawings = tuple(drawing for chart in charts for drawing in chart.drawings)
        names = [drawing.name for drawing in drawings]
        if len(set(names)) < len(names):
            raise ValueError(f"two drawings of one name among {', '.join(names)}")
        object.__setattr__(self, "drawings", drawings)


def attach_records(records: Sequence[Record], name: str = "records.jsonl") -> Attachment:
    """Every number with its circumstances, as `leansd` reads them again."""
    lines = "".join(f"{record.line()}\n" for record in records)
    return Attachment(name, lines, f"{len(records)} records, one measured number a line of JSON")

"""A report as data, and the page that shows it: no request to anywhere, no script, light and dark.

A new kind of section is a class here and a macro in the template.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from leansd.evaluation.records import Record
from leansd.files import write_file
from leansd.report.figures import declare_colours, embed_svg, encode_png, encode_svg
from leansd.text import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECIBELS = (
    "Decibels (dB) say how close pictures are to those of the reference: 6 more are half the "
    "error, and above about 40 differences are hard to see."
)
LOUDER = 4
"""Times that differences between pictures are amplified."""


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
    """The name of its files; no other drawing of the report has it."""
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
class PictureGrid:
    """Pictures under column heads; every row has a name and a remark."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[Image.Image]]]
    notes: Sequence[str] = ()
    kind: ClassVar[str] = "grid"


Section: TypeAlias = Prose | Listing | Chart | PictureGrid


@dataclass(frozen=True)
class Provenance:
    """Where a report comes from; stands in the head of its page."""

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
class AttachedFile:
    """A file that a page carries, to be saved from it."""

    name: str
    content: str
    about: str


@dataclass(frozen=True)
class ReportPage:
    """All that a page says."""

    title: str
    summary: str
    """The result, in a sentence that no engineer is needed for."""
    measured: str
    """What was measured or looked at, in a line."""
    sections: Sequence[Section]
    attachments: Sequence[AttachedFile] = ()
    reload: int = 0
    """Seconds after which the page opens itself again; 0 for never."""
    drawings: tuple[Drawing, ...] = field(init=False)
    """The drawings of all sections."""

    def __post_init__(self) -> None:
        charts = [section for section in self.sections if isinstance(section, Chart)]
        drawings = tuple(drawing for chart in charts for drawing in chart.drawings)
        names = [drawing.name for drawing in drawings]
        if len(set(names)) < len(names):
            raise ValueError(f"two drawings of one name among {', '.join(names)}")
        object.__setattr__(self, "drawings", drawings)


def attach_records(records: Sequence[Record], name: str = "records.jsonl") -> AttachedFile:
    """Every number with its circumstances, as `leansd` reads them again."""
    lines = "".join(f"{record.line()}\n" for record in records)
    return AttachedFile(name, lines, f"{len(records)} records, one measured number a line of JSON")


def count(number: int, word: str) -> str:
    """`1 stage`, `2 stages`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


# -- pictures ------------------------------------------------------------------------------------


def show_differences(
    title: str,
    columns: Sequence[str],
    reference: tuple[str, str, Sequence[Image.Image]],
    others: Sequence[tuple[str, str, Sequence[Image.Image]]],
) -> PictureGrid:
    """A grid of the reference's pictures, and below them each other row with its difference.

    Args:
        reference: name, remark and pictures, as the rows of `PictureGrid`.
    """
    rows = [reference]
    for name, remark, pictures in others:
        apart = subtract_all(pictures, reference[2])
        rows += [(name, remark, pictures), ("difference", f"{name} - {reference[0]}", apart)]
    return PictureGrid(title, columns, rows, [AMPLIFIED])


AMPLIFIED = f"A difference is amplified {LOUDER} times; grey is none."


def subtract_all(
    pictures: Sequence[Image.Image], reference: Sequence[Image.Image]
) -> list[Image.Image]:
    """The difference of every picture from the one at its place in the reference."""
    return [subtract_pictures(*pair) for pair in zip(pictures, reference, strict=True)]


def subtract_pictures(one: Image.Image, other: Image.Image, times: int = LOUDER) -> Image.Image:
    """How much lighter or darker one is than the other, on grey; what is too much is cut off."""
    ours, theirs = (np.asarray(each.convert("RGB"), dtype=np.int16) for each in (one, other))
    apart = np.clip((ours - theirs) * times + 128, 0, 255)
    return Image.fromarray(apart.astype(np.uint8))


# -- the page --------------------------------------------------------------------------------------

SHOWN = 384
"""Pixels of a picture's longer side on a page; larger ones are made smaller."""
SMALL = 160
"""Up to here pictures are kept to the bit."""


def write_report(path: str | Path, report: ReportPage, origin: Provenance) -> Path:
    """Write a page, and beside it every figure as `STEM-NAME.svg` and `STEM-NAME.png`."""
    path = Path(path)
    vectors = {drawing.name: encode_svg(drawing.figure) for drawing in report.drawings}
    for drawing in report.drawings:
        stem = f"{path.stem}-{drawing.name}"
        write_file(path.with_name(f"{stem}.svg"), vectors[drawing.name])
        write_file(path.with_name(f"{stem}.png"), encode_png(drawing.figure))
    return write_file(path, render_page(report, origin, vectors))


def render_page(
    report: ReportPage, origin: Provenance, vectors: Mapping[str, str] = MappingProxyType({})
) -> str:
    """A report as HTML.

    Args:
        vectors: SVGs by the names of drawings; others are made.
    """
    return (
        _open_templates(vectors)
        .get_template("page.html.j2")
        .render(
            report=report,
            origin=origin,
            anchors=_name_anchors([section.title for section in report.sections]),
            light=Markup(declare_colours("light")),
            dark=Markup(declare_colours("dark")),
        )
    )


def render_section(section: Section) -> str:
    """One section as HTML without its title and notes, for other pages."""
    sections: Any = _open_templates({}).get_template("sections.html.j2").module
    return getattr(sections, section.kind)(section)


def _open_templates(vectors: Mapping[str, str]) -> Environment:
    """The templates, with what they put pictures, files and drawings into a page by."""

    def embed_drawing(drawing: Drawing) -> str:
        svg = vectors.get(drawing.name) or encode_svg(drawing.figure)
        return embed_svg(svg, drawing.name, drawing.alt)

    pages = Environment(
        loader=PackageLoader(__package__ or "leansd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "picture": _embed_picture,
        "download": lambda text: _embed_bytes("text/plain;charset=utf-8", text.encode()),
        "figure": embed_drawing,
    }
    return pages


def _name_anchors(titles: list[str]) -> list[str]:
    """An id for every section; figures have theirs with a dash of their own names in front."""
    anchors: list[str] = []
    for title in titles:
        slug = "at-" + (re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section")
        count = sum(each == slug or each.startswith(f"{slug}_") for each in anchors)
        anchors.append(f"{slug}_{count + 1}" if count else slug)
    return anchors


def _embed_picture(image: Image.Image) -> str:
    """A picture as an address that holds it."""
    shown = image.convert("RGB")
    shown.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    out, is_small = BytesIO(), max(shown.size) <= SMALL
    shown.save(out, "PNG" if is_small else "WEBP", **({} if is_small else {"quality": 88}))
    return _embed_bytes("image/png" if is_small else "image/webp", out.getvalue())


def _embed_bytes(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

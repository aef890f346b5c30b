"""Reports to HTML files: no request to anywhere, no script, light, dark and on paper."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL.Image import Image, Resampling

from leansd.files import write_file
from leansd.report.figures import embed_svg, encode_png, encode_svg
from leansd.report.palette import declare_colours
from leansd.report.sections import Drawing, Provenance, ReportPage, Section

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
    return write_file(path, _render(report, origin, vectors))


def render_page(report: ReportPage, origin: Provenance) -> str:
    """A report as HTML."""
    return _render(report, origin, {each.name: encode_svg(each.figure) for each in report.drawings})


def render_section(section: Section) -> str:
    """One section as HTML without its title and notes, for other pages."""
    sections: Any = _open_templates({}).get_template("sections.html.j2").module
    return getattr(sections, section.kind)(section)


def _render(report: ReportPage, origin: Provenance, vectors: Mapping[str, str]) -> str:
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


def _open_templates(vectors: Mapping[str, str]) -> Environment:
    """The templates, with what they put pictures, files and drawings into a page by.

    Args:
        vectors: SVGs by the names of drawings; others are made.
    """

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
        "download": _embed_text,
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


def _embed_picture(image: Image) -> str:
    """A picture as an address that holds it."""
    shown = image.convert("RGB")
    shown.thumbnail((SHOWN, SHOWN), Resampling.LANCZOS)
    out, is_small = BytesIO(), max(shown.size) <= SMALL
    shown.save(out, "PNG" if is_small else "WEBP", **({} if is_small else {"quality": 88}))
    return _embed_bytes("image/png" if is_small else "image/webp", out.getvalue())


def _embed_text(text: str) -> str:
    return _embed_bytes("text/plain;charset=utf-8", text.encode())


def _embed_bytes(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

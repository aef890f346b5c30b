"""Sections to one HTML file: no request to anywhere, readable without scripts, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL.Image import Image

from leansd.faces.pictures import encode_png
from leansd.faces.report.sections import Section
from leansd.measuring.files import write_file
from leansd.version import __version__


def write_page(
    path: str | Path, *, title: str, lead: str, sections: Sequence[Section], foot: str = ""
) -> Path:
    """Write a report in one piece."""
    return write_file(path, render_page(title=title, lead=lead, sections=sections, foot=foot))


def render_page(*, title: str, lead: str, sections: Sequence[Section], foot: str = "") -> str:
    """A report as HTML."""
    page = Environment(
        loader=PackageLoader(__package__ or "leansd.faces.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"data_uri": _embed, "svg": Markup}
    return page.get_template("page.html.j2").render(
        title=title, lead=lead, sections=sections, foot=foot, version=__version__
    )


def _embed(image: Image) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()

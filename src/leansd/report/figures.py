"""Figures: drawn once, as SVG and PNG files and as part of a page that follows its colours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup, escape

from leansd.plans.grid import POINT, get_states

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# -- colours ---------------------------------------------------------------------------------------
# Colours by name, for light and for dark: what pages and figures are drawn in.
#
# Figures are drawn in light; a page puts the names in the place of the colours, so that its figures
# follow it. No two names share a colour, or it could not be told whose it is.

COLOURS = {
    "paper": ("#fafaf9", "#14161a"),
    "card": ("#ffffff", "#1c1f25"),
    "ink": ("#1b1d22", "#e7e9ee"),
    "soft": ("#5a606c", "#a7aebb"),
    "line": ("#dfe2e7", "#363b45"),
    "mark": ("#2563eb", "#7ea6ff"),
    "series-1": ("#2563ec", "#7ea6fe"),
    "series-2": ("#d97706", "#f2a33c"),
    "series-3": ("#059669", "#34c491"),
    "series-4": ("#b91c5c", "#f472a8"),
    "series-5": ("#7c3aed", "#b79cf7"),
    "series-6": ("#0891b2", "#3cc3dd"),
    "series-7": ("#92400e", "#d99a63"),
    "series-8": ("#6b7280", "#9aa1ad"),
}
"""On white paper, and so in print and in files of figures; and on a dark page."""


def get_colours() -> dict[str, tuple[str, str]]:
    """All colours, light and dark: `COLOURS` and those of the states of a plan's cells."""
    return COLOURS | {name: (state.colour, state.dark) for name, state in get_states().items()}


LIGHT = {name: light for name, (light, _) in get_colours().items()}
"""What figures are drawn in, by names that are always there."""
SERIES = tuple(name for name in COLOURS if name.startswith("series-"))
"""For curves of one plot, most easily told apart first."""
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "<")
"""Shapes of points, beside the colours: for who cannot tell colours apart."""


def name_colours() -> dict[str, str]:
    """The name of every light colour."""
    return {light: name for name, (light, _) in get_colours().items()}


def declare_colours(theme: Literal["light", "dark"]) -> str:
    """Colours as properties of CSS."""
    place = ("light", "dark").index(theme)
    return " ".join(f"--{name}: {both[place]};" for name, both in get_colours().items())


def list_series() -> Iterator[tuple[str, str]]:
    """Colours with shapes, so many that no plot runs out."""
    for turn in range(len(SHAPES)):
        for place, name in enumerate(SERIES):
            yield LIGHT[name], SHAPES[(place + turn) % len(SHAPES)]


# -- figures ---------------------------------------------------------------------------------------

RESOLUTION = 160
"""Dots per inch of PNG files."""
TEXT = 9.0
"""Size of most text."""


def open_figure(width: float, height: float) -> Figure:
    """An empty figure of so many points."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / POINT, height / POINT), dpi=POINT, facecolor=LIGHT["card"])


def open_axes(
    figure: Figure, *, left: float, right: float, top: float, bottom: float, rules: str = ""
) -> Axes:
    """Axes with margins in points, and rules across them along `x`, `y` or `both`."""
    width, height = (side * POINT for side in figure.get_size_inches())
    place = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    axes = figure.add_axes(place)
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=TEXT - 0.5, labelcolor=LIGHT["soft"], pad=4)
    axes.set_axisbelow(True)
    if rules:
        axes.grid(axis=rules, color=LIGHT["line"], linewidth=0.8)  # type: ignore[arg-type]
    return axes


def name_axes(axes: Axes, x: str = "", y: str = "") -> None:
    """What is along the sides, with its unit."""
    axes.set_xlabel(x, fontsize=TEXT, color=LIGHT["soft"], labelpad=5)
    axes.set_ylabel(y, fontsize=TEXT, color=LIGHT["soft"], labelpad=5)


def encode_svg(figure: Figure) -> str:
    """A figure as SVG, the same for the same data."""
    # Clipping paths are referred to by url(), which a page that needs nothing else has none of.
    for artist in figure.findobj():
        artist.set_clip_on(False)
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    return _save(figure, "svg", metadata=nothing).decode()


def encode_png(figure: Figure) -> bytes:
    return _save(figure, "png", dpi=RESOLUTION)


def _save(figure: Figure, form: str, **options: object) -> bytes:
    import matplotlib

    out = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "leansd", "svg.fonttype": "none"}):
        figure.savefig(out, format=form, facecolor=LIGHT["card"], **options)  # type: ignore[arg-type]
    return out.getvalue()


def embed_svg(svg: str, name: str, alt: str) -> Markup:
    """An SVG as part of a page: in its colours and font, with ids that are its own.

    Args:
        name: of the figure, no other's on the page.
        alt: what it shows, in words.
    """
    body = svg[svg.index("<svg") :]
    for noise in (r"<!--.*?-->", r"<metadata>.*?</metadata>", r"<defs>\s*<style.*?</defs>"):
        body = re.sub(noise, "", body, flags=re.DOTALL)
    used = set(re.findall(r'href="#([^"]+)"', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = body.replace('href="#', f'href="#{name}-')
    names = name_colours()
    body = re.sub(
        r"(?<=[ :])#[0-9a-f]{6}\b",
        lambda m: f"var(--{names[m[0]]})" if m[0] in names else m[0],
        body,
    )
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", body)
    opening = body[: body.index(">") + 1]
    _, _, width, height = re.findall(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', opening)[0]
    head = (
        f'<svg class="figure" role="img" aria-label="{escape(alt)}" viewBox="0 0 {width} {height}" '
        f'style="--width: {float(width):.0f}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return Markup(re.sub(r"\n\s*", "\n", head + body[len(opening) :]))

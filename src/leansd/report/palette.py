"""Colours by name, for light and for dark: what pages and figures are drawn in.

Figures are drawn in light; a page puts the names in the place of the colours, so that its figures
follow it. No two names share a colour, or it could not be told whose it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

LIGHT = {
    "paper": "#fafaf9",
    "card": "#ffffff",
    "ink": "#1b1d22",
    "soft": "#5a606c",
    "line": "#dfe2e7",
    "mark": "#2563eb",
    "compute": "#3b6fd8",
    "reuse": "#f0a431",
    "residual": "#a566e0",
    "forecast": "#2fae7f",
    "forecast2": "#12796b",
    "chebyshev": "#c2306f",
    "chebyshev-line": "#8f2a63",
    "idle": "#e8eaee",
    "elsewhere": "#f3f4f7",
    "gri": "#7cc4ef",
    "full-attention": "#23408f",
    "series-1": "#2563ec",
    "series-2": "#d97706",
    "series-3": "#059669",
    "series-4": "#b91c5c",
    "series-5": "#7c3aed",
    "series-6": "#0891b2",
    "series-7": "#92400e",
    "series-8": "#6b7280",
}
"""On white paper, and so in print and in files of figures."""

DARK = {
    "paper": "#14161a",
    "card": "#1c1f25",
    "ink": "#e7e9ee",
    "soft": "#a7aebb",
    "line": "#363b45",
    "mark": "#7ea6ff",
    "compute": "#5b8bea",
    "reuse": "#e0a03c",
    "residual": "#b182e8",
    "forecast": "#3fbf8f",
    "forecast2": "#2a9d8c",
    "chebyshev": "#e0609a",
    "chebyshev-line": "#b34d86",
    "idle": "#2a2e36",
    "elsewhere": "#22252c",
    "gri": "#8fd0f2",
    "full-attention": "#3d5fc0",
    "series-1": "#7ea6fe",
    "series-2": "#f2a33c",
    "series-3": "#34c491",
    "series-4": "#f472a8",
    "series-5": "#b79cf7",
    "series-6": "#3cc3dd",
    "series-7": "#d99a63",
    "series-8": "#9aa1ad",
}
"""The same names on a dark page."""


def declare_colours(colours: Mapping[str, str]) -> str:
    """Colours as properties of CSS."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


NAMES = {colour: name for name, colour in LIGHT.items()}
SERIES = tuple(name for name in LIGHT if name.startswith("series-"))
"""For curves of one plot, most easily told apart first."""
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "<")
"""Of points, beside the colours: who cannot tell colours apart can tell these."""


def list_series() -> Iterator[tuple[str, str]]:
    """Colours with shapes, so many that no plot runs out."""
    for turn in range(len(SHAPES)):
        for place, name in enumerate(SERIES):
            yield LIGHT[name], SHAPES[(place + turn) % len(SHAPES)]

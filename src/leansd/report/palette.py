"""Colours by name, for light and for dark: what pages and figures are drawn in.

Figures are drawn in light; a page puts the names in the place of the colours, so that its figures
follow it. No two names share a colour, or it could not be told whose it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from leansd.plans.grid import get_states

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
"""Of points, beside the colours: who cannot tell colours apart can tell these."""


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

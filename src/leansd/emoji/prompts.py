"""What the embedded model is asked for where nobody says what to draw."""

from __future__ import annotations

# Two styles of things a person knows at a glance.
_THINGS = (
    "red apple",
    "pizza",
    "lemon",
    "cat face",
    "dog face",
    "tiger face",
    "penguin",
    "fish",
    "grinning face",
    "red heart",
    "rocket",
    "police car",
    "soccer ball",
    "crown",
    "tulip",
    "mushroom",
    "hamburger",
    "guitar",
)
GRID_PROMPTS = tuple(
    f"a {thing}, {style} style" for style in ("twemoji", "noto") for thing in _THINGS
)

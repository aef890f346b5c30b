"""What the embedded model is asked for where nobody says what to draw."""

from __future__ import annotations

_STYLES = ("noto", "twemoji", "fluent")

# Fixed before any was drawn: things a person knows at a glance, in all three styles.
_GRID = (
    *("red apple", "pizza", "lemon", "strawberry", "hamburger", "ice cream", "cat face", "panda"),
    *("penguin", "tropical fish", "lady beetle", "octopus", "grinning face", "red heart", "rocket"),
    *("police car", "soccer ball", "crown", "tulip", "mushroom", "cactus", "guitar", "umbrella"),
    *("alarm clock", "robot", "ghost", "sunflower", "sailboat", "light bulb", "birthday cake"),
    *("dolphin", "banana", "house", "gem stone", "trophy", "smiling face with sunglasses"),
)
_THINGS = (
    *("red apple", "pizza", "lemon", "cat face", "dog face", "tiger face", "penguin", "fish"),
    *("grinning face", "red heart", "rocket", "police car", "soccer ball", "crown", "tulip"),
    *("mushroom", "hamburger", "guitar", "cactus", "basketball", "banana", "strawberry"),
    *("cherries", "carrot", "avocado", "sunflower", "elephant", "octopus", "airplane"),
    *("umbrella", "candle", "panda"),
)


def add_article(words: str) -> str:
    """Put `a` or `an` before a name that takes one."""
    first = words.split()[0]
    if (first.endswith("s") and not first.endswith("ss")) or first in {"the", "no"}:
        return words
    return f"{'an' if first[0] in 'aeiou' else 'a'} {words}"


def _ask(things: tuple[str, ...], first: int = 0) -> tuple[str, ...]:
    # The styles in turns; six things make a row, whose styles begin one further on.
    return tuple(
        f"{add_article(thing)}, {_STYLES[(first + place + place // 6) % 3]} style"
        for place, thing in enumerate(things)
    )


GRID_PROMPTS = _ask(_GRID)
"""36 prompts, those of the grid in the model's card."""

THINGS = _ask(_THINGS) + _ask(_THINGS, 1)
"""64 prompts, for benchmarks."""

PROMPTS = (
    "a red apple, noto style",
    "a red heart, twemoji style",
    "a smiling face with sunglasses, fluent style",
    "a cat face, twemoji style",
    "a cactus, noto style",
    "a strawberry, fluent style",
    "a tulip, noto style",
    "a hamburger, twemoji style",
)
"""8 prompts, for the demo."""

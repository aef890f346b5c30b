"""Prompts and guidance where the user gives none, and prompts from files."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from leansd.emoji.location import EMBEDDED
from leansd.emoji.prompts import THINGS
from leansd.errors import LeansdError

_SUBJECTS = (
    "a lighthouse on a cliff at dusk",
    "an old man reading a newspaper in a cafe",
    "a red bicycle against a brick wall",
    "two horses running on a beach",
    "a bowl of ramen on a wooden table",
    "a snowy village with lit windows",
    "a tabby cat asleep on a windowsill",
    "a crowded street market in the rain",
    "a glass of orange juice and a croissant",
    "a steam train crossing a stone bridge",
    "a woman with a yellow umbrella",
    "a mountain lake with a small boat",
    "a violin lying on sheet music",
    "a field of sunflowers under a stormy sky",
    "a robot watering plants in a greenhouse",
    "a library with a spiral staircase",
)
_MANNERS = ("a photo of", "an oil painting of", "a watercolour of", "a pencil drawing of")
SCENES = tuple(f"{manner} {subject}" for manner in _MANNERS for subject in _SUBJECTS)
"""64 prompts of any other model, for benchmarks."""

GUIDANCE = 4.0
"""Guidance scale for the embedded model; its edges are cleaner than at the pipeline's default."""


def read_prompts(path: str | Path, *, least: int = 2) -> list[str]:
    """Prompts from a text file, one a line; blank lines and lines that begin with # do not count.

    Raises:
        LeansdError: the file is not there or not text, or has fewer than `least` different prompts.
    """
    try:
        # utf-8-sig: editors on Windows begin a file with a mark that is no part of the prompt.
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LeansdError(f"cannot read prompts from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LeansdError(f"{path} is not a file of prompts: it is not text") from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if len(set(prompts)) < least:
        raise LeansdError(
            f"too few prompts in {path}: {least} different ones are needed at least, one a line"
        )
    return prompts


def choose_guidance(model: str, given: float | None = None) -> float | None:
    """The guidance scale to ask a model's pipeline for; None is the pipeline's own."""
    return GUIDANCE if given is None and model == EMBEDDED else given


def find_guidance(pipe: Any, model: str, given: float | None = None) -> float:
    """The guidance scale that a model is used with, where the user names none, too."""
    from leansd.drawing import find_scale

    found = find_scale(pipe, choose_guidance(model, given))
    return 1.0 if found is None else found


@cache
def read_generic() -> tuple[str, ...]:
    """A thousand prompts of everything under the sun, for tuning where a user has none."""
    return tuple(read_prompts(Path(__file__).parent / "prompts.txt"))


def choose_prompts(model: str, count: int, given: Sequence[str] | None = None) -> list[str]:
    """`count` prompts, those given or the model's own, in turns."""
    texts = given or (THINGS if model == EMBEDDED else SCENES)
    return [texts[place % len(texts)] for place in range(count)]

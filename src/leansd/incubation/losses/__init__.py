"""Losses by the name that a recipe gives. A new one is a module with a `build`, and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from leansd.errors import LeansdError
from leansd.incubation.losses.outcome import Comparison, Loss, Outcome, Setting

LOSSES: Mapping[str, str] = {
    "denoising": "leansd.incubation.losses.denoising",
    "output": "leansd.incubation.losses.output",
    "features": "leansd.incubation.losses.features",
    "normalised-features": "leansd.incubation.losses.normalised",
    "guided": "leansd.incubation.losses.guided",
    "mid": "leansd.incubation.losses.mid",
    "vgg": "leansd.incubation.losses.perception",
}


def build_loss(name: str, options: Mapping[str, Any], setting: Setting) -> Loss:
    """A term by its name.

    Raises:
        LeansdError: there is none, or it cannot be had with these options or of this student.
    """
    check_loss(name)
    try:
        return import_module(LOSSES[name]).build(setting, **options)
    except TypeError as error:
        reason = str(error).partition("() ")[2] or str(error)
        raise LeansdError(f"loss {name}: {reason}") from error


def check_loss(name: str) -> None:
    """Refuse a name that no loss has."""
    if name not in LOSSES:
        near = get_close_matches(name, LOSSES, n=1)
        offer = f"did you mean {near[0]}?" if near else f"there are {', '.join(LOSSES)}"
        raise LeansdError(f"no loss {name!r}; {offer}")


__all__ = ["LOSSES", "Comparison", "Loss", "Outcome", "Setting", "build_loss", "check_loss"]

"""What comes from a browser, checked, and what a user did wrong, told on the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from html import escape
from typing import Any

import gradio as gr
from pydantic import ValidationError

from leansd.errors import LeansdError
from leansd.plans.plan import Plan
from leansd.ui.history import Settings
from leansd.ui.page import MOST_STEPS


def explain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Say a user's mistake on the page instead of failing."""

    @wraps(function)
    def told(*given: Any) -> Any:
        try:
            return function(*given)
        except LeansdError as error:
            raise gr.Error(
                escape(str(error), quote=False), title="Not possible", print_exception=False
            ) from error

    return told


def explain_all(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same for what yields as it goes."""

    @wraps(function)
    def told(*given: Any) -> Iterator[Any]:
        try:
            yield from function(*given)
        except LeansdError as error:
            raise gr.Error(
                escape(str(error), quote=False), title="Not possible", print_exception=False
            ) from error

    return told


def read_settings(
    model: str,
    prompt: str,
    negative: str,
    seed: float | None,
    steps: float,
    sampler: str,
    guidance: float,
) -> Settings:
    """The settings that the page shows, checked.

    Raises:
        LeansdError: one lies outside its bounds.
    """
    try:
        return Settings(
            model=model,
            prompt=prompt or "",
            negative=negative or "",
            seed=int(seed or 0),
            steps=int(steps),
            sampler=sampler,
            guidance=guidance,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise LeansdError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_cells(event: Any, plan: Plan) -> tuple[str, list[tuple[str, int]]]:
    """What the grid says was clicked, checked: anybody can send anything."""
    data: dict[str, Any] = getattr(event, "_data", None) or {}
    kind: Any = data.get("kind")
    given: Any = data.get("cells")
    cells = [
        (str(each[0]), each[1])
        for each in (given if isinstance(given, list) else [])
        if isinstance(each, list) and len(each) == 2 and isinstance(each[1], int)
    ]
    inside = [cell for cell in cells if 0 <= cell[1] < plan.steps][: 200 * MOST_STEPS]
    if kind not in ("cells", "step", "line") or not inside:
        raise LeansdError("nothing was chosen in the grid")
    return kind, inside

"""The panel in other programs whose pages are gradio's: which plan a run follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from leansd.plans.presets.tuned import SPEED_PRESETS

OFF = "off"


def lay_out_panel() -> list[Any]:
    """The panel's fields, a preset and the path of a plan file: what `read_choice` takes."""
    with gr.Accordion("Lean Plan", open=False):
        plan = gr.Dropdown(
            [OFF, *SPEED_PRESETS],
            value=OFF,
            label="Plan",
            info="Faster from left to right; the picture stays near that of the full run.",
        )
        file = gr.Textbox(label="Plan file", placeholder="in the place of a preset")
    return [plan, file]


def read_choice(plan: str = OFF, file: str = "") -> str | Path | None:
    """The plan that the fields mean; None for none."""
    if file.strip():
        return Path(file.strip())
    return None if plan == OFF else plan

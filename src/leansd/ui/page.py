"""The page's layout: what is where. What it does is in `handlers`."""

from __future__ import annotations

from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import gradio as gr

from leansd.plans.grid import get_states
from leansd.runtime.samplers import SAMPLERS
from leansd.ui.folders import LONGEST, OWN_SAMPLER
from leansd.ui.plan_grid import TIERS, list_brushes
from leansd.ui.studio import MOST_PROMPTS

ASSETS = files("leansd.ui") / "assets"

# A list that opens as its field is left already stays open: gradio opens it a moment after.
CLOSE_LISTS = """() => document.addEventListener('focusout', () => setTimeout(() => {
  document.querySelectorAll('[role=combobox][aria-expanded=true]').forEach((field) => {
    if (field !== document.activeElement) field.dispatchEvent(new FocusEvent('blur'));
  });
}, 300))"""

MOST_STEPS = 100
TITLE = "leansd"
LEAD = "The same picture from the same UNet, in less time."
BEGIN = "a red apple, noto style"
"""A prompt to begin with."""
HIDDEN = ("elsewhere", "gri", "full-attention")
"""States that no click sets, left out of the legend."""


class Parts(SimpleNamespace):
    """Every component that something is done with, by the name that is its id as well."""

    @property
    def settings(self) -> dict[str, Any]:
        """Components by the names of `folders.Settings`."""
        names = ("model", "prompt", "negative", "seed", "steps", "sampler", "guidance")
        return {name: getattr(self, name) for name in names}

    @property
    def inputs(self) -> set[Any]:
        """All that handlers may read."""
        given = (self.plan, self.keys, self.plan_name, self.rounds, self.tier, self.brush)
        return {
            *given,
            *self.settings.values(),
            *(self.save_name, self.speed, self.tries, self.prompts),
        }


def lay_out(models: list[str]) -> Parts:
    """All components, without what they do."""
    parts = Parts()
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as parts.blocks:
        parts.plan, parts.keys = gr.State(None), gr.State([])
        _html(f'<header class="top"><h1>{TITLE}</h1><p>{LEAD}</p></header>')
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                _lay_out_settings(parts, models)
            with gr.Column(scale=8, min_width=320, elem_id="results"), gr.Tabs() as parts.tabs:
                for title, fill in (
                    ("Pictures", _lay_out_pictures),
                    ("Plan", _lay_out_plan),
                    ("Tune", _lay_out_tuning),
                    ("Costs", _lay_out_costs),
                    ("History", _lay_out_history),
                ):
                    with gr.Tab(title, id=title.lower()):
                        fill(parts)
    for name, part in vars(parts).items():
        part.elem_id = name.replace("_", "-")
    return parts


def _html(text: str = "", **options: Any) -> gr.HTML:
    return gr.HTML(text, apply_default_css=False, padding=False, **options)


def _lay_out_settings(parts: Parts, models: list[str]) -> None:
    parts.prompt = gr.Textbox(BEGIN, label="Prompt", lines=2, max_length=2000)
    with gr.Row():
        parts.draw = gr.Button("Draw", variant="primary", min_width=120)
        parts.stop = gr.Button("Stop", interactive=False, min_width=80)
    parts.turn = _html(visible=False)
    parts.model = _choose(models, "Model")
    parts.plan_name = _choose(
        ["balanced"], "Plan", "What is computed at which step. Edit it in the Plan tab."
    )
    parts.forecast = _html()
    parts.steps = gr.Slider(2, MOST_STEPS, 30, step=1, label="Steps")
    parts.guidance = gr.Slider(1, 15, 4, step=0.5, label="Guidance")
    with gr.Row(elem_classes="aligned"):
        parts.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
        parts.dice = gr.Button("Another seed", min_width=80)
    with gr.Accordion("More", open=False):
        parts.negative = gr.Textbox(label="Negative prompt", max_length=2000)
        parts.sampler = _choose([OWN_SAMPLER, *SAMPLERS], "Sampler")
        told = "Both runs take turns so many times; the speed-up is the median."
        parts.rounds = gr.Slider(1, 9, 1, step=1, label="Rounds", info=told)


def _choose(choices: list[str], label: str, info: str | None = None) -> gr.Dropdown:
    return gr.Dropdown(choices, value=choices[0], label=label, filterable=False, info=info)


def _lay_out_pictures(parts: Parts) -> None:
    parts.lanes = _html()
    look: dict[str, Any] = {
        "interactive": False,
        "height": 300,
        "min_width": 120,
        "buttons": ["download", "fullscreen"],
        "elem_classes": "picture",
    }
    with gr.Row(elem_classes="pictures"):
        parts.full = gr.Image(label="Full run", **look)
        parts.lean = gr.Image(label="With the plan", **look)
    parts.numbers = _html()
    parts.slider = gr.ImageSlider(
        label="Before and after: the full run left, the plan right",
        interactive=False,
        max_height=420,
        visible=False,
    )


def _lay_out_plan(parts: Parts) -> None:
    with gr.Row():
        parts.tier = gr.Radio(list(TIERS), value="layer", label="Rows", min_width=180)
        parts.brush = gr.Radio(
            [(label, name) for name, label in list_brushes().items()],
            value="forecast",
            label="A click sets",
            min_width=280,
            scale=2,
        )
    parts.plan_forecast = _html()
    parts.grid = gr.HTML(
        {},
        html_template='<div class="grid-box"></div>',
        js_on_load=(ASSETS / "grid.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        padding=False,
    )
    parts.cell = _html()
    marks = "".join(
        f'<span><i class="{name}"></i>{state.label}</span>'
        for name, state in get_states().items()
        if name not in HIDDEN
    )
    _html(
        f'<div class="legend">{marks}<span>Click a cell, or drag over several; click a row\'s name '
        "for the whole row, a step's head to compute that step in full or not. Arrow keys move, "
        "Enter sets.</span></div>"
    )
    with gr.Row(elem_classes="aligned"):
        parts.save_name = gr.Textbox(
            label="Name", max_length=LONGEST, placeholder="my plan", min_width=160
        )
        parts.save = gr.Button("Save", min_width=80)
        parts.download = gr.DownloadButton("Download", min_width=80, interactive=False)
        parts.upload = gr.UploadButton("Load a file", file_types=[".json"], min_width=80)


def _lay_out_tuning(parts: Parts) -> None:
    _html(
        '<p class="soft">Finds the plan that loses least at a speed, for this model, sampler, '
        "guidance and machine. It runs the prompts below some dozens of times; every third decides "
        "and the rest tune. A stopped tuning goes on where it was. "
        "<code>leansd tune</code> takes larger budgets.</p>"
    )
    with gr.Row():
        parts.speed = gr.Slider(1.2, 4, 2, step=0.1, label="Times faster", min_width=200)
        told = "Moves of key steps that are tried."
        parts.tries = gr.Slider(0, 8, 1, step=1, label="Effort", min_width=200, info=told)
    parts.prompts = gr.Textbox(
        label=f"Prompts, one a line, 4 to {MOST_PROMPTS}", lines=6, max_lines=10, max_length=20_000
    )
    with gr.Row():
        parts.tune = gr.Button("Tune", variant="primary", min_width=120)
        parts.tune_stop = gr.Button("Stop", interactive=False, min_width=80)
    parts.tuning = _html()


def _lay_out_costs(parts: Parts) -> None:
    parts.anatomy = _html()
    with gr.Row():
        parts.measure = gr.Button("Time it on this machine", variant="primary")
        parts.measure_stop = gr.Button("Stop", interactive=False, min_width=80)
    parts.costs = _html()


def _lay_out_history(parts: Parts) -> None:
    _html(
        '<p class="soft">The latest runs beside each other, kept in the folder the page was given. '
        "Choose one to have its settings, its plan and its pictures back.</p>"
    )
    parts.gallery = gr.Gallery(
        label="History",
        show_label=False,
        columns=5,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
    )

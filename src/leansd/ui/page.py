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
        """By the names of `folders.Settings`."""
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
    return parts


def _html(text: str = "", **options: Any) -> gr.HTML:
    return gr.HTML(text, apply_default_css=False, padding=False, **options)


def _lay_out_settings(parts: Parts, models: list[str]) -> None:
    parts.prompt = gr.Textbox(BEGIN, label="Prompt", lines=2, max_length=2000, elem_id="prompt")
    with gr.Row():
        parts.draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
        parts.stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=80)
    parts.turn = _html(elem_id="turn", visible=False)
    parts.model = _choose(models, "Model", "model")
    parts.plan_name = _choose(
        ["balanced"],
        "Plan",
        "plan-name",
        "What is computed at which step. Edit it in the Plan tab.",
    )
    parts.forecast = _html(elem_id="forecast")
    parts.steps = gr.Slider(2, MOST_STEPS, 30, step=1, label="Steps", elem_id="steps")
    parts.guidance = gr.Slider(1, 15, 4, step=0.5, label="Guidance", elem_id="guidance")
    with gr.Row(elem_classes="aligned"):
        parts.seed = gr.Number(
            0, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=120
        )
        parts.dice = gr.Button("Another seed", elem_id="dice", min_width=80)
    with gr.Accordion("More", open=False):
        parts.negative = gr.Textbox(label="Negative prompt", max_length=2000, elem_id="negative")
        parts.sampler = _choose([OWN_SAMPLER, *SAMPLERS], "Sampler", "sampler")
        told = "Both runs take turns so many times; the speed-up is the median."
        parts.rounds = gr.Slider(1, 9, 1, step=1, label="Rounds", elem_id="rounds", info=told)


def _choose(choices: list[str], label: str, name: str, info: str | None = None) -> gr.Dropdown:
    return gr.Dropdown(
        choices, value=choices[0], label=label, elem_id=name, filterable=False, info=info
    )


def _lay_out_pictures(parts: Parts) -> None:
    parts.lanes = _html(elem_id="lanes")
    look: dict[str, Any] = {
        "interactive": False,
        "height": 300,
        "min_width": 120,
        "buttons": ["download", "fullscreen"],
        "elem_classes": "picture",
    }
    with gr.Row(elem_classes="pictures"):
        parts.full = gr.Image(label="Full run", elem_id="full", **look)
        parts.lean = gr.Image(label="With the plan", elem_id="lean", **look)
    parts.numbers = _html(elem_id="numbers")
    parts.slider = gr.ImageSlider(
        label="Before and after: the full run left, the plan right",
        interactive=False,
        max_height=420,
        elem_id="slider",
        visible=False,
    )


def _lay_out_plan(parts: Parts) -> None:
    with gr.Row():
        parts.tier = gr.Radio(
            list(TIERS), value="layer", label="Rows", elem_id="tier", min_width=180
        )
        parts.brush = gr.Radio(
            [(label, name) for name, label in list_brushes().items()],
            value="forecast",
            label="A click sets",
            elem_id="brush",
            min_width=280,
            scale=2,
        )
    parts.prediction = _html(elem_id="plan-forecast")
    parts.grid = gr.HTML(
        {},
        html_template='<div class="grid-box"></div>',
        js_on_load=(ASSETS / "grid.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        padding=False,
        elem_id="grid",
    )
    parts.cell = _html(elem_id="cell")
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
            label="Name",
            max_length=LONGEST,
            placeholder="my plan",
            elem_id="save-name",
            min_width=160,
        )
        parts.save = gr.Button("Save", elem_id="save", min_width=80)
        parts.download = gr.DownloadButton(
            "Download", elem_id="download", min_width=80, interactive=False
        )
        parts.upload = gr.UploadButton(
            "Load a file", file_types=[".json"], elem_id="upload", min_width=80
        )


def _lay_out_tuning(parts: Parts) -> None:
    _html(
        '<p class="soft">Finds the plan that loses least at a speed, for this model, sampler, '
        "guidance and machine. It runs the prompts below some dozens of times; every third decides "
        "and the rest tune. A stopped tuning goes on where it was. "
        "<code>leansd tune</code> takes larger budgets.</p>"
    )
    with gr.Row():
        parts.speed = gr.Slider(
            1.2, 4, 2, step=0.1, label="Times faster", elem_id="speed", min_width=200
        )
        told = "Moves of key steps that are tried."
        parts.tries = gr.Slider(
            0, 8, 1, step=1, label="Effort", elem_id="tries", min_width=200, info=told
        )
    parts.prompts = gr.Textbox(
        label=f"Prompts, one a line, 4 to {MOST_PROMPTS}",
        lines=6,
        max_lines=10,
        max_length=20_000,
        elem_id="prompts",
    )
    with gr.Row():
        parts.tune = gr.Button("Tune", variant="primary", elem_id="tune", min_width=120)
        parts.tune_stop = gr.Button("Stop", interactive=False, elem_id="tune-stop", min_width=80)
    parts.tuning = _html(elem_id="tuning")


def _lay_out_costs(parts: Parts) -> None:
    parts.anatomy = _html(elem_id="anatomy")
    with gr.Row():
        parts.measure = gr.Button("Time it on this machine", variant="primary", elem_id="measure")
        parts.measure_stop = gr.Button(
            "Stop", interactive=False, elem_id="measure-stop", min_width=80
        )
    parts.costs = _html(elem_id="costs")


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
        elem_id="gallery",
    )

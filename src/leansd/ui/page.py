"""The page's layout: what is where. What it does is in `wiring`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import gradio as gr

from leansd.plans.grid import get_states
from leansd.runtime.samplers import SAMPLERS
from leansd.ui.cells import BRUSHES, TIERS
from leansd.ui.history import OWN_SAMPLER
from leansd.ui.studio import MOST_PROMPTS

ASSETS = files("leansd.ui") / "assets"


MOST_STEPS = 100
TITLE = "leansd"
LEAD = "The same picture from the same UNet, in less time."

_BRUSH_NAMES = {
    "compute": "compute",
    "reuse": "reuse",
    "residual": "residual",
    "forecast": "forecast",
    "forecast2": "parabola",
}
_LEGEND = ("compute", "reuse", "residual", "forecast", "forecast2", "idle")


@dataclass(frozen=True)
class Parts:
    """Every component that something is done with."""

    blocks: gr.Blocks
    # settings
    model: Any
    prompt: Any
    negative: Any
    seed: Any
    dice: Any
    steps: Any
    sampler: Any
    guidance: Any
    plan_name: Any
    rounds: Any
    draw: Any
    stop: Any
    turn: Any
    """How many runs are before the visitor's own."""
    forecast: Any
    # pictures
    tabs: Any
    lanes: Any
    full: Any
    lean: Any
    slider: Any
    numbers: Any
    # plan
    tier: Any
    brush: Any
    prediction: Any
    grid: Any
    cell: Any
    save_name: Any
    save: Any
    upload: Any
    download: Any
    # tuning
    speed: Any
    tries: Any
    prompts: Any
    tune: Any
    tune_stop: Any
    tuning: Any
    # costs
    anatomy: Any
    measure: Any
    measure_stop: Any
    costs: Any
    # history
    gallery: Any
    # what the session has in hand
    plan: Any
    keys: Any

    @property
    def settings(self) -> list[Any]:
        """In the order of `wiring.read_settings`."""
        return [
            self.model,
            self.prompt,
            self.negative,
            self.seed,
            self.steps,
            self.sampler,
            self.guidance,
        ]


def lay_out(models: list[str]) -> Parts:
    """All components, without what they do."""
    found: dict[str, Any] = {}
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        found |= {"plan": gr.State(None), "keys": gr.State([])}
        gr.HTML(
            f'<header class="top"><h1>{TITLE}</h1><p>{LEAD}</p></header>',
            apply_default_css=False,
            padding=False,
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                found |= _lay_out_settings(models)
            with gr.Column(scale=8, min_width=320, elem_id="results"), gr.Tabs() as tabs:
                found["tabs"] = tabs
                with gr.Tab("Pictures", id="pictures"):
                    found |= _lay_out_pictures()
                with gr.Tab("Plan", id="plan"):
                    found |= _lay_out_plan()
                with gr.Tab("Tune", id="tune"):
                    found |= _lay_out_tuning()
                with gr.Tab("Costs", id="costs"):
                    found |= _lay_out_costs()
                with gr.Tab("History", id="history"):
                    found |= _lay_out_history()
    return Parts(blocks=blocks, **found)


def _lay_out_settings(models: list[str]) -> dict[str, Any]:
    prompt = gr.Textbox(
        label="Prompt", value="a red apple, noto style", lines=2, max_length=2000, elem_id="prompt"
    )
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
        stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=80)
    turn = gr.HTML(apply_default_css=False, padding=False, elem_id="turn", visible=False)
    model = gr.Dropdown(models, value=models[0], label="Model", elem_id="model", filterable=False)
    plan_name = gr.Dropdown(
        ["balanced"],
        value="balanced",
        label="Plan",
        elem_id="plan-name",
        filterable=False,
        info="What is computed at which step. Edit it in the Plan tab.",
    )
    forecast = gr.HTML(apply_default_css=False, padding=False, elem_id="forecast")
    steps = gr.Slider(2, MOST_STEPS, value=30, step=1, label="Steps", elem_id="steps")
    guidance = gr.Slider(1, 15, value=4, step=0.5, label="Guidance", elem_id="guidance")
    with gr.Row(elem_classes="aligned"):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=120)
        dice = gr.Button("Another seed", elem_id="dice", min_width=80)
    with gr.Accordion("More", open=False):
        negative = gr.Textbox(label="Negative prompt", max_length=2000, elem_id="negative")
        sampler = gr.Dropdown(
            [OWN_SAMPLER, *SAMPLERS],
            value=OWN_SAMPLER,
            label="Sampler",
            elem_id="sampler",
            filterable=False,
        )
        rounds = gr.Slider(
            1,
            9,
            value=1,
            step=1,
            label="Rounds",
            elem_id="rounds",
            info="Both runs take turns so many times; the speed-up is the median.",
        )
    return {
        "model": model,
        "prompt": prompt,
        "negative": negative,
        "seed": seed,
        "dice": dice,
        "steps": steps,
        "sampler": sampler,
        "guidance": guidance,
        "plan_name": plan_name,
        "rounds": rounds,
        "draw": draw,
        "stop": stop,
        "turn": turn,
        "forecast": forecast,
    }


def _lay_out_pictures() -> dict[str, Any]:
    lanes = gr.HTML(apply_default_css=False, padding=False, elem_id="lanes")
    with gr.Row(elem_classes="pictures"):
        full, lean = (
            gr.Image(
                label=label,
                interactive=False,
                height=300,
                min_width=120,
                buttons=["download", "fullscreen"],
                elem_id=name,
                elem_classes="picture",
            )
            for name, label in (("full", "Full run"), ("lean", "With the plan"))
        )
    numbers = gr.HTML(apply_default_css=False, padding=False, elem_id="numbers")
    slider = gr.ImageSlider(
        label="Before and after: the full run left, the plan right",
        interactive=False,
        max_height=420,
        elem_id="slider",
        visible=False,
    )
    return {"lanes": lanes, "full": full, "lean": lean, "numbers": numbers, "slider": slider}


def _lay_out_plan() -> dict[str, Any]:
    with gr.Row():
        tier = gr.Radio(list(TIERS), value="layer", label="Rows", elem_id="tier", min_width=180)
        brush = gr.Radio(
            [(_BRUSH_NAMES[each], each) for each in BRUSHES],
            value="forecast",
            label="A click sets",
            elem_id="brush",
            min_width=280,
            scale=2,
        )
    prediction = gr.HTML(apply_default_css=False, padding=False, elem_id="plan-forecast")
    grid = gr.HTML(
        {},
        html_template='<div class="grid-box"></div>',
        js_on_load=(ASSETS / "grid.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        padding=False,
        elem_id="grid",
    )
    cell = gr.HTML(apply_default_css=False, padding=False, elem_id="cell")
    states = get_states()
    marks = "".join(f'<span><i class="{each}"></i>{states[each].label}</span>' for each in _LEGEND)
    gr.HTML(
        f'<div class="legend">{marks}<span>Click a cell, or drag over several; click a row\'s name '
        "for the whole row, a step's head to compute that step in full or not. Arrow keys move, "
        "Enter sets.</span></div>",
        apply_default_css=False,
        padding=False,
    )
    with gr.Row(elem_classes="aligned"):
        save_name = gr.Textbox(
            label="Name", max_length=64, placeholder="my plan", elem_id="save-name", min_width=160
        )
        save = gr.Button("Save", elem_id="save", min_width=80)
        download = gr.DownloadButton(
            "Download", elem_id="download", min_width=80, interactive=False
        )
        upload = gr.UploadButton(
            "Load a file", file_types=[".json"], elem_id="upload", min_width=80
        )
    return {
        "tier": tier,
        "brush": brush,
        "prediction": prediction,
        "grid": grid,
        "cell": cell,
        "save_name": save_name,
        "save": save,
        "download": download,
        "upload": upload,
    }


def _lay_out_tuning() -> dict[str, Any]:
    gr.HTML(
        '<p class="soft">Finds the plan that loses least at a speed, for this model, sampler, '
        "guidance and machine. It runs the prompts below some dozens of times; every third decides "
        "and the rest tune. A stopped tuning goes on where it was. "
        "<code>leansd tune</code> takes larger budgets.</p>",
        apply_default_css=False,
        padding=False,
    )
    with gr.Row():
        speed = gr.Slider(
            1.2, 4, value=2, step=0.1, label="Times faster", elem_id="speed", min_width=200
        )
        tries = gr.Slider(
            0,
            8,
            value=1,
            step=1,
            label="Effort",
            elem_id="tries",
            min_width=200,
            info="Moves of key steps that are tried.",
        )
    prompts = gr.Textbox(
        label=f"Prompts, one a line, 4 to {MOST_PROMPTS}",
        lines=6,
        max_lines=10,
        max_length=20_000,
        elem_id="prompts",
    )
    with gr.Row():
        tune = gr.Button("Tune", variant="primary", elem_id="tune", min_width=120)
        stop = gr.Button("Stop", interactive=False, elem_id="tune-stop", min_width=80)
    tuning = gr.HTML(apply_default_css=False, padding=False, elem_id="tuning")
    return {
        "speed": speed,
        "tries": tries,
        "prompts": prompts,
        "tune": tune,
        "tune_stop": stop,
        "tuning": tuning,
    }


def _lay_out_costs() -> dict[str, Any]:
    anatomy = gr.HTML(apply_default_css=False, padding=False, elem_id="anatomy")
    with gr.Row():
        measure = gr.Button("Time it on this machine", variant="primary", elem_id="measure")
        stop = gr.Button("Stop", interactive=False, elem_id="measure-stop", min_width=80)
    costs = gr.HTML(apply_default_css=False, padding=False, elem_id="costs")
    return {"anatomy": anatomy, "measure": measure, "measure_stop": stop, "costs": costs}


def _lay_out_history() -> dict[str, Any]:
    gr.HTML(
        '<p class="soft">The latest duels, kept in the folder the page was given. '
        "Choose one to have its settings, its plan and its pictures back.</p>",
        apply_default_css=False,
        padding=False,
    )
    gallery = gr.Gallery(
        label="History",
        show_label=False,
        columns=5,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        elem_id="gallery",
    )
    return {"gallery": gallery}

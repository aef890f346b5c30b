"""Which event of which component calls which handler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from leansd.ui.page import Parts
from leansd.ui.wiring import DEVICE, Wiring

Listen: TypeAlias = Callable[..., Any]

# On a phone the pictures lie below the settings.
SHOW_RESULTS = (
    "() => { if (window.innerWidth < 800) document.getElementById('results')"
    ".scrollIntoView({behavior: 'smooth'}) }"
)


def connect(parts: Parts, wiring: Wiring) -> None:
    """Everything that happens on the page; called inside its blocks."""
    shows_forecast = [parts.forecast, parts.prediction]
    shows_plan = [parts.plan, parts.grid, *shows_forecast, parts.lanes]
    shows_model = [parts.guidance, parts.anatomy, parts.costs, parts.prompts]
    shows_history = [parts.gallery, parts.keys]
    shows_entry = [parts.full, parts.lean, parts.slider, parts.numbers]
    busy = [
        *(parts.draw, parts.tune, parts.measure),
        *(parts.stop, parts.tune_stop, parts.measure_stop),
        parts.turn,
    ]
    # Quick handlers do not wait for what computes; past the queue their errors would not be shown.
    quick: Listen = partial(_listen, concurrency_id="page", concurrency_limit=8)
    slow: Listen = partial(_listen, concurrency_id=DEVICE, concurrency_limit=1)
    chosen = [parts.plan_name, parts.tier, *parts.settings]

    parts.blocks.load(
        wiring.begin,
        chosen,
        [parts.model, parts.plan_name, *shows_model, *shows_plan, *shows_history],
        api_visibility="private",
        show_progress="hidden",
    )
    parts.blocks.unload(wiring.leave)

    quick(
        parts.model.input, wiring.pick_model, chosen, [parts.plan_name, *shows_model, *shows_plan]
    )
    quick(parts.plan_name.input, wiring.pick_plan, chosen, [parts.steps, *shows_plan])
    held = [parts.plan, *chosen]
    for event in (parts.steps.input, parts.sampler.input, parts.guidance.input):
        quick(event, wiring.pick_steps, held, shows_plan, trigger_mode="always_last")
    quick(parts.dice.click, wiring.roll, None, parts.seed)

    quick(
        parts.grid.select,
        wiring.edit,
        [parts.plan, parts.tier, parts.brush, *parts.settings],
        [parts.plan_name, parts.cell, *shows_plan],
        trigger_mode="multiple",
    )
    quick(parts.tier.input, wiring.pick_tier, [parts.plan, parts.tier, *parts.settings], parts.grid)
    saves = [parts.plan, parts.save_name, parts.plan_name, parts.download, parts.cell]
    saves += shows_forecast
    for event in (parts.save.click, parts.save_name.submit):
        quick(event, wiring.save_plan, [parts.plan, parts.save_name, *parts.settings], saves)
    quick(
        parts.upload.upload,
        wiring.load_plan,
        [parts.upload, parts.tier, *parts.settings],
        [parts.steps, parts.plan_name, parts.cell, *shows_plan],
    )

    def work(event: Any, handler: Any, given: list[Any], shows: list[Any], js: str = "") -> None:
        """A ticket first, then the work in its turn, at last, whatever came, the ticket back."""
        begun = quick(event, wiring.take_ticket, None, busy, js=js or None)
        done = slow(begun.success, handler, given, [*shows, parts.turn])
        # `then` alone does not follow an error.
        for over in (done.success, done.failure):
            quick(over, wiring.give_back, None, busy)

    drawing = [parts.plan, parts.rounds, *parts.settings]
    for event in (parts.draw.click, parts.prompt.submit):
        work(
            event,
            wiring.draw,
            drawing,
            [parts.lanes, parts.tabs, *shows_entry, *shows_history],
            SHOW_RESULTS,
        )
    work(
        parts.tune.click,
        wiring.tune,
        [parts.speed, parts.tries, parts.prompts, parts.tier, *parts.settings],
        [parts.tuning, parts.steps, parts.plan_name, parts.save_name, *shows_plan],
    )
    work(
        parts.measure.click,
        wiring.measure,
        [parts.plan, *parts.settings],
        [parts.costs, *shows_forecast],
    )
    for stop in (parts.stop, parts.tune_stop, parts.measure_stop):
        _listen(stop.click, wiring.stop, None, None, queue=False)

    quick(
        parts.gallery.select,
        wiring.recall,
        [parts.keys, parts.tier],
        [
            *(parts.model, parts.prompt, parts.negative, parts.seed, parts.steps, parts.sampler),
            *(parts.plan_name, parts.tabs),
            *shows_model,
            *shows_plan,
            *shows_entry,
        ],
    )


def _listen(event: Any, handler: Any, given: Any, shows: Any, **options: Any) -> Any:
    """One event, with no name to be called by from outside the page."""
    return event(handler, given, shows, api_visibility="private", show_progress="hidden", **options)

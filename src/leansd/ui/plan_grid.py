"""A plan as a grid of cells, a row a unit and a column a step, which are changed one by one.

Every change gives a new plan, checked against the UNet before it is handed out. What a plan says
with globs is spelled out in the steps that are changed, and only there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, get_args

from leansd.errors import LeansdError
from leansd.plans.address import get_block, get_layer
from leansd.plans.anatomy import HEAD, WHOLE, Anatomy
from leansd.plans.compile import compile_plan
from leansd.plans.grid import GUIDANCE_STATES, get_states, list_states
from leansd.plans.liveness import GUIDANCE, Net
from leansd.plans.methods import METHODS
from leansd.plans.plan import Plan
from leansd.plans.row import GUIDANCES, NO_CORRECTION, Guidance, Row, resolve_row

Tier = Literal["block", "layer", "unit"]
TIERS: tuple[Tier, ...] = get_args(Tier)

COMPUTE = "compute"

EDITED = " (edited)"


def list_brushes() -> dict[str, str]:
    """What a cell can be made to do, and how the page calls it: compute, or inherit in a way."""
    return {COMPUTE: COMPUTE} | {name: method.label for name, method in METHODS.items()}


@dataclass(frozen=True)
class Line:
    """A row of the grid: what is called `at`, and its state at every step."""

    at: str
    states: tuple[str, ...]
    says: tuple[bool, ...]
    """Where the plan says that it inherits, though nobody may read it."""


@dataclass(frozen=True)
class PlanGrid:
    """What a page draws of a plan."""

    name: str
    steps: int
    keys: tuple[int, ...]
    corrected: tuple[int, ...]
    """Steps whose output is moved on by a fitted correction."""
    lines: tuple[Line, ...]

    @property
    def labels(self) -> dict[str, dict[str, str]]:
        """How the states are called, in rows of units and in the row of guidance."""
        units = {name: state.label for name, state in get_states().items()}
        guidance = {shown: GUIDANCE_LABELS[word] for word, shown in GUIDANCE_STATES.items()}
        return {"units": units, GUIDANCE: guidance}


GUIDANCE_LABELS: dict[str, str] = {
    "compute": "computed",
    "inherit": "inherited",
    "forecast": "forecast",
    "drop": "dropped",
}


def list_tier(anatomy: Anatomy, tier: Tier) -> list[tuple[str, tuple[str, ...]]]:
    """The rows of a grid, and the units of each."""
    name = {"block": get_block, "layer": get_layer, "unit": str}[tier]
    return [(at, tuple(units)) for at, units in groupby(anatomy.addresses, key=name)]


def lay_out_grid(plan: Plan, anatomy: Anatomy, tier: Tier = "layer") -> PlanGrid:
    """The cells of a plan.

    Several units in one row that differ in what they do are `mixed`.

    Raises:
        LeansdError: the plan does not suit the UNet.
    """
    states = list_states(plan, anatomy)
    says = plan.resolve(anatomy, dict.fromkeys(plan.nets, anatomy))
    rows = list_tier(anatomy, tier)
    known = {at for _, units in rows for at in units}
    rows += [(at, (at,)) for at in states if at not in known]
    if anatomy is WHOLE:  # guidance of a transformer is computed whatever a plan says
        rows = [row for row in rows if row[0] != GUIDANCE]
    elif GUIDANCE not in states:
        states[GUIDANCE] = ["compute"] * plan.steps
        rows.append((GUIDANCE, (GUIDANCE,)))
    lines = tuple(
        Line(
            at,
            tuple(_blend(cells) for cells in zip(*(states[unit] for unit in units), strict=True)),
            tuple(any(unit in step for unit in units) for step in says),
        )
        for at, units in rows
    )
    corrected = tuple(step for step, row in enumerate(plan.rows) if any(row.correct))
    return PlanGrid(plan.name, plan.steps, plan.keys, corrected, lines)


def _blend(states: Sequence[str]) -> str:
    """What a row of several units does: idle ones do nothing, so they do not count."""
    working = {state for state in states if state != "idle"} or {"idle"}
    return working.pop() if len(working) == 1 else "mixed"


def change_cells(
    plan: Plan, anatomy: Anatomy, cells: Iterable[tuple[str, int]], brush: str
) -> Plan:
    """The plan with all units under some addresses computed, or inheriting, at some steps.

    Args:
        cells: addresses and steps; of `guidance` see `turn_guidance`.

    Raises:
        LeansdError: the plan would mean nothing, as where the first step inherits.
    """
    if brush not in list_brushes():
        raise LeansdError(f"no brush {brush!r}; there are {', '.join(list_brushes())}")
    by_step: dict[int, list[str]] = {}
    for at, step in cells:
        if not 0 <= step < plan.steps:
            raise LeansdError(f"step {step} lies outside a plan of {plan.steps} steps")
        by_step.setdefault(step, []).append(at)
    rows = list(plan.rows)
    for step, addresses in by_step.items():
        if step == 0 and brush != COMPUTE:
            raise LeansdError("the first step computes everything: nothing was kept before it")
        rows[step] = _change_row(step, rows[step], anatomy, addresses, brush)
    return _finish(plan, rows, anatomy)


def turn_guidance(plan: Plan, anatomy: Anatomy, steps: Iterable[int]) -> Plan:
    """The plan with guidance at some steps handled the next way of those that there are.

    Raises:
        LeansdError: the first step must compute it.
    """
    rows = list(plan.rows)
    for step in steps:
        if step == 0:
            raise LeansdError("the first step computes guidance: no difference was kept before it")
        place = (GUIDANCES.index(rows[step].guidance) + 1) % len(GUIDANCES)
        chosen: Guidance = GUIDANCES[place]
        correct = rows[step].correct if chosen == "compute" else NO_CORRECTION
        rows[step] = replace(rows[step], guidance=chosen, correct=correct)
    return _finish(plan, rows, anatomy)


def turn_key(plan: Plan, anatomy: Anatomy, step: int, brush: str = "forecast") -> Plan:
    """The plan with a step computed in full, or, if it is, doing what the nearest other one does.

    Where no step inherits yet, the UNet's output does from then on: that step is not run at all.

    Raises:
        LeansdError: the first step must compute everything.
    """
    rows = list(plan.rows)
    if step == 0:
        raise LeansdError("the first step computes everything: nothing was kept before it")
    if not rows[step].is_key:
        rows[step] = replace(rows[step], inherit={}, guidance="compute")
        return _finish(plan, rows, anatomy)
    others = [place for place, row in enumerate(rows) if not row.is_key]
    if others:
        like = rows[min(others, key=lambda place: abs(place - step))]
        rows[step] = replace(
            rows[step], inherit=like.inherit, guidance=like.guidance, correct=NO_CORRECTION
        )
        return _finish(plan, rows, anatomy)
    how = "forecast" if brush == COMPUTE else brush
    rows[step] = replace(rows[step], inherit={HEAD: how}, correct=NO_CORRECTION)
    return _finish(plan, rows, anatomy)


def find_brush(plan: Plan, anatomy: Anatomy, at: str, step: int, brush: str) -> str:
    """What a click on a cell sets: the brush, or computing where the brush is there already."""
    resolved = resolve_row(step, plan.rows[step], anatomy)
    units = [unit.at for unit in anatomy.select(at)]
    return COMPUTE if all(resolved.get(unit) == brush for unit in units) else brush


def _change_row(step: int, row: Row, anatomy: Anatomy, addresses: Sequence[str], brush: str) -> Row:
    inherit = resolve_row(step, row, anatomy)
    for at in addresses:
        for unit in anatomy.select(at):
            inherit.pop(unit.at, None)
            if brush != COMPUTE:
                inherit[unit.at] = brush
    changed = replace(row, inherit=inherit)
    # A head that inherits has no computed output to correct.
    return replace(changed, correct=NO_CORRECTION) if HEAD in inherit else changed


def _finish(plan: Plan, rows: Sequence[Row], anatomy: Anatomy) -> Plan:
    """The plan with other rows, checked; what it was tuned for it no longer is.

    Mixes go: they are fitted to all that was computed before.
    """
    name = plan.name if plan.name.endswith(EDITED) else plan.name + EDITED
    plain = (replace(row, correct=row.correction) for row in rows)
    changed = replace(plan, rows=tuple(plain), name=name, tuned=None)
    compile_plan(changed, anatomy, nets={net: Net(anatomy) for net in changed.nets})
    return changed


def describe_cell(grid: PlanGrid, at: str, step: int) -> str:
    """A cell in words."""
    line = next((each for each in grid.lines if each.at == at), None)
    if line is None or not 0 <= step < grid.steps:
        return ""
    state = line.states[step]
    if state == "idle" and at != GUIDANCE:
        what = "what it would inherit" if line.says[step] else "it"
        return f"{at} at step {step}: idle, for nobody reads {what}"
    label = grid.labels[GUIDANCE if at == GUIDANCE else "units"].get(state, state)
    return f"{at} at step {step}: {label}"

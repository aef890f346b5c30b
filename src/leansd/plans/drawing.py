"""Anatomies and plans as text, and plans as pictures.

A grid has a line a unit and a column a step: `#` computed, `=` reused, `+` residual, `~` forecast,
`^` forecast by a parabola, `.` idle, and of self-attentions that are gated `g` by GRI and `f` in
full. Parts, guidance and other nets have lines where the plan says anything of them; where another
net runs, the units of the pipeline's own are `:`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from leansd.plans.address import get_block, get_layer
from leansd.plans.anatomy import Anatomy, Unit
from leansd.plans.gate import Attend
from leansd.plans.liveness import GUIDANCE, Net
from leansd.plans.methods import METHODS
from leansd.plans.plan import Plan
from leansd.plans.row import OWN, Guidance
from leansd.plans.tracing import compile_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class State:
    """What a cell of a plan's grid says."""

    mark: str
    """One character, in text."""
    label: str
    """In legends."""
    colour: str
    """On white."""
    dark: str
    """On a dark page."""


_COMPUTED = {"compute": State("#", "computed", "#3b6fd8", "#5b8bea")}
_OTHERS = {
    "idle": State(".", "idle", "#e8eaee", "#2a2e36"),
    "gri": State("g", "GRI", "#7cc4ef", "#8fd0f2"),
    "full-attention": State("f", "full attention", "#23408f", "#3d5fc0"),
    "elsewhere": State(":", "another net runs", "#f3f4f7", "#22252c"),
}


def get_states() -> dict[str, State]:
    """All that cells can say: computed, every way of `METHODS` to inherit, and the rest."""
    methods = {
        name: State(each.mark, each.label, each.colour, each.dark) for name, each in METHODS.items()
    }
    return {**_COMPUTED, **methods, **_OTHERS}


ATTEND_STATES: dict[Attend | None, str] = {
    None: "compute",
    "gri": "gri",
    "full": "full-attention",
}
GUIDANCE_STATES: dict[Guidance, str] = {
    "compute": "compute",
    "inherit": "reuse",
    "forecast": "forecast",
    "drop": "idle",
}


def list_states(plan: Plan, anatomy: Anatomy) -> dict[str, list[str]]:
    """For every unit (parts and guidance if need be) its state at every step (see `get_states`)."""
    # What other nets are is not known here: only that they run.
    nets = {name: Net(anatomy) for name in plan.nets}
    calls = compile_plan(plan, anatomy, nets=nets).calls
    told = {at for call in calls for at in (*call.pattern.parts, *call.gates)}
    parts = [part.at for part in anatomy.parts if part.at in told]
    states: dict[str, list[str]] = {at: [] for at in (*anatomy.addresses, *parts)}
    for call in calls:
        does: dict[str, str] = dict.fromkeys(call.pattern.active, "compute")
        does |= {at: ATTEND_STATES[attend] for at, attend in call.gates.items()}
        does |= {**call.pattern.inherited, **call.pattern.parts}
        for at, row in states.items():
            row.append(does.get(at, "idle") if call.net == OWN else "elsewhere")
    states |= list_nets(plan)
    if any(call.guidance != "compute" for call in calls):
        states[GUIDANCE] = [GUIDANCE_STATES[call.guidance] for call in calls]
    return states


def list_nets(plan: Plan) -> dict[str, list[str]]:
    """For every other net of a plan, at which steps it runs."""
    return {
        f"net {name}": ["compute" if row.net == name else "idle" for row in plan.rows]
        for name in plan.nets
    }


def draw_grid(plan: Plan, anatomy: Anatomy) -> str:
    """The plan as a grid of units and steps, with the share of multiply-accumulates where known."""
    states, known = list_states(plan, anatomy), get_states()
    width = max(len(at) for at in states)
    lines = [*_headlines(plan), " " * width + " " + _ruler(plan.steps)]
    for at, row in states.items():
        lines.append(f"{at:<{width}} " + "".join(known[state].mark for state in row))
    lines.append(" ".join(f"{each.mark} {state}" for state, each in known.items()))
    return "\n".join(lines)


def list_row_states(plan: Plan) -> dict[str, list[str]]:
    """For everything that the plan names, its state at every step, whatever the UNet."""
    patterns = dict.fromkeys(pattern for row in plan.rows for pattern in row.inherit)
    states: dict[str, list[str]] = {
        pattern: [row.inherit.get(pattern, "compute") for row in plan.rows] for pattern in patterns
    }
    for pattern in dict.fromkeys(pattern for row in plan.rows for pattern in row.attend):
        states[f"attend {pattern}"] = [ATTEND_STATES[row.attend.get(pattern)] for row in plan.rows]
    states |= list_nets(plan)
    if any(row.guidance != "compute" for row in plan.rows):
        states[GUIDANCE] = [GUIDANCE_STATES[row.guidance] for row in plan.rows]
    return states


def draw_rows(plan: Plan) -> str:
    """The plan without a UNet: a line for each address or glob it names."""
    states, known = list_row_states(plan), get_states()
    width = max((len(name) for name in states), default=8)
    lines = [*_headlines(plan), " " * width + " " + _ruler(plan.steps)]
    for name, row in states.items():
        lines.append(f"{name:<{width}} " + "".join(known[state].mark for state in row))
    return "\n".join(lines)


def draw_picture(plan: Plan, anatomy: Anatomy | None = None) -> Figure:
    """The plan as a coloured grid of units (or of what it names) and steps."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    states = list_row_states(plan) if anatomy is None else list_states(plan, anatomy)
    states = states or {"everything": ["compute"] * plan.steps}
    known = get_states()
    codes = {state: code for code, state in enumerate(known)}
    cells = [[codes[state] for state in row] for row in states.values()]
    figure = Figure(
        figsize=(2.2 + plan.steps * 0.17, 1.3 + len(states) * 0.15), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.imshow(
        cells,
        cmap=ListedColormap([each.colour for each in known.values()]),
        vmin=0,
        vmax=len(known) - 1,
        aspect="auto",
    )
    axes.set_xticks([step + 0.5 for step in range(plan.steps)], minor=True)
    axes.set_yticks([row + 0.5 for row in range(len(states))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0, labelsize=7)
    axes.set_yticks(range(len(states)), list(states))
    axes.set_xlabel("step", fontsize=8)
    axes.set_title("\n".join(_headlines(plan)), fontsize=9, loc="left")
    axes.spines[:].set_visible(False)
    used = {state for row in states.values() for state in row}
    axes.legend(
        handles=[
            Patch(color=each.colour, label=each.label)
            for state, each in known.items()
            if state in used
        ],
        loc="upper left", bbox_to_anchor=(0, -0.06), ncols=5, fontsize=7, frameon=False,
    )  # fmt: skip
    return figure


def draw_tree(anatomy: Anatomy) -> str:
    """An anatomy as a tree of blocks, layers and units with parameters and multiply-accumulates."""
    lines = [
        _describe(anatomy),
        f"{'address':<18}{'kind':<13}{'channels':>12}{'scale':>7}{'params':>11}",
    ]
    if anatomy.macs:
        lines[-1] += f"{'MACs':>10}{'share':>8}"
    for block, members in groupby(anatomy.units, key=lambda unit: get_block(unit.at)):
        units = list(members)
        if len(units) > 1 or units[0].at != block:
            lines.append(_row(block, "", "", "", units, anatomy))
        for layer, parts in groupby(units, key=lambda unit: get_layer(unit.at)):
            rows = list(parts)
            indent = "" if layer == block else "  "
            if len(rows) > 1:
                lines.append(_row(indent + layer, "", "", "", rows, anatomy))
                indent += "  "
            for unit in rows:
                channels = f"{unit.channels[0]}>{unit.channels[1]}"
                lines.append(
                    _row(indent + unit.at, unit.kind, channels, f"1/{unit.scale}", [unit], anatomy)
                )
    return "\n".join(lines)


def _describe(anatomy: Anatomy) -> str:
    units = f"{anatomy.name}: {len(anatomy) - 2} units and 2 ends"
    params = f"{anatomy.params / 1e6:,.2f} M parameters"
    if not anatomy.macs or not anatomy.size:
        return "\n".join(filter(None, (f"{units}, {params}", anatomy.uncounted)))
    height, width = anatomy.size
    macs = f"{anatomy.macs / 1e9:,.3f} GMAC at {height}x{width} latents, {anatomy.tokens} tokens"
    return f"{units}, {params}\n{macs}"


def _row(
    name: str, kind: str, channels: str, scale: str, units: list[Unit], anatomy: Anatomy
) -> str:
    params = sum(unit.params for unit in units)
    text = f"{name:<18}{kind:<13}{channels:>12}{scale:>7}{params / 1e6:>9,.3f} M"
    if anatomy.macs:
        macs = sum(unit.macs for unit in units)
        text += f"{macs / 1e9:>8,.3f} G{macs / anatomy.macs:>8.1%}"
    return text


def _headlines(plan: Plan) -> list[str]:
    headline = f"plan {plan.name}: {plan.steps} steps, {len(plan.keys)} in full"
    return [headline] if plan.drift is None else [headline, str(plan.drift)]


def _ruler(steps: int) -> str:
    """A digit every ten steps: `0         10        20`."""
    return "".join(f"{step:<10}" for step in range(0, steps, 10))[: max(steps, 10)].rstrip()

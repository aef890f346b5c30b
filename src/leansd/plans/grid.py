"""A plan as a grid of cells: a line a unit, a column a step; in text and as a picture.

`#` is computed, `.` idle, and every way to inherit has the mark that `leansd.plans.methods` gives
it; of self-attentions that are gated, `g` is by GRI and `f` in full. Parts, guidance and other nets
have lines where the plan says anything of them; where another net runs, the units of the pipeline's
own are `:`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

from leansd.plans.address import get_block
from leansd.plans.anatomy import Anatomy
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import GUIDANCE, Net
from leansd.plans.methods import GUIDANCE_METHODS, METHODS, Method
from leansd.plans.row import OWN, Attend, Schedule, list_nets

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class State:
    """What a cell says."""

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
ATTEND_STATES: dict[Attend | None, str] = {None: "compute", "gri": "gri", "full": "full-attention"}
GUIDANCE_STATES: dict[str, str] = {"compute": "compute", **GUIDANCE_METHODS, "drop": "idle"}


def get_states() -> dict[str, State | Method]:
    """All that cells can say: computed, every way of `METHODS` to inherit, and the rest."""
    return {**_COMPUTED, **METHODS, **_OTHERS}


def list_states(plan: Schedule, anatomy: Anatomy) -> dict[str, list[str]]:
    """For every unit (parts and guidance if need be) its state at every step (`get_states`)."""
    # What other nets are is not known here: only that they run.
    nets = {name: Net(anatomy) for name in list_nets(plan.rows)}
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
    states |= _list_net_states(plan)
    if any(call.guidance != "compute" for call in calls):
        states[GUIDANCE] = [GUIDANCE_STATES[call.guidance] for call in calls]
    return states


def list_row_states(plan: Schedule) -> dict[str, list[str]]:
    """For everything that the plan names, its state at every step, whatever the UNet."""
    rows = plan.rows
    patterns = dict.fromkeys(pattern for row in rows for pattern in row.inherit)
    states: dict[str, list[str]] = {
        pattern: [row.inherit.get(pattern, "compute") for row in rows] for pattern in patterns
    }
    for pattern in dict.fromkeys(pattern for row in rows for pattern in row.attend):
        states[f"attend {pattern}"] = [ATTEND_STATES[row.attend.get(pattern)] for row in rows]
    states |= _list_net_states(plan)
    if any(row.guidance != "compute" for row in rows):
        states[GUIDANCE] = [GUIDANCE_STATES[row.guidance] for row in rows]
    return states


def _list_net_states(plan: Schedule) -> dict[str, list[str]]:
    """For every other net of a plan, at which steps it runs."""
    return {
        f"net {name}": ["compute" if row.net == name else "idle" for row in plan.rows]
        for name in list_nets(plan.rows)
    }


# -- text --------------------------------------------------------------------------------------


def draw_text(plan: Schedule, anatomy: Anatomy | None = None) -> str:
    """The grid of a UNet's units; without a UNet, of what the plan names."""
    states = list_row_states(plan) if anatomy is None else list_states(plan, anatomy)
    known, steps = get_states(), len(plan.rows)
    width = max((len(name) for name in states), default=8)
    lines = [*_list_headlines(plan), " " * width + " " + _draw_ruler(steps)]
    for name, row in states.items():
        lines.append(f"{name:<{width}} " + "".join(known[state].mark for state in row))
    if anatomy is not None:
        lines.append(" ".join(f"{each.mark} {state}" for state, each in known.items()))
    return "\n".join(lines)


def _list_headlines(plan: Schedule) -> list[str]:
    keys = sum(row.is_key for row in plan.rows)
    headline = f"plan {plan.name}: {len(plan.rows)} steps, {keys} in full"
    mixed = sum(row.mix is not None for row in plan.rows)
    headline += f", {mixed} mixed of all before" if mixed else ""
    return [headline] if plan.drift is None else [headline, str(plan.drift)]


def _draw_ruler(steps: int) -> str:
    """A digit every ten steps: `0         10        20`."""
    return "".join(f"{step:<10}" for step in range(0, steps, 10))[: max(steps, 10)].rstrip()


# -- picture -----------------------------------------------------------------------------------

WIDTH = 400.0
"""Width of a picture, in points: what a phone shows without scrolling."""
LINE = 6.6
MARGINS = {"left": 52.0, "right": 6.0, "top": 4.0, "bottom": 58.0}
POINT = 72
"""Points of an inch."""
TEXT = 8.5
PAPER, SOFT = "#ffffff", "#5a606c"

Cell: TypeAlias = tuple[float, float, float]
"""A row, where in it the cell begins, and its length."""


def draw_picture(plan: Schedule, anatomy: Anatomy | None = None) -> Figure:
    """The grid as a figure of matplotlib: of a UNet's units, or of what the plan names."""
    from matplotlib.figure import Figure

    states = list_row_states(plan) if anatomy is None else list_states(plan, anatomy)
    states = states or {"everything": ["compute"] * len(plan.rows)}
    longest = max(map(len, states)) if anatomy is None else 0
    left = max(MARGINS["left"], 5.0 * longest)
    line = LINE if anatomy is not None else 12.0
    height = len(states) * line + MARGINS["top"] + MARGINS["bottom"]
    figure: Any = Figure(figsize=(WIDTH / POINT, height / POINT), dpi=POINT, facecolor=PAPER)
    width = WIDTH - left - MARGINS["right"]
    axes = figure.add_axes(
        (left / WIDTH, MARGINS["bottom"] / height, width / WIDTH, len(states) * line / height)
    )
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=TEXT, labelcolor=SOFT, pad=4)
    axes.set(xlim=(0, len(plan.rows)), ylim=(len(states), 0))
    used = {
        state: each
        for state, each in get_states().items()
        if any(state in row for row in states.values())
    }
    for state, each in used.items():
        fill_cells(axes, _list_cells(states, state), each.colour)
    _mark_steps(axes, len(plan.rows))
    _mark_rows(axes, states, by_block=anatomy is not None)
    add_colours(axes, {each.label: each.colour for each in used.values()}, y=34, columns=4)
    return figure


def _list_cells(states: Mapping[str, Sequence[str]], state: str) -> Iterator[Cell]:
    """All cells in one state, neighbouring steps as one."""
    for row, marks in enumerate(states.values()):
        begin = 0
        for each, run in groupby(marks):
            length = len(list(run))
            if each == state:
                yield row, begin, length
            begin += length


def fill_cells(
    axes: Any,
    cells: Iterable[Cell],
    colour: str,
    *,
    thick: float = 0.86,
    gap: float = 0.08,
    strength: float = 1.0,
) -> None:
    """Fill cells of a grid, whose row `n` reaches from `n` to `n + 1`, as one shape."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners: list[tuple[float, float]] = []
    codes: list[Any] = []
    for row, begin, length in cells:
        end, low, high = begin + length - gap, row, row + thick
        corners += [(begin, low), (end, low), (end, high), (begin, high), (begin, low)]
        codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    if corners:
        shape = Path(corners, codes)
        axes.add_patch(
            PathPatch(shape, facecolor=colour, edgecolor="none", linewidth=0, alpha=strength)
        )


def _mark_steps(axes: Any, steps: int) -> None:
    every = next(count for count in (1, 2, 5, 10, 25, 50, 100, 250, steps) if steps / count <= 12)
    marked = range(0, steps, every)
    axes.set_xticks([step + 0.5 for step in marked], list(map(str, marked)))
    axes.set_xlabel("step of the sampler", fontsize=TEXT + 0.5, color=SOFT, labelpad=5)


def _mark_rows(axes: Any, names: Mapping[str, Any], *, by_block: bool) -> None:
    """The name of every row, or that of a block in the middle of its rows."""
    places: list[float] = []
    labels: list[str] = []
    row = 0
    for name, rows in groupby(names, key=get_block if by_block else str):
        count = len(list(rows))
        places.append(row + count / 2)
        labels.append(name)
        row += count
    axes.set_yticks(places, labels)


def add_key(axes: Any, *, y: float, columns: int, **options: Any) -> None:
    """What the colours and lines of axes are called, `y` points below them.

    Args:
        options: of matplotlib's `legend`; by default, all that has a label is named.
    """
    look = {"handlelength": 1.0, "handleheight": 1.0, "labelcolor": SOFT}
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, -y / axes.get_window_extent().height),
        ncols=columns,
        fontsize=TEXT,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handletextpad=0.5,
        columnspacing=1.4,
        labelspacing=0.35,
        **look | options,
    )


def add_colours(axes: Any, names: Mapping[str, str], *, y: float, columns: int) -> None:
    """Squares in the colours that `names` has for texts, `y` points below the axes."""
    from matplotlib.patches import Patch

    squares = [Patch(facecolor=colour, label=text) for text, colour in names.items()]
    add_key(axes, y=y, columns=columns, handles=squares)

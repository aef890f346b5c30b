"""Where a UNet keeps its weights and spends its work: two figures, made from records.

The analysis that A-SDM (arXiv 2406.00210) begins with: parameters and computation by block, then
latency and parameters by unit. What costs much and holds little is where thinning pays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leansd.measuring.records import Record
from leansd.measuring.resuming import get_field
from leansd.measuring.tables import Table
from leansd.measuring.units import UnitTimes
from leansd.plans.address import get_block
from leansd.plans.anatomy import HEAD, STEM, Anatomy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAN = "no plan"
METRICS = {"params": "", "macs": "", "unit_time": "s"}
"""What is on record of every unit, and its unit of measure; times only where they were taken."""
WHOLE = {"unet_params": "", "unet_macs": "", "call_time": "s"}

PARAMS, MACS = "#9ca3af", "#1d4ed8"
KINDS = {"resnet": "#1d4ed8", "transformer": "#f59e0b", "": "#9ca3af"}
"""Colours of ResNets, attentions and everything else."""
LABELS = {"resnet": "ResNet", "transformer": "attention", "": "sampler, ends"}


@dataclass(frozen=True)
class Spent:
    """What every unit of one UNet has and takes, in running order."""

    subject: str
    kinds: Mapping[str, str]
    params: Mapping[str, float]
    macs: Mapping[str, float]
    seconds: Mapping[str, float]
    """Of one call; empty where it was not timed."""
    whole: Mapping[str, float]
    """By metric: parameters, MACs and seconds of the UNet, those outside the units included."""
    fields: Mapping[str, Any]
    """Of the records: latent size, samples a call, device."""

    @property
    def blocks(self) -> list[str]:
        return [at for at in dict.fromkeys(map(get_block, self.kinds)) if at not in (STEM, HEAD)]

    def share(self, metric: str, block: str) -> float:
        """Of a block in the whole UNet's parameters or MACs."""
        numbers = {"params": self.params, "macs": self.macs}[metric]
        inside = sum(value for at, value in numbers.items() if get_block(at) == block)
        return inside / self.whole[f"unet_{metric}"]


def list_records(
    anatomy: Anatomy, times: UnitTimes | None, circumstances: Mapping[str, str]
) -> list[Record]:
    """An anatomy with its cost, and its times where they were taken, as records."""
    height, width = anatomy.size or (0, 0)
    shared: dict[str, Any] = {
        **circumstances,
        "subject": anatomy.name,
        "plan": PLAN,
        "latent_height": height,
        "latent_width": width,
        "tokens": anatomy.tokens,
    }
    rows: list[dict[str, Any]] = [
        {"metric": "unet_params", "value": anatomy.params},
        {"metric": "unet_macs", "value": anatomy.macs},
    ]
    for unit in anatomy:
        place = {"at": unit.at, "kind": unit.kind}
        rows.append({"metric": "params", "value": unit.params, **place})
        rows.append({"metric": "macs", "value": unit.macs, **place})
    if times is not None:
        kinds = {unit.at: unit.kind for unit in (*anatomy.units, *anatomy.parts)}
        timed: list[tuple[dict[str, Any], Any]] = [({"metric": "call_time"}, times.call)]
        timed += [
            ({"metric": "unit_time", "at": at, "kind": kinds[at]}, times.units[at]) for at in kinds
        ]
        rows += [
            {
                **place,
                "value": timing.median,
                "low": min(timing.seconds),
                "high": max(timing.seconds),
                "batch": times.batch,
                "repeats": len(timing.seconds),
            }
            for place, timing in timed
        ]
    units = METRICS | WHOLE
    return [Record(**shared, **row, unit=units[row["metric"]]) for row in rows]


def read_spent(records: Iterable[Record]) -> list[Spent]:
    """What `list_records` wrote, a UNet each; other records are passed over."""
    by_subject: dict[str, list[Record]] = {}
    for record in records:
        if record.plan == PLAN and record.metric in METRICS | WHOLE:
            by_subject.setdefault(record.subject, []).append(record)
    return [_read_one(subject, rows) for subject, rows in by_subject.items()]


def _read_one(subject: str, rows: Sequence[Record]) -> Spent:
    def gather(metric: str) -> dict[str, float]:
        units = [row for row in rows if row.metric == metric and row.at is not None]
        return {str(row.at): row.value for row in units if str(row.at).count(".") < 3}

    macs = next(row for row in rows if row.metric == "unet_macs")
    last = rows[-1]
    names = ("latent_height", "latent_width", "batch")
    return Spent(
        subject,
        kinds={str(row.at): get_field(row, "kind") for row in rows if row.metric == "params"},
        params=gather("params"),
        macs=gather("macs"),
        seconds=gather("unit_time"),
        whole={row.metric: row.value for row in rows if row.metric in WHOLE},
        fields={name: get_field(last, name) for name in names}
        | {"device": last.device, "tokens": get_field(macs, "tokens")},
    )


def tabulate_spent(spent: Spent) -> Table:
    """Every block and unit: milliseconds of a call where timed, shares of time, work, weights."""
    timed = bool(spent.seconds)
    rows: list[tuple[str, ...]] = []
    for block in dict.fromkeys(map(get_block, spent.kinds)):
        inside = [at for at in spent.kinds if get_block(at) == block]
        if inside != [block]:
            rows.append(_show_row(spent, block, inside, timed))
        rows += [_show_row(spent, at, [at], timed, deep=at != block) for at in inside]
    time = ("ms", "of time") if timed else ()
    return Table(("address", *time, "of MACs", "of params", "params"), tuple(rows))


def _show_row(
    spent: Spent, name: str, inside: Sequence[str], timed: bool, *, deep: bool = False
) -> tuple[str, ...]:
    params = sum(spent.params[at] for at in inside)
    macs = sum(spent.macs[at] for at in inside)
    cells = [f"{macs / spent.whole['unet_macs']:.1%}", f"{params / spent.whole['unet_params']:.1%}"]
    if timed:
        seconds = sum(spent.seconds[at] for at in inside)
        share = seconds / spent.whole["call_time"]
        cells = [f"{seconds * 1000:.2f}", f"{share:.1%}", *cells]
    return ("  " * deep + name, *cells, f"{params / 1e6:.3f} M")


# -- figures -----------------------------------------------------------------------------------


def draw_blocks(models: Sequence[Spent]) -> Figure:
    """Parameters and computation by block: shares of the whole UNet, a panel a model."""
    figure, panels = _open_figure(1, len(models), width=5.4, height=3.3)
    for spent, axes in zip(models, panels, strict=True):
        places = range(len(spent.blocks))
        for offset, metric, colour, label in (
            (-0.2, "params", PARAMS, f"parameters, {spent.whole['unet_params'] / 1e6:.1f} M"),
            (+0.2, "macs", MACS, f"computation, {spent.whole['unet_macs'] / 1e9:.1f} GMAC"),
        ):
            shares = [100 * spent.share(metric, block) for block in spent.blocks]
            bars = axes.bar(
                [place + offset for place in places], shares, 0.38, color=colour, label=label
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1, color="#374151")
        axes.set_xticks(list(places), spent.blocks)
        axes.set_ylabel("share of the UNet, %")
        axes.legend(fontsize=8, frameon=False, loc="upper left")
        axes.margins(y=0.22)
        _finish(axes, _name(spent))
    return figure


def draw_units(models: Sequence[Spent]) -> Figure:
    """Latency and parameters by unit, two panels a model; MACs where a model was not timed."""
    figure, panels = _open_figure(2 * len(models), 1, width=10.5, height=2.1)
    for place, spent in enumerate(models):
        top, bottom = panels[2 * place : 2 * place + 2]
        if spent.seconds:
            work = {at: seconds * 1000 for at, seconds in spent.seconds.items()}
            samples = spent.fields["batch"]
            title = f"{_name(spent)}, {samples} samples a call, {spent.fields['device']}"
            _draw_row(top, spent, work, "latency, ms", title)
        else:
            work = {at: macs / 1e9 for at, macs in spent.macs.items()}
            _draw_row(top, spent, work, "GMAC", _name(spent))
        top.tick_params(labelbottom=False)
        top.margins(y=0.22)
        top.legend(fontsize=8, frameon=False, loc="upper center", ncols=len(KINDS))
        millions = {at: params / 1e6 for at, params in spent.params.items()}
        _draw_row(bottom, spent, millions, "parameters, M", "")
    return figure


def _draw_row(axes: Axes, spent: Spent, values: Mapping[str, float], what: str, title: str) -> None:
    addresses = list(spent.kinds)
    for kind, colour in KINDS.items():
        own = [
            place
            for place, at in enumerate(addresses)
            if (spent.kinds[at] if spent.kinds[at] in KINDS else "") == kind
        ]
        heights = [values[addresses[place]] for place in own]
        axes.bar(own, heights, 0.78, color=colour, label=LABELS[kind])
    axes.set_xticks(range(len(addresses)), addresses, rotation=90, fontsize=6.5)
    axes.set_xlim(-0.7, len(addresses) - 0.3)
    axes.set_ylabel(what, fontsize=8.5)
    axes.tick_params(axis="y", labelsize=8)
    borders = [
        place - 0.5
        for place in range(1, len(addresses))
        if get_block(addresses[place]) != get_block(addresses[place - 1])
    ]
    for border in borders:
        axes.axvline(border, color="#d1d5db", linewidth=0.7, zorder=0)
    _finish(axes, title)


def _open_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _finish(axes: Axes, title: str) -> None:
    if title:
        axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _name(spent: Spent) -> str:
    return (
        f"{spent.subject}, {spent.fields['latent_width']}x{spent.fields['latent_height']} latents"
    )

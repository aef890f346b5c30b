"""Where a UNet keeps its weights and spends its work: records, and what they say.

The analysis that A-SDM (arXiv 2406.00210) begins with: parameters and computation by block, then
latency and parameters by unit. What costs much and holds little is where thinning pays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from leansd.errors import LeansdError
from leansd.evaluation.cost import CostModel, GuidedRows
from leansd.evaluation.inner_timing import UnitTimes
from leansd.evaluation.records import Record, get_field
from leansd.plans.address import get_block
from leansd.plans.anatomy import HEAD, STEM, Anatomy
from leansd.text import Table

PLAN = "no plan"
METRICS = {"params": "", "macs": "", "unit_time": "s"}
"""What is on record of every unit, and its unit of measure; times only where they were taken."""
WHOLE = {"unet_params": "", "unet_macs": "", "call_time": "s"}


@dataclass(frozen=True)
class Spent:
    """What every unit of one UNet has and takes, in running order."""

    subject: str
    kinds: Mapping[str, str]
    params: Mapping[str, float]
    macs: Mapping[str, float]
    seconds: Mapping[str, float]
    """Seconds of one call by unit; empty where it was not timed."""
    whole: Mapping[str, float]
    """Totals by metric: parameters, MACs and seconds of the UNet, outside the units as well."""
    fields: Mapping[str, Any]
    """Fields of the records: latent size, samples a call, device."""

    @property
    def blocks(self) -> list[str]:
        return [at for at in dict.fromkeys(map(get_block, self.kinds)) if at not in (STEM, HEAD)]

    def share(self, metric: str, block: str) -> float:
        """A block's share of the whole UNet's parameters or MACs."""
        numbers = {"params": self.params, "macs": self.macs}[metric]
        inside = sum(value for at, value in numbers.items() if get_block(at) == block)
        return inside / (self.whole[f"unet_{metric}"] or 1)


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


def read_cost(records: Iterable[Record]) -> CostModel:
    """What units cost, of what `leansd profile` wrote or `leansd anatomy --time`.

    An anatomy's times tell what units and whole calls take and nothing else of a pipeline.

    Raises:
        LeansdError: the records are of several UNets, or hold no times.
    """
    rows = list(records)
    timed = [row for row in rows if row.plan == PLAN and row.metric in ("unit_time", "call_time")]
    if not timed:
        return CostModel.from_records(rows)
    subjects = sorted({row.subject for row in timed})
    if len(subjects) != 1:
        raise LeansdError(
            f"these records hold times of {', '.join(subjects)}; give a file that has those of one"
        )
    (call,) = (row.value for row in timed if row.metric == "call_time")
    units: dict[str, Mapping[GuidedRows, float]] = {
        row.at: {"whole": row.value} for row in timed if row.at is not None
    }
    # Latents were timed, not pictures: there is no size in pixels.
    bare = CostModel(subjects[0], 1, (0, 0), units, {}, fixed={"whole": 0.0})
    return replace(bare, fixed={"whole": call - bare.full_call})


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
    cells = [
        f"{macs / (spent.whole['unet_macs'] or 1):.1%}",
        f"{params / spent.whole['unet_params']:.1%}",
    ]
    if timed:
        seconds = sum(spent.seconds[at] for at in inside)
        share = seconds / spent.whole["call_time"]
        cells = [f"{seconds * 1000:.2f}", f"{share:.1%}", *cells]
    return ("  " * deep + name, *cells, f"{params / 1e6:.3f} M")

"""What UNet calls and whole runs cost on one machine, as numbers that predict any plan's time.

The time of a call is a sum: the units that it computes, what a block spends besides its units when
it is entered at all (joining the skips), a fixed part (time embedding, guidance, Python), and what
is copied in and out of the store. `leansd.profile` measures the numbers; here is only arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from leansd.errors import LeansdError
from leansd.evaluation.records import Record, get_field
from leansd.plans.address import get_block
from leansd.plans.anatomy import HEAD, STEM
from leansd.plans.liveness import Call, Kept, Program
from leansd.plans.methods import METHODS
from leansd.plans.row import OWN, Attend

GuidedRows = Literal["whole", "half", "none"]
"""What a call runs: the `whole` batch, only the conditional `half` of a guided one, or `none` of
it, where the UNet's output is inherited and the UNet not entered."""
BATCHES: tuple[GuidedRows, ...] = get_args(GuidedRows)

Times = Mapping[str, Mapping[GuidedRows, float]]
"""Seconds by address and batch."""


@dataclass(frozen=True)
class CostModel:
    """Seconds of everything that a run is made of, for one pipeline, size, batch and machine."""

    subject: str
    pictures: int
    """Pictures drawn at once."""
    size: tuple[int, int]
    """Width and height of a picture, in pixels."""
    units: Times
    """A unit, or a part of one, when it is computed; the parts' time is in their unit's too.

    Of gated self-attentions by the names of `name_gated`.
    """
    blocks: Times
    """What a block spends besides its units when anything in it runs."""
    output_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Bytes that a unit or part gives, for the whole batch."""
    peak_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    """The most memory that computing a unit took on top of what was there; on a GPU only."""
    fixed: Mapping[GuidedRows, float] = field(default_factory=dict[GuidedRows, float])
    """What every call spends besides blocks, ends and copies."""
    per_byte: float = 0.0
    """A byte read or written by keeping and recalling."""
    text: float = 0.0
    """Text encoder, a run."""
    decode: float = 0.0
    """Decoder of the autoencoder, all pictures of a run."""
    other: float = 0.0
    """A run's rest: attaching, tokens, first latents, conversion to pictures."""
    per_step: float = 0.0
    """Scheduler and pipeline between two UNet calls."""
    nets: Mapping[str, CostModel] = field(default_factory=dict)
    """Cost models of UNets that plans switch to, by name; they are not in the records."""

    @property
    def overhead_per_run(self) -> float:
        """Seconds of a run that are spent neither in UNet calls nor between them."""
        return self.text + self.decode + self.other

    @property
    def full_call(self) -> float:
        """Seconds of a UNet call that computes everything for the whole batch and keeps nothing."""
        units = sum(times["whole"] for at, times in self.units.items() if at.count(".") < 3)
        return units + sum(times["whole"] for times in self.blocks.values()) + self.fixed["whole"]

    @property
    def is_guided(self) -> bool:
        """Whether calls for half a guided batch were measured."""
        return "half" in self.fixed

    def predict_call(self, call: Call) -> float:
        """Seconds of one UNet call.

        Raises:
            LeansdError: the call has a unit, a gate or a batch that was not measured.
        """
        if call.net != OWN:
            if call.net not in self.nets:
                raise LeansdError(f"no cost is known of net {call.net!r} ({self.subject})")
            return self.nets[call.net].predict_call(replace(call, net=OWN))
        batch = get_batch(call)
        if batch not in self.fixed:
            raise LeansdError(f"no cost is known of a call {MISSING[batch]} ({self.subject})")
        pattern = call.pattern
        units = sum(self._get_time(at, batch) for at in pattern.computed)
        units -= sum(self._get_time(at, batch) for at in pattern.parts)
        for at, attend in call.gates.items():
            units += self._get_time(name_gated(at, attend), batch) - self._get_time(at, batch)
        copies = self.per_byte * self.count_bytes(call)
        return units + self.predict_joins(call) + self.fixed[batch] + copies

    def predict_joins(self, call: Call) -> float:
        """Seconds that the entered blocks spend besides their units."""
        return sum(self.blocks[block][get_batch(call)] for block in list_entered(call))

    def count_bytes(self, call: Call) -> float:
        """Bytes that a call reads and writes to keep outputs and to make inherited ones."""
        kept = sum(
            # The output is read and a copy written; most else also reads what came in.
            (2 if each.what == "output" else 3) * self._get_bytes(each)
            for group in call.keeps.values()
            for each in group
        )
        recalled = sum(
            (len(sources) + 1) * self._get_bytes(sources[0])
            for lanes in (*call.sources.values(), call.corrects)
            for sources in lanes
        )
        return kept + recalled

    def predict_unet(self, calls: Iterable[Call]) -> float:
        """Seconds in the UNet."""
        return sum(self.predict_call(call) for call in calls)

    def predict_run(self, program: Program) -> float:
        """Seconds of a whole run: text encoder, UNet, scheduler, decoder and the rest."""
        steps = len(program.calls) * self.per_step
        return self.overhead_per_run + steps + self.predict_unet(program.calls)

    def predict_full_run(self, calls: int) -> float:
        """Seconds of a whole run that computes everything in each of `calls` UNet calls."""
        return self.overhead_per_run + calls * (self.per_step + self.full_call)

    def predict_speedup(self, program: Program) -> float:
        """How many times faster a whole run of `program` is than one that computes everything."""
        return self.predict_full_run(len(program.calls)) / self.predict_run(program)

    def predict_unet_speedup(self, program: Program) -> float:
        """The speed-up of the UNet alone, which the whole tends to as the rest gets cheaper."""
        return len(program.calls) * self.full_call / self.predict_unet(program.calls)

    # -- records -----------------------------------------------------------------------------

    def list_records(self, circumstances: Mapping[str, str]) -> list[Record]:
        """Every number as a record; `circumstances` are those of `records.stamp`."""
        shared: dict[str, Any] = {
            **circumstances,
            "subject": self.subject,
            "plan": PLAN,
            "pictures": self.pictures,
            "width": self.size[0],
            "height": self.size[1],
        }
        rows: list[dict[str, Any]] = []
        for metric, table in (("unit_time", self.units), ("block_overhead", self.blocks)):
            rows += [
                {"metric": metric, "at": at, "batch": batch, "value": seconds, "unit": "s"}
                for at, times in table.items()
                for batch, seconds in times.items()
            ]
        for metric in ("output_bytes", "peak_bytes"):
            rows += [
                {"metric": metric, "at": at, "value": count, "unit": "B"}
                for at, count in getattr(self, metric).items()
            ]
        rows += [
            {"metric": "call_overhead", "batch": batch, "value": seconds, "unit": "s"}
            for batch, seconds in self.fixed.items()
        ]
        rows.append({"metric": "copy_time", "value": self.per_byte, "unit": "s/B"})
        rows += [
            {"metric": metric, "value": getattr(self, name), "unit": "s"}
            for metric, name in STAGES.items()
        ]
        return [Record(**shared, **row) for row in rows]

    @classmethod
    def of_whole_calls(
        cls,
        subject: str,
        *,
        pictures: int,
        size: tuple[int, int],
        computed: float,
        forecast: float,
        other: float = 0.0,
    ) -> CostModel:
        """Of a denoiser whose output alone is known.

        Args:
            computed: seconds of a call that runs it.
            forecast: seconds of one that does not.
            other: a run's rest.
        """
        return cls(
            subject=subject,
            pictures=pictures,
            size=size,
            units={HEAD: {"whole": computed, "none": 0.0}},
            blocks={},
            fixed={"whole": 0.0, "none": forecast},
            other=other,
        )

    @classmethod
    def from_records(cls, records: Iterable[Record]) -> CostModel:
        """The model that `list_records` wrote; records of other metrics are passed over.

        Raises:
            LeansdError: there are none, they are of several profiles, or some are missing.
        """
        rows = [record for record in records if record.plan == PLAN]
        profiles = {
            (
                row.subject,
                get_field(row, "pictures"),
                get_field(row, "width"),
                get_field(row, "height"),
            )
            for row in rows
        }
        if len(profiles) != 1:
            raise LeansdError(
                f"these records hold {len(profiles)} profiles, not one; give a file that "
                "leansd profile wrote"
            )
        ((subject, pictures, width, height),) = profiles
        values = {row.metric: row.value for row in rows if row.at is None}
        missing = [metric for metric in (*STAGES, "copy_time") if metric not in values]
        if missing:
            raise LeansdError(f"the profile has no record of {missing[0]}; profile the model again")
        stages: dict[str, Any] = {name: values[metric] for metric, name in STAGES.items()}
        return cls(
            subject=subject,
            pictures=pictures,
            size=(width, height),
            units=_gather(rows, "unit_time"),
            blocks=_gather(rows, "block_overhead"),
            output_bytes=_gather_bytes(rows, "output_bytes"),
            peak_bytes=_gather_bytes(rows, "peak_bytes"),
            fixed={
                get_field(row, "batch"): row.value for row in rows if row.metric == "call_overhead"
            },
            per_byte=values["copy_time"],
            **stages,
        )

    # -- reading -----------------------------------------------------------------------------

    def _get_time(self, at: str, batch: GuidedRows) -> float:
        try:
            return self.units[at][batch]
        except KeyError:
            raise LeansdError(
                f"the cost of {at} was not measured ({batch} batch): the profile of {self.subject} "
                "is of another UNet, or was taken without guidance or without this gate (attend=)"
            ) from None

    def _get_bytes(self, kept: Kept) -> float:
        # The guidance difference is as large as the latents: nothing beside a feature.
        whole = self.output_bytes.get(kept.unit, 0)
        return whole if kept.lane == "all" else whole / 2


PLAN = "profile"
"""Stands in the records' `plan`."""

STAGES = {
    "text_time": "text",
    "decode_time": "decode",
    "other_time": "other",
    "step_time": "per_step",
}
"""Metric of each number that is of the whole pipeline, and its name in the model."""


MISSING: Mapping[GuidedRows, str] = {
    "whole": "for a whole batch: the profile is broken; profile the model again",
    "half": "for half a batch: it was profiled without guidance; profile it with a guidance scale "
    "above 1",
    "none": "that computes nothing: the profile has none; profile the model again",
}
"""What to say where a kind of call was not measured."""


def name_gated(at: str, attend: Attend) -> str:
    """What a self-attention that a plan gates is called among units: it has a time of its own."""
    return f"{at}:{attend}"


def get_batch(call: Call) -> GuidedRows:
    if HEAD in call.pattern.inherited:
        return "none"
    return "half" if call.is_half else "whole"


def list_entered(call: Call) -> set[str]:
    """The blocks in which a call computes anything, or needs the input of what inherits."""
    pattern = call.pattern
    fed = (at for at, how in pattern.inherited.items() if METHODS[how].takes_input)
    return {get_block(at) for at in (*pattern.computed, *fed)} - {STEM, HEAD}


class Observed(NamedTuple):
    """What was seen of one UNet call."""

    call: Call
    seconds: float
    besides: float
    """Seconds that it took besides the units computed in it."""


def fit_overheads(cost: CostModel, observed: Sequence[Observed]) -> CostModel:
    """`cost` with the fixed part of a call and the price of a copied byte fitted to whole calls.

    Least squares, an error counting as a share of its call, so that short calls matter as much as
    long ones; nothing costs less than nothing.
    """
    batches = [
        batch for batch in BATCHES if any(get_batch(each.call) == batch for each in observed)
    ]
    rows = [
        [
            *(float(get_batch(each.call) == batch) for batch in batches),
            cost.count_bytes(each.call) / 2**20,
        ]
        for each in observed
    ]
    rest = np.array([each.besides - cost.predict_joins(each.call) for each in observed])
    seconds = np.array([each.seconds for each in observed])
    solution = solve_nonnegative(np.array(rows) / seconds[:, None], rest / seconds)
    *fixed, per_mebibyte = solution.tolist()
    return replace(
        cost, fixed=dict(zip(batches, fixed, strict=True)), per_byte=per_mebibyte / 2**20
    )


def scale_calls(cost: CostModel, factor: float) -> CostModel:
    """`cost` with everything inside UNet calls `factor` times as long.

    Medians of short laps miss what now and then interrupts them, which whole calls do not: where
    other work shares the machine, their sum falls short by a factor.
    """
    return replace(
        cost,
        units=_scale_times(cost.units, factor),
        blocks=_scale_times(cost.blocks, factor),
        fixed={batch: seconds * factor for batch, seconds in cost.fixed.items()},
        per_byte=cost.per_byte * factor,
    )


def solve_nonnegative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares over x [n] >= 0 of `matrix` [m, n] times x against `target` [m].

    The few columns allow plain elimination: as long as one comes out negative, the most negative
    one is set to zero.
    """
    solution = np.zeros(matrix.shape[1])
    columns = list(range(matrix.shape[1]))
    while columns:
        found = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
        if (found >= 0).all():
            solution[columns] = found
            break
        del columns[int(found.argmin())]
    return solution


def _scale_times(times: Times, factor: float) -> Times:
    return {
        at: {batch: seconds * factor for batch, seconds in row.items()} for at, row in times.items()
    }


def _gather(rows: Iterable[Record], metric: str) -> dict[str, dict[GuidedRows, float]]:
    table: dict[str, dict[GuidedRows, float]] = {}
    for row in rows:
        if row.metric == metric and row.at is not None:
            table.setdefault(row.at, {})[get_field(row, "batch")] = row.value
    return table


def _gather_bytes(rows: Iterable[Record], metric: str) -> dict[str, int]:
    return {row.at: int(row.value) for row in rows if row.metric == metric and row.at is not None}

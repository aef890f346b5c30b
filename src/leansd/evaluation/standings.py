"""What came out of a benchmark, from its records: points, fronts, margins and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, permutations
from typing import Any

from leansd.evaluation.compare import CONVERGED
from leansd.evaluation.pareto import find_front
from leansd.evaluation.quality import OTHER_SEEDS
from leansd.evaluation.records import Record, get_field
from leansd.evaluation.rivals import OURS, RIVALS, Contest
from leansd.evaluation.runs import FULL
from leansd.text import Table

SPEEDS = (1.5, 2.0, 3.0)
SLACK = 0.01
"""The difference up to which speeds are the same: ten calls of thirty and twenty forecasts take
0.1 % longer than ten steps, and no clock tells more."""
MEASURED, PREDICTED = "speedup", "predicted_speedup"
"""How fast contestants are: by the clock, whose noise counts, or by what they compute."""
FIELDS = ("task", "sampler", "steps", "guidance", "strength")
"""Fields that tell contests apart; a strength is told where it is not the usual one."""
COLUMNS = {
    "PSNR": ("psnr", FULL, ".1f"),
    "to converged": ("psnr", CONVERGED, ".1f"),
    "SSIM": ("ssim", FULL, ".3f"),
    "latent error": ("latent_error", FULL, ".3f"),
    "CLIP score": ("clip_score", None, ".2f"),
    "retrieval": ("retrieval", None, ".3f"),
    "Fréchet (CLIP)": ("frechet", FULL, ".3f"),
    "Fréchet (CLIP), other seeds": ("frechet", OTHER_SEEDS, ".3f"),
}
"""Columns of the whole table: metric, reference and form."""


@dataclass(frozen=True)
class BenchPoint:
    """One contestant: how many times faster than the full run, and a quality; more is better."""

    name: str
    speed: float
    quality: float


@dataclass(frozen=True)
class Margin:
    """Ours against the best rival at one speed; what nobody reaches is None."""

    speed: float
    ours: BenchPoint | None
    rival: BenchPoint | None
    family: str = ""

    @property
    def value(self) -> float | None:
        """The lead of ours over the rival, in dB."""
        if self.ours is None or self.rival is None:
            return None
        return self.ours.quality - self.rival.quality


def rate_point(point: BenchPoint) -> tuple[float, float]:
    """What a front is made of."""
    return point.speed, point.quality


def read_points(points: Sequence[BenchPoint], speed: float) -> BenchPoint | None:
    """The best measured point that is at least so fast, or as good as."""
    fast = [point for point in points if point.speed >= speed * (1 - SLACK)]
    return max(fast, key=lambda point: point.quality, default=None)


def read_front(points: Sequence[BenchPoint], speed: float) -> BenchPoint | None:
    """The best that a family reaches at a speed, between its measured points too."""
    front = find_front(points, rate_point)
    for slow, fast in pairwise(front):
        if slow.speed < speed < fast.speed:
            share = math.log(speed / slow.speed) / math.log(fast.speed / slow.speed)
            quality = slow.quality + share * (fast.quality - slow.quality)
            return BenchPoint(f"{slow.name} to {fast.name}", speed, quality)
    return read_points(front, speed)


def pick_shares(points: Sequence[BenchPoint], speed: float) -> tuple[BenchPoint, ...]:
    """The one or two that reach most at a speed, each drawing a share of the pictures."""
    alone = read_points(points, speed)
    found = [(alone,)] if alone is not None else []
    pairs = permutations(points, 2)
    found += [(slow, fast) for slow, fast in pairs if slow.speed < speed < fast.speed]
    return max(found, key=lambda parts: mix_points(parts, speed).quality, default=())


def mix_points(parts: Sequence[BenchPoint], speed: float) -> BenchPoint:
    """What they reach together: over many pictures, time and decibels are means by the shares."""
    if len(parts) == 1:
        return parts[0]
    slow, fast = parts
    share = (1 / slow.speed - 1 / speed) / (1 / slow.speed - 1 / fast.speed)
    quality = slow.quality + share * (fast.quality - slow.quality)
    return BenchPoint(f"{slow.name} and {fast.name}", speed, quality)


def read_shares(points: Sequence[BenchPoint], speed: float) -> BenchPoint | None:
    """The best that two of them reach together."""
    parts = pick_shares(points, speed)
    return mix_points(parts, speed) if parts else None


Rivals = Mapping[str, Sequence[BenchPoint]]
"""Points by family."""


def find_best(rivals: Rivals, speed: float) -> tuple[str, BenchPoint] | None:
    """The best family at a speed, given what lies between its points."""
    reached = {family: read_front(points, speed) for family, points in rivals.items()}
    there = [(family, point) for family, point in reached.items() if point is not None]
    return max(there, key=lambda each: each[1].quality, default=None)


def find_best_two(rivals: Rivals, speed: float) -> tuple[str, BenchPoint] | None:
    """The best that any two rivals reach together, of one family or of two."""
    families = {point: family for family, points in rivals.items() for point in points}
    parts = pick_shares(list(families), speed)
    told = " + ".join(dict.fromkeys(families[each] for each in parts))
    return (told, mix_points(parts, speed)) if parts else None


@dataclass(frozen=True)
class Reading:
    """How ours and the best rival are read at a speed."""

    ours: Callable[[Sequence[BenchPoint], float], BenchPoint | None]
    rival: Callable[[Rivals, float], tuple[str, BenchPoint] | None]


SINGLE = Reading(read_points, find_best)
"""One plan for every picture; rivals are given what lies between their points, ours are not."""
SHARED = Reading(read_shares, find_best_two)
"""Two share the pictures, of ours or of all rivals."""


def find_margin(
    ours: Sequence[BenchPoint], rivals: Rivals, speed: float, reading: Reading = SINGLE
) -> Margin:
    """Ours against the best of all rivals, by family, at a speed."""
    family, rival = reading.rival(rivals, speed) or ("", None)
    return Margin(speed, reading.ours(ours, speed), rival, family)


@dataclass(frozen=True)
class Standing:
    """All records of one contest of one model, by contestant, metric and reference."""

    fields: Mapping[str, Any]
    cells: Mapping[tuple[str, str, Any], Record]

    @property
    def names(self) -> list[str]:
        """The contestants, the full run first."""
        return list(dict.fromkeys(name for name, _, _ in self.cells))

    @property
    def contest(self) -> Contest:
        """As records tell it: those of image-to-image leave the usual strength out."""
        return Contest(**{name: self.fields[name] for name in FIELDS if name in self.fields})

    @property
    def title(self) -> str:
        return str(self.contest)

    @property
    def slug(self) -> str:
        """The title as part of a file name."""
        return self.title.replace(", ", "-").replace(" ", "-").replace("+", "p")

    def find(self, name: str, metric: str, reference: str | None = None) -> Record | None:
        return self.cells.get((name, metric, reference))

    def get_family(self, name: str) -> str:
        return str(get_field(self.cells[name, MEASURED, None], "family"))

    def list_points(self, reference: str, speeds: str = MEASURED) -> dict[str, list[BenchPoint]]:
        """By family, every contestant's speed-up and mean PSNR in dB to a reference.

        Args:
            speeds: `MEASURED` or `PREDICTED`; adaptive plans have none of the second.
        """
        points: dict[str, list[BenchPoint]] = {}
        for name in self.names:
            psnr, speed = self.find(name, "psnr", reference), self.find(name, speeds)
            if psnr is not None and speed is not None and name != FULL:
                family = points.setdefault(self.get_family(name), [])
                family.append(BenchPoint(name, speed.value, psnr.value))
        return points

    @property
    def references(self) -> list[str]:
        """What pictures were held against: no converged run where every step draws noise."""
        return [FULL, *([CONVERGED] if self.list_points(CONVERGED) else [])]

    def find_margins(
        self,
        reference: str = FULL,
        speeds: Sequence[float] = SPEEDS,
        by: str = MEASURED,
        reading: Reading = SINGLE,
    ) -> list[Margin]:
        """Ours against the best rival at every speed, measured or predicted."""
        points = self.list_points(reference, by)
        rivals = {
            family: each
            for family, each in points.items()
            if family != OURS and (family not in RIVALS or RIVALS[family].competes)
        }
        own = points.get(OURS, [])
        return [find_margin(own, rivals, speed, reading) for speed in speeds]


def find_contest(record: Record) -> tuple[Any, ...]:
    """What is the same in all records of one contest of one model."""
    return record.subject, *(get_field(record, name) for name in FIELDS)


def read_standings(records: Sequence[Record]) -> list[Standing]:
    """The standings of every contest: text-to-image first, by guidance, sampler and steps."""
    standings: list[Standing] = []
    for key, group in groupby(records, key=find_contest):
        cells = {
            (record.plan, record.metric, get_field(record, "reference")): record for record in group
        }
        told = zip(("subject", *FIELDS), key, strict=True)
        fields: dict[str, Any] = {name: value for name, value in told if value is not None}
        standings.append(Standing(fields, cells))
    return sorted(
        standings,
        key=lambda each: (
            each.fields["task"] != "text-to-image",
            each.fields.get("strength", 0.0),
            each.fields["guidance"],
            each.fields["sampler"],
            each.fields["steps"],
        ),
    )


def tabulate_margins(standing: Standing) -> Table:
    """Ours against the best rival at each speed, under both references; fits 80 columns."""
    rows = [
        (
            f"{margin.speed:g}x",
            reference,
            "–" if (ours := margin.ours) is None else f"{ours.quality:.1f} dB ({ours.name})",
            "–" if (best := margin.rival) is None else f"{best.quality:.1f} dB ({margin.family})",
            show_margin(margin),
        )
        for reference in standing.references
        for margin in standing.find_margins(reference)
    ]
    columns = ("at", "PSNR to", "ours", "best rival", "margin")
    return Table(columns, tuple(rows), standing.title)


def tabulate_computing(standing: Standing) -> Table:
    """The same to the full run by what is computed, which no busy machine changes; fits 80."""
    readings = (SINGLE, SHARED)
    margins = zip(
        SPEEDS,
        *(standing.find_margins(by=PREDICTED, reading=each) for each in readings),
        strict=True,
    )
    rows = [(f"{speed:g}x", *map(summarise_margin, found)) for speed, *found in margins]
    columns = ("at", "one plan for all", "two share the pictures")
    return Table(columns, tuple(rows), "by what is computed, dB to full")


def tabulate_all(standing: Standing) -> Table:
    """Every contestant with all that was measured, slowest first."""
    names = sorted(standing.names, key=lambda name: standing.cells[name, MEASURED, None].value)
    heads = [
        head
        for head, (metric, reference, _) in COLUMNS.items()
        if any(standing.find(name, metric, reference) for name in names)
    ]

    def show(name: str, head: str) -> str:
        metric, reference, form = COLUMNS[head]
        record = standing.find(name, metric, reference)
        return "" if record is None else f"{record.value:{form}}"

    rows = [
        (
            name,
            standing.get_family(name),
            show_speed(standing, name),
            *(show(name, head) for head in heads),
        )
        for name in names
    ]
    return Table(("", "family", "speed-up", *heads), tuple(rows), standing.title)


def summarise_margin(margin: Margin) -> str:
    """Both and the difference, in few words."""
    ours = "–" if margin.ours is None else f"{margin.ours.quality:.1f}"
    rival = "–" if margin.rival is None else f"{margin.rival.quality:.1f} ({margin.family})"
    return f"{ours} / {rival}: {show_margin(margin)}"


def show_margin(margin: Margin) -> str:
    return "–" if margin.value is None else f"{margin.value:+.1f}"


def show_speed(standing: Standing, name: str) -> str:
    record = standing.cells[name, MEASURED, None]
    low, high = (get_field(record, edge) for edge in ("low", "high"))
    return f"{record.value:.2f}x ({low:.2f}-{high:.2f})"


def list_left_out(standing: Standing) -> list[str]:
    """Rivals that did not take part, and why."""
    record = standing.find(FULL, "seconds")
    text = get_field(record, "left_out") if record is not None else None
    return str(text).split("; ") if text else []


def describe_quality(standing: Standing) -> str:
    """Whether ours at 2x is as good a set as the full run, within its own spread from seed to seed.

    Empty where no spread was measured.
    """
    margin = standing.find_margins(speeds=(2.0,))[0]
    if margin.ours is None:
        return ""
    name, parts = margin.ours.name, list[str]()
    for head in ("retrieval", "Fréchet (CLIP), other seeds"):
        metric, reference, form = COLUMNS[head]
        own, full = (standing.find(each, metric, reference) for each in (name, FULL))
        spread = get_field(full, "seed_spread") if full is not None else None
        if own is not None and full is not None and spread is not None:
            parts.append(f"{head} {own.value:{form}}, full {full.value:{form}} ±{spread:{form}}")
    return f"sets at 2x ({name}): {'; '.join(parts)}" if parts else ""

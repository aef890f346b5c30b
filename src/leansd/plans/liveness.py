"""Liveness: what runs at each UNet call of a run, and what must be kept for how long.

A unit whose output nobody reads is *idle*: neither computed nor inherited, it costs nothing. Which
units are idle follows from the graph (`Unit.reads`) alone, so a plan only ever says what inherits.
That DeepCache skips everything below its branch, or encoder propagation everything above the mid
block, is a consequence, not a rule.

A guided call has two lanes, the unconditional and the conditional half of its batch. Where a plan
inherits or drops guidance, only the conditional lane runs, and what is kept is kept by lane.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, Anatomy
from leansd.plans.plan import Guidance, How, Plan

Lane = Literal["all", "rest", "cond"]
"""`all` of a batch; or of a guided one the `cond`itional half, which comes last, and the `rest`."""

GUIDANCE = "guidance"
"""Stands in `Kept.unit` for the difference between the two lanes of the UNet's output."""


@dataclass(frozen=True)
class Pattern:
    """What one call does with every unit of a UNet: the three sets are a partition of the units."""

    computed: frozenset[str]
    inherited: Mapping[str, How]
    """Units that give a kept output because somebody reads it."""
    idle: frozenset[str]
    parts: Mapping[str, How] = field(default_factory=dict[str, How])
    """Parts that inherit inside units that are computed."""
    active: frozenset[str] = frozenset()
    """Units and parts that are computed."""


What = Literal["output", "change", "difference"]
"""A unit's output; what it added to its input; conditional minus unconditional output."""


class Kept(NamedTuple):
    """Something to keep from one call for later ones."""

    unit: str
    call: int
    what: What
    lane: Lane = "all"


@dataclass(frozen=True)
class Call:
    """One UNet call of a run: its pattern, what inherited outputs are made of, what is kept."""

    index: int
    pattern: Pattern
    lanes: tuple[Lane, ...]
    """The lanes that run, in the order of the batch."""
    guidance: Guidance
    sources: Mapping[str, tuple[tuple[Kept, ...], ...]]
    """For each inherited unit and each lane, what it is made from, latest first."""
    keeps: Mapping[str, tuple[Kept, ...]]
    """For each computed unit that a later call inherits from, what to keep."""
    releases: frozenset[Kept]
    """What nobody reads after this call."""

    @property
    def is_full(self) -> bool:
        """Whether everything is computed, for the whole batch."""
        pattern = self.pattern
        return not (pattern.inherited or pattern.idle or pattern.parts or self.is_half)

    @property
    def is_half(self) -> bool:
        """Whether only the conditional half of a guided batch runs."""
        return self.lanes == ("cond",)


@dataclass(frozen=True, eq=False)
class Program:
    """A run's UNet calls from `start` to the end; the first of them computes everything."""

    start: int
    calls: tuple[Call, ...]

    def __getitem__(self, index: int) -> Call:
        return self.calls[index - self.start]

    @cached_property
    def alive(self) -> tuple[frozenset[Kept], ...]:
        """What is kept after every call: the least that any engine must store."""
        alive: set[Kept] = set()
        after: list[frozenset[Kept]] = []
        for call in self.calls:
            for kept in call.keeps.values():
                alive.update(kept)
            alive -= call.releases
            after.append(frozenset(alive))
        return tuple(after)


def find_pattern(anatomy: Anatomy, inherits: Mapping[str, How]) -> Pattern:
    """Split the units into computed, inherited and idle, walking from the output to the input."""
    needed = {HEAD}
    computed: set[str] = set()
    inherited: dict[str, How] = {}
    idle: set[str] = set()
    for unit in reversed(anatomy.units):
        if unit.at not in needed:
            idle.add(unit.at)
            continue
        how = inherits.get(unit.at)
        if how is None:
            computed.add(unit.at)
        else:
            inherited[unit.at] = how
        if how is None or how == "residual":
            needed.update(unit.reads)
    working = [part.at for part in anatomy.parts if part.reads[0] in computed]
    parts: dict[str, How] = {at: inherits[at] for at in working if at in inherits}
    active = computed.union(at for at in working if at not in parts)
    return Pattern(frozenset(computed), inherited, frozenset(idle), parts, frozenset(active))


def compile_plan(
    plan: Plan,
    anatomy: Anatomy,
    *,
    start: int = 0,
    rows: Sequence[int] | None = None,
    moments: Sequence[float] | None = None,
    guided: bool = True,
) -> Program:
    """The UNet calls of a run that follows `plan`, from call `start` on.

    A run that starts late (image-to-image) or has to start over (another batch size midway) is the
    same plan with another `start`: its first call computes everything.

    Args:
        rows: the plan's row for each UNet call, where a sampler makes several in a step.
        moments: the time step of each call; forecasts draw on outputs of distinct moments.
        guided: whether the batch has an unconditional and a conditional half; without them what the
            plan says of guidance means nothing.
    """
    rows = range(plan.steps) if rows is None else rows
    resolved = plan.resolve(anatomy)
    guidance: list[Guidance] = [
        plan.rows[rows[index]].guidance if guided and index > start else "compute"
        for index in range(start, len(rows))
    ]
    patterns = [
        find_pattern(anatomy, {} if index == start else resolved[rows[index]])
        for index in range(start, len(rows))
    ]
    lanes = [_pick_lanes(each, guidance) for each in guidance]
    sources = _trace_sources(patterns, guidance, lanes, start, moments)
    last_use = {kept: index for index, read in enumerate(sources, start) for kept in _flatten(read)}
    calls = tuple(
        Call(
            index=index,
            pattern=patterns[index - start],
            lanes=lanes[index - start],
            guidance=guidance[index - start],
            sources=sources[index - start],
            keeps=_group(kept for kept in last_use if kept.call == index),
            releases=frozenset(kept for kept, last in last_use.items() if last == index),
        )
        for index in range(start, len(rows))
    )
    return Program(start, calls)


def predict_speedup(calls: Sequence[Call], anatomy: Anatomy) -> float:
    """Multiply-accumulates of computing everything in every call, over those of these calls.

    Raises:
        LeansdError: the anatomy's cost was not counted (`leansd.dissect` does).
    """
    if not anatomy.macs:
        raise LeansdError("this anatomy has no cost; leansd.dissect(unet) counts it")
    parts = {part.at: part.macs for part in anatomy.parts}
    spent = 0.0
    for call in calls:
        pattern = call.pattern
        macs = anatomy.macs - sum(parts[at] for at in pattern.parts)
        macs -= sum(unit.macs for unit in anatomy if unit.at not in pattern.computed)
        spent += macs / 2 if call.is_half else macs
    return anatomy.macs * len(calls) / spent


def _pick_lanes(guidance: Guidance, of_run: Sequence[Guidance]) -> tuple[Lane, ...]:
    """The lanes that a call runs; a run that computes guidance throughout needs no lanes."""
    if all(each == "compute" for each in of_run):
        return ("all",)
    return ("rest", "cond") if guidance == "compute" else ("cond",)


def _trace_sources(
    patterns: Sequence[Pattern],
    guidance: Sequence[Guidance],
    lanes: Sequence[tuple[Lane, ...]],
    start: int,
    moments: Sequence[float] | None,
) -> list[dict[str, tuple[tuple[Kept, ...], ...]]]:
    """For every call, what each inherited unit is made from: its latest computed outputs."""
    computed_at: dict[tuple[str, Lane], tuple[int, ...]] = {}

    def note(unit: str, lane: Lane, index: int) -> None:
        before = computed_at.get((unit, lane), ())
        if before and moments is not None and moments[before[0]] == moments[index]:
            before = before[1:]
        computed_at[unit, lane] = (index, *before[:1])

    def trace(unit: str, lane: Lane, how: How) -> tuple[Kept, ...]:
        depth = 2 if how == "forecast" else 1
        what: What = "change" if how == "residual" else "output"
        if unit == GUIDANCE:
            what = "difference"
        return tuple(Kept(unit, call, what, lane) for call in computed_at[unit, lane][:depth])

    sources: list[dict[str, tuple[tuple[Kept, ...], ...]]] = []
    for index, pattern in enumerate(patterns, start):
        here, guide = lanes[index - start], guidance[index - start]
        inherited: dict[str, How] = {**pattern.inherited}
        inherited.update(pattern.parts)
        read = {
            unit: tuple(trace(unit, lane, how) for lane in here) for unit, how in inherited.items()
        }
        if guide in ("inherit", "forecast"):
            how: How = "forecast" if guide == "forecast" else "reuse"
            read[GUIDANCE] = (trace(GUIDANCE, "cond", how),)
        sources.append(read)
        for unit in pattern.active:
            for lane in here:
                note(unit, lane, index)
        if guide == "compute":
            note(GUIDANCE, "cond", index)
    return sources


def _flatten(read: Mapping[str, tuple[tuple[Kept, ...], ...]]) -> Iterable[Kept]:
    return (kept for lanes in read.values() for sources in lanes for kept in sources)


def _group(items: Iterable[Kept]) -> dict[str, tuple[Kept, ...]]:
    grouped: dict[str, tuple[Kept, ...]] = {}
    for kept in items:
        grouped[kept.unit] = (*grouped.get(kept.unit, ()), kept)
    return grouped

"""Liveness: what runs at each UNet call of a run, and what must be kept for how long.

A unit whose output nobody reads is *idle*: neither computed nor inherited, it costs nothing. Which
units are idle follows from the graph (`Unit.reads`) alone, so a plan only ever says what inherits.
That DeepCache skips everything below its branch, or encoder propagation everything above the mid
block, is a consequence, not a rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, Anatomy
from leansd.plans.plan import How, Plan


@dataclass(frozen=True)
class Pattern:
    """What one call does with every unit of a UNet: the three sets are a partition of the units."""

    computed: frozenset[str]
    inherited: Mapping[str, How]
    """Units that give a kept output because somebody reads it."""
    idle: frozenset[str]


class Kept(NamedTuple):
    """Something to keep from one call for later ones."""

    unit: str
    call: int
    what: Literal["output", "change"]
    """The unit's output, or what it added to its input."""


@dataclass(frozen=True)
class Call:
    """One UNet call of a run: its pattern, what inherited outputs are made of, what is kept."""

    index: int
    pattern: Pattern
    sources: Mapping[str, tuple[Kept, ...]]
    """For each inherited unit, what it is made from, latest first."""
    keeps: Mapping[str, tuple[Kept, ...]]
    """For each computed unit that a later call inherits from, what to keep."""
    releases: frozenset[Kept]
    """What nobody reads after this call."""


@dataclass(frozen=True)
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
    return Pattern(frozenset(computed), inherited, frozenset(idle))


def compile_plan(
    plan: Plan,
    anatomy: Anatomy,
    *,
    start: int = 0,
    rows: Sequence[int] | None = None,
    moments: Sequence[float] | None = None,
) -> Program:
    """The UNet calls of a run that follows `plan`, from call `start` on.

    A run that starts late (image-to-image) or has to start over (another batch size midway) is the
    same plan with another `start`: its first call computes everything.

    Args:
        rows: the plan's row for each UNet call, where a sampler makes several in a step.
        moments: the time step of each call; forecasts draw on outputs of distinct moments.
    """
    rows = range(plan.steps) if rows is None else rows
    resolved = plan.resolve(anatomy)
    patterns = [
        find_pattern(anatomy, {} if index == start else resolved[rows[index]])
        for index in range(start, len(rows))
    ]
    sources = _trace_sources(patterns, start, moments)
    last_use = {kept: index for index, read in enumerate(sources, start) for kept in _flatten(read)}
    calls = tuple(
        Call(
            index=index,
            pattern=pattern,
            sources=read,
            keeps=_group(kept for kept in last_use if kept.call == index),
            releases=frozenset(kept for kept, last in last_use.items() if last == index),
        )
        for index, (pattern, read) in enumerate(zip(patterns, sources, strict=True), start)
    )
    return Program(start, calls)


def predict_speedup(calls: Sequence[Call], anatomy: Anatomy) -> float:
    """Multiply-accumulates of computing everything in every call, over those of these calls.

    Raises:
        LeansdError: the anatomy's cost was not counted (`leansd.dissect` does).
    """
    if not anatomy.macs:
        raise LeansdError("this anatomy has no cost; leansd.dissect(unet) counts it")
    saved = sum(
        unit.macs for call in calls for unit in anatomy if unit.at not in call.pattern.computed
    )
    total = anatomy.macs * len(calls)
    return total / (total - saved)


def _trace_sources(
    patterns: Sequence[Pattern], start: int, moments: Sequence[float] | None
) -> list[dict[str, tuple[Kept, ...]]]:
    """For every call, what each inherited unit is made from: its latest computed outputs."""
    computed_at: dict[str, tuple[int, ...]] = {}
    sources: list[dict[str, tuple[Kept, ...]]] = []
    for index, pattern in enumerate(patterns, start):
        read: dict[str, tuple[Kept, ...]] = {}
        for unit, how in pattern.inherited.items():
            depth = 2 if how == "forecast" else 1
            what = "change" if how == "residual" else "output"
            read[unit] = tuple(Kept(unit, call, what) for call in computed_at[unit][:depth])
        sources.append(read)
        for unit in pattern.computed:
            before = computed_at.get(unit, ())
            if before and moments is not None and moments[before[0]] == moments[index]:
                before = before[1:]
            computed_at[unit] = (index, *before[:1])
    return sources


def _flatten(read: Mapping[str, tuple[Kept, ...]]) -> Iterable[Kept]:
    return (kept for sources in read.values() for kept in sources)


def _group(items: Iterable[Kept]) -> dict[str, tuple[Kept, ...]]:
    grouped: dict[str, tuple[Kept, ...]] = {}
    for kept in items:
        grouped[kept.unit] = (*grouped.get(kept.unit, ()), kept)
    return grouped

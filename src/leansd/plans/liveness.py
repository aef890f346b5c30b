"""Liveness: what runs at each UNet call of a run, and what must be kept for how long.

A unit whose output nobody reads is *idle*: neither computed nor inherited, it costs nothing. Which
units are idle follows from the graph (`Unit.reads`) alone, so a plan only ever says what inherits.
That DeepCache skips everything below its branch, or encoder propagation everything above the mid
block, is a consequence, not a rule.

A guided call has two lanes, the unconditional and the conditional half of its batch. Where a plan
inherits or drops guidance, only the conditional lane runs, and what is kept is kept by lane.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Literal, NamedTuple

from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, Anatomy
from leansd.plans.drift import SAMPLE, Drift
from leansd.plans.gate import Attend, Gates, count_attention
from leansd.plans.plan import NO_CORRECTION, Correction, Guidance, How, Plan

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


DEPTHS: dict[How, int] = {
    "reuse": 1,
    "residual": 1,
    "forecast": 2,
    "forecast2": 3,
    "chebyshev": sys.maxsize,
    "chebyshev-line": sys.maxsize,
}
"""How many computed outputs each way of inheriting draws on, at most."""

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
    correct: Correction = NO_CORRECTION
    """See `Row.correct`; nothing where nothing was inherited since the output before."""
    corrects: tuple[tuple[Kept, ...], ...] = ()
    """For each lane, the earlier outputs that the correction is by, latest first."""
    is_upgraded: bool = False
    """Whether everything is computed although the plan would have inherited."""
    attend: Gates = field(default_factory=dict[str, Attend])
    """Self-attentions that attend otherwise than the UNet has them, wherever they are computed."""

    @property
    def inherits(self) -> bool:
        """Whether a unit or a part inherits."""
        return bool(self.pattern.inherited or self.pattern.parts)

    @property
    def computes_all(self) -> bool:
        """Whether everything is computed, for the lanes that run."""
        return not (self.inherits or self.pattern.idle)

    @property
    def is_full(self) -> bool:
        """Whether everything is computed, for the whole batch."""
        return self.computes_all and not self.is_half

    @property
    def gates(self) -> Gates:
        """The gates of what is computed."""
        active = self.pattern.active
        return {at: attend for at, attend in self.attend.items() if at in active}

    @property
    def is_half(self) -> bool:
        """Whether only the conditional half of a guided batch runs."""
        return self.lanes == ("cond",)


@dataclass(frozen=True, eq=False)
class Program:
    """A run's UNet calls from `start` to the end; the first of them computes everything."""

    start: int
    calls: tuple[Call, ...]
    probe: str | None = None
    """For a plan with a drift, the unit (or `sample`) that tells."""
    upgrades: frozenset[int] = frozenset()
    """Calls that are computed in full though the plan inherits."""
    retrace: Callable[..., Program] | None = field(default=None, repr=False, compare=False)

    def upgrade(self, index: int) -> Program:
        """This program with the call `index` computed in full, and all that follows from it."""
        assert self.retrace is not None
        return self.retrace(upgrades=self.upgrades | {index})

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
        # A residual needs the present input; the head's is the UNet's own.
        if how is None or (how == "residual" and unit.at != HEAD):
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
    upgrades: frozenset[int] = frozenset(),
) -> Program:
    """The UNet calls of a run that follows `plan`, from call `start` on.

    A run that starts late (image-to-image) or has to start over (another batch size midway) is the
    same plan with another `start`: its first call computes everything.

    Args:
        rows: the plan's row for each UNet call, where a sampler makes several in a step.
        moments: the time step of each call; forecasts draw on outputs of distinct moments.
        guided: whether the batch has an unconditional and a conditional half; without them what the
            plan says of guidance means nothing.
        upgrades: calls to compute in full where the plan inherits; guidance stays the plan's.

    Raises:
        LeansdError: the plan does not suit this UNet, or its probe runs too late.
    """
    retrace = partial(
        compile_plan, plan, anatomy, start=start, rows=rows, moments=moments, guided=guided
    )
    rows = range(plan.steps) if rows is None else rows
    resolved, gates = plan.resolve(anatomy), plan.resolve_gates(anatomy)
    guidance: list[Guidance] = [
        plan.rows[rows[index]].guidance if guided and index > start else "compute"
        for index in range(start, len(rows))
    ]
    patterns = [
        find_pattern(anatomy, {} if index == start or index in upgrades else resolved[rows[index]])
        for index in range(start, len(rows))
    ]
    probe = find_probe(plan.drift, anatomy, patterns) if plan.drift is not None else None
    lanes = [_pick_lanes(each, guides=guided and plan.guides) for each in guidance]
    weights = [plan.rows[rows[index]].correct for index in range(start, len(rows))]
    sources, corrects = _trace_sources(patterns, guidance, lanes, weights, start, moments)
    last_use = {
        kept: index
        for index, (read, before) in enumerate(zip(sources, corrects, strict=True), start)
        for kept in (*_flatten(read), *chain.from_iterable(before))
    }
    calls = tuple(
        Call(
            index=index,
            pattern=patterns[index - start],
            lanes=lanes[index - start],
            guidance=guidance[index - start],
            sources=sources[index - start],
            keeps=_group(kept for kept in last_use if kept.call == index),
            releases=frozenset(kept for kept, last in last_use.items() if last == index),
            correct=weights[index - start] if corrects[index - start] else NO_CORRECTION,
            corrects=corrects[index - start],
            is_upgraded=index in upgrades,
            attend=gates[rows[index]],
        )
        for index in range(start, len(rows))
    )
    return Program(start, calls, probe, upgrades, retrace)


def find_probe(drift: Drift, anatomy: Anatomy, patterns: Sequence[Pattern]) -> str:
    """The full address of the unit that tells the drift.

    Raises:
        LeansdError: there is none, or it does not run before everything that inherits.
    """
    if drift.probe == SAMPLE:
        return SAMPLE
    try:
        at = anatomy[drift.probe].at
    except LeansdError as error:
        raise LeansdError(f"probe of the drift: {error}") from None
    early = _list_early(anatomy, patterns)
    if at not in early:
        raise LeansdError(
            f"{at} cannot be the probe of the drift: where the plan inherits it must be computed, "
            f"and so must all that runs before it; probes that will do: {', '.join(early)}"
        )
    return at


def _list_early(anatomy: Anatomy, patterns: Sequence[Pattern]) -> list[str]:
    """`sample` and the units that every call computes before anything inherits or is left out."""
    early = [SAMPLE]
    for unit in anatomy:
        for pattern in patterns:
            if unit.at not in pattern.computed:
                return early
            if any(anatomy.by_address[part].reads[0] == unit.at for part in pattern.parts):
                return early
        early.append(unit.at)
    return early


def predict_speedup(calls: Sequence[Call], anatomy: Anatomy) -> float:
    """Multiply-accumulates of computing everything in every call, over those of these calls.

    Raises:
        LeansdError: the anatomy's cost was not counted (`leansd.dissect` does).
    """
    if not anatomy.macs:
        raise LeansdError("this anatomy has no cost; leansd.dissect(unet) counts it")
    parts = {part.at: part.macs for part in anatomy.parts}
    size = anatomy.size or (0, 0)
    spent = 0.0
    for call in calls:
        pattern = call.pattern
        macs = anatomy.macs - sum(parts[at] for at in pattern.parts)
        macs -= sum(unit.macs for unit in anatomy if unit.at not in pattern.computed)
        for at, attend in call.gates.items():
            macs += count_attention(anatomy.by_address[at], attend, size) - parts[at]
        spent += macs / 2 if call.is_half else macs
    return anatomy.macs * len(calls) / spent


def _pick_lanes(guidance: Guidance, *, guides: bool) -> tuple[Lane, ...]:
    """The lanes that a call runs; a plan that computes guidance throughout needs no lanes."""
    if not guides:
        return ("all",)
    return ("rest", "cond") if guidance == "compute" else ("cond",)


def _trace_sources(
    patterns: Sequence[Pattern],
    guidance: Sequence[Guidance],
    lanes: Sequence[tuple[Lane, ...]],
    weights: Sequence[Correction],
    start: int,
    moments: Sequence[float] | None,
) -> tuple[list[dict[str, tuple[tuple[Kept, ...], ...]]], list[tuple[tuple[Kept, ...], ...]]]:
    """For every call, what each inherited unit is made from: its latest computed outputs.

    And what a correction of the UNet's output is made from, at calls that have one.
    """
    computed_at: dict[tuple[str, Lane], tuple[int, ...]] = {}

    def note(unit: str, lane: Lane, index: int) -> None:
        before = computed_at.get((unit, lane), ())
        if before and moments is not None and moments[before[0]] == moments[index]:
            before = before[1:]
        computed_at[unit, lane] = (index, *before)

    def trace(unit: str, lane: Lane, how: How) -> tuple[Kept, ...]:
        what: What = "change" if how == "residual" else "output"
        if unit == GUIDANCE:
            what = "difference"
        return tuple(
            Kept(unit, call, what, lane) for call in computed_at[unit, lane][: DEPTHS[how]]
        )

    sources: list[dict[str, tuple[tuple[Kept, ...], ...]]] = []
    corrects: list[tuple[tuple[Kept, ...], ...]] = []
    inherits = False  # whether the head was inherited since it was last computed
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
        inherits = inherits or HEAD in pattern.inherited
        corrected = inherits and any(weights[index - start])
        corrects.append(tuple(trace(HEAD, lane, "forecast") for lane in here) if corrected else ())
        if HEAD in pattern.active:
            inherits = False
        for unit in pattern.active:
            for lane in here:
                note(unit, lane, index)
        if guide == "compute":
            note(GUIDANCE, "cond", index)
    return sources, corrects


def _flatten(read: Mapping[str, tuple[tuple[Kept, ...], ...]]) -> Iterable[Kept]:
    return (kept for lanes in read.values() for sources in lanes for kept in sources)


def _group(items: Iterable[Kept]) -> dict[str, tuple[Kept, ...]]:
    grouped: dict[str, tuple[Kept, ...]] = {}
    for kept in items:
        grouped[kept.unit] = (*grouped.get(kept.unit, ()), kept)
    return grouped

"""Liveness: what runs at each UNet call of a run, and what must be kept for how long.

A unit whose output nobody reads is *idle*: neither computed nor inherited, it costs nothing. Which
units are idle follows from the graph (`Unit.reads`) alone, so a plan only ever says what inherits.
That DeepCache skips everything below its branch, or encoder propagation everything above the mid
block, is a consequence, not a rule.

A guided call has two lanes, the unconditional and the conditional half of its batch. Where a plan
inherits or drops guidance, only the conditional lane runs, and what is kept is kept by lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Literal, NamedTuple

from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, Anatomy
from leansd.plans.methods import METHODS, NO_CORRECTION, Correction, Mix, What
from leansd.plans.row import OWN, SAMPLE, Attend, Drift, Gates, Guidance, How

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


class Kept(NamedTuple):
    """Something to keep from one call for later ones."""

    unit: str
    call: int
    what: What
    lane: Lane = "all"


@dataclass(frozen=True)
class Net:
    """A UNet that runs at some steps of a plan."""

    anatomy: Anatomy
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    """What units, parts and the difference of guidance are called among all nets, where that is not
    their address: the same name is the same unit, weights and all, so that what either of two nets
    computes both may inherit."""

    def name(self, at: str) -> str:
        """What a unit is called among all nets."""
        return self.names.get(at, at)


NO_NETS: Mapping[str, Net] = MappingProxyType({})


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
    mix: Mix | None = None
    """What the sampler gets in the place of the output; None for the output itself."""
    recomputed: bool = False
    """Whether everything is computed although the plan would have inherited."""
    attend: Gates = field(default_factory=dict[str, Attend])
    """Self-attentions that attend otherwise than the UNet has them, wherever they are computed."""
    net: str = OWN
    """The UNet that runs; units are called by its addresses, what is kept by names of all nets."""

    def list_read(self) -> Iterator[Kept]:
        """What is read of earlier calls."""
        made = chain.from_iterable(chain.from_iterable(self.sources.values()))
        return chain(made, chain.from_iterable(self.corrects))

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

    @cached_property
    def mixes(self) -> bool:
        """Whether a call mixes outputs, so that all that are computed are kept."""
        return any(call.mix is not None for call in self.calls)

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
        # A change is added to the present input; the head's is the UNet's own.
        if how is None or (METHODS[how].takes_input and unit.at != HEAD):
            needed.update(unit.reads)
    working = [part.at for part in anatomy.parts if part.reads[0] in computed]
    parts: dict[str, How] = {at: inherits[at] for at in working if at in inherits}
    active = computed.union(at for at in working if at not in parts)
    return Pattern(frozenset(computed), inherited, frozenset(idle), parts, frozenset(active))


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

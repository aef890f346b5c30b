"""Structures: what UNet calls have in common that one graph serves, so that it is compiled once.

Calls with the same pattern differ in which earlier calls they inherit from and in whether anybody
reads what they keep. A structure forgets the first, counting back from the latest source, and
takes the most of a program's calls for the second, so that a program has one for each pattern.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from leansd.plans.liveness import Call, Kept, Lane, Program, What

Slots = tuple[tuple[Kept, ...], ...]
"""What one inherited unit is made from: for each lane its sources, latest first."""


@dataclass(frozen=True)
class Structure:
    """One kind of UNet call."""

    key: Hashable
    call: Call = field(compare=False)
    """The call itself, with every `Kept.call` an age: 0 is kept now, -1 the latest source."""

    @property
    def sources(self) -> tuple[tuple[Kept, ...], ...]:
        """All that the call is made from, a tuple for each unit and lane."""
        return tuple(sources for lanes in self.call.sources.values() for sources in lanes)

    def list_sources(self, call: Call) -> tuple[tuple[Kept, ...], ...]:
        """What `call`, which is of this structure, puts in the place of `sources`.

        Where it has fewer sources than the structure, its last one stands in for the others.
        """
        return tuple(
            (*real, *real[-1:] * (len(slots) - len(real)))
            for unit, lanes in self.call.sources.items()
            for slots, real in zip(lanes, call.sources[unit], strict=True)
        )

    def list_keeps(self, call: Call) -> tuple[Kept, ...]:
        """What `call`, which is of this structure, keeps, in the order of the structure."""
        return tuple(
            kept._replace(call=call.index) for keeps in self.call.keeps.values() for kept in keeps
        )


def list_structures(program: Program) -> tuple[Structure, ...]:
    """The structure of each call of `program`."""
    groups: dict[Hashable, list[Call]] = {}
    for call in program.calls:
        groups.setdefault(_sign(call), []).append(call)
    shared = {sign: _share(sign, calls) for sign, calls in groups.items()}
    return tuple(shared[_sign(call)] for call in program.calls)


def _sign(call: Call) -> Hashable:
    """What decides which units run and how the others are made."""
    pattern = call.pattern
    made = frozenset((*pattern.inherited.items(), *pattern.parts.items()))
    return pattern.active, made, call.lanes, call.guidance


def _share(sign: Hashable, calls: Sequence[Call]) -> Structure:
    """The structure that serves all these calls."""
    first = calls[0]
    sources = {
        unit: tuple(
            _count_back(max((call.sources[unit][lane] for call in calls), key=len))
            for lane in range(len(first.sources[unit]))
        )
        for unit in sorted(first.sources)
    }
    keeps = _unite(calls)
    call = Call(
        index=0,
        pattern=first.pattern,
        lanes=first.lanes,
        guidance=first.guidance,
        sources=sources,
        keeps=keeps,
        releases=frozenset(),
    )
    return Structure((sign, tuple(sources.items()), tuple(keeps.items())), call)


def _count_back(sources: Sequence[Kept]) -> tuple[Kept, ...]:
    return tuple(kept._replace(call=-age) for age, kept in enumerate(sources, start=1))


def _unite(calls: Sequence[Call]) -> Mapping[str, tuple[Kept, ...]]:
    """All that any of the calls keeps, in an order that does not depend on them."""
    kept: set[tuple[str, What, Lane]] = {
        (each.unit, each.what, each.lane)
        for call in calls
        for keeps in call.keeps.values()
        for each in keeps
    }
    united: dict[str, tuple[Kept, ...]] = {}
    for unit, what, lane in sorted(kept):
        united[unit] = (*united.get(unit, ()), Kept(unit, 0, what, lane))
    return united

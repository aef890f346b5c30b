"""Structures: what UNet calls have in common that one graph serves, so that it is compiled once.

Calls with the same pattern differ in which earlier calls they inherit from and in whether anybody
reads what they keep. A structure forgets the first, counting back from the latest source, and
takes the most of a program's calls for the second, so that a program has one for each pattern.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
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
        return _list_sources(self.call, self.call.sources)

    def list_sources(self, call: Call) -> tuple[tuple[Kept, ...], ...]:
        """What `call`, which is of this structure, puts in the place of `sources`.

        Where it has fewer sources than the structure, its last one stands in for the others.
        """
        return tuple(
            (*real, *real[-1:] * (len(slots) - len(real)))
            for slots, real in zip(
                self.sources, _list_sources(call, self.call.sources), strict=True
            )
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


def _list_sources(call: Call, units: Iterable[str]) -> tuple[tuple[Kept, ...], ...]:
    """What a call makes its units from, in this order, and then the forecast that it corrects."""
    sources = (each for unit in units for each in call.sources[unit])
    return (*sources, *call.corrects)


def _sign(call: Call) -> Hashable:
    """What decides which units run and how the others are made."""
    pattern = call.pattern
    made = frozenset((*pattern.inherited.items(), *pattern.parts.items()))
    corrects = len(call.corrects)
    # A line with one source to stand in for both is that source; a parabola would be rounded.
    curves = tuple(len(each) > 2 for each in _list_sources(call, sorted(call.sources)))
    gates = frozenset(call.gates.items())
    return pattern.active, made, call.lanes, call.guidance, corrects, curves, gates


def _share(sign: Hashable, calls: Sequence[Call]) -> Structure:
    """The structure that serves all these calls."""
    first = calls[0]
    sources = {
        unit: _count_back([call.sources[unit] for call in calls]) for unit in sorted(first.sources)
    }
    corrects = _count_back([call.corrects for call in calls])
    keeps = _unite(calls)
    call = Call(
        index=0,
        pattern=first.pattern,
        lanes=first.lanes,
        guidance=first.guidance,
        sources=sources,
        keeps=keeps,
        releases=frozenset(),
        corrects=corrects,
        attend=first.gates,
    )
    return Structure((sign, tuple(sources.items()), tuple(keeps.items()), corrects), call)


def _count_back(calls: Sequence[Slots]) -> Slots:
    """For each lane the most sources that any call has, told by their age."""
    most = (max(sources, key=len) for sources in zip(*calls, strict=True))
    return tuple(
        tuple(kept._replace(call=-age) for age, kept in enumerate(sources, start=1))
        for sources in most
    )


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

"""Compiling: a plan becomes the UNet calls of a run; what they cost, and which share a graph."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import nan

from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, Anatomy, Unit
from leansd.plans.liveness import (
    GUIDANCE,
    NO_NETS,
    Call,
    Kept,
    Lane,
    Net,
    Program,
    find_pattern,
    find_probe,
)
from leansd.plans.methods import GUIDANCE_METHODS, METHODS, NO_CORRECTION, Correction, What
from leansd.plans.row import (
    CELL,
    OWN,
    REGIONS,
    Attend,
    Guidance,
    How,
    Row,
    Schedule,
    pair_anatomies,
    resolve_gates,
    resolve_row,
)

WHOLE: tuple[Lane, ...] = ("all",)
BOTH: tuple[Lane, ...] = ("rest", "cond")


def compile_plan(
    plan: Schedule,
    anatomy: Anatomy,
    *,
    nets: Mapping[str, Net] = NO_NETS,
    start: int = 0,
    rows: Sequence[int] | None = None,
    moments: Sequence[float] | None = None,
    guided: bool = True,
    upgrades: frozenset[int] = frozenset(),
) -> Program:
    """The UNet calls of a run that follows `plan`, from call `start` on.

    A run that starts late (image-to-image) or has to start over (another batch size midway) is the
    same plan with another `start`: its first call computes everything, and none mixes outputs. What
    a net inherits after a switch without anybody having computed it is computed.

    Args:
        anatomy: of the pipeline's own UNet.
        nets: the others that the plan runs, by name.
        rows: the plan's row for each UNet call, where a sampler makes several in a step.
        moments: the time step of each call; forecasts draw on outputs of distinct moments.
        guided: whether the batch has an unconditional and a conditional half; without them what the
            plan says of guidance means nothing.
        upgrades: calls to compute in full where the plan inherits; guidance stays the plan's.

    Raises:
        LeansdError: the plan does not suit its UNets, one of them is missing, or its probe runs too
            late.
    """
    retrace = partial(
        compile_plan, plan, anatomy,
        nets=nets, start=start, rows=rows, moments=moments, guided=guided,
    )  # fmt: skip
    rows = range(len(plan.rows)) if rows is None else rows
    anatomies = {name: net.anatomy for name, net in nets.items()}
    steps = list(pair_anatomies(plan.rows, anatomy, anatomies))
    resolved = [resolve_row(*each) for each in steps]
    gates = [resolve_gates(*each) for each in steps]
    there = {**nets, OWN: Net(anatomy)}
    # Mixes tell the lanes apart, and so do calls that leave one out.
    by_lane = any(row.guidance != "compute" or row.mix is not None for row in plan.rows)
    trace = _Trace(moments, guides=guided and by_lane)
    calls: list[Call] = []
    for index in range(start, len(rows)):
        row = plan.rows[rows[index]]
        inherits = {} if index == start or index in upgrades else resolved[rows[index]]
        guidance: Guidance = row.guidance if guided and index > start else "compute"
        calls.append(trace.take(index, row, there[row.net], inherits, guidance))
        if not start:
            _check_mix(rows[index], calls)
    probe = None
    if plan.drift is not None:
        probe = find_probe(plan.drift, anatomy, [call.pattern for call in calls])
    last_use = {kept: call.index for call in calls for kept in call.list_read()}
    whole = tuple(
        replace(
            call,
            keeps=_list_keeps(call, there[call.net], last_use),
            releases=frozenset(kept for kept, last in last_use.items() if last == call.index),
            mix=None if start else call.mix,
            recomputed=call.index in upgrades,
            attend=gates[rows[call.index]],
        )
        for call in calls
    )
    return Program(start, whole, probe, upgrades, retrace)


def _check_mix(step: int, calls: Sequence[Call]) -> None:
    """Refuse a mix that does not count the outputs that there are."""
    mix, computed = calls[-1].mix, sum(HEAD in call.pattern.active for call in calls)
    if mix is not None and len(mix.guided) != computed:
        raise LeansdError(
            f"step {step} mixes {len(mix.guided)} outputs, and {computed} are computed by then: "
            "mixes are fitted to one plan and to a sampler with one call a step"
        )


class _Trace:
    """What has been computed so far, and when."""

    def __init__(self, moments: Sequence[float] | None, *, guides: bool) -> None:
        self._moments = moments
        self._guides = guides
        self._net: Net | None = None
        self._computed_at: dict[tuple[str, Lane], tuple[int, ...]] = {}
        """Calls that computed something, by its name among all nets and its lane; latest first."""
        self._inherited: What | None = None
        """What the head was last made of, if it was inherited since it was last computed."""

    def take(
        self, index: int, row: Row, net: Net, inherits: Mapping[str, How], guidance: Guidance
    ) -> Call:
        """The next call, with what it can inherit of what its row says.

        What later ones read of it is not known yet.
        """
        if net is not self._net:
            self._switch(net)
        if guidance in GUIDANCE_METHODS and not self._knows(GUIDANCE, ("cond",)):
            guidance = "compute"
        lanes = _pick_lanes(guidance, guides=self._guides)
        known: dict[str, How] = {at: how for at, how in inherits.items() if self._knows(at, lanes)}
        pattern = find_pattern(net.anatomy, known)
        inherited: dict[str, How] = {**pattern.inherited, **pattern.parts}
        sources = {
            at: tuple(self._list_sources(at, lane, how) for lane in lanes)
            for at, how in inherited.items()
        }
        if guidance in GUIDANCE_METHODS:
            how = GUIDANCE_METHODS[guidance]
            sources[GUIDANCE] = (self._list_sources(GUIDANCE, "cond", how),)
        if HEAD in pattern.inherited:
            self._inherited = METHODS[pattern.inherited[HEAD]].of
        corrects = self._list_corrects(row.correction, lanes)
        if HEAD in pattern.active:
            self._inherited = None
        for at in pattern.active:
            # What a half call leaves out of the UNet's output is made up, and given like the rest.
            for lane in BOTH if at == HEAD and lanes != WHOLE else lanes:
                self._note(at, lane, index)
        if guidance == "compute":
            self._note(GUIDANCE, "cond", index)
        return Call(
            index, pattern, lanes, guidance, sources, {}, frozenset(),
            correct=row.correction if corrects else NO_CORRECTION,
            corrects=corrects, mix=row.mix, net=row.net,
        )  # fmt: skip

    def _switch(self, net: Net) -> None:
        """Go on with another UNet, which inherits from units of its own only."""
        own = {net.name(at) for at in (*net.anatomy.by_address, GUIDANCE)}
        self._computed_at = {
            (name, lane): calls for (name, lane), calls in self._computed_at.items() if name in own
        }
        if not any(name == net.name(HEAD) for name, _ in self._computed_at):
            self._inherited = None
        self._net = net

    def _name(self, at: str) -> str:
        assert self._net is not None
        return self._net.name(at)

    def _knows(self, at: str, lanes: Sequence[Lane]) -> bool:
        """Whether a unit was computed before, for all of these lanes."""
        return all((self._name(at), lane) in self._computed_at for lane in lanes)

    def _note(self, at: str, lane: Lane, index: int) -> None:
        key: tuple[str, Lane] = (self._name(at), lane)
        moments = self._moments
        before = self._computed_at.get(key, ())
        if before and moments is not None and moments[before[0]] == moments[index]:
            before = before[1:]
        self._computed_at[key] = (index, *before)

    def _list_sources(self, at: str, lane: Lane, how: How) -> tuple[Kept, ...]:
        """What an inherited unit is made from: its latest computed outputs."""
        what: What = "difference" if at == GUIDANCE else METHODS[how].of
        return self._list_kept(at, lane, what, METHODS[how].depth)

    def _list_kept(self, at: str, lane: Lane, what: What, depth: int) -> tuple[Kept, ...]:
        name = self._name(at)
        return tuple(Kept(name, call, what, lane) for call in self._computed_at[name, lane][:depth])

    def _list_corrects(
        self, correct: Correction, lanes: Sequence[Lane]
    ) -> tuple[tuple[Kept, ...], ...]:
        """What a correction of the UNet's output is made from, where there is one."""
        if self._inherited is None or not (any(correct) and self._knows(HEAD, lanes)):
            return ()
        what: What = "denoised" if self._inherited == "denoised" else "output"
        depth = METHODS["forecast"].depth
        return tuple(self._list_kept(HEAD, lane, what, depth) for lane in lanes)


def _pick_lanes(guidance: Guidance, *, guides: bool) -> tuple[Lane, ...]:
    """The lanes that a call runs; a plan that computes guidance throughout needs no lanes."""
    if not guides:
        return WHOLE
    return BOTH if guidance == "compute" else ("cond",)


def _list_keeps(call: Call, net: Net, read: Iterable[Kept]) -> dict[str, tuple[Kept, ...]]:
    """What of all that is read a call has to keep, by the address that it has in its UNet."""
    places = {net.name(at): at for at in (*call.pattern.active, GUIDANCE)}
    grouped: dict[str, tuple[Kept, ...]] = {}
    for kept in read:
        if kept.call != call.index:
            continue
        at = places[kept.unit]
        grouped[at] = (*grouped.get(at, ()), kept)
    return grouped


# -- what calls cost -------------------------------------------------------------------------------


def predict_speedup(
    calls: Sequence[Call], anatomy: Anatomy, nets: Mapping[str, Net] = NO_NETS
) -> float:
    """Multiply-accumulates of computing everything in every call, over those of these calls.

    NaN where a UNet could not be counted (`Anatomy.uncounted` says why).

    Args:
        anatomy: of the pipeline's own UNet, which everything is computed by.
        nets: the others that the calls run, by name.

    Raises:
        LeansdError: the anatomy's cost was not counted (`leansd.dissect` does).
    """
    there = {OWN: anatomy, **{name: net.anatomy for name, net in nets.items()}}
    for each in there.values():
        if each.uncounted:
            return nan
        if not each.macs:
            raise LeansdError("this anatomy has no cost; leansd.dissect(unet) counts it")
    spent = sum(_count_macs(call, there[call.net]) for call in calls)
    return anatomy.macs * len(calls) / spent


def _count_macs(call: Call, anatomy: Anatomy) -> float:
    """Multiply-accumulates of a call, for a whole guided batch one sample's."""
    parts = {part.at: part.macs for part in anatomy.parts}
    pattern, size = call.pattern, anatomy.size or (0, 0)
    macs = anatomy.macs - sum(parts[at] for at in pattern.parts)
    macs -= sum(unit.macs for unit in anatomy if unit.at not in pattern.computed)
    for at, attend in call.gates.items():
        macs += count_attention(anatomy.by_address[at], attend, size) - parts[at]
    return macs / 2 if call.is_half else macs


def count_attention(part: Unit, attend: Attend, size: tuple[int, int]) -> int:
    """Multiply-accumulates of a self-attention, without LoRAs, at a latent (height, width).

    Its four projections [C, C], and the products of queries with keys and of weights with values.
    """
    channels = part.channels[1]
    height, width = (-(-side // part.scale) for side in size)
    tokens = height * width
    if attend == "full":
        return 4 * tokens * channels**2 + 2 * tokens**2 * channels
    cells = -(-height // CELL) * -(-width // CELL)
    # Queries are projected once, keys, values and results in every region.
    projections = (1 + 3 * REGIONS) * cells * channels**2
    return projections + REGIONS * 2 * cells**2 * channels


# -- structures: what calls have in common that one graph serves, so that it is compiled once ------
#
# Calls with the same pattern differ in which earlier calls they inherit from and in whether
# anybody reads what they keep. A structure forgets the first, counting back from the latest
# source, and takes the most of a program's calls for the second, so that a program has one for
# each pattern.

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
    corrects = tuple(each[0].what for each in call.corrects)
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

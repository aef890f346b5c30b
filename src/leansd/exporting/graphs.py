"""The graphs that a plan needs: one for each pattern of its calls that enters the UNet.

A graph takes what its inherited units are to give and gives what later calls inherit. Of what
that is made (forecasts, guidance lanes, corrections) it knows nothing: all of it is arithmetic on
few tensors, and the runtime does it outside. Forecasts, step counts and guidance therefore share
graphs, and a graph is told by the tensors that it is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, Anatomy
from leansd.plans.liveness import Call, Kept, Pattern, What, find_pattern
from leansd.plans.plan import Plan
from leansd.plans.row import How
from leansd.plans.structures import Structure

Feature = tuple[str, What]
"""What crosses the border of a graph: a unit's output, or what it adds to its input."""


@dataclass(frozen=True)
class Graph:
    """One pattern of UNet calls as a function of tensors."""

    given: tuple[Feature, ...]
    """What comes in besides the UNet's own arguments."""
    kept: tuple[Feature, ...]
    """What comes out besides the UNet's own output."""
    pattern: Pattern = field(compare=False)

    @property
    def structure(self) -> Structure:
        """The call that this graph is, for the engine to run."""
        made: dict[str, tuple[tuple[Kept, ...], ...]] = {
            at: ((Kept(at, -1, what),),) for at, what in self.given
        }
        keeps: dict[str, tuple[Kept, ...]] = {}
        for at, what in self.kept:
            keeps[at] = (*keeps.get(at, ()), Kept(at, 0, what))
        hows: dict[str, How] = {
            at: "residual" if what == "change" else "reuse" for at, what in self.given
        }
        pattern = Pattern(
            self.pattern.computed,
            {at: hows[at] for at in self.pattern.inherited},
            self.pattern.idle,
            {at: hows[at] for at in self.pattern.parts},
            self.pattern.active,
        )
        call = Call(0, pattern, ("all",), "compute", made, keeps, frozenset())
        return Structure((self.given, self.kept), call)


def list_graphs(anatomy: Anatomy, plan: Plan | None = None) -> tuple[Graph, ...]:
    """The graph that computes everything, then the others in the order a run comes to them.

    Every graph gives all that any call of the plan reads of what it computes, so that runs that
    start late, start over or make several calls a step find in it what they need.

    Raises:
        LeansdError: the plan names what this UNet has not, decides as it runs, or has gates.
    """
    full = find_pattern(anatomy, {})
    if plan is None:
        return (Graph((), (), full),)
    if plan.drift is not None:
        raise LeansdError(
            f"plan {plan.name} decides as it runs what each picture inherits (probe "
            f"{plan.drift.probe}), which a graph cannot: export a plan without a drift"
        )
    gated = next((at for gates in plan.resolve_gates(anatomy) for at in gates), None)
    if gated is not None:
        raise LeansdError(
            f"plan {plan.name} gates {gated} from step to step, which exported graphs cannot: "
            "operate on the net instead (replace by gri), or export a plan without gates"
        )
    patterns = [find_pattern(anatomy, inherits) for inherits in plan.resolve(anatomy)]
    entering = [pattern for pattern in (full, *patterns) if HEAD not in pattern.inherited]
    # The UNet's own output is kept outside, and no graph is given it.
    read = {each for pattern in entering for each in list_given(pattern)}
    graphs = [
        Graph(list_given(each), _order(one for one in read if one[0] in each.active), each)
        for each in entering
    ]
    return tuple(dict.fromkeys(graphs))


def list_given(pattern: Pattern) -> tuple[Feature, ...]:
    """What a call with this pattern has to be given."""
    made = {**pattern.inherited, **pattern.parts}
    return _order((at, "change" if how == "residual" else "output") for at, how in made.items())


def name_feature(feature: Feature) -> str:
    """The name of a graph's input or output: an address, `mid.l0.attn` or `mid.l0.attn.change`."""
    at, what = feature
    return at if what == "output" else f"{at}.{what}"


def _order(features: Iterable[Feature]) -> tuple[Feature, ...]:
    return tuple(sorted(features))

"""Presets that switch between UNets: give them as `nets` to `leansd.inherit`.

A compressed UNet draws the beginning of a picture as well as the original, which is why A-SDM and
T-Stitch (arXiv 2402.14167) let it; OMS-DPM (arXiv 2306.08860) searches who draws what.
"""

from __future__ import annotations

from collections.abc import Sequence

from leansd.errors import LeansdError
from leansd.plans.plan import Plan
from leansd.plans.row import OWN

LIGHT = "light"
"""What presets call the compressed UNet."""


def build_light_early(*, steps: int, blocks: int, share: float = 0.5, net: str = LIGHT) -> Plan:
    return build_stitch(steps=steps, blocks=blocks, nets=(net,), shares=(share,))


def build_light_late(*, steps: int, blocks: int, share: float = 0.5, net: str = LIGHT) -> Plan:
    return Plan.full(steps).switch(net, at=range(steps - _count(share, steps), steps))


def build_stitch(
    *, steps: int, blocks: int, nets: Sequence[str] = (LIGHT,), shares: Sequence[float] = (0.4,)
) -> Plan:
    """Each net for its share of the steps, one after the other; then the pipeline's own."""
    if len(nets) != len(shares):
        raise LeansdError(f"stitch: {len(nets)} nets and {len(shares)} shares; give one for each")
    if sum(shares) > 1:
        raise LeansdError(f"stitch: shares of {sum(shares):g} in all; they are parts of 1")
    plan, begin = Plan.full(steps), 0.0
    for net, share in zip(nets, shares, strict=True):
        places = range(_count(begin, steps), _count(begin + share, steps))
        plan, begin = plan.switch(net, at=places), begin + share
    return plan


def build_tstitch_exact(*, steps: int, blocks: int, share: float = 0.4, net: str = LIGHT) -> Plan:
    """Its comparison of step over steps with the share lets the step at the share in as well."""
    return Plan.full(steps).switch(net, at=[i for i in range(steps) if i / steps <= share])


def build_turns(*, steps: int, blocks: int, names: Sequence[str] = (LIGHT, OWN)) -> Plan:
    """Names of nets in their order; another number of them than of steps is stretched over them."""
    if not names:
        raise LeansdError("turns: give the names of nets, one for each step")
    plan = Plan.full(steps)
    for step in range(steps):
        plan = plan.switch(names[step * len(names) // steps], at=step)
    return plan


def _count(share: float, steps: int) -> int:
    """How many steps a share is."""
    if not 0 <= share <= 1:
        raise LeansdError(f"a share of {share:g} of the steps: it lies between 0 and 1")
    return round(share * steps)

"""Multiply-accumulates of UNet calls, and how many fewer a plan needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan

from leansd.errors import LeansdError
from leansd.plans.anatomy import Anatomy, Unit
from leansd.plans.liveness import NO_NETS, Call, Net
from leansd.plans.row import CELL, OWN, REGIONS, Attend


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

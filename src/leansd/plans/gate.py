"""Gates: which self-attentions a step computes by GRI, and which in full.

Full attention is a quadratic function of the picture's size; GRI (arXiv 2406.00210, see
`leansd.surgery.gri`) computes a third of it at the shallowest level. A gate says which of the two a
self-attention is, from step to step: full early and GRI late, or the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NoReturn, get_args

from leansd.errors import LeansdError
from leansd.plans.address import covers

if TYPE_CHECKING:
    from leansd.plans.anatomy import Anatomy, Unit

Attend = Literal["full", "gri"]
"""How a gated self-attention attends.

`full`  every token to every token.
`gri`   the averaged tokens of the whole picture to those of each of its four regional pictures.
"""
ATTENDS: tuple[Attend, ...] = get_args(Attend)

Gates = Mapping[str, Attend]
"""By address; of a row also by glob, where a later entry overrules an earlier one."""

SELF_ATTENTION = "self-attention"
"""The kind of part that can be gated."""

CELL = 2
"""Side of GRI's cells in tokens."""
REGIONS = CELL * CELL
"""Its regional pictures, one for each place in a cell."""


def check_gates(step: int, gates: Gates) -> None:
    """Refuse an attention that there is not."""
    for pattern, attend in gates.items():
        if attend not in ATTENDS:
            known = ", ".join(ATTENDS)
            raise LeansdError(
                f"step {step}, {pattern}: cannot attend by {attend!r}; there are {known}"
            )


def resolve_gates(step: int, gates: Gates, anatomy: Anatomy) -> dict[str, Attend]:
    """The self-attentions that a row gates, by full address.

    Raises:
        LeansdError: an address matches nothing, or nothing that is a self-attention.
    """
    own = [part.at for part in anatomy.parts if part.kind == SELF_ATTENTION] if gates else []
    resolved: dict[str, Attend] = {}
    for pattern, attend in gates.items():
        covered = [at for at in own if covers(pattern, at)]
        if not covered:
            _explain_nothing(step, pattern, anatomy)
        resolved.update(dict.fromkeys(covered, attend))
    return resolved


def _explain_nothing(step: int, pattern: str, anatomy: Anatomy) -> NoReturn:
    try:
        found = anatomy.select(pattern).addresses
    except LeansdError as error:
        raise LeansdError(f"step {step}: {error}") from None
    raise LeansdError(
        f"step {step}: {pattern!r} ({found[0]}) is no self-attention; only those can be gated, the "
        "likes of dn0.*.attn and dn0.*.sa"
    )


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

"""One step of a plan: what inherits, what guidance does, what is corrected, which UNet runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, STEM, Anatomy
from leansd.plans.gate import Attend, Gates, check_gates
from leansd.plans.methods import METHODS, NO_CORRECTION, Correction

How = str
"""How a unit gives an output that it does not compute: a word of `leansd.plans.methods.METHODS`."""

Guidance = Literal["compute", "inherit", "forecast", "drop"]
"""What a guided call does with its unconditional half.

`compute`   runs it.
`inherit`   leaves it out: unconditional output = conditional output - the last computed difference.
`forecast`  the same with the line through the last two differences, over log-SNR.
`drop`      leaves it out: no guidance at this step.
"""
GUIDANCES: tuple[Guidance, ...] = get_args(Guidance)


OWN = ""
"""What the pipeline's own UNet is called among the nets of a plan."""


@dataclass(frozen=True)
class Row:
    """What one step does: `inherit` maps addresses or globs to how they inherit."""

    inherit: Mapping[str, How] = field(default_factory=dict[str, How])
    guidance: Guidance = "compute"
    correct: Correction = NO_CORRECTION
    """How far the UNet's output is moved on beyond what was computed, see `Plan.correct`."""
    attend: Gates = field(default_factory=dict[str, Attend])
    """Self-attentions that are computed otherwise than the UNet has them, see `Plan.attend`."""
    net: str = OWN
    """The UNet that runs, by its name in `nets`; the pipeline's own by default."""

    @property
    def is_key(self) -> bool:
        """Whether the whole UNet is computed, for the conditional half at least."""
        return not self.inherit

    def describe(self) -> list[object]:
        """What the row does as plain values, for fingerprints; what it leaves alone is left out."""
        does: list[object] = [_order(self.inherit), self.guidance]
        does.extend(self.correct if any(self.correct) else ())
        does.extend([_order(self.attend)] if self.attend else [])
        does.extend([self.net] if self.net else [])
        return does


def check_row(step: int, row: Row) -> None:
    """Refuse what means nothing in any UNet.

    Raises:
        LeansdError: a word is none of those that there are, a number is none, or two things do not
            go together.
    """
    if row.guidance not in GUIDANCES:
        known = ", ".join(GUIDANCES)
        raise LeansdError(f"step {step}: unknown guidance {row.guidance!r}; it can {known}")
    if not all(map(math.isfinite, row.correct)):
        raise LeansdError(f"step {step}: cannot correct by {tuple(row.correct)}; give numbers")
    if any(row.correct) and row.guidance != "compute":
        raise LeansdError(
            f"step {step}: a correction needs both halves of a guided batch; "
            f"it cannot go with guidance {row.guidance!r}"
        )
    check_gates(step, row.attend)
    for pattern, how in row.inherit.items():
        if how not in METHODS:
            known = ", ".join(METHODS)
            raise LeansdError(f"step {step}, {pattern}: unknown how {how!r}; there are {known}")


def resolve_row(step: int, row: Row, anatomy: Anatomy) -> dict[str, How]:
    """The units and parts that inherit in a UNet, and how.

    Raises:
        LeansdError: an address matches nothing in it, or a unit cannot inherit that way.
    """
    resolved: dict[str, How] = {}
    for pattern, how in row.inherit.items():
        try:
            units = anatomy.select(pattern)
        except LeansdError as error:
            raise LeansdError(f"step {step}: {error}") from None
        for unit in units:
            if METHODS[how].of_change and len(unit.at.split(".")) > 3:
                raise LeansdError(
                    f"step {step}: {unit.at} is itself added to its input; use reuse or forecast"
                )
            given = anatomy[STEM].channels[0] if unit.at == HEAD else unit.channels[0]
            # Further channels of the UNet's input (masks, other pictures) follow the latents.
            fits = given >= unit.channels[1] if unit.at == HEAD else given == unit.channels[1]
            if METHODS[how].of_change and not fits:
                raise LeansdError(
                    f"step {step}: {unit.at} cannot inherit its residual: it takes "
                    f"{given} channels, gives {unit.channels[1]}; use reuse or forecast"
                )
            if METHODS[how].of_change and unit.kind.endswith("sampler"):
                raise LeansdError(
                    f"step {step}: {unit.at} cannot inherit its residual: it changes the size; "
                    "use reuse or forecast"
                )
            resolved[unit.at] = how
    if any(row.correct) and HEAD in resolved:
        raise LeansdError(f"step {step} inherits {HEAD}: there is no computed output to correct")
    return resolved


def _order(choices: Mapping[str, str]) -> list[tuple[str, str]]:
    """The entries of a row; their order means something only where they differ in how."""
    entries = list(choices.items())
    return entries if len(set(choices.values())) > 1 else sorted(entries)

"""One step of a plan: what inherits, which attention, what guidance does, which UNet runs.

Besides rows, a plan may have a drift: how far something may change before inheritance is called off
for a picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from leansd.errors import LeansdError
from leansd.plans.address import covers
from leansd.plans.anatomy import HEAD, STEM, Anatomy, Selection, Unit
from leansd.plans.methods import METHODS, NO_CORRECTION, Correction, Method, Mix

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


# -- gates: which self-attentions a step computes by GRI, and which in full ---------------------

Attend = Literal["full", "gri"]
"""How a gated self-attention attends.

`full`  every token to every token.
`gri`   the averaged tokens of the whole picture to those of each of its four regional pictures.
"""
ATTENDS: tuple[Attend, ...] = get_args(Attend)

Gates = Mapping[str, Attend]
"""Gates by address; in a row by glob, too, where a later entry overrules an earlier one."""

SELF_ATTENTION = "self-attention"
"""The kind of part that can be gated."""

CELL = 2
"""Side of GRI's cells in tokens."""
REGIONS = CELL * CELL
"""Regional pictures of GRI, one for each place in a cell."""

OWN = ""
"""What the pipeline's own UNet is called among the nets of a plan."""


@dataclass(frozen=True)
class Row:
    """What one step does: `inherit` maps addresses or globs to how they inherit."""

    inherit: Mapping[str, How] = field(default_factory=dict[str, How])
    guidance: Guidance = "compute"
    correct: Correction | Mix = NO_CORRECTION
    """How far the UNet's output is moved on beyond what was computed, see `Plan.correct`, or what
    is given in its place, see `Plan.mix`."""
    attend: Gates = field(default_factory=dict[str, Attend])
    """Self-attentions that are computed otherwise than the UNet has them, see `Plan.attend`."""
    net: str = OWN
    """The UNet that runs, by its name in `nets`; the pipeline's own by default."""

    @property
    def is_key(self) -> bool:
        """Whether the whole UNet is computed, for the conditional half at least."""
        return not self.inherit

    @property
    def correction(self) -> Correction:
        """The correction; nothing where the output is mixed."""
        return self.correct if isinstance(self.correct, Correction) else NO_CORRECTION

    @property
    def mix(self) -> Mix | None:
        """The mix; None where the output is not mixed."""
        return self.correct if isinstance(self.correct, Mix) else None

    def describe(self) -> list[object]:
        """What the row does as plain values, for fingerprints; what it leaves alone is left out."""
        does: list[object] = [_order(self.inherit), self.guidance]
        does.extend(self.correct.describe())
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
    if not all(map(math.isfinite, row.correct.numbers)):
        raise LeansdError(f"step {step}: cannot correct by {tuple(row.correct)}; give numbers")
    if row.mix is not None and len(row.mix.difference) not in (0, len(row.mix.guided)):
        raise LeansdError(
            f"step {step}: a mix has as many weights of differences as of guided outputs, or none, "
            f"not {len(row.mix.difference)} and {len(row.mix.guided)}"
        )
    if any(row.correction) and row.guidance != "compute":
        raise LeansdError(
            f"step {step}: a correction needs both halves of a guided batch; "
            f"it cannot go with guidance {row.guidance!r}"
        )
    for pattern, attend in row.attend.items():
        if attend not in ATTENDS:
            known = ", ".join(ATTENDS)
            raise LeansdError(
                f"step {step}, {pattern}: cannot attend by {attend!r}; there are {known}"
            )
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
        for unit in _select(step, pattern, anatomy):
            why = _explain_no_input(unit, anatomy, METHODS[how])
            if why:
                raise LeansdError(f"step {step}: {unit.at} {why}; use reuse or forecast")
            resolved[unit.at] = how
    if any(row.correct) and HEAD in resolved:
        raise LeansdError(f"step {step} inherits {HEAD}: there is no computed output to correct")
    return resolved


def _explain_no_input(unit: Unit, anatomy: Anatomy, method: Method) -> str:
    """Why a unit's output cannot be made of its present input; empty where it can."""
    if not method.takes_input:
        return ""
    if method.of == "denoised" and unit.at != HEAD:
        return f"shows no denoised picture: only {HEAD}, the whole UNet, does"
    if len(unit.at.split(".")) > 3:
        return "is itself added to its input"
    stem = anatomy.by_address.get(STEM, unit) if unit.at == HEAD else unit
    given, made = stem.channels[0], unit.channels[1]
    # Further channels of the UNet's input (masks, other pictures) follow the latents.
    if given != made and not (unit.at == HEAD and given > made):
        return f"cannot inherit its residual: it takes {given} channels, gives {made}"
    if unit.kind.endswith("sampler"):
        return "cannot inherit its residual: it changes the size"
    return ""


def _order(choices: Mapping[str, str]) -> list[tuple[str, str]]:
    """The entries of a row; their order means something only where they differ in how."""
    entries = list(choices.items())
    return entries if len(set(choices.values())) > 1 else sorted(entries)


def resolve_gates(step: int, row: Row, anatomy: Anatomy) -> dict[str, Attend]:
    """The self-attentions that a row gates, by full address.

    Raises:
        LeansdError: an address matches nothing, or nothing that is a self-attention.
    """
    own = [part.at for part in anatomy.parts if part.kind == SELF_ATTENTION] if row.attend else []
    resolved: dict[str, Attend] = {}
    for pattern, attend in row.attend.items():
        covered = [at for at in own if covers(pattern, at)]
        if not covered:
            found = _select(step, pattern, anatomy).addresses
            raise LeansdError(
                f"step {step}: {pattern!r} ({found[0]}) is no self-attention; only those can be "
                "gated, the likes of dn0.*.attn and dn0.*.sa"
            )
        resolved.update(dict.fromkeys(covered, attend))
    return resolved


def _select(step: int, pattern: str, anatomy: Anatomy) -> Selection:
    try:
        return anatomy.select(pattern)
    except LeansdError as error:
        raise LeansdError(f"step {step}: {error}") from None


# -- drift: a plan with one is a frame ---------------------------------------------------------

SAMPLE = "sample"
"""The probe that is the UNet's input: known before anything is computed."""

Measure = Literal["change", "predicted"]
"""What is compared with the threshold; both are relative, in sums of absolute values.

`change`     the probe now against the probe when the picture was last computed in full.
`predicted`  the output's change as predicted from the probe's, call by call, and added up since the
             picture was last computed in full (EasyCache, arXiv 2507.02860): the probe's change
             since the call before, times how much the output changed for the probe's change between
             the last two full computations, over the last computed output.
"""
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True)
class Drift:
    """Inherit while the drift of `probe` is below `threshold`, each picture on its own."""

    probe: str
    """Address of a unit that runs before anything inherits, or `sample`."""
    threshold: float
    """0 computes everything, infinity follows the plan."""
    measure: Measure = "change"

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise LeansdError(f"a drift's threshold must be 0 or more, not {self.threshold}")
        if self.measure not in MEASURES:
            known = ", ".join(MEASURES)
            raise LeansdError(f"unknown measure of drift {self.measure!r}; there are {known}")

    def __str__(self) -> str:
        what = "change of" if self.measure == "change" else "output change predicted from"
        return f"inherits while the {what} {self.probe} is below {self.threshold:g}"


# -- all steps ---------------------------------------------------------------------------------


class Schedule(Protocol):
    """What a plan says, step by step; `leansd.Plan` is one."""

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> tuple[Row, ...]: ...

    @property
    def drift(self) -> Drift | None: ...


def list_nets(rows: Sequence[Row]) -> tuple[str, ...]:
    """The nets that run besides the pipeline's own UNet, in the order of their turns."""
    return tuple(dict.fromkeys(row.net for row in rows if row.net != OWN))


def pair_anatomies(
    rows: Sequence[Row], own: Anatomy, nets: Mapping[str, Anatomy]
) -> Iterator[tuple[int, Row, Anatomy]]:
    """Every step, its row and the UNet that it runs.

    Raises:
        LeansdError: there is no such net.
    """
    known = {**nets, OWN: own}
    for step, row in enumerate(rows):
        if row.net not in known:
            there = ", ".join(nets) or "none"
            raise LeansdError(
                f"step {step} runs net {row.net!r}, and the nets given are: {there}; give it "
                f"by --net {row.net}=FOLDER, in Python by nets={{{row.net!r}: unet}}"
            )
        yield step, row, known[row.net]

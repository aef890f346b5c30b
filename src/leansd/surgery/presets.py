"""Surgeries by name: published light UNets as a few edits each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leansd.errors import LeansdError
from leansd.surgery.edits import Surgery
from leansd.text import suggest_name


@dataclass(frozen=True)
class SurgeryPreset:
    """A named surgery, and for which nets it is."""

    surgery: Surgery
    summary: str
    models: tuple[str, ...]
    """Built-in shapes that it is published for."""


def _assemble(name: str, *levels: int) -> Surgery:
    """One layer down and one up taken out at each of `levels`, the shallowest first."""
    down = (f"dn{level}.l1" for level in levels)
    up = (f"up{3 - level}.l1" for level in levels)
    return Surgery(name).drop(*down, *up)


_SD = ("sd15", "sd21-base")
_BASE = Surgery("bk-base").drop("dn*.l1", "up*.l1")
_SMALL = Surgery("bk-small", _BASE.edits).drop("mid")
_TINY = Surgery("bk-tiny", _SMALL.edits).drop("dn2.down", "dn3", "up0")
# What the embedded model hardly uses goes first. The two shallowest levels keep every
# cross-attention: they cost next to nothing, and what the prompt does training gives back last.
_HARDLY_USED = ("mid", "dn2.l1", "up1.l1", "dn3.l1", "up0.l1", "dn2.l0.attn", "up1.l0.attn")
_SECOND = ("up3.l[12].*.sa", "up3.l[12].*.ff", "dn0.l1.*.sa", "dn1.l1.*.sa", "up2.l0.*.sa")
_LEAN = Surgery("lean").drop(*_HARDLY_USED).replace(*_SECOND, by="skip")
_LEANER = Surgery("leaner", _LEAN.edits).replace(
    "dn0.l1.*.ff", "dn1.l1.*.ff", "up1.l2.*.sa", by="skip"
)
_LEANEST = Surgery("leanest", _LEANER.edits).replace(
    "dn0.l0.*.ff", "up2.l0.*.ff", "up1.l2.*.ff", by="skip"
)
_KOALA = Surgery("koala-1b").drop("dn*.l1", "up*.l1")

PRESETS: dict[str, SurgeryPreset] = {
    preset.surgery.name: preset
    for preset in (
        SurgeryPreset(_BASE, "BK-SDM-Base: a layer less a block (arXiv 2305.15798)", _SD),
        SurgeryPreset(_SMALL, "BK-SDM-Small: and no middle block", _SD),
        SurgeryPreset(_TINY, "BK-SDM-Tiny: and no innermost level", _SD),
        SurgeryPreset(_assemble("asdm-1222", 0), "A-SDM: the shallowest level thinned", _SD),
        SurgeryPreset(
            _assemble("asdm-1122", 0, 1), "A-SDM: the two shallowest levels thinned", _SD
        ),
        SurgeryPreset(
            _assemble("asdm-1112", 0, 1, 2), "A-SDM: the three shallowest levels thinned", _SD
        ),
        SurgeryPreset(Surgery("asdm-1111", _BASE.edits), "A-SDM: all levels thinned", _SD),
        SurgeryPreset(
            _LEAN,
            "ours: fewer self-attentions and feed-forwards, the shallow cross-attentions kept",
            _SD,
        ),
        SurgeryPreset(_LEANER, "ours: two feed-forwards and a self-attention fewer than lean", _SD),
        SurgeryPreset(_LEANEST, "ours: three feed-forwards fewer than leaner", _SD),
        SurgeryPreset(
            Surgery("ssd-1b")
            .drop("dn2.*.t[4-9]", "up0.l[01].attn.t[4-9]", "up1.l[12].attn.t1")
            .drop("mid.l0.attn", "mid.l1"),
            "SSD-1B: fewer transformer blocks (arXiv 2401.02677)",
            ("sdxl",),
        ),
        SurgeryPreset(
            _KOALA.drop("*.attn.t[6-9]"),
            "KOALA-1B: a layer less a block, six transformer blocks (arXiv 2312.04005)",
            ("sdxl",),
        ),
        SurgeryPreset(
            Surgery("koala-700m", _KOALA.edits).drop("mid").drop("*.attn.t[5-9]"),
            "KOALA-700M: five transformer blocks, no middle block",
            ("sdxl",),
        ),
    )
}


def find_surgery(source: Surgery | str | Path) -> Surgery:
    """A surgery itself, by its preset's name, or from its file.

    Raises:
        LeansdError: there is none; the message offers what comes nearest.
    """
    if isinstance(source, Surgery):
        return source
    if not isinstance(source, str | Path):
        raise LeansdError(
            f"a surgery is a name, a file or a leansd.Surgery, not a {type(source).__name__}; "
            "the UNets come first, then the surgery"
        )
    name = str(source)
    if name in PRESETS:
        return PRESETS[name].surgery
    if Path(name).is_file():
        return Surgery.load(name)
    raise LeansdError(
        f"no surgery {name!r}, neither a file nor a preset{suggest_name(name, PRESETS)}"
    )

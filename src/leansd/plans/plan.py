"""A plan: for every step of a run, what inherits instead of being computed.

A plan is data. It names addresses, not modules, so one plan serves every UNet that has them; what a
row means for one UNet (what runs, what is read, what nobody needs) follows from `liveness`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, cast

from leansd.errors import LeansdError
from leansd.plans import keysteps
from leansd.plans.anatomy import Anatomy
from leansd.plans.grid import draw_picture, draw_text
from leansd.plans.methods import NO_CORRECTION, Correction, Mix
from leansd.plans.row import (
    OWN,
    Attend,
    Drift,
    Gates,
    Guidance,
    How,
    Measure,
    Row,
    check_row,
    list_nets,
    pair_anatomies,
    resolve_gates,
    resolve_row,
)
from leansd.text import suggest_name

NO_NETS: Mapping[str, Anatomy] = MappingProxyType({})
FORMAT = "leansd-plan"
VERSION = 2
"""The version of the file format; a change that older readers would not understand raises it."""
PLAIN_VERSION = 1
"""The version of files without mixes and noise levels: every reader understands them."""


@dataclass(frozen=True)
class Tuned:
    """What a plan was tuned for; elsewhere it runs, but nothing says that it is any good."""

    sampler: str
    """Short name, or the scheduler's class."""
    unet: str
    """Fingerprint of the UNet's weights."""
    guidance: float | None = None
    """Guidance scale; None for the pipeline's own."""
    log_snr: tuple[float, ...] = ()
    """At every step of the sampler's run; nothing where it was not noted."""
    strength: float | None = None
    """The strength of image-to-image; None from the first step on, or where it was not noted."""

    @property
    def share(self) -> float | None:
        """How much of the steps its runs had; None where it was not noted."""
        return 1.0 if self.strength is None and self.log_snr else self.strength


@dataclass(frozen=True)
class Plan:
    """One row a step of the sampler. Make one with `full`, `every`, `between` or a preset."""

    rows: tuple[Row, ...]
    name: str = "plan"
    drift: Drift | None = None
    """When a picture that may inherit does not: makes the plan adaptive."""
    tuned: Tuned | None = None
    """Where `leansd tune` wrote the plan, what for; the fingerprint does not see it."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise LeansdError("a plan needs at least one step")
        if not self.rows[0].is_key:
            named = next(iter(self.rows[0].inherit))
            raise LeansdError(f"step 0 cannot inherit {named}: nothing was computed before it")
        if self.rows[0].guidance != "compute":
            raise LeansdError("step 0 must compute guidance: no difference is known before it")
        for step, row in enumerate(self.rows):
            check_row(step, row)
        if self.drift is not None and self.nets:
            raise LeansdError(
                f"a plan with a drift runs one UNet: pictures of a batch that differ in what they "
                f"inherit cannot switch to {self.nets[0]} together"
            )
        if self.mixes:
            self._check_mixes()

    def _check_mixes(self) -> None:
        """Refuse what cannot go with mixed outputs."""
        if self.drift is not None:
            raise LeansdError(
                "a plan with a drift cannot mix outputs: which are computed is not known before"
            )
        corrected = [step for step, row in enumerate(self.rows) if any(row.correction)]
        if corrected:
            raise LeansdError(
                f"step {corrected[0]} corrects its output, and other steps mix theirs: a mix says "
                "all that a correction could, so give mixes alone"
            )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    # -- making ------------------------------------------------------------------------------

    @classmethod
    def full(cls, steps: int, *, name: str = "full") -> Plan:
        """Every unit at every step: bit-equal to no plan."""
        return cls((Row(),) * steps, name)

    @classmethod
    def every(
        cls, interval: int, *, cut: str, steps: int, how: How = "reuse", name: str | None = None
    ) -> Plan:
        """The whole UNet every `interval`-th step; between, what lies at `cut` inherits."""
        keys = keysteps.uniform(steps, interval)
        return cls.between(keys, cut=cut, steps=steps, how=how, name=name or f"every-{interval}")

    @classmethod
    def between(
        cls, keys: Iterable[int], *, cut: str, steps: int, how: How = "reuse", name: str = "plan"
    ) -> Plan:
        """The whole UNet at key steps (see `leansd.plans.keysteps`); between, `cut` inherits."""
        chosen = set(keysteps.explicit(steps, keys))
        others = [step for step in range(steps) if step not in chosen]
        return cls.full(steps, name=name).inherit(cut, at=others, how=how)

    def inherit(self, *patterns: str, at: int | Iterable[int], how: How = "reuse") -> Plan:
        """This plan with the addresses or globs `patterns` inheriting at the steps `at` as well.

        A later call overrules an earlier one where both cover a unit.
        """

        def overrule(row: Row, _: int) -> Row:
            kept = {each: before for each, before in row.inherit.items() if each not in patterns}
            return replace(row, inherit={**kept, **dict.fromkeys(patterns, how)})

        return self._change(at, overrule)

    def guide(self, guidance: Guidance, *, at: int | Iterable[int]) -> Plan:
        """This plan with classifier-free guidance handled otherwise at the steps `at`."""
        return self._change(at, lambda row, _: replace(row, guidance=guidance))

    def guard(self, probe: str, *, threshold: float, measure: Measure = "change") -> Plan:
        """This plan as a frame: a picture inherits only while its drift is below `threshold`.

        See `leansd.plans.row.Drift`.

        Args:
            probe: address of a unit that runs before anything inherits, or `sample`.
        """
        return replace(self, drift=Drift(probe, threshold, measure))

    def correct(self, weights: Mapping[int, float | tuple[float, float]]) -> Plan:
        """This plan with the UNet's output corrected at some steps.

        At such a step the output `e` is computed. Known as well are the one computed before, `p`,
        and where the line through the last two would have led, `f`. The sampler gets
        `e + line * (e - f) + last * (e - p)`. Where inherited outputs went before, however they
        were, that leads the latents back towards where computed ones would have led: a corrector
        without a further call (compare UniPC, arXiv 2302.04867, section 3.2).

        Args:
            weights: `(line, last)` by step, or `line` alone.
        """

        def move_on(row: Row, step: int) -> Row:
            given = weights[step]
            pair = Correction(*given) if isinstance(given, tuple) else Correction(given)
            return replace(row, correct=pair)

        return self._change(weights, move_on)

    def mix(self, rows: Mapping[int, Mix]) -> Plan:
        """This plan with the sampler given a mix of all that was computed, at some steps.

        See `leansd.plans.methods.Mix`. What inherits goes on inheriting from outputs as they were
        computed. A mix counts on the run's first step and on every computed output since: a run
        that begins later, whose latents are changed between steps or that rescales guidance is
        refused, and one that has to start over midway mixes no more. `leansd.tune` fits such rows.

        Args:
            rows: by step, each with a weight for every output computed up to then.
        """
        return self._change(rows, lambda row, step: replace(row, correct=rows[step]))

    def attend(self, *patterns: str, by: Attend, at: int | Iterable[int]) -> Plan:
        """This plan with self-attentions computed `by` GRI or in full at the steps `at`.

        Only what is computed is concerned; elsewhere the UNet attends as it has it. GRI (A-SDM,
        arXiv 2406.00210) needs no parameters, so any UNet can attend by it, but only one that was
        distilled to it draws as well: measure a plan that gates another (`leansd evaluate`). Later
        calls overrule.

        Args:
            patterns: what self-attentions are or lie in, `dn0.l0.attn.t0.sa` or `dn0.*.attn`.
        """

        def overrule(row: Row, _: int) -> Row:
            kept = {each: before for each, before in row.attend.items() if each not in patterns}
            return replace(row, attend={**kept, **dict.fromkeys(patterns, by)})

        return self._change(at, overrule)

    def switch(self, net: str, *, at: int | Iterable[int]) -> Plan:
        """This plan with another UNet running at the steps `at`.

        What it inherits there must have been computed by itself since it was switched to, or by
        units of other nets that are the same, weights and all; what was not is computed.

        Args:
            net: its name among the `nets` of `leansd.inherit`; `""` for the pipeline's own UNet.
        """
        return self._change(at, lambda row, _: replace(row, net=net))

    def _change(self, at: int | Iterable[int], change: Callable[[Row, int], Row]) -> Plan:
        """This plan with other rows at the steps `at`."""
        steps = {at} if isinstance(at, int) else set(at)
        outside = sorted(step for step in steps if not 0 <= step < self.steps)
        if outside:
            raise LeansdError(f"step {outside[0]} lies outside a plan of {self.steps} steps")
        rows = enumerate(self.rows)
        return replace(
            self, rows=tuple(change(row, step) if step in steps else row for step, row in rows)
        )

    def rename(self, name: str) -> Plan:
        return replace(self, name=name)

    def fit(self, steps: int) -> Plan:
        """The same plan stretched to another number of steps.

        Key steps keep their density over the run, so that the speed-up stays about the same; every
        other step does what the nearest such step of this plan did. Gates and nets keep their
        place, and so does everything where no unit inherits.

        Raises:
            LeansdError: it mixes outputs, which only the run that it was fitted for can.
        """
        if steps == self.steps:
            return self
        if self.mixes:
            raise LeansdError(
                f"plan {self.name} mixes outputs as fitted to {self.steps} steps, so it cannot be "
                f"stretched: run {self.steps} steps, or tune a plan for {steps}"
            )
        placed = [self.rows[step * self.steps // steps] for step in range(steps)]
        old_keys = list(self.keys)
        others = [step for step, row in enumerate(self.rows) if not row.is_key]
        if not others:
            return replace(self, rows=tuple(placed))
        scale = steps / self.steps
        count = min(steps, max(1, round(len(old_keys) * scale)))
        ends = [*old_keys, self.steps]
        parts = [len(old_keys) * part / count for part in range(count)]
        keys = keysteps.place(steps, [keysteps.interpolate(ends, part) * scale for part in parts])
        key_rows = iter([self.rows[old_keys[int(part)]] for part in parts])
        rows = tuple(
            next(key_rows)
            if step in keys
            else self.rows[min(others, key=lambda old: abs(old - step / scale))]
            for step in range(steps)
        )
        there = (
            replace(row, attend=each.attend, net=each.net)
            for row, each in zip(rows, placed, strict=True)
        )
        return replace(self, rows=tuple(there))

    # -- reading -----------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """The step count of the sampler that this plan is for."""
        return len(self.rows)

    @property
    def keys(self) -> tuple[int, ...]:
        """The steps at which the whole UNet is computed."""
        return tuple(step for step, row in enumerate(self.rows) if row.is_key)

    @cached_property
    def nets(self) -> tuple[str, ...]:
        """The nets that it runs besides the pipeline's own UNet, in the order of their turns."""
        return list_nets(self.rows)

    @cached_property
    def guides(self) -> bool:
        """Whether it does anything but compute guidance at some step."""
        return any(row.guidance != "compute" for row in self.rows)

    @property
    def drops_guidance(self) -> bool:
        """Whether there is no guidance at some step, whatever its scale."""
        return any(row.guidance == "drop" for row in self.rows)

    @cached_property
    def mixes(self) -> bool:
        """Whether the sampler is given mixed outputs at some step."""
        return any(row.mix is not None for row in self.rows)

    @property
    def identity(self) -> str:
        """Its name and its fingerprint, as pages and pictures say which plan it was."""
        return f"{self.name} ({self.fingerprint})"

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits of what the plan does; its name does not count."""
        from hashlib import sha256  # here, since it opens OpenSSL

        rows = [row.describe() for row in self.rows]
        told = rows if self.drift is None else [rows, *_list_values(self.drift)]
        return sha256(json.dumps(told).encode()).hexdigest()[:12]

    def resolve(
        self, anatomy: Anatomy, nets: Mapping[str, Anatomy] = NO_NETS
    ) -> tuple[dict[str, How], ...]:
        """For every step, the units that inherit and how.

        Args:
            anatomy: of the pipeline's own UNet.
            nets: of the others, by name.

        Raises:
            LeansdError: an address matches nothing in this UNet, or a unit cannot inherit that way.
                The message names the step and the address. Or there is no such net.
        """
        return tuple(resolve_row(*each) for each in pair_anatomies(self.rows, anatomy, nets))

    def resolve_gates(
        self, anatomy: Anatomy, nets: Mapping[str, Anatomy] = NO_NETS
    ) -> tuple[Gates, ...]:
        """For every step, the self-attentions that are gated, by full address.

        Raises:
            LeansdError: an address matches no self-attention of this UNet.
        """
        return tuple(resolve_gates(*each) for each in pair_anatomies(self.rows, anatomy, nets))

    def draw(self, anatomy: Anatomy | None = None, *, picture: str | Path | None = None) -> str:
        """The plan as a grid in text: of a UNet's units, or without one of what the plan names.

        Args:
            picture: a file to draw the same grid to as well, `plan.png` or `.svg`.
        """
        if picture is not None:
            figure: Any = draw_picture(self, anatomy)
            figure.savefig(picture, dpi=150)
        return draw_text(self, anatomy)

    def __str__(self) -> str:
        return draw_text(self)

    # -- files -------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Raises:
            LeansdError: it cannot be written; what was there stays.
        """
        from leansd.files import write_file  # here, since it opens OpenSSL

        write_file(path, self.encode())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            LeansdError: there is no such file, or it is not a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise LeansdError(f"cannot read the plan {path}: {error.strerror}") from error
        except UnicodeDecodeError:
            raise LeansdError(f"{path} is not a valid plan file: it is not text") from None
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise LeansdError(f"{path} is not a valid plan file: {error}") from None
        except LeansdError as error:
            raise LeansdError(f"{path} is not a valid plan file: {error}") from None

    def encode(self) -> str:
        """The text of the plan's file."""
        tuned = self.tuned
        newer = self.mixes or (tuned is not None and (tuned.log_snr or tuned.strength is not None))
        version = VERSION if newer else PLAIN_VERSION
        head: dict[str, Any] = {"format": FORMAT, "version": version, "name": self.name}
        values = self.to_dict()
        head |= {key: value for key, value in values.items() if key != "rows"}
        if self.drift is not None:
            head["drift"] = {**values["drift"], "measure": self.drift.measure}
        rows = ",\n  ".join(json.dumps(_describe_row(row)) for row in self.rows)
        return "{" + json.dumps(head)[1:-1] + ', "rows": [\n  ' + rows + "\n]}\n"

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, as in its file; what is as by default is left out."""
        values: dict[str, Any] = {} if self.name == "plan" else {"name": self.name}
        values["steps"] = self.steps
        if self.drift is not None:
            drift = {"probe": self.drift.probe, "threshold": float(self.drift.threshold)}
            other = {} if self.drift.measure == "change" else {"measure": self.drift.measure}
            values["drift"] = {**drift, **other}
        if self.tuned is not None:
            told = vars(self.tuned) | {"log_snr": list(self.tuned.log_snr) or None}
            values["tuned"] = {key: value for key, value in told.items() if value is not None}
        return {**values, "rows": [_describe_row(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, values: object) -> Plan:
        """The plan that `to_dict`, or a plan's file, says.

        Raises:
            LeansdError: a key is missing, unknown or of another kind, or the plan means nothing.
        """
        return _read_plan(values)


def _describe_row(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {"inherit": dict(row.inherit)} if row.inherit else {}
    if row.guidance != "compute":
        values["guidance"] = row.guidance
    if row.correct != NO_CORRECTION:
        values["correct"] = row.correct.encode()
    if row.attend:
        values["attend"] = dict(row.attend)
    return {**values, "net": row.net} if row.net != OWN else values


def _list_values(drift: Drift) -> tuple[str, float, str]:
    return drift.probe, float(drift.threshold), drift.measure


# -- reading files -----------------------------------------------------------------------------


def _read_plan(values: object) -> Plan:
    fields = _read_fields(
        values, "", ("steps", "rows"),
        format=_read_format, version=_read_version, name=_read_text, steps=_read_number,
        drift=_read_drift, tuned=_read_tuned, rows=_read_rows,
    )  # fmt: skip
    steps, rows = fields.pop("steps"), fields["rows"]
    if steps != len(rows):
        raise LeansdError(f"it says {steps:g} steps and has {len(rows)} rows")
    return Plan(**{key: value for key, value in fields.items() if key not in ("format", "version")})


def _read_fields(
    values: object, place: str, needed: Sequence[str] = (), **readers: Callable[[object, str], Any]
) -> dict[str, Any]:
    """What an object of JSON says that has all it needs, and no key that means nothing here."""
    if not isinstance(values, dict):
        _refuse(place or "the file", values, "an object")
    found = cast(dict[str, object], values)
    before = f"{place}." if place else ""
    for key in found:
        if key not in readers:
            raise LeansdError(f"{before}{key}: there is no such key{suggest_name(key, readers)}")
    for key in needed:
        if found.get(key) is None:
            raise LeansdError(f"{before}{key} is missing")
    there = {key: read for key, read in readers.items() if found.get(key) is not None}
    return {key: read(found[key], f"{before}{key}") for key, read in there.items()}


def _read_format(value: object, place: str) -> None:
    if value != FORMAT:
        _refuse(place, value, repr(FORMAT))


def _read_version(value: object, place: str) -> None:
    version = _read_number(value, place)
    if version > VERSION:
        raise LeansdError(
            f"it has plan format {version:g}, this leansd reads up to {VERSION}; upgrade leansd"
        )


def _read_rows(values: object, place: str) -> tuple[Row, ...]:
    return tuple(
        Row(
            **_read_fields(
                row, f"{place}.{step}",
                inherit=_read_words, guidance=_read_text, correct=_read_correct,
                attend=_read_words, net=_read_text,
            )
        )
        for step, row in enumerate(_read_list(values, place))
    )  # fmt: skip


def _read_correct(values: object, place: str) -> Correction | Mix:
    """Two numbers, or a mix."""
    if isinstance(values, dict):
        mix, read = cast(object, values), _read_numbers
        return Mix(
            **_read_fields(
                mix, place, ("guided",), start=_read_number, guided=read, difference=read
            )
        )
    correct = _read_numbers(values, place)
    if len(correct) != 2:
        _refuse(place, correct, "two numbers")
    return Correction(*correct)


def _read_drift(values: object, place: str) -> Drift:
    needed, text = ("probe", "threshold"), _read_text
    return Drift(
        **_read_fields(values, place, needed, probe=text, threshold=_read_number, measure=text)
    )


def _read_tuned(values: object, place: str) -> Tuned:
    return Tuned(
        **_read_fields(
            values, place, ("sampler", "unet"),
            sampler=_read_text, unet=_read_text, guidance=_read_number,
            log_snr=_read_numbers, strength=_read_number,
        )
    )  # fmt: skip


def _read_list(value: object, place: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        _refuse(place, value, "a list")
    return list(cast(Iterable[Any], value))


def _read_words(value: object, place: str) -> dict[str, str]:
    if not isinstance(value, dict):
        _refuse(place, value, "an object")
    items = cast(dict[str, object], value).items()
    return {key: _read_text(each, f"{place}.{key}") for key, each in items}


def _read_text(value: object, place: str) -> str:
    return value if isinstance(value, str) else _refuse(place, value, "a text")


def _read_numbers(value: object, place: str) -> tuple[float, ...]:
    return tuple(_read_number(each, place) for each in _read_list(value, place))


def _read_number(value: object, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        _refuse(place, value, "a number")
    return float(value)


def _refuse(place: str, value: object, wanted: str) -> NoReturn:
    told = json.dumps(value, default=str)
    raise LeansdError(f"{place}: {told if len(told) < 40 else 'what it says'} is not {wanted}")

"""A plan: for every step of a run, what inherits instead of being computed.

A plan is data. It names addresses, not modules, so one plan serves every UNet that has them; what a
row means for one UNet (what runs, what is read, what nobody needs) follows from `liveness`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, cast

from leansd.errors import LeansdError
from leansd.plans import keysteps
from leansd.plans.anatomy import Anatomy
from leansd.plans.grid import draw_picture, draw_text
from leansd.plans.methods import METHODS, NO_CORRECTION, Correction, Mix
from leansd.plans.row import (
    ATTENDS,
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
    resolve_all_gates,
    resolve_rows,
)
from leansd.text import suggest_name

NO_NETS: Mapping[str, Anatomy] = MappingProxyType({})
VERSION = 2
"""Of the file format; a change that an older reader would not understand raises it."""
PLAIN_VERSION = 1
"""Of the files of plans without mixes and noise levels: every reader understands them."""


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
    """Of image-to-image; None of runs from the first step on, or where it was not noted."""

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
        if steps < 1:
            raise LeansdError(f"a plan needs at least one step, not {steps}")
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
        steps = self._check_steps(at)
        if 0 in steps and patterns:
            raise LeansdError(
                f"step 0 cannot inherit {patterns[0]}: nothing was computed before it"
            )
        rows = list(self.rows)
        for step in steps:
            inherit = dict(rows[step].inherit)
            for pattern in patterns:
                inherit.pop(pattern, None)  # to the end: later entries overrule
                inherit[pattern] = how
            rows[step] = replace(rows[step], inherit=inherit)
        return replace(self, rows=tuple(rows))

    def guide(self, guidance: Guidance, *, at: int | Iterable[int]) -> Plan:
        """This plan with classifier-free guidance handled otherwise at the steps `at`."""
        rows = list(self.rows)
        for step in self._check_steps(at):
            rows[step] = replace(rows[step], guidance=guidance)
        return replace(self, rows=tuple(rows))

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
        rows = list(self.rows)
        for step in self._check_steps(weights):
            given = weights[step]
            pair = Correction(*given) if isinstance(given, tuple) else Correction(given)
            rows[step] = replace(rows[step], correct=pair)
        return replace(self, rows=tuple(rows))

    def mix(self, rows: Mapping[int, Mix]) -> Plan:
        """This plan with the sampler given a mix of all that was computed, at some steps.

        See `leansd.plans.methods.Mix`. What inherits goes on inheriting from outputs as they were
        computed. A mix counts on the run's first step and on every computed output since: a run
        that begins later, whose latents are changed between steps or that rescales guidance is
        refused, and one that has to start over midway mixes no more. `leansd.tune` fits such rows.

        Args:
            rows: by step, each with a weight for every output computed up to then.
        """
        changed = list(self.rows)
        for step in self._check_steps(rows):
            changed[step] = replace(changed[step], correct=rows[step])
        return replace(self, rows=tuple(changed))

    def attend(self, *patterns: str, by: Attend, at: int | Iterable[int]) -> Plan:
        """This plan with self-attentions computed `by` GRI or in full at the steps `at`.

        Only what is computed is concerned; elsewhere the UNet attends as it has it. GRI (A-SDM,
        arXiv 2406.00210) needs no parameters, so any UNet can attend by it, but only one that was
        distilled to it draws as well: measure a plan that gates another (`leansd evaluate`). Later
        calls overrule.

        Args:
            patterns: what self-attentions are or lie in, `dn0.l0.attn.t0.sa` or `dn0.*.attn`.
        """
        rows = list(self.rows)
        for step in self._check_steps(at):
            kept = {each: how for each, how in rows[step].attend.items() if each not in patterns}
            rows[step] = replace(rows[step], attend={**kept, **dict.fromkeys(patterns, by)})
        return replace(self, rows=tuple(rows))

    def switch(self, net: str, *, at: int | Iterable[int]) -> Plan:
        """This plan with another UNet running at the steps `at`.

        What it inherits there must have been computed by itself since it was switched to, or by
        units of other nets that are the same, weights and all; what was not is computed.

        Args:
            net: its name among the `nets` of `leansd.inherit`; `""` for the pipeline's own UNet.
        """
        rows = list(self.rows)
        for step in self._check_steps(at):
            rows[step] = replace(rows[step], net=net)
        return replace(self, rows=tuple(rows))

    def _check_steps(self, at: int | Iterable[int]) -> set[int]:
        steps = {at} if isinstance(at, int) else set(at)
        outside = sorted(step for step in steps if not 0 <= step < self.steps)
        if outside:
            raise LeansdError(f"step {outside[0]} lies outside a plan of {self.steps} steps")
        return steps

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
        if steps < 1:
            raise LeansdError(f"a plan needs at least one step, not {steps}")
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
        keys = keysteps.place(steps, [_interpolate(ends, part) * scale for part in parts])
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
        return resolve_rows(self.rows, anatomy, nets)

    def resolve_gates(
        self, anatomy: Anatomy, nets: Mapping[str, Anatomy] = NO_NETS
    ) -> tuple[Gates, ...]:
        """For every step, the self-attentions that are gated, by full address.

        Raises:
            LeansdError: an address matches no self-attention of this UNet.
        """
        return resolve_all_gates(self.rows, anatomy, nets)

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
        head: dict[str, Any] = {"format": "leansd-plan", "version": version, "name": self.name}
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


def _interpolate(values: list[int], position: float) -> float:
    """`values` at a fractional index."""
    index = min(int(position), len(values) - 2)
    return values[index] + (values[index + 1] - values[index]) * (position - index)


# -- reading files -----------------------------------------------------------------------------


def _read_plan(values: object) -> Plan:
    known = ("format", "version", "name", "steps", "drift", "tuned", "rows")
    head = _read_keys(values, "", known, needed=("steps", "rows"))
    if head.get("format", "leansd-plan") != "leansd-plan":
        raise LeansdError(f"format: {head['format']!r} is not 'leansd-plan'")
    version = _read_number(head.get("version", VERSION), "version")
    if version > VERSION:
        raise LeansdError(
            f"it has plan format {version:g}, this leansd reads up to {VERSION}; upgrade leansd"
        )
    rows = _read_list(head["rows"], "rows")
    if head["steps"] != len(rows):
        raise LeansdError(f"it says {head['steps']} steps and has {len(rows)} rows")
    drift, tuned = head.get("drift"), head.get("tuned")
    return Plan(
        tuple(_read_row(row, f"rows.{step}") for step, row in enumerate(rows)),
        _read_text(head.get("name", "plan"), "name"),
        None if drift is None else _read_drift(drift),
        None if tuned is None else _read_tuned(tuned),
    )


def _read_row(values: object, place: str) -> Row:
    row = _read_keys(values, place, ("inherit", "guidance", "correct", "attend", "net"))
    return Row(
        _read_words(row.get("inherit", {}), f"{place}.inherit", METHODS),
        cast(Guidance, _read_text(row.get("guidance", "compute"), f"{place}.guidance")),
        _read_correct(row.get("correct", (0.0, 0.0)), f"{place}.correct"),
        cast(Gates, _read_words(row.get("attend", {}), f"{place}.attend", ATTENDS)),
        _read_text(row.get("net", OWN), f"{place}.net"),
    )


def _read_correct(values: object, place: str) -> Correction | Mix:
    """Two numbers, or a mix."""
    if isinstance(values, dict):
        known = ("start", "guided", "difference")
        mix = _read_keys(cast(object, values), place, known, needed=("guided",))
        return Mix(
            _read_number(mix.get("start", 0.0), f"{place}.start"),
            _read_numbers(mix["guided"], f"{place}.guided"),
            _read_numbers(mix.get("difference", ()), f"{place}.difference"),
        )
    correct = _read_numbers(values, place)
    if len(correct) != 2:
        _refuse(place, correct, "two numbers")
    return Correction(*correct)


def _read_drift(values: object) -> Drift:
    known = ("probe", "threshold", "measure")
    drift = _read_keys(values, "drift", known, needed=("probe", "threshold"))
    return Drift(
        _read_text(drift["probe"], "drift.probe"),
        _read_number(drift["threshold"], "drift.threshold"),
        cast(Measure, _read_text(drift.get("measure", "change"), "drift.measure")),
    )


def _read_tuned(values: object) -> Tuned:
    known = ("sampler", "unet", "guidance", "log_snr", "strength")
    tuned = _read_keys(values, "tuned", known, needed=("sampler", "unet"))
    guidance, strength = tuned.get("guidance"), tuned.get("strength")
    return Tuned(
        _read_text(tuned["sampler"], "tuned.sampler"),
        _read_text(tuned["unet"], "tuned.unet"),
        None if guidance is None else _read_number(guidance, "tuned.guidance"),
        _read_numbers(tuned.get("log_snr", ()), "tuned.log_snr"),
        None if strength is None else _read_number(strength, "tuned.strength"),
    )


def _read_keys(
    values: object, place: str, known: Sequence[str], needed: Sequence[str] = ()
) -> dict[str, Any]:
    """An object of JSON that has the keys that it needs, and none that means nothing here."""
    if not isinstance(values, dict):
        _refuse(place or "the file", values, "an object")
    found = cast(dict[str, Any], values)
    before = f"{place}." if place else ""
    for key in found:
        if key not in known:
            raise LeansdError(f"{before}{key}: there is no such key{suggest_name(key, known)}")
    for key in needed:
        if key not in found:
            raise LeansdError(f"{before}{key} is missing")
    return found


def _read_list(value: object, place: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        _refuse(place, value, "a list")
    return list(cast(Iterable[Any], value))


def _read_words(value: object, place: str, known: Collection[str]) -> dict[str, str]:
    if not isinstance(value, dict):
        _refuse(place, value, "an object")
    items = cast(dict[str, object], value).items()
    words = {key: _read_text(each, f"{place}.{key}") for key, each in items}
    for key, word in words.items():
        if word not in known:
            _refuse(f"{place}.{key}", word, f"one of {', '.join(known)}")
    return words


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

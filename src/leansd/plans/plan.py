"""A plan: for every step of a run, what inherits instead of being computed.

A plan is data. It names addresses, not modules, so one plan serves every UNet that has them; what a
row means for one UNet (what runs, what is read, what nobody needs) follows from `liveness`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from leansd.errors import LeansdError
from leansd.plans import keysteps
from leansd.plans.anatomy import Anatomy
from leansd.plans.drift import Drift, Measure
from leansd.plans.gate import Attend, Gates, resolve_gates
from leansd.plans.row import OWN, Correction, Guidance, How, Row, check_row, resolve_row

NO_NETS: Mapping[str, Anatomy] = MappingProxyType({})


@dataclass(frozen=True)
class Tuned:
    """What a plan was tuned for; elsewhere it runs, but nothing says that it is any good."""

    sampler: str
    """Short name, or the scheduler's class."""
    unet: str
    """Fingerprint of the UNet's weights."""
    guidance: float | None = None
    """Guidance scale; None for the pipeline's own."""


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

        See `leansd.plans.drift`.

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
        place.
        """
        if steps == self.steps:
            return self
        if steps < 1:
            raise LeansdError(f"a plan needs at least one step, not {steps}")
        old_keys = [step for step, row in enumerate(self.rows) if row.is_key]
        others = [step for step, row in enumerate(self.rows) if not row.is_key]
        placed = [self.rows[step * self.steps // steps] for step in range(steps)]
        if not others:
            return Plan(tuple(Row(attend=each.attend, net=each.net) for each in placed), self.name)
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
        return tuple(dict.fromkeys(row.net for row in self.rows if row.net != OWN))

    @cached_property
    def guides(self) -> bool:
        """Whether it does anything but compute guidance at some step."""
        return any(row.guidance != "compute" for row in self.rows)

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
        there = self._pick_anatomies(anatomy, nets)
        return tuple(
            resolve_row(step, row, each)
            for step, (row, each) in enumerate(zip(self.rows, there, strict=True))
        )

    def resolve_gates(
        self, anatomy: Anatomy, nets: Mapping[str, Anatomy] = NO_NETS
    ) -> tuple[Gates, ...]:
        """For every step, the self-attentions that are gated, by full address.

        Raises:
            LeansdError: an address matches no self-attention of this UNet.
        """
        there = self._pick_anatomies(anatomy, nets)
        return tuple(
            resolve_gates(step, row.attend, each)
            for step, (row, each) in enumerate(zip(self.rows, there, strict=True))
        )

    def _pick_anatomies(self, own: Anatomy, nets: Mapping[str, Anatomy]) -> list[Anatomy]:
        """The UNet of every step."""
        known = {**nets, OWN: own}
        for step, row in enumerate(self.rows):
            if row.net not in known:
                there = ", ".join(nets) or "none"
                raise LeansdError(
                    f"step {step} runs net {row.net!r}, and the nets given are: {there}; give it "
                    f"to leansd.inherit(pipe, plan, nets={{{row.net!r}: unet}})"
                )
        return [known[row.net] for row in self.rows]

    def draw(self, anatomy: Anatomy | None = None, *, picture: str | Path | None = None) -> str:
        """The plan as a grid in text: of a UNet's units, or without one of what the plan names.

        Args:
            picture: a file to draw the same grid to as well, `plan.png` or `.svg`.
        """
        from leansd.plans.drawing import draw_grid, draw_picture, draw_rows

        if picture is not None:
            draw_picture(self, anatomy).savefig(picture, dpi=150)
        return draw_rows(self) if anatomy is None else draw_grid(self, anatomy)

    def __str__(self) -> str:
        from leansd.plans.drawing import draw_rows

        return draw_rows(self)

    # -- files -------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        from leansd.plans.document import write_plan

        write_plan(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            LeansdError: there is no such file, or it is not a plan.
        """
        from leansd.plans.document import read_plan

        return read_plan(Path(path))


def _list_values(drift: Drift) -> tuple[str, float, str]:
    return drift.probe, float(drift.threshold), drift.measure


def _interpolate(values: list[int], position: float) -> float:
    """`values` at a fractional index."""
    index = min(int(position), len(values) - 2)
    return values[index] + (values[index + 1] - values[index]) * (position - index)

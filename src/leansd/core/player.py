"""A player of plans: says which calls of a denoiser are computed, and makes the others.

A call is of one or several conditionings, in one batch or apart. What is kept of each is kept by an
identity that the host gives, so that a batch that is split otherwise midway is no matter. Where the
host knows the inside of its denoiser, units of it may inherit too: they ask `Player.batch`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from operator import is_
from typing import Any

import torch

from leansd.core.outputs import (
    History,
    PlannedCall,
    explain_unknown_output,
    find_method,
    make_placeholder,
)
from leansd.core.schedule import CallSchedule
from leansd.errors import LeansdError
from leansd.plans.anatomy import HEAD, WHOLE, Anatomy
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import Program
from leansd.plans.plan import Plan

Signature = tuple[torch.Size, torch.dtype, torch.device]


@dataclass
class PlayerStats:
    """What a run did, counted as it goes; a call is one of the sampler, however it was split."""

    calls: set[int] = field(default_factory=set[int])
    computed: set[int] = field(default_factory=set[int])
    """The calls that called the denoiser."""
    partial: set[int] = field(default_factory=set[int])
    """The computed calls in which some units were not."""
    forced: Counter[str] = field(default_factory=Counter[str])
    """How often something was computed although the plan goes on, by why."""
    bytes_kept: int = 0
    """The most that was kept at any time."""

    @property
    def inherited(self) -> int:
        """How many calls the denoiser was spared."""
        return len(self.calls - self.computed)


class _Track(History):
    """The calls with one identity on one device."""

    def __init__(self) -> None:
        super().__init__()
        self.signature: Signature | None = None
        self.is_ambiguous = False
        """Whether it came twice at one call: tiles, or a step tried again."""
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        """Shape and precision of units' outputs, by address."""

    def clear(self) -> None:
        super().clear()
        self.shapes.clear()


class _ThreadState(threading.local):
    batch: PlayedBatch | None = None


class Player:
    """Plays a plan along the calls of one run.

    Whatever is unknown is computed: an identity that was not there at the call before or came
    twice, another shape, dtype or device, a call out of order. Threads may play at once, each on a
    device or with identities of its own. No value is read from a device.
    """

    def __init__(
        self,
        plan: Plan,
        schedule: CallSchedule,
        anatomy: Anatomy = WHOLE,
        *,
        writable: bool = False,
    ) -> None:
        """Args:
        anatomy: of the denoiser, where its units ask `batch` what to do.
        writable: whether the code between units may write to what they give.
        """
        why = explain_unplayable(plan, schedule.steps, anatomy)
        self.reason = why or explain_unknown_output(plan, schedule)
        """Why all is computed in full, in words; empty where the plan is followed."""
        self.plan = Plan.full(schedule.steps) if self.reason else plan
        self.schedule, self.anatomy, self.writable = schedule, anatomy, writable
        self.stats = PlayerStats()
        self._tracks: dict[tuple[torch.device, Hashable], _Track] = {}
        self._lock = threading.Lock()
        self._thread = _ThreadState()
        rows, moments = schedule.rows, schedule.moments
        compile_ = partial(
            compile_plan, self.plan, anatomy, rows=rows, moments=moments, guided=False
        )
        self._compile = lru_cache(maxsize=64)(compile_)

    @property
    def batch(self) -> PlayedBatch | None:
        """What this thread is computing: the denoiser's units ask it what to do."""
        return self._thread.batch

    def play(
        self,
        call: int,
        latents: torch.Tensor,
        compute: Callable[[], torch.Tensor],
        keys: Sequence[Hashable] = ("all",),
    ) -> torch.Tensor:
        """The denoiser's output at a call of the run.

        Args:
            call: its number in the schedule.
            latents: what the denoiser is given [keys * B, C, ...], whose first channels are those
                of its output.
            compute: calls the denoiser with them and gives its output [keys * B, C, ...].
            keys: an identity for each conditioning, in the order of the batch.
        """
        turns = self._take_all(call, latents, keys)
        if turns is not None and all(turn.skips_unet for turn in turns):
            made = _join([turn.inherit() for turn in turns])
            self._count(call)
            return made
        try:
            given = [turn.remember_input() for turn in turns or ()]
            output = self._run_units(turns, compute)
        except BaseException:
            self.forget(latents.device, keys)
            raise
        rows = outputs = list[torch.Tensor]()
        if turns is not None and _fits(output, latents, given):
            rows = list(output.chunk(len(turns)))
            each = zip(turns, rows, given, strict=True)
            outputs = [turn.settle(own, before) for turn, own, before in each]
        elif turns is not None:
            self._force("the output has another shape than the latents")
            self.forget(latents.device, keys)
        partial = any(not turn.call.computes_all for turn in turns or ())
        self._count(call, computed=True, partial=partial)
        return output if all(map(is_, outputs, rows)) else _join(outputs)

    def play_denoised(
        self,
        call: int,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        compute: Callable[[], torch.Tensor],
        keys: Sequence[Hashable] = ("all",),
    ) -> torch.Tensor:
        """Play a call of a denoiser that gives pictures: latents - sigma * output.

        What is computed and not corrected goes on as it came, to the bit.

        Args:
            sigma: of every row, [keys * B].
            compute: gives the denoised latents [keys * B, C, ...].
        """
        level = sigma.reshape(-1, *[1] * (latents.ndim - 1))
        computed: list[tuple[torch.Tensor, torch.Tensor]] = []

        def find_output() -> torch.Tensor:
            denoised = compute()
            output = (latents - denoised) / level
            computed.append((output, denoised))
            return output

        output = self.play(call, latents, find_output, keys)
        for own, denoised in computed:
            if own is output:
                return denoised
        return latents - level * output

    def spares(self, call: int, device: torch.device, keys: Sequence[Hashable]) -> bool:
        """Whether `play` will make this call of kept outputs, if shapes and precision stay."""
        with self._lock:
            tracks = [self._tracks.get((device, key)) for key in keys]
            return bool(tracks) and all(
                track is not None
                and track.program is not None
                and not track.is_ambiguous
                and track.follows(call)
                and call < len(self.schedule.rows)
                and HEAD in track.program[call].pattern.inherited
                for track in tracks
            )

    def forget(self, device: torch.device, keys: Sequence[Hashable]) -> None:
        """Keep nothing of some identities: their next call is computed."""
        with self._lock:
            for key in keys:
                self._tracks.pop((device, key), None)

    def clear(self) -> None:
        """Keep nothing any more; counts stay."""
        with self._lock:
            self._tracks.clear()

    def describe(self) -> str:
        """What the run did, in words."""
        calls, computed = len(self.stats.calls), len(self.stats.computed)
        why = self.reason or "; ".join(self.stats.forced)
        return f"the model ran {computed} of {calls} times" + (f", because {why}" if why else "")

    # -- one call ----------------------------------------------------------------------------------

    def _take_all(
        self, call: int, latents: torch.Tensor, keys: Sequence[Hashable]
    ) -> list[_Turn] | None:
        """What each conditioning does; None where the call cannot be told apart by conditioning."""
        why = ""
        if not 0 <= call < len(self.schedule.rows):
            why = "the run has more calls than its sigmas say"
        elif len(set(keys)) != len(keys) or not keys or latents.shape[0] % len(keys):
            why = "whose rows of a batch are whose is not known"
        elif latents.requires_grad and torch.is_grad_enabled():
            why = "gradients are wanted"
        if why:
            self._force(why)
            self.forget(latents.device, keys)
            return None
        parts = latents.chunk(len(keys))
        with self._lock:
            turns = [self._take(call, part, key) for part, key in zip(parts, keys, strict=True)]
        pattern = turns[0].call.pattern
        if any(turn.call.pattern != pattern or not turn.is_ready for turn in turns):
            # Some are to be computed, and with them the whole batch is.
            for turn in turns:
                turn.upgrade()
        return turns

    def _run_units(
        self, turns: list[_Turn] | None, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The denoiser's output, while its units ask `batch` what to do."""
        if turns is None or self.anatomy is WHOLE:
            return compute()
        self._thread.batch = PlayedBatch(turns, writable=self.writable)
        try:
            return compute()
        except _InDoubt as doubt:
            self._force(str(doubt))
            for turn in turns:
                turn.doubt(self._compile(start=turn.call.index))
            self._thread.batch = None
            return compute()
        finally:
            self._thread.batch = None

    def _take(self, call: int, latents: torch.Tensor, key: Hashable) -> _Turn:
        track = self._tracks.setdefault((latents.device, key), _Track())
        signature = (latents.shape, latents.dtype, latents.device)
        track.is_ambiguous |= track.program is not None and call == track.last
        why = ""
        if track.is_ambiguous:
            why = "a conditioning comes twice at a call"
        elif track.program is not None and not track.follows(call):
            why = "a call is out of order"
        elif track.program is not None and track.signature != signature:
            why = "shape, precision or device have changed"
        if why or track.program is None:
            track.begin(self._compile(start=call))
            track.signature = signature
        if why:
            self.stats.forced[why] += 1
        track.last = call
        return _Turn(track, latents, self.schedule)

    def _force(self, why: str) -> None:
        with self._lock:
            self.stats.forced[why] += 1

    def _count(self, call: int, *, computed: bool = False, partial: bool = False) -> None:
        with self._lock:
            self.stats.calls.add(call)
            if computed:
                self.stats.computed.add(call)
            if partial:
                self.stats.partial.add(call)
            kept = sum(track.bytes for track in self._tracks.values())
            self.stats.bytes_kept = max(self.stats.bytes_kept, kept)


class _Turn(PlannedCall):
    """One conditioning at one call."""

    def __init__(self, track: _Track, latents: torch.Tensor, schedule: CallSchedule) -> None:
        assert track.program is not None
        super().__init__(track.cache, track.program[track.last], schedule)
        self._track = track
        self._latents = latents

    @property
    def is_ready(self) -> bool:
        """Whether all that the call is made from is there."""
        call = self.call
        known = all(self.store.has(sources) for (sources,) in call.sources.values())
        return known and (self.skips_unet or call.pattern.idle <= self._track.shapes.keys())

    def upgrade(self) -> None:
        """Compute this call, and all that follows from it."""
        program, index = self._track.program, self.call.index
        assert program is not None
        if not self.call.computes_all:
            self._track.program = program.upgrade(index)
            self.call = self._track.program[index]

    def doubt(self, program: Program) -> None:
        """Compute from here on: it is not known what comes with this identity."""
        self._track.begin(program)
        self._track.is_ambiguous = True
        self.call = program[self.call.index]

    def inherit(self) -> torch.Tensor:
        """The output made of kept ones; always a fresh tensor."""
        made = self.give(HEAD, self._latents)
        self.store.release(self.call.releases)
        return made

    def give(self, at: str, given: torch.Tensor) -> torch.Tensor:
        """What a unit that inherits gives, `given` its input now; always a fresh tensor."""
        method = find_method(self.call, at)
        (sources,) = self.call.sources[at]
        before = given[:, : self.store.read(sources[0]).shape[1]] if method.takes_input else None
        return self.fill(method, sources, before)

    def keep(self, at: str, output: torch.Tensor, given: torch.Tensor) -> None:
        """Keep what is read later of a computed unit, `given` its input."""
        looks = output.shape, output.dtype
        if self._track.shapes.setdefault(at, looks) != looks:
            raise _InDoubt("what the denoiser's units give has another shape")
        for kept in self.list_keeps(at):
            self.keep_output(kept, output, given)

    def make_placeholder(self, at: str, count: int, *, writable: bool) -> torch.Tensor:
        """NaN for what nobody reads, in the shape of `count` conditionings."""
        (batch, *rest), dtype = self._track.shapes[at]
        size, device = (count * batch, *rest), self._latents.device
        return make_placeholder(size, dtype, device, writable=writable)

    def remember_input(self) -> torch.Tensor | None:
        """The input, where something that it goes into is made: the denoiser may overwrite it."""
        corrected = any(each[0].what == "denoised" for each in self.call.corrects)
        return self._latents.clone() if corrected or self.keeps_input(HEAD) else None

    def settle(self, output: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
        """Keep what is read later of a computed output, and correct it."""
        before = given[:, : output.shape[1]] if given is not None else None
        for kept in self.list_keeps(HEAD):
            self.keep_output(kept, output, before)
        if self.call.corrects:
            (sources,) = self.call.corrects
            output = self.move_on(output, sources, before)
        self.store.release(self.call.releases)
        return output


class PlayedBatch:
    """The conditionings of a call that is computed, one after the other in one batch."""

    def __init__(self, turns: Sequence[_Turn], *, writable: bool) -> None:
        self._turns, self._writable = turns, writable
        self._pattern = turns[0].call.pattern
        self._seen: set[str] = set()

    def run_unit(
        self, at: str, forward: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """What a unit gives [keys * B, C, H, W]; its input comes first."""
        if at in self._seen:
            raise _InDoubt("the denoiser runs twice in a call")
        self._seen.add(at)
        turns, pattern = self._turns, self._pattern
        if at in pattern.idle:
            return turns[0].make_placeholder(at, len(turns), writable=self._writable)
        given = args[0].chunk(len(turns))
        if at in pattern.inherited:
            return _join([turn.give(at, own) for turn, own in zip(turns, given, strict=True)])
        if any(turn.keeps_input(at) for turn in turns):
            given = [each.clone() for each in given]  # the unit may overwrite its input
        output = forward(*args, **kwargs)
        for turn, rows, own in zip(turns, output.chunk(len(turns)), given, strict=True):
            turn.keep(at, rows, own)
        return output


class _InDoubt(Exception):
    """Midway it shows that the units of a call are not what they were taken for."""


def explain_unplayable(plan: Plan, steps: int, anatomy: Anatomy = WHOLE) -> str:
    """Why a plan cannot be played by its host, in words; empty where it can.

    Guidance that a plan leaves out is computed all the same.
    """
    if plan.steps != steps:
        return f"plan {plan.name} is for {plan.steps} steps, this run has {steps}"
    if plan.drift is not None:
        return f"plan {plan.name} decides as it runs what each picture inherits"
    if plan.mixes:
        return f"plan {plan.name} mixes outputs, for which the guidance of the run must be known"
    if plan.nets:
        return f"plan {plan.name} runs other nets at some steps"
    if any(row.attend for row in plan.rows):
        return f"plan {plan.name} gates self-attentions"
    try:
        plan.resolve(anatomy)
    except LeansdError as error:
        if anatomy is not WHOLE:
            return str(error)
        return f"plan {plan.name} inherits inside the UNet, not whole steps ({HEAD}) alone"
    return ""


def _fits(
    output: torch.Tensor, latents: torch.Tensor, given: Sequence[torch.Tensor | None]
) -> bool:
    """Whether an output has the latents' rows, and where its change is kept also their channels."""
    if output.shape[0] != latents.shape[0]:
        return False
    changes = any(before is not None for before in given)
    return not changes or latents[:, : output.shape[1]].shape == output.shape


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))

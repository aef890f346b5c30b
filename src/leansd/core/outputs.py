"""Outputs: what a run keeps of them, and those that are made of kept ones.

An output that is not computed is a weighted sum of kept ones by `leansd.plans.methods.METHODS`; a
mix is what a sampler gets in the place of one that is. Where outputs are mixed, everything is
weighed in single precision at least, and rounded once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch

from leansd.core.schedule import UNKNOWN_OUTPUT, CallSchedule
from leansd.plans.anatomy import HEAD
from leansd.plans.liveness import GUIDANCE, Call, Kept, Program
from leansd.plans.methods import GUIDANCE_METHODS, METHODS, Method, Mix
from leansd.plans.plan import Plan

# -- mixes -----------------------------------------------------------------------------------------


class Guided(NamedTuple):
    """One output as mixes know it, both [B, C, H, W]."""

    output: torch.Tensor
    """What guidance makes of the two halves."""
    difference: torch.Tensor | None
    """Conditional minus unconditional; None without guidance."""


def guide(rest: torch.Tensor, cond: torch.Tensor, scale: float) -> Guided:
    """Classifier-free guidance of two halves [B, C, H, W], as pipelines do it."""
    difference = cond - rest
    return Guided(rest + scale * difference, difference)


def solve_rest(mixed: torch.Tensor, cond: torch.Tensor, scale: float) -> torch.Tensor:
    """The unconditional output of which guidance by a scale above 1 makes `mixed`."""
    return (scale * make_precise(cond) - mixed) / (scale - 1)


class OutputHistory:
    """What mixes are made of: what a run began with, and every output computed since.

    Args:
        start: what the UNet was given at the run's first step, [B, C, H, W].
    """

    def __init__(self, start: torch.Tensor) -> None:
        self._start = make_precise(start)
        self._outputs: list[Guided] = []
        self.held: torch.Tensor | None = None
        """The conditional output, while the unconditional one of the same step is computed."""

    def __len__(self) -> int:
        return len(self._outputs)

    @property
    def bytes(self) -> int:
        kept = [self._start, *(each for pair in self._outputs for each in pair)]
        return sum(each.nbytes for each in kept if each is not None)

    def note(self, output: Guided) -> None:
        """Take a computed output, which is the history's from now on."""
        self._outputs.append(output)

    def mix(self, row: Mix) -> torch.Tensor:
        """The weighted sum [B, C, H, W]; the output itself where only that has a weight, of one."""
        terms = [(self._start, row.start)]
        terms += [(each.output, own) for each, own in zip(self._outputs, row.guided, strict=True)]
        apart = row.difference or (0.0,) * len(self)
        for each, weight in zip(self._outputs, apart, strict=True):
            if each.difference is not None:
                terms.append((each.difference, weight))
        (first, lead), *others = [term for term in terms if term[1]] or terms[:1]
        total = first * lead
        for tensor, weight in others:
            total = total + tensor * weight
        return total


def make_precise(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in single precision at least."""
    tensor = tensor.detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


# -- what a run keeps, and where it is in its plan -------------------------------------------------


class FeatureCache:
    """Kept tensors of one run by (unit, call). Nobody outside ever holds one of them.

    Tensors are copied on the way in and on the way out, since the code between units may write in
    place; that is two copies of what a plan keeps, not of the UNet's activations.
    """

    def __init__(self) -> None:
        self._tensors: dict[Kept, torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def put(self, kept: Kept, tensor: torch.Tensor) -> None:
        """Keep `tensor` itself, which nobody else holds."""
        self._tensors[kept] = tensor

    def has(self, items: Iterable[Kept]) -> bool:
        return all(kept in self._tensors for kept in items)

    def read(self, kept: Kept) -> torch.Tensor:
        """The kept tensor itself, for reading only."""
        return self._tensors[kept]

    def release(self, items: Iterable[Kept]) -> None:
        for kept in items:
            self._tensors.pop(kept, None)

    def retain(self, items: Collection[Kept]) -> None:
        """Release all others."""
        self.release([kept for kept in self._tensors if kept not in items])

    def clear(self) -> None:
        self._tensors.clear()


class History:
    """One sequence of calls, each of which goes on from the one before, and what they keep."""

    def __init__(self) -> None:
        self.cache = FeatureCache()
        self.outputs: OutputHistory | None = None
        """Where outputs are mixed, those so far."""
        self.program: Program | None = None
        self.last = -1
        """Number of the call that was made last."""

    @property
    def bytes(self) -> int:
        return self.cache.bytes + (self.outputs.bytes if self.outputs is not None else 0)

    def follows(self, index: int) -> bool:
        """Whether this is the next call."""
        return self.program is not None and index == self.last + 1

    def begin(self, program: Program) -> None:
        """Forget everything and follow `program`, whose first call computes in full."""
        self.clear()
        self.program = program

    def clear(self) -> None:
        """Keep nothing any more."""
        self.cache.clear()
        self.outputs = None


# -- inherited and corrected outputs, and what stands in the place of idle ones --------------------


def make_placeholder(
    size: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, writable: bool
) -> torch.Tensor:
    """NaN in this shape: nobody reads it, and if somebody did it would show.

    It takes no memory unless it has to be `writable`, for code that works in place (FreeU,
    T2I-Adapter).
    """
    if writable:
        return torch.full(size, torch.nan, dtype=dtype, device=device)
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(size)


Weight = float | torch.Tensor


class PlannedCall:
    """One call under a plan: makes what is not computed, and corrects what is."""

    def __init__(self, store: FeatureCache, call: Call, schedule: CallSchedule | None) -> None:
        self.store = store
        self.call = call
        self.schedule = schedule
        """The run's; None where a graph is traced, which has it from its arguments."""

    @property
    def skips_unet(self) -> bool:
        """Whether the denoiser's output follows from its input and what is kept alone."""
        return HEAD in self.call.pattern.inherited

    def list_keeps(self, at: str) -> Sequence[Kept]:
        """What to keep of a unit."""
        return self.call.keeps.get(at, ())

    def keeps_input(self, at: str) -> bool:
        """Whether a later call reads something that a unit's input goes into."""
        return any(kept.what in ("change", "denoised") for kept in self.list_keeps(at))

    def keep_output(
        self, kept: Kept, output: torch.Tensor, given: torch.Tensor | None = None
    ) -> None:
        """Keep what later calls read of a computed output, `given` its input: one lane of both
        [B, C, H, W]. Of a difference `given` is the other output."""
        output = output.detach()
        if kept.what == "output" or given is None:
            self.store.put(kept, output.clone())
        elif kept.what == "denoised":
            self.store.put(kept, self.denoise(output, given))
        else:
            self.store.put(kept, output - given)

    def denoise(self, output: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """The denoised picture that input and output of the denoiser show, [B, C, H, W]."""
        assert self.schedule is not None
        return combine([given, output], self.schedule.denoise(self.call.index))

    def fill(
        self, method: Method, sources: Sequence[Kept], given: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One lane of an output: of what is kept and, where the method takes it, of its input."""
        if method.of == "change" and given is not None and len(sources) == 1 and method.is_exact:
            return given + self.store.read(sources[0])
        made = weigh_tensors(method, *self.weigh(method, sources))
        if not method.takes_input or given is None:
            return made
        if method.of == "change":
            return given + made
        assert self.schedule is not None
        own, lead = self.schedule.denoise(self.call.index)
        return combine([made, given], [1 / lead, -own / lead])

    def weigh(
        self, method: Method, sources: Sequence[Kept]
    ) -> tuple[list[torch.Tensor], list[Weight]]:
        """What an output is made from, latest first, and its weights."""
        assert self.schedule is not None
        weights = list_weights(method, sources, self.call.index, self.schedule)
        counted = [(kept, each) for kept, each in zip(sources, weights, strict=True) if each]
        return [self.store.read(kept) for kept, _ in counted], [each for _, each in counted]

    def move_on(
        self, noise: torch.Tensor, sources: Sequence[Kept], given: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One lane of a corrected output: moved away from forecasts by the outputs before, or as
        the picture that it shows of its input `given` is moved away from pictures before."""
        tensors = [noise, *map(self.store.read, sources)]
        if sources[0].what == "denoised":
            assert given is not None
            tensors.append(given)
        return combine(tensors, self.weigh_correction(sources))

    def weigh_correction(self, sources: Sequence[Kept]) -> Sequence[Weight]:
        """The weights of what `move_on` sums."""
        assert self.schedule is not None
        return list_correction(self.call, sources, self.schedule)


def explain_unknown_output(plan: Plan, schedule: CallSchedule) -> str:
    """Why a run cannot follow a plan that inherits denoised pictures; empty where it can."""
    hows = {how for row in plan.rows for how in row.inherit.values()}
    wanted = any(METHODS[how].of == "denoised" for how in hows)
    return UNKNOWN_OUTPUT if wanted and schedule.output is None else ""


def find_method(call: Call, at: str) -> Method:
    """How an inherited unit or part, or the difference of the guidance lanes, is made."""
    if at == GUIDANCE:
        return METHODS[GUIDANCE_METHODS[call.guidance]]
    pattern = call.pattern
    return METHODS[pattern.inherited.get(at) or pattern.parts[at]]


def list_weights(
    method: Method, sources: Sequence[Kept], index: int, schedule: CallSchedule
) -> tuple[float, ...]:
    """The weights, in the output of call `index`, of what it is made from, latest first."""
    log_snr = schedule.log_snr
    by_call = method.axis == "call"
    now = float(index) if by_call else log_snr[index]
    then = [float(kept.call) if by_call else log_snr[kept.call] for kept in sources]
    return method.weights(now, then, len(schedule.rows))


def list_correction(
    call: Call, sources: Sequence[Kept], schedule: CallSchedule
) -> tuple[float, ...]:
    """The weights of a corrected output itself, of the outputs before, latest first, and, where it
    is the picture that is corrected, of the input."""
    then = [schedule.log_snr[kept.call] for kept in sources]
    lead, weights = call.correct.lead, call.correct.weights(schedule.log_snr[call.index], then)
    if sources[0].what != "denoised":
        return (lead, *weights)
    of_input, of_output = schedule.denoise(call.index)
    back = tuple(weight / of_output for weight in weights)
    return (lead, *back, (lead - 1) * of_input / of_output)


def weigh_tensors(
    method: Method, tensors: Sequence[torch.Tensor], weights: Sequence[Weight]
) -> torch.Tensor:
    """The weighted sum of tensors, latest first; always a fresh tensor."""
    if not method.is_exact:
        return combine(tensors, weights)
    if len(tensors) == 1:
        return tensors[0].clone()
    if len(tensors) == 2:
        return _lerp(tensors[1], tensors[0], weights[0])
    # Earliest first, which decides how the sum is rounded.
    return combine(tensors[::-1], weights[::-1])


def _lerp(before: torch.Tensor, latest: torch.Tensor, weight: Weight) -> torch.Tensor:
    """before + weight (latest - before); a weight beyond 1 lies beyond the latest."""
    if not isinstance(weight, torch.Tensor):
        return torch.lerp(before, latest, weight)
    # In the precision that lerp gives to a weight that is a number, so that the bits agree.
    return torch.lerp(before.to(weight.dtype), latest.to(weight.dtype), weight).to(latest.dtype)


def combine(tensors: Sequence[torch.Tensor], weights: Sequence[Weight]) -> torch.Tensor:
    """The weighted sum of tensors, rounded to their precision only once."""
    dtype = tensors[0].dtype
    precise = torch.promote_types(dtype, torch.float32)
    output = tensors[0].to(precise) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        output = output + tensor.to(precise) * weight
    return output.to(dtype)

"""What a run did under a plan: counted, timed and put into words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy.counting import dissect
from leansd.core.devices import Stopwatch
from leansd.plans.compile import predict_speedup
from leansd.plans.liveness import Call, Net
from leansd.plans.plan import Plan
from leansd.plans.row import OWN
from leansd.runtime.finite import NOT_FINITE, FiniteWatch, is_real


@dataclass(frozen=True)
class Report:
    """One run under a plan. Unit counts are over all its UNet calls.

    Where pictures of a call differ, a unit counts as computed if any picture computes it, and a
    call as full if all do; the predicted speed-up weighs them.
    """

    plan: Plan
    calls: int
    full_calls: int
    """The UNet calls that computed the whole of the net that ran."""
    computed: int
    inherited: int
    idle: int
    bytes_kept: int
    """The most that was kept at any time."""
    predicted_speedup: float
    """Full run's over this run's multiply-accumulates, UNet only; NaN where not counted."""
    measured_speedup: float
    """What the run would have taken with every call like its median full one, over what it took.

    A full one is one of the pipeline's own UNet without gates, if there is any; NaN where none of
    the calls ran that UNet in full."""
    seconds: float
    """In the UNet."""
    control_calls: int = 0
    control_runs: int = 0
    """How many of the calls of the ControlNet ran it; the others inherited its residuals."""
    guarded: int = 0
    """Under a plan with a drift: calls at which it inherits, counted once for each picture."""
    drifted: int = 0
    """Guarded calls that were computed in full because the picture had drifted too far."""
    gated: int = 0
    """Calls in which the plan had self-attentions computed otherwise than the UNet has them."""
    switched: int = 0
    """Calls that another net ran in the place of the pipeline's own UNet."""
    forced: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many calls were computed in full although the plan goes on, by why."""
    uncounted: str = ""
    """Why nothing is predicted, "not counted, because ..."; empty where it is."""
    fault: str = ""
    """From which step on the UNet gave NaN or Inf, and whether the plan had a part in it."""
    notes: tuple[str, ...] = ()
    """What the plan was tuned for and this run was not, and the like, as it was warned of."""

    def __str__(self) -> str:
        units = self.computed + self.inherited + self.idle
        nets = f", {self.switched} by another net" if self.switched else ""
        told = [each for each in (self.fault, *self.notes) if each]
        told += [
            f"{self.calls} UNet calls, {self.full_calls} in full{nets}",
            f"of {units} unit runs {self.computed} computed, {self.inherited} inherited, "
            f"{self.idle} idle",
            f"{self.bytes_kept / 2**20:.2f} MiB kept",
        ]
        told += [f"{count} computed in full because {why}" for why, count in self.forced.items()]
        if self.control_calls:
            told.append(f"ControlNet ran {self.control_runs} of {self.control_calls} times")
        if self.guarded:
            told.append(
                f"{self.drifted} of {self.guarded} times a picture drifted and was computed"
            )
        if self.gated:
            told.append(f"self-attentions gated in {self.gated} calls")
        told.append(f"UNet {self.seconds:.2f} s, speed-up {self._describe_speedup()}")
        return f"plan {self.plan.name}: {'; '.join(told)}"

    def _describe_speedup(self) -> str:
        measured = f"{self.measured_speedup:.2f}x"
        if math.isnan(self.measured_speedup):
            measured = "not measured, because no call ran the pipeline's own UNet in full"
        return f"{measured} ({self.uncounted or f'predicted {self.predicted_speedup:.2f}x'})"


class RunStats:
    """Counts a run as it goes."""

    def __init__(self, plan: Plan, notes: tuple[str, ...] = ()) -> None:
        self.plan = plan
        self.notes = notes
        self.control_calls = self.control_runs = 0
        """How often the run called a ControlNet, and how often that ran."""
        self.calls: list[tuple[Call, ...]] = []
        self.times: list[Stopwatch] = []
        self.forced: Counter[str] = Counter()
        self.outputs = FiniteWatch()
        self.places: list[tuple[int, int]] = []
        """Places of every output that was looked at: how many calls there were, and the step."""
        self.dtype = torch.float32
        self.bytes_kept = 0
        self.size = (0, 0)
        self.tokens = 0

    def add(self, calls: tuple[Call, ...], seconds: Stopwatch, bytes_kept: int) -> None:
        """Count a UNet call, given as one call of the batch or one of each picture."""
        self.calls.append(calls)
        self.times.append(seconds)
        self.bytes_kept = max(self.bytes_kept, bytes_kept)

    def note_output(self, noise: torch.Tensor, step: int) -> None:
        """Look at what the UNet gave [B, C, H, W] at a step of the sampler, from 0."""
        if is_real(noise):
            self.outputs.note(noise)
            self.places.append((len(self.calls), step))
            self.dtype = noise.dtype

    def find_fault(self) -> str:
        """From which step on an output is not finite, in words; waits for the device."""
        rows = zip(self.places, self.outputs.read(), strict=True)
        place = next((place for place, finite in rows if not all(finite)), None)
        if place is None:
            return ""
        calls, step = place
        what = f"the UNet's outputs {NOT_FINITE} (NaN or Inf) from step {step + 1} "
        what += f"of {self.plan.steps} on"
        if all(call.is_full for each in self.calls[:calls] for call in each):
            precision = str(self.dtype).removeprefix("torch.")
            return (
                f"{what}, and nothing was inherited before: the model itself fails in {precision}"
            )
        return f"{what}; a run without the plan tells whether the model itself fails"

    def note_size(self, sample: torch.Tensor, text: torch.Tensor | None) -> None:
        """Remember what the cost of this run is to be counted at."""
        self.size = (sample.shape[-2], sample.shape[-1])
        self.tokens = text.shape[1] if text is not None else 0

    def summarise(
        self, unet: UNet2DConditionModel, others: Mapping[str, UNet2DConditionModel]
    ) -> Report:
        counts = [_count_units(calls) for calls in self.calls]
        computed, inherited, idle = (sum(each) for each in zip(*counts, strict=True))
        every = [call for calls in self.calls for call in calls]
        drifted = sum(call.recomputed for call in every)
        guarded = drifted + sum(call.inherits for call in every) if self.plan.drift else 0
        seconds = [each() for each in self.times]
        anatomy = dissect(unet, latent=self.size, tokens=self.tokens)
        nets = {
            name: Net(dissect(each, latent=self.size, tokens=self.tokens))
            for name, each in others.items()
        }
        there = (anatomy, *(net.anatomy for net in nets.values()))
        return Report(
            plan=self.plan,
            calls=len(self.calls),
            full_calls=sum(all(call.is_full for call in calls) for calls in self.calls),
            computed=computed,
            inherited=inherited,
            idle=idle,
            bytes_kept=self.bytes_kept,
            predicted_speedup=predict_speedup(every, anatomy, nets),
            measured_speedup=self._find_full_seconds(seconds) * len(seconds) / sum(seconds),
            seconds=sum(seconds),
            control_calls=self.control_calls,
            control_runs=self.control_runs,
            guarded=guarded,
            drifted=drifted,
            gated=sum(any(call.gates for call in calls) for calls in self.calls),
            switched=sum(calls[0].net != OWN for calls in self.calls),
            forced=dict(self.forced),
            uncounted=next((each.uncounted for each in there if each.uncounted), ""),
            fault=self.find_fault(),
            notes=self.notes,
        )

    def _find_full_seconds(self, seconds: Sequence[float]) -> float:
        """Median seconds of full calls: of those without gates, where there are any."""
        rows = [
            (any(call.gates for call in calls), each)
            for calls, each in zip(self.calls, seconds, strict=True)
            if _is_full(calls)
        ]
        if not rows:
            return math.nan
        least = min(is_gated for is_gated, _ in rows)
        return median(each for is_gated, each in rows if is_gated == least)


def _is_full(calls: Sequence[Call]) -> bool:
    """Whether a call ran the whole of the pipeline's own UNet."""
    return all(call.is_full and call.net == OWN for call in calls)


def _count_units(calls: Sequence[Call]) -> tuple[int, int, int]:
    """Units that a UNet call computed, inherited and left idle, for all pictures together."""
    patterns = [call.pattern for call in calls]
    computed = frozenset[str]().union(*(pattern.computed for pattern in patterns))
    inherited = frozenset[str]().union(*(pattern.inherited for pattern in patterns)) - computed
    idle = frozenset[str]().union(*(pattern.idle for pattern in patterns)) - computed - inherited
    return len(computed), len(inherited), len(idle)

"""Mixes fitted end to end: what leads a plan's last latents to where the full run's are.

The latents before every key step are a sum over the noise at the start, the guided outputs so far
and the differences of the lanes; the weights are the unknowns, about 100 to 200 numbers, and the
plan that was found by the search is where they start. The gradient goes through the UNet and the
sampler, as in Non-Stationary Solvers (BNS, arXiv 2403.01329) and S4S (arXiv 2502.17423), which
fit one weight an output and the times, too; here key steps and forecasts are the search's.

Neighbouring outputs are nearly the same, so a weight by itself means nothing. Each row is therefore
fitted in the whitened span of what it is a sum of: a unit moves the latents by one, root mean
square, whatever the direction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from leansd.core.devices import send
from leansd.errors import LeansdError
from leansd.plans.plan import Plan
from leansd.tuning.run_starts import (
    RunStart,
    StartBatch,
    count_saved,
    find_free_memory,
    keep_weights,
    recompute_blocks,
)
from leansd.tuning.sampler_map import (
    Matrix,
    PlanMap,
    stack_features,
)

LEAST_SHARE = 1e-7
"""Directions with less of a row's variance than this share of the largest are left out."""
WHITENED = 8
"""Pictures that the span of a row is measured on."""
BETAS = (0.9, 0.95)
RESERVE = 0.8
"""The share of free memory that a fit takes at most."""


@dataclass(frozen=True)
class MixConfig:
    """How rows are fitted."""

    iterations: int = 45
    rate: float = 7e-4
    """The rate of Adam: how far a row moves the latents an iteration, root mean square."""
    warm_up: int = 5
    batch: int = 8
    lanes: bool = True
    """Whether the difference of the guidance lanes has weights of its own, where there is one."""
    floor: float = 0.0
    """Added to a picture's error before the logarithm: 0 weighs every picture alike, more weighs
    those more that are far off."""
    seed: int = 0


@dataclass
class FitState:
    """Where a fit is: all that Adam knows. Saved every few iterations, so that it can go on."""

    iteration: int
    moved: np.ndarray
    mean: np.ndarray
    square: np.ndarray

    @classmethod
    def begin(cls, size: int) -> FitState:
        return cls(0, np.zeros(size), np.zeros(size), np.zeros(size))

    def step(self, gradient: np.ndarray, config: MixConfig) -> None:
        """One step of Adam, with a warm-up and a cosine."""
        first, second = BETAS
        self.mean = first * self.mean + (1 - first) * gradient
        self.square = second * self.square + (1 - second) * gradient**2
        done = self.iteration + 1
        mean, square = self.mean / (1 - first**done), self.square / (1 - second**done)
        left = (self.iteration - config.warm_up) / max(1, config.iterations - config.warm_up)
        share = min(1.0, done / config.warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0.0, left)))
        self.moved = self.moved - config.rate * share * mean / (np.sqrt(square) + 1e-8)
        self.iteration = done

    def encode(self) -> dict[str, Any]:
        told: dict[str, Any] = {"iteration": self.iteration}
        named = {"moved": self.moved, "mean": self.mean, "square": self.square}
        return told | {name: [float(f"{x:.9g}") for x in each] for name, each in named.items()}

    @classmethod
    def decode(cls, values: Mapping[str, Any]) -> FitState:
        arrays = (np.array(values[name]) for name in ("moved", "mean", "square"))
        return cls(int(values["iteration"]), *arrays)


@dataclass(frozen=True)
class Spending:
    """How a fit fits into memory."""

    pictures: int
    """At once; the gradients of a batch are added up."""
    recomputes: bool
    """Whether a key step's activations are computed again for its gradient."""
    by_block: bool
    """Whether, within it, each block's are."""
    bytes: int
    """About so many in all, besides the weights."""

    def __str__(self) -> str:
        how = ", each key step computed twice" if self.recomputes else ""
        return f"{self.pictures} pictures at once{how}, about {self.bytes / 2**30:.1f} GiB"


OPEN_SHARE = 0.15
"""The largest share of what a call keeps that is open at once, where layers are recomputed."""


def choose_spending(
    unet: Any, call: Callable[[], Sequence[Tensor]], most: int, keys: int, free: float
) -> Spending:
    """The fastest way to fit into memory.

    Args:
        call: of the UNet for one picture; it may be without data, on the meta device.
        most: pictures at once.
        keys: calls of a run.
        free: bytes that may be taken.

    Raises:
        LeansdError: nothing fits.
    """
    each = count_saved(unet, call)
    halves = [max(1, most >> turn) for turn in range(most.bit_length())]
    spendings = [Spending(n, False, False, n * each * keys) for n in halves[:2]]
    spendings += [Spending(n, True, False, n * each) for n in halves]
    for spending in spendings:
        if spending.bytes <= free:
            return spending
    with recompute_blocks(unet):
        least = int(count_saved(unet, call) + OPEN_SHARE * each)
    if least > free:
        raise LeansdError(
            f"memory does not suffice to fit mixes: about {least / 2**30:.1f} GiB are needed for "
            f"one picture, {free / 2**30:.1f} GiB can be had; leave them out"
        )
    return Spending(1, True, True, least)


Rows: TypeAlias = Sequence[Tensor]
"""For each key step, the weights of the latents after it, by `PlanMap.list_columns`."""
Watch: TypeAlias = Callable[[FitState, float], None]
"""Told after every iteration: the state, and the batch's error in dB of the latents."""


@dataclass(eq=False)
class MixFit:
    """A plan, and the pictures that its mixes are fitted on."""

    unet: Any
    plan: PlanMap
    starts: Sequence[RunStart]
    begin: float = 1.0
    """What the plan's sampler gives the UNet at first, over what the full run's did."""
    config: MixConfig = field(default_factory=MixConfig)
    spending: Spending | None = None

    def __post_init__(self) -> None:
        self.plan.require_weights()
        sampler = self.plan.sampler
        moments = sampler.schedule.timesteps
        assert moments is not None
        # What is fitted is what the UNet is given; the last row is the latents themselves.
        self._scales = [float(sampler.scales[key]) for key in self.plan.keys[1:]] + [1.0]
        self.device = next(self.unet.parameters()).device
        # Sent once; the rest of a run stays on the device until an iteration is over.
        self._moments = [moments[key].to(self.device) for key in self.plan.keys]
        rows = self.plan.build_rows()
        self._first = [
            rows[place][self._columns(place)] * scale for place, scale in enumerate(self._scales)
        ]
        self._spans: list[np.ndarray] = []

    @property
    def _by_lane(self) -> bool:
        return self.config.lanes and self.starts[0].lanes == 2

    def _columns(self, place: int) -> list[int]:
        known = self.plan.list_columns(place)
        return known if self._by_lane else known[: 2 + place]

    # -- through the plan ------------------------------------------------------------------------

    def roll_out(self, batch: StartBatch, rows: Rows, seen: list[Matrix] | None = None) -> Tensor:
        """The last latents [B, C, H, W] of a plan with these rows.

        Args:
            seen: takes what every row is a sum of, as rows of numbers.
        """
        latents, guided, differences = batch.begin, list[Tensor](), list[Tensor]()
        for row, moment in zip(rows, self._moments, strict=True):
            if self.spending is not None and self.spending.recomputes:
                made = checkpoint(batch.call, self.unet, latents, moment, use_reentrant=False)
            else:
                made = batch.call(self.unet, latents, moment)
            guided.append(made[0])
            differences += made[1:] if self._by_lane else ()
            columns = [batch.begin, *guided, *differences]
            if seen is not None:
                seen.append(stack_features(columns))
            latents = (torch.stack(columns, dim=-1) * row).sum(-1)
        return latents

    def measure_spans(self) -> None:
        """The whitened span of every row, on a few pictures of the plan as it is."""
        seen: list[Matrix] = []
        rows = [torch.tensor(each, dtype=torch.float32, device=self.device) for each in self._first]
        with torch.no_grad():
            self.roll_out(self._gather(range(min(WHITENED, len(self.starts)))), rows, seen)
        self._spans = []
        for columns in seen:
            values, directions = np.linalg.eigh(columns @ columns.T / columns.shape[1])
            kept = values > LEAST_SHARE * values[-1]
            self._spans.append(directions[:, kept] / np.sqrt(values[kept]))

    def _gather(self, places: Sequence[int] | range) -> StartBatch:
        return StartBatch.of([self.starts[place] for place in places], self.device, self.begin)

    @property
    def size(self) -> int:
        """How many numbers are fitted."""
        return sum(span.shape[1] for span in self._spans)

    def _make_rows(self, moved: Tensor) -> list[Tensor]:
        """Rows in single precision on the device, worked out in double before they go there."""
        parts = moved.split([span.shape[1] for span in self._spans])
        rows = [
            (torch.as_tensor(first) + torch.as_tensor(span) @ part).float()
            for first, span, part in zip(self._first, self._spans, parts, strict=True)
        ]
        return list(send(torch.cat(rows), self.device).split([len(row) for row in rows]))

    # -- the fit ---------------------------------------------------------------------------------

    def plan_memory(self) -> Spending:
        """How many pictures go through at once, and what is computed twice, in the memory there is.

        Raises:
            LeansdError: nothing fits.
        """
        batch = self._gather([0])
        batch.begin.requires_grad_()
        call = functools.partial(batch.call, self.unet, batch.begin, self._moments[0])
        most = min(self.config.batch, len(self.starts))
        free = find_free_memory(self.device) * RESERVE
        with keep_weights(self.unet):
            return choose_spending(self.unet, call, most, len(self._moments), free)

    def run(self, state: FitState | None = None, watch: Watch = lambda state, error: None) -> Plan:
        """Fit, from the beginning or from where it was, and give the plan with its mixes."""
        self.spending = self.spending or self.plan_memory()
        if not self._spans:
            self.measure_spans()
        state = state or FitState.begin(self.size)
        blocks = recompute_blocks(self.unet) if self.spending.by_block else nullcontext()
        with keep_weights(self.unet), blocks:
            while state.iteration < self.config.iterations:
                gradient, error = self._differentiate(state)
                state.step(gradient, self.config)
                watch(state, -10 * math.log10(max(error, 1e-30)))
        return self.build_plan(state)

    def _differentiate(self, state: FitState) -> tuple[np.ndarray, float]:
        """The gradient of a batch's loss, and its mean error."""
        assert self.spending is not None
        moved = torch.from_numpy(state.moved)
        places = self._pick(state.iteration)
        rows = [row.detach().requires_grad_() for row in self._make_rows(moved)]
        told: list[Tensor] = []
        with torch.enable_grad():
            for first in range(0, len(places), self.spending.pictures):
                batch = self._gather(places[first : first + self.spending.pictures])
                errors = (self.roll_out(batch, rows) - batch.goals).square().mean(dim=(1, 2, 3))
                loss = (errors + self.config.floor).log().sum() / len(places)
                parts = torch.autograd.grad(loss, rows)
                told.append(torch.cat([*parts, errors.detach().sum()[None]]))
        # Read at once: one wait an iteration.
        *slopes, total = torch.stack(told).cpu().double().sum(0).split([*map(len, rows), 1])
        gradient = np.concatenate(
            [span.T @ slope.numpy() for span, slope in zip(self._spans, slopes, strict=True)]
        )
        if not np.isfinite(gradient).all():
            raise LeansdError("the gradient of a fit is no number (NaN): try float32")
        return gradient, float(total) / len(places)

    def _pick(self, iteration: int) -> list[int]:
        """The pictures of an iteration: all in turns, every time round in another order."""
        count, size = len(self.starts), min(self.config.batch, len(self.starts))
        taken = range(iteration * size, (iteration + 1) * size)
        turns = {place // count for place in taken}
        orders = {
            turn: np.random.default_rng((self.config.seed, turn)).permutation(count)
            for turn in turns
        }
        return [int(orders[place // count][place % count]) for place in taken]

    def build_plan(self, state: FitState) -> Plan:
        """The plan with the mixes of a state."""
        width = 1 + 2 * len(self.plan.keys)
        rows = np.zeros((len(self.plan.keys), width))
        parts = np.split(state.moved, np.cumsum([span.shape[1] for span in self._spans])[:-1])
        for place, (part, scale) in enumerate(zip(parts, self._scales, strict=True)):
            weights = self._first[place] + self._spans[place] @ part
            rows[place][self._columns(place)] = weights / scale
        return self.plan.lead_to(rows)

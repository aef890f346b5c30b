"""Choosing what to cut out of a UNet: least error of its output for a budget of its cost.

1. A few full runs are drawn; the UNet's calls at some of their time steps are kept.
2. Everything that can go is taken out alone, by the surgery that would do it, and the error of the
   guided output is measured on those calls.
3. Squared errors of several removals are taken to add up, as in LAPTOP-Diff (arXiv 2404.11098),
   and a knapsack over what each saves, measured here or counted, is solved exactly.
4. Errors do not quite add up, so neighbours of the answer, without one of its removals each, are
   built and measured too, and the best is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from leansd.anatomy.counting import dissect
from leansd.core.devices import make_exact
from leansd.core.outputs import guide
from leansd.errors import LeansdError
from leansd.evaluation.cost import CostModel
from leansd.evaluation.inner_timing import time_units
from leansd.evaluation.runs import CallSet, PipelineCall, expand_calls, run_calls
from leansd.evaluation.timing import check_count
from leansd.plans.anatomy import Anatomy
from leansd.runtime.arguments import map_rows
from leansd.runtime.clock import SchedulerClock
from leansd.runtime.engine import list_followers
from leansd.runtime.guidance import is_guided
from leansd.runtime.hooks import ForwardHooks
from leansd.surgery.apply import BASE, operate
from leansd.surgery.blueprint import Source, lay_out_surgery
from leansd.surgery.edits import Surgery
from leansd.text import Table
from leansd.tuning.removals import (
    Choice,
    ChoiceFront,
    Removal,
    Removals,
    choose_item,
    find_best,
    list_removals,
)

# -- recorded calls --------------------------------------------------------------------------------
# UNet calls of real runs, kept, and how far another UNet's output of the same calls is off.
#
# The error is that of the guided output: it is what the scheduler steps with, and guidance
# multiplies what a cut does to the difference of the two halves. A call's squared error is taken
# over the squared output, so that every time step counts alike, and the calls' mean is the error
# of a cut.


@dataclass(frozen=True)
class KeptCall:
    """One UNet call with what came out."""

    step: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    guidance: float | None
    """The scale, of a batch of unconditional and conditional halves; None of any other."""
    output: Tensor
    """The guided output [B, C, H, W]."""


def keep_calls(
    pipe: Any,
    calls: CallSet,
    steps: int,
    *,
    moments: int = 6,
) -> list[KeptCall]:
    """Run a pipeline in full and keep its UNet calls at `moments` steps, evenly spread.

    Raises:
        LeansdError: the pipeline follows a plan, or gives NaN or Inf.
    """
    if list_followers(pipe.unet):
        raise LeansdError(
            "release the plan that the UNet follows first: a cut is of the whole UNet"
        )
    check_count(moments, "moments")
    clock = SchedulerClock(pipe)
    kept: list[KeptCall] = []
    start = 0

    def around(_: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal start
        tick = clock.locate(args[1] if len(args) > 1 else kwargs["timestep"])
        output = forward(*args, **kwargs)
        if tick is None:
            return output
        if tick.starts:  # image-to-image leaves the first steps out
            start = tick.index
        if tick.index - start in _spread(len(tick.schedule.rows) - start, moments):
            noise = output[0].detach()
            scale = float(pipe.guidance_scale) if is_guided(pipe, len(noise)) else None
            taken, named = map_rows((args, kwargs), len(noise), lambda each: each.detach().clone())
            kept.append(KeptCall(tick.index, taken, named, scale, guide_batch(noise, scale)))
        return output

    with ForwardHooks({"unet": pipe.unet}, around):
        run_calls(pipe, calls, steps).require_finite()
    if not kept:
        raise LeansdError(
            "no UNet call belonged to a step of the scheduler: cuts are measured on pipelines that "
            "call their UNet at every time step"
        )
    return kept


@torch.no_grad()
def measure_error(unet: UNet2DConditionModel, kept: Sequence[KeptCall]) -> float:
    """The mean over calls of the squared error of a UNet's guided output, over the output's own."""
    # Read at once, when all calls are under way.
    errors: list[Tensor] = []
    for call in kept:
        output = make_exact(guide_batch(unet(*call.args, **call.kwargs)[0], call.guidance))
        true = make_exact(call.output)
        errors.append((output - true).square().sum() / true.square().sum())
    return sum(torch.stack(errors).tolist()) / len(kept)


def guide_batch(noise: Tensor, scale: float | None) -> Tensor:
    """The guided output [B/2, C, H, W] of a whole batch [B, C, H, W]; the same without guidance."""
    if scale is None:
        return noise.clone()
    rest, cond = noise.chunk(2)
    return guide(rest, cond, scale).output


def _spread(count: int, moments: int) -> set[int]:
    """`moments` of `count` steps, each in the middle of its segment."""
    return {int((place + 0.5) * count / moments) for place in range(moments)}


# -- the cut ---------------------------------------------------------------------------------------

Of: TypeAlias = Literal["ms", "macs", "params"]
"""What a budget is of: milliseconds of a call, multiply-accumulates, parameters."""
MEASURES: tuple[Of, ...] = get_args(Of)

TICKS = 10_000
"""Ticks of the whole UNet's cost; what a removal saves is rounded down to them."""

CALLS = (
    *("a red apple", "a cat", "a smiling face", "a sunflower"),
    *("a guitar", "a police car", "a slice of pizza", "a house with a garden"),
)
"""What is drawn where nothing else is asked for."""

OnCutProgress: TypeAlias = Callable[[str, float], None]
"""Told in a few words what goes on, and the share of the work that is done."""


@dataclass(frozen=True)
class Prices:
    """What units and parts of a UNet cost, by one measure."""

    of: Of
    whole: float
    """The UNet, what lies outside its units included."""
    by_address: Mapping[str, float]

    def price(self, removal: Removal, anatomy: Anatomy) -> float:
        """What goes with a removal."""
        gone = [unit.at for unit in anatomy if removal.takes(unit.at)]
        inside = [part for part in anatomy.parts if part.reads[0] not in gone]
        gone += [part.at for part in inside if removal.takes(part.at)]
        return sum(self.by_address[at] for at in gone)


@dataclass(frozen=True)
class CutCandidate:
    """Something that can go, on its own."""

    removal: Removal
    error: float
    """Squared error of the guided output over the output, without it."""
    saves: float
    """Share of the whole cost."""


@dataclass(frozen=True)
class Cut:
    """What to take out of a UNet, and what is known of what that does."""

    surgery: Surgery
    of: Of
    budget: float
    """Share of the cost that may be left."""
    cost: float
    """Share that is left."""
    predicted_error: float
    """Sum of the errors of what goes."""
    measured_error: float
    """Error of the UNet without all of it: squared error of the guided output over the output."""
    removals: tuple[Removal, ...]
    candidates: tuple[CutCandidate, ...]
    front: tuple[tuple[float, float], ...] = field(repr=False)
    """Predicted least error at every cost that can be reached: (share left, error), falling."""

    @property
    def least_cost(self) -> float:
        """The smallest share of the cost that any cut leaves."""
        return min(cost for cost, _ in self.front)

    def tabulate(self) -> Table:
        """Every candidate, what costs least error for what it saves first."""
        rows = sorted(self.candidates, key=lambda each: each.error / max(each.saves, 1e-12))
        return Table(
            ("removed", "error", f"saves {self.of}", "error per %", "in the cut"),
            tuple(
                (
                    each.removal.name,
                    f"{each.error:.4f}",
                    f"{each.saves:.1%}",
                    f"{each.error / max(100 * each.saves, 1e-12):.4f}",
                    "yes" if each.removal in self.removals else "",
                )
                for each in rows
            ),
        )

    def __str__(self) -> str:
        return (
            f"{self.cost:.1%} of the {NAMES[self.of]} are left for a budget of {self.budget:.1%}; "
            f"the output's squared error is {self.measured_error:.2%} of the output, where the sum "
            f"of what goes is {self.predicted_error:.2%}."
        )


NAMES: Mapping[Of, str] = {"ms": "milliseconds", "macs": "MACs", "params": "parameters"}


def cut(
    pipe: Any,
    calls: Sequence[PipelineCall] = CALLS,
    *,
    budget: float = 0.8,
    of: Of = "ms",
    cost: CostModel | None = None,
    steps: int = 30,
    moments: int = 6,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch: int = 8,
    tries: int = 24,
    name: str = "cut",
    tell: OnCutProgress = lambda text, share: None,
) -> Cut:
    """Choose what to cut out of a pipeline's UNet, before any training.

    Removals are measured one by one and chosen by a knapsack, as in LAPTOP-Diff (arXiv 2404.11098);
    errors are those of the guided output.

    Args:
        calls: prompts, or dicts of pipeline arguments, that errors are measured on.
        budget: share of the UNet's cost that may be left.
        of: `ms` of a UNet call on this machine, `macs` or `params`.
        cost: of `leansd.profile`, for `ms`; by default some UNet calls are timed here.
        steps: of the runs that errors are measured on.
        moments: how many of their steps, evenly spread.
        settings: arguments that all calls share, such as `guidance_scale`.
        seed: of the first picture.
        batch: pictures drawn at once.
        tries: cuts near the knapsack's answer that are built and measured.
        name: of the surgery.
        tell: told in a few words what goes on, and the share of the work that is done.

    Raises:
        LeansdError: the budget is out of reach; the message says what can be reached.
    """
    check_budget(budget, of)
    drawn = CallSet(calls, seed, batch, settings or {})
    expand_calls(calls, drawn.settings)
    tell("drawing", 0.0)
    kept = keep_calls(pipe, drawn, steps, moments=moments)
    study = study_removals(
        pipe.unet, kept, of, cost, tell=lambda text, share: tell(text, 0.1 + 0.7 * share)
    )
    return study.choose(
        budget, tries=tries, name=name, tell=lambda text, share: tell(text, 0.8 + 0.2 * share)
    )


def check_budget(budget: float, of: str) -> None:
    """Refuse what is no share, and measures that there are not."""
    if of not in MEASURES:
        raise LeansdError(f"no budget of {of!r}: there are {', '.join(MEASURES)}")
    if not 0 < budget < 1:
        raise LeansdError(
            f"a budget of {budget:g} cuts nothing: give the share of the UNet's {NAMES[of]} "  # type: ignore[index]
            "that may be left, between 0 and 1"
        )


@dataclass(frozen=True)
class Study:
    """All that is measured of a UNet; cuts for any budget follow from it."""

    unet: UNet2DConditionModel
    anatomy: Anatomy
    removals: Removals
    errors: Mapping[Removal, float]
    prices: Prices
    kept: Sequence[KeptCall]

    @cached_property
    def candidates(self) -> tuple[CutCandidate, ...]:
        return tuple(
            CutCandidate(each, error, self.prices.price(each, self.anatomy) / self.prices.whole)
            for each, error in self.errors.items()
        )

    def choose(
        self,
        budget: float,
        *,
        tries: int = 24,
        name: str = "cut",
        tell: OnCutProgress = lambda text, share: None,
    ) -> Cut:
        """The best cut that is known for a budget."""
        need = math.ceil((1 - budget) * TICKS - 1e-6)
        front = self._solve()
        best = find_best(front, need)
        if best is None:
            least = 1 - front[-1].ticks / TICKS
            raise LeansdError(
                f"a budget of {budget:g} is out of reach: the least that cuts leave of this UNet's "
                f"{NAMES[self.prices.of]} is {least:.3f}; give that or more"
            )
        best, error = self._descend(best, need, tries, tell)
        taken = tuple(each for each in self.removals if each.name in best.names)
        saved = sum(each.saves for each in self.candidates if each.removal in taken)
        return Cut(
            make_surgery(taken, name),
            self.prices.of,
            budget,
            1 - saved,
            best.error,
            error,
            taken,
            self.candidates,
            tuple((1 - each.ticks / TICKS, each.error) for each in front),
        )

    def measure(self, removals: Sequence[Removal]) -> float:
        """The error of the UNet without some of it."""
        student, _ = operate(self.unet, make_surgery(removals))
        return measure_error(student, self.kept)

    def _solve(self, barred: frozenset[str] = frozenset()) -> ChoiceFront:
        """The knapsack's front, without the removals that are barred."""
        saves = {each.removal: each.saves for each in self.candidates}

        def solve(removal: Removal) -> ChoiceFront:
            ticks = 0 if removal.name in barred else math.floor(saves[removal] * TICKS)
            return choose_item(removal.name, self.errors[removal], ticks)

        return self.removals.solve(solve)

    def _descend(
        self, first: Choice, need: int, tries: int, tell: OnCutProgress
    ) -> tuple[Choice, float]:
        """From the knapsack's answer to the best neighbour, while that helps.

        A neighbour is the answer where one of the removals of the present one is barred, beside
        those that were barred on the way here.
        """
        by_name = {each.name: each for each in self.removals}
        errors: dict[frozenset[str], float] = {}

        def measure(choice: Choice) -> float:
            names = frozenset(choice.names)
            if names not in errors:
                tell("measuring cuts", min(1.0, len(errors) / (tries + 1)))
                errors[names] = self.measure([by_name[each] for each in choice.names])
            return errors[names]

        best, barred = first, frozenset[str]()
        least = measure(first)
        while True:
            found = None
            for gone in best.names:
                other = find_best(self._solve(barred | {gone}), need)
                if other is None or len(errors) > tries:
                    continue
                if measure(other) < least:
                    found, least = (other, barred | {gone}), measure(other)
            if found is None:
                return best, least
            best, barred = found


def study_removals(
    unet: UNet2DConditionModel,
    kept: Sequence[KeptCall],
    of: Of = "ms",
    cost: CostModel | None = None,
    *,
    tell: OnCutProgress = lambda text, share: None,
) -> Study:
    """Measure what every removal costs a UNet's output of kept calls, and what it saves."""
    sample = kept[0].args[0] if kept[0].args else kept[0].kwargs["sample"]
    anatomy = dissect(unet, latent=tuple(sample.shape[-2:]))
    tell("timing", 0.0)
    prices = list_prices(unet, anatomy, of, cost, guided=kept[0].guidance is not None)
    sources = {BASE: Source.read(BASE, unet)}
    removals = list_removals(
        anatomy, lambda addresses: lay_out_surgery(sources, Surgery("cut").drop(*addresses))
    )
    every = list(removals)
    study = Study(unet, anatomy, removals, {}, prices, kept)
    errors: dict[Removal, float] = {}
    for place, removal in enumerate(every):
        tell(f"without {removal.name}", 0.05 + 0.95 * place / len(every))
        errors[removal] = study.measure([removal])
    return replace(study, errors=errors)


def list_prices(
    unet: UNet2DConditionModel,
    anatomy: Anatomy,
    of: Of,
    cost: CostModel | None = None,
    *,
    guided: bool = True,
) -> Prices:
    """What a UNet's units cost by a measure; times are taken here where no profile is given."""
    rows = (*anatomy.units, *anatomy.parts)
    if of == "macs":
        return Prices(of, anatomy.macs, {row.at: row.macs for row in rows})
    if of == "params":
        return Prices(of, anatomy.params, {row.at: row.params for row in rows})
    if cost is None:
        times = time_units(unet, batch=2 if guided else 1, latent=anatomy.size, repeats=5)
        return Prices(of, times.call.median, times.medians)
    missing = [row.at for row in rows if row.at not in cost.units]
    if missing:
        raise LeansdError(
            f"the profile of {cost.subject} has no time of {missing[0]}: profile this UNet"
        )
    return Prices(of, cost.full_call, {at: times["whole"] for at, times in cost.units.items()})


def make_surgery(removals: Sequence[Removal], name: str = "cut") -> Surgery:
    """The surgery that takes all of them out."""
    dropped = [at for each in removals if not each.inside for at in each.addresses]
    parts = [at for each in removals if each.inside for at in each.addresses]
    surgery = Surgery(name).drop(*dropped) if dropped else Surgery(name)
    return surgery.replace(*parts, by="skip") if parts else surgery

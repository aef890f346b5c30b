"""What the search chooses among: what key steps may run, kinds of plans, and the best of each kind.

1. Variants: what a key step may run in the place of the whole UNet, and how wrong that is.
2. Regimes: what all plans of one search share besides their key steps.
3. Candidates: plans that the search proposes, and what lies beside them.
4. Proposals: what the error model holds to be the best plans, for every speed at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch

from leansd.evaluation.cost import CostModel
from leansd.plans import address, keysteps
from leansd.plans.anatomy import Anatomy
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import Call, Net
from leansd.plans.methods import METHODS
from leansd.plans.plan import Plan
from leansd.plans.row import OWN, Attend, Gates, Guidance
from leansd.tuning.error_model import (
    DENOISED,
    HEAD_ACTIONS,
    LINE,
    MEMORY,
    REUSE,
    Action,
    Calibration,
    ErrorModel,
    Key,
    Keys,
    Proposal,
    Segment,
    find_best,
)
from leansd.tuning.host import Seen, Step
from leansd.tuning.sampler_map import count_weighed
from leansd.tuning.trials import TrialRunner

TICKS = 16
"""Ticks of a key step that runs the whole UNet, in the dynamic programme's budgets."""
WORTH = 0.9
"""A step that costs more than this share of a full one is not worth being wrong for."""
DEEPEST = 0.6
"""A cut that costs more than this share of a step leaves no speed worth having."""
HISTORY = 2
"""Key steps that compute guidance before one that forecasts it: a line needs two."""


@dataclass(frozen=True)
class Variant:
    """What a key step runs."""

    name: str = "full"
    ticks: int = TICKS
    net: str = OWN
    guidance: Guidance = "compute"
    attend: Gates = field(default_factory=dict[str, Attend])

    def dress(self, plan: Plan, step: int) -> Plan:
        """The plan with this at one of its steps."""
        if self.net != OWN:
            plan = plan.switch(self.net, at=step)
        if self.guidance != "compute":
            plan = plan.guide(self.guidance, at=step)
        for at, by in self.attend.items():
            plan = plan.attend(at, by=by, at=step)
        return plan

    @property
    def forecasts(self) -> bool:
        """Whether it forecasts something by its last two values."""
        return self.guidance == "forecast"

    def leave_out(self) -> Variant:
        """The variant without what it forecasts: how wrong that is depends on no other key step."""
        return replace(self, guidance="drop") if self.forecasts else self


FULL = Variant()


def allows(variants: Sequence[Variant], keys: Sequence[Key]) -> bool:
    """Whether the last of some key steps may run what it runs, after those before."""
    last = variants[keys[-1].variant]
    if last.guidance == "compute":
        return True
    before = [variants[key.variant] for key in keys[:-1]][-HISTORY:]
    return len(before) == HISTORY and all(each.guidance == "compute" for each in before)


def list_variants(
    cost: CostModel, anatomy: Anatomy, nets: Mapping[str, Net], attend: Sequence[str] = ()
) -> tuple[Variant, ...]:
    """The whole UNet first; then what costs noticeably less, where its cost is known.

    Args:
        cost: which knows the nets' own costs.
        nets: those that a plan may switch to.
        attend: self-attentions that may go by GRI; their cost must have been measured so.
    """

    def price(variant: Variant) -> Variant:
        plan = variant.dress(Plan.full(HISTORY + 2), HISTORY + 1)
        call = compile_plan(plan, anatomy, nets=nets).calls[HISTORY + 1]
        return replace(variant, ticks=max(1, round(TICKS * _share(cost, replace(call, keeps={})))))

    found = [Variant(f"net {name}", net=name) for name in nets]
    if attend:
        gates: dict[str, Attend] = dict.fromkeys(attend, "gri")
        found.append(Variant("GRI", attend=gates))
    if cost.is_guided:
        found.append(Variant("guidance forecast", guidance="forecast"))
    return (FULL, *(each for each in map(price, found) if each.ticks < WORTH * TICKS))


def _share(cost: CostModel, call: Call) -> float:
    """A call's share of a full one, both without what a call takes that computes nothing."""
    nothing = cost.fixed.get("none", 0.0)
    return (cost.predict_call(call) - nothing) / (cost.full_call - nothing)


def measure_deviation(variant: Variant, bench: TrialRunner, calibration: Calibration) -> np.ndarray:
    """What a variant gives at every call of the full run minus what that gives, [n, numbers].

    The run goes on with the full run's outputs, so all calls are on its latents. What the variant
    forecasts is left out; the first call of a run cannot do without it, and is taken to be as
    wrong as the second.
    """
    plan, start = Plan.full(calibration.steps), calibration.start
    for step in range(start + variant.forecasts, calibration.steps):
        plan = variant.leave_out().dress(plan, step)
    wrong = [[torch.zeros_like(seen.output) for seen in run] for run in calibration.runs]

    def steer(run: int, index: int, seen: Seen, step: Step) -> torch.Tensor:
        full = calibration.runs[run][index].output
        wrong[run][index] = seen.output - full
        return full

    bench.run(calibration.steps, plan, steer)
    for run in wrong if variant.forecasts else ():
        run[0] = run[min(1, len(run) - 1)]
    joined = torch.cat([torch.stack(each).flatten(1) for each in wrong], dim=1)
    return joined.cpu().double().numpy()


@dataclass(frozen=True)
class Regime:
    """One kind of plan.

    Attributes:
        actions: what steps between key steps may do, and their cost in ticks.
        variants: what key steps may run, the whole UNet first.
        coherent: whether errors of segments are added with their signs, for they may cancel, and no
            corrections are counted on; else their squares are, as dynamic programming can.
    """

    actions: Mapping[Action, int]
    variants: tuple[Variant, ...] = (FULL,)
    coherent: bool = False

    @property
    def key_costs(self) -> tuple[int, ...]:
        """Ticks of a key step, by what it runs."""
        return tuple(variant.ticks for variant in self.variants)


LINES = Regime({LINE: 0}, coherent=True)
"""Errors of lines change their signs from one to the next where key steps lie evenly."""
KEPT = Regime({DENOISED: 0})
"""With samplers that add noise the picture that the last output shows is kept, not the output."""


def list_noisy_regimes(cost: CostModel, anatomy: Anatomy) -> list[Regime]:
    """With samplers that add noise: pictures kept; outputs kept as they were; cuts.

    Whatever lies below a cut sees every noise that is drawn. What the layers above it made changes
    with the picture, and slowly, so even a deep cut, which costs nearly half of a step, is worth it
    where little time is to be saved.
    """
    found = [KEPT, Regime({REUSE: 0})]
    for block in reversed(range(anatomy.up_blocks)):
        layers = {address.get_layer(unit.at) for unit in anatomy.select(f"up{block}.l*")}
        for layer in sorted(layers, reverse=True):
            cut = Action(layer, "reuse")
            ticks = math.ceil(TICKS * _share_cut(cost, anatomy, cut))
            if 0 < ticks <= DEEPEST * TICKS:
                found.append(Regime({cut: ticks}))
    return found


def _share_cut(cost: CostModel, anatomy: Anatomy, cut: Action) -> float:
    """The share of a full call that a call with this cut takes."""
    plan = Plan.full(4).inherit(cut.cut, at=3, how=cut.how)
    return _share(cost, compile_plan(plan, anatomy).calls[3])


def list_regimes(
    cost: CostModel, anatomy: Anatomy, variants: Sequence[Variant] = (FULL,)
) -> list[Regime]:
    """Forecasts of the whole output first; then the last output as it is; then lines whose errors
    cancel; then forecasts with cheaper key steps, where there are any; then a cut, where it costs
    noticeably less than a step.

    Where guidance makes outputs turn fast, a line leads away faster than the corrections at key
    steps lead back, and the last output does better by far; the model does not see it.

    Args:
        variants: what key steps may run where the whole output is forecast between them.
    """
    heads = dict.fromkeys(HEAD_ACTIONS, 0)
    regimes = [Regime(heads), Regime({REUSE: 0}), LINES]
    if len(variants) > 1:
        regimes.append(Regime(heads, tuple(variants)))
    if not anatomy.up_blocks:
        return regimes
    cut = Action(f"up{anatomy.up_blocks - 1}.l1", "forecast")
    above = _share_cut(cost, anatomy, cut)
    if above < WORTH:
        regimes.append(Regime({cut: max(1, round(TICKS * above))}))
    return regimes


@dataclass(frozen=True)
class Candidate:
    """A plan to try, as the search found it."""

    proposal: Proposal
    model: ErrorModel
    regime: Regime

    @property
    def error(self) -> float:
        """What the model expects of it."""
        return self.proposal.error + self.model.step_count_error

    def build(self) -> Plan:
        """The plan for the sampler's whole step count, without corrections."""
        calibration = self.model.calibration
        start, plan = calibration.start, Plan.full(calibration.steps, name="tuned")
        for segment in self.proposal.segments:
            between = [start + step for step in range(segment.key.step + 1, segment.end)]
            if between:
                plan = plan.inherit(segment.action.cut, at=between, how=segment.action.how)
        for key in self.proposal.keys:
            plan = self.regime.variants[key.variant].dress(plan, start + key.step)
        return plan

    def list_neighbours(self) -> list[Candidate]:
        """Every plan of the kind with one small change that costs nothing.

        One key step moved by one place, two neighbours that change what they run, or one segment
        forecast otherwise.
        """
        keys, count = self.proposal.keys, self.model.calibration.count
        actions = [segment.action for segment in self.proposal.segments]
        taken = {key.step for key in keys}
        changed: list[tuple[Sequence[Key], Sequence[Action]]] = []
        for place in range(1, len(keys)):
            for step in (keys[place].step - 1, keys[place].step + 1):
                if step < count and step not in taken:
                    moved = keys[place]._replace(step=step)
                    changed.append(([*keys[:place], moved, *keys[place + 1 :]], actions))
        for place, (one, other) in enumerate(pairwise(keys)):
            if one.variant != other.variant:
                swapped = one._replace(variant=other.variant), other._replace(variant=one.variant)
                changed.append(([*keys[:place], *swapped, *keys[place + 2 :]], actions))
        for place, segment in enumerate(self.proposal.segments):
            others = self.regime.actions if segment.end - segment.key.step > 1 else ()
            changed += [
                (keys, [*actions[:place], action, *actions[place + 1 :]])
                for action in others
                # With fewer key steps behind it, a parabola is a line.
                if action != segment.action and place + 1 >= METHODS[action.how].depth
            ]
        found = (self.move(_join(*each, count)) for each in changed)
        return [each for each in found if np.isfinite(each.error)]

    def move(self, segments: tuple[Segment, ...]) -> Candidate:
        """A plan of the same kind with other segments."""
        error, change, keys = 0.0, np.zeros(len(self.model.products)), ()
        coherent = self.regime.coherent
        for segment in segments:
            keys = (*keys, segment.key)[-MEMORY:]
            if not allows(self.regime.variants, keys):
                error = float("inf")
                break
            found = self.model.judge(keys, segment.end, segment.action, corrects=not coherent)
            error, change = error + found.error, change + found.change
        else:
            error = self.model.square(change) if coherent else error
        return replace(self, proposal=Proposal(segments, error, self.proposal.ticks))

    def settle(self) -> Candidate:
        """Where the model's error cannot be made less by putting one key step elsewhere."""
        best = self
        while True:
            found = min(best._list_moves(), key=lambda each: each.error, default=best)
            if not found.error < best.error:
                return best
            best = found

    def _list_moves(self) -> list[Candidate]:
        """Every plan of the kind with one key step put to another place."""
        keys, count = self.proposal.keys, self.model.calibration.count
        actions = [segment.action for segment in self.proposal.segments]
        free = sorted(set(range(1, count)) - {key.step for key in keys})
        moved = (
            sorted([*keys[:place], keys[place]._replace(step=step), *keys[place + 1 :]])
            for place in range(1, len(keys))
            for step in free
        )
        return [self.move(_join(each, actions, count)) for each in moved]


def _join(keys: Sequence[Key], actions: Sequence[Action], count: int) -> tuple[Segment, ...]:
    ends = [*(key.step for key in keys[1:]), count]
    return tuple(
        Segment(key, end, action) for key, end, action in zip(keys, ends, actions, strict=True)
    )


FEWER = 2
"""Proposals of each regime but the first that are tried for each speed."""
FINALISTS = 3
"""Plans of different step counts for each speed; the held-out calls help to decide between them."""
LONGEST = 0.2
"""The most steps between two key steps, as a share of all."""


def space_evenly(model: ErrorModel, calls: int, regime: Regime) -> Candidate:
    """A plan of so many UNet calls at even distances, of a regime with one action."""
    (action,) = regime.actions
    count, weighed = model.calibration.count, count_weighed(model.calibration.response)
    # What is kept as it is serves the last two steps, lines lead astray there.
    if action == LINE and calls <= weighed:
        steps = keysteps.short_first(weighed, calls)
    else:
        steps = keysteps.even(count, calls, max(count - 2, calls - 1))
    keys = [Key(step) for step in steps]
    empty = Candidate(Proposal((), 0.0, calls * TICKS), model, regime)
    return empty.move(_join(keys, [action] * calls, count))


def propose(
    models: Sequence[ErrorModel],
    regimes: Sequence[Regime],
    cost: CostModel,
    whole: float,
    speeds: Sequence[float],
    tell: Callable[[str], None],
) -> list[list[Candidate]]:
    """For each speed the best plan of every step count, a few of each other regime, and even steps.

    Of every one, since where key steps are few the model thinks too well of many steps; and even
    steps, since it thinks too well of uneven ones.

    Errors of different regimes do not compare: of what a cut or an older guidance difference makes
    better or worse the model knows nothing.

    Args:
        regimes: the main one first.
        whole: seconds of the full run that speeds are against.
        tell: told what is being sought.
    """
    found: list[list[Candidate]] = [[] for _ in speeds]
    for place, regime in enumerate(regimes):
        best: list[list[Candidate]] = [[] for _ in speeds]
        for model in models:
            calibration = model.calibration
            tell(f"looking for plans of {calibration.steps} steps")
            budgets = [_count_ticks(whole / speed, calibration.count, cost) for speed in speeds]
            for candidates, candidate in zip(best, search(model, regime, budgets), strict=True):
                candidates += filter(None, [candidate])
        for few, candidates in zip(found, best, strict=True):
            candidates.sort(key=lambda each: each.error)
            few += candidates[:FEWER] if place else candidates
    full = models[0].calibration
    for few, speed in zip(found, speeds, strict=True):
        count = full.count
        calls = min(_count_ticks(whole / speed, count, cost) // TICKS, count)
        ways = (KEPT,) if full.adds_noise else (Regime({REUSE: 0}), LINES)
        few += [space_evenly(models[0], calls, way) for way in ways if calls > 1]
    return found


def search(model: ErrorModel, regime: Regime, budgets: Sequence[int]) -> list[Candidate | None]:
    """The best plan of one step count within each budget, in ticks."""
    calibration = model.calibration

    def judge(keys: Keys, end: int, action: Action) -> float:
        if not allows(regime.variants, keys):
            return float("inf")
        return model.judge(keys, end, action, corrects=not regime.coherent).error

    longest = max(4, round(LONGEST * calibration.steps))
    proposals = find_best(
        calibration.count, judge, regime.actions, regime.key_costs, budgets, longest=longest
    )
    found = [each and Candidate(each, model, regime) for each in proposals]
    return [_settle_best(each) if each and regime.coherent else each for each in found]


def _settle_best(candidate: Candidate) -> Candidate:
    """The better of what the proposal of dynamic programming and even steps lead to."""
    model, calls = candidate.model, len(candidate.proposal.keys)
    even = space_evenly(model, calls, candidate.regime)
    starts = candidate.move(candidate.proposal.segments), even
    return min((each.settle() for each in starts), key=lambda each: each.error)


def _count_ticks(seconds: float, count: int, cost: CostModel) -> int:
    """The ticks that key steps may take for a run to take no longer.

    What a call takes that computes nothing, every step takes; ticks are of the rest.
    """
    nothing = cost.fixed.get("none", 0.0)
    left = seconds - cost.overhead_per_run - count * (cost.per_step + nothing)
    return int(left / (cost.full_call - nothing) * TICKS + 0.5)

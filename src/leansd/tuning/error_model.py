"""The error model: its calibration, errors of segments between key steps, and the best of them.

A *segment* goes from one key step to the next; the steps between do not run the UNet in full. In
the model that is calibrated here the errors of segments add up, so that the best plan can be found
by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from leansd.evaluation.runs import PipelineCall, RunOutputs
from leansd.plans.anatomy import HEAD
from leansd.plans.methods import METHODS, weigh
from leansd.plans.row import NO_CORRECTION, Correction, How
from leansd.tuning.host import Course, Host, SchedulerRun, Seen, Steer, Step

# -- calibration -----------------------------------------------------------------------------------
# What a sampler's full run says about every plan of the same run.
#
# A scheduler is linear in the UNet's outputs, with the same few numbers for every pixel. So where a
# plan replaces outputs by combinations of earlier ones, what that does to the latents is a linear
# combination of the full run's outputs, and its size follows from their inner products: an n by n
# matrix for n steps, whatever the pictures' size. No plan has to be run to be judged in this model.
#
# What the model leaves out is that the UNet answers to the changed latents; how much a disturbance
# at some step still matters at the end is therefore measured (`error_gain`).

Draw: TypeAlias = Callable[[Steer | None], tuple[RunOutputs, list[SchedulerRun]]]
"""Draws the calls, steered or not."""

PROBES = (0.1, 0.35, 0.6, 0.85)
"""Where in a run disturbances are tried, as shares of its steps."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Calibration(Course):
    """The full run of some calls, seen from the scheduler's side."""

    error_gain: np.ndarray
    """[n + 1]: squared error in the final latents for each squared error before call k."""
    runs: tuple[SchedulerRun, ...]
    finals: RunOutputs

    @property
    def adds_noise(self) -> bool:
        return self.denoising is not None

    def show_pictures(self, weights: np.ndarray) -> np.ndarray:
        """The denoised pictures that the calls of all runs see, [n, numbers].

        Args:
            weights: of sample and output in them, [n, 2].
        """
        samples = stack_outputs(self.runs, lambda seen: seen.sample)
        own, lead = weights.T[:, :, None]
        return own * samples + lead * self.outputs

    @property
    def outputs(self) -> np.ndarray:
        """The guided outputs of every call, of all runs together, [n, numbers]."""
        return stack_outputs(self.runs)

    @property
    def count(self) -> int:
        """UNet calls of a run."""
        return len(self.log_snr)

    @property
    def start(self) -> int:
        """The step of the first call."""
        return self.steps - self.count


def calibrate(
    host: Host,
    calls: Sequence[PipelineCall],
    steps: int,
    *,
    seed: int,
    like: Calibration | None = None,
) -> Calibration:
    """Run the calls in full, and see.

    Args:
        like: a calibration at another step count whose `error_gain` serves here, too.

    Raises:
        LeansdError: the sampler calls the UNet more than once a step, or is not linear.
    """
    host.respond(steps)

    def draw(steer: Steer | None = None) -> tuple[RunOutputs, list[SchedulerRun]]:
        return host.draw(calls, steps, seed=seed, steer=steer)

    finals, runs = draw()
    finals.require_finite()
    course = host.respond(steps, len(runs[0]))
    if like is None:
        error_gain = _measure_error_gain(runs, draw, course)
    else:
        inside = np.interp(course.log_snr, like.log_snr, like.error_gain[:-1])
        error_gain = np.append(inside, 1.0)
    return Calibration(**vars(course), error_gain=error_gain, runs=tuple(runs), finals=finals)


def stack_outputs(
    runs: Sequence[SchedulerRun], read: Callable[[Seen], torch.Tensor] = lambda seen: seen.output
) -> np.ndarray:
    """The guided outputs of every call, of all runs together, [n, numbers], double precision.

    Args:
        read: gives what is wanted in their place.
    """
    rows = [torch.cat([read(each).flatten() for each in call]) for call in zip(*runs, strict=True)]
    return torch.stack(rows).cpu().double().numpy()


def _measure_error_gain(runs: Sequence[SchedulerRun], draw: Draw, course: Course) -> np.ndarray:
    """How squared errors in the sample before each call grow or shrink till the end, [n + 1].

    At a few steps the run's output is replaced by one made of that before, which is the kind of
    error that plans make; between them the logarithm is interpolated.
    """
    count = len(runs[0])
    places = sorted({max(1, round(share * (count - 1))) for share in PROBES})
    known: dict[int, float] = {}
    for place in places:
        disturbed: list[float] = []
        arrived: list[float] = []
        for mine, reference in zip(_disturb(place, draw, course), runs, strict=True):
            at = min(place + 1, count - 1)
            disturbed.append(_square(mine[at].sample - reference[at].sample))
            arrived.append(_square(mine[-1].previous - reference[-1].previous))
        known[place + 1] = sum(arrived) / max(sum(disturbed), 1e-30)
    logs = np.interp(np.arange(count + 1), [*known, count], [*np.log(list(known.values())), 0.0])
    return np.exp(logs)


def _disturb(place: int, draw: Draw, course: Course) -> list[SchedulerRun]:
    """Runs whose output at one step is that of the step before, or shows the picture of that."""
    before: list[torch.Tensor] = []

    def steer(run: int, index: int, seen: Seen, step: Step) -> torch.Tensor:
        own, lead = (0.0, 1.0) if course.denoising is None else course.denoising[index].tolist()
        if index == place:
            return (before[-1] - own * seen.sample) / lead
        before[:] = [own * seen.sample + lead * seen.output]
        return seen.output

    return draw(steer)[1]


def _square(difference: torch.Tensor) -> float:
    return float(difference.cpu().double().square().sum())


# -- errors of segments ----------------------------------------------------------------------------

CORRECTION_HOWS: tuple[How, ...] = ("forecast", "reuse")
"""The forecasts that `Correction`'s parts are by, in their order."""


class Action(NamedTuple):
    """What the steps of a segment do."""

    cut: str
    """What inherits; `HEAD` for the UNet's whole output."""
    how: How


LINE = Action(HEAD, "forecast")
HEAD_ACTIONS = (LINE, Action(HEAD, "forecast2"))
REUSE = Action(HEAD, "reuse")
DENOISED = Action(HEAD, "denoised")
"""For samplers that add noise: an output goes stale with every noise, the picture does not."""


class Key(NamedTuple):
    """A key step."""

    step: int
    variant: int = 0
    """What it runs, by its place among the variants of the error model; 0 is the UNet in full."""


class SegmentError(NamedTuple):
    """The model's view of one segment."""

    error: float
    """Mean squared error that it adds to the final latents."""
    correct: Correction = NO_CORRECTION
    """The correction at its end that makes the error least."""
    change: Any = 0.0
    """What it adds to the final latents, in the model's basis."""


@dataclass(frozen=True, eq=False)
class ErrorModel:
    """Errors of segments in which the UNet's output is forecast.

    The outputs of all calls are its basis, and behind them, for every variant of a key step, by how
    much that is wrong at all calls: [n (1 + variants)]. Where a variant forecasts something by the
    line through its last two values, that is what leaving it out would be wrong by; the forecast
    makes most of it good, and the less of it the longer ago those two key steps were.

    Where the sampler adds noise, the pictures that the calls see come second instead.
    """

    calibration: Calibration
    products: np.ndarray
    """Mean products of every two of the basis."""
    forecasts: frozenset[int] = frozenset()
    """The variants that forecast something."""
    step_count_error: float = 0.0
    """Squared error of the full run of its step count against that of all steps."""
    _known: dict[Any, SegmentError] = field(default_factory=dict[Any, SegmentError], repr=False)
    _made: dict[Any, np.ndarray] = field(default_factory=dict[Any, np.ndarray], repr=False)

    @classmethod
    def of(
        cls,
        calibration: Calibration,
        deviations: Sequence[np.ndarray] = (),
        forecasts: Iterable[int] = (),
        step_count_error: float = 0.0,
    ) -> ErrorModel:
        """The model of a full run.

        Args:
            deviations: for every variant but the full one, its outputs at all calls minus the full
                ones, [n, numbers], as `calibration.outputs` has those.
            forecasts: the variants, counted from 1, whose deviations are of leaving out what they
                forecast.
        """
        if calibration.denoising is not None:
            assert not deviations
            deviations = [calibration.show_pictures(calibration.denoising)]
        basis = np.concatenate([calibration.outputs, *deviations])
        products = basis @ basis.T / basis.shape[1]
        return cls(calibration, products, frozenset(forecasts), step_count_error)

    def judge(
        self, keys: Sequence[Key], end: int, action: Action, *, corrects: bool = True
    ) -> SegmentError:
        """The segment from the last of `keys` to `end`, the next key step or the end of the run.

        What is wrong with the last key step itself counts with it.

        Remembered: the dynamic programme asks the same of every segment for every speed.

        Args:
            corrects: whether a correction at its end is counted on.
        """
        asked = tuple(keys), end, action, corrects
        if asked not in self._known:
            self._known[asked] = self._judge(keys, end, action, corrects)
        return self._known[asked]

    def square(self, change: np.ndarray) -> float:
        """Mean squared error of a change of the final latents, in the basis."""
        return float(change @ self.products @ change)

    def _judge(self, keys: Sequence[Key], end: int, action: Action, corrects: bool) -> SegmentError:
        calibration, products = self.calibration, self.products
        count = calibration.count
        between = range(keys[-1].step + 1, end)
        after = min(end + 1, count)
        change = np.zeros(len(products))
        if keys[-1].variant:
            change += calibration.response[after, keys[-1].step] * self._deviate(keys)
        if not between and not keys[-1].variant:
            return SegmentError(0.0)
        misses: dict[int, np.ndarray] = {}
        for step in between:
            misses[step] = self._miss(keys, step, action, misses)
            change += calibration.response[after, step] * misses[step]
        correct = NO_CORRECTION
        # Of pictures the model would promise too much: the next one answers to what went before.
        corrects = corrects and not self._keeps_picture(action)
        if corrects and between and end < count:
            remedies = np.stack([self._combine(keys, end, how) for how in CORRECTION_HOWS], axis=1)
            remedies = -remedies
            remedies[end] += 1
            remedies *= calibration.response[after, end]
            # Where one output is known the two are the same; least squares shares between them.
            solution = np.linalg.lstsq(
                remedies.T @ products @ remedies, -remedies.T @ products @ change, rcond=1e-9
            )[0]
            correct = Correction(*solution.tolist())
            change = change + remedies @ solution
        change = change * np.sqrt(calibration.error_gain[after])
        return SegmentError(self.square(change), correct, change)

    def _keeps_picture(self, action: Action) -> bool:
        """Whether an action is held to be wrong by what the picture changes.

        Below a cut every noise is seen, so with a sampler that adds some that is what a cut misses.
        """
        is_cut = action.cut != HEAD and self.calibration.adds_noise
        return is_cut or METHODS[action.how].of == "denoised"

    def _miss(
        self, keys: Sequence[Key], step: int, action: Action, misses: Mapping[int, np.ndarray]
    ) -> np.ndarray:
        """By how much what is made at `step` is wrong, in the basis.

        Args:
            misses: of the steps before it in the segment, which have moved the sample.
        """
        if not self._keeps_picture(action):
            made = self._combine(keys, step, action.how).copy()
            made[step] -= 1
            return made
        calibration = self.calibration
        assert calibration.denoising is not None
        own, lead = calibration.denoising[step]
        wrong = np.zeros(len(self.products))
        wrong[calibration.count + keys[-1].step] += 1
        wrong[calibration.count + step] -= 1
        for before, miss in misses.items():
            wrong -= own * calibration.response[step, before] * miss
        return wrong / lead

    def _place(self, key: Key) -> int:
        """Where in the basis lies what is wrong with a key step that is not full."""
        return self.calibration.count * key.variant + key.step

    def _combine(self, keys: Sequence[Key], step: int, how: How) -> np.ndarray:
        """What a forecast at `step` is made of, in the basis; not to be written to."""
        asked = tuple(keys), step, how
        if asked not in self._made:
            self._made[asked] = self._make_forecast(asked[0], step, METHODS[how].depth)
        return self._made[asked]

    def _make_forecast(self, keys: Sequence[Key], step: int, depth: int) -> np.ndarray:
        weights = np.zeros(len(self.products))
        begin = max(0, len(keys) - depth)
        shares = self._weigh(step, [key.step for key in keys[begin:]])
        for place, weight in enumerate(shares, start=begin):
            weights[keys[place].step] += weight
            if keys[place].variant:
                weights += weight * self._deviate(keys[: place + 1])
        return weights

    def _deviate(self, keys: Sequence[Key]) -> np.ndarray:
        """What is wrong with the last of some key steps, in the basis."""
        last = keys[-1]
        weights = np.zeros(len(self.products))
        weights[self._place(last)] = 1.0
        if last.variant in self.forecasts:
            known = _list_two([key.step for key in keys])
            for step, weight in zip(known, self._weigh(last.step, known), strict=True):
                weights[self._place(Key(step, last.variant))] -= weight
        return weights

    def _weigh(self, step: int, known: Sequence[int]) -> list[float]:
        """The shares that outputs at known steps have in the forecast at a step."""
        points = [float(self.calibration.log_snr[each]) for each in known]
        at = float(self.calibration.log_snr[step])
        return [weigh(at, here, points) for here in points]


def _list_two(steps: Sequence[int]) -> list[int]:
    """The two steps before the last; where one is out of sight, as far off as the next is."""
    seen = list(steps)
    while len(seen) < 3:
        gap = seen[1] - seen[0] if len(seen) > 1 else 1
        seen.insert(0, seen[0] - gap)
    first, second = (max(0, step) for step in seen[-3:-1])
    return [first, second] if first < second else [second]


# -- dynamic programming over key steps ------------------------------------------------------------
# The errors of segments add up and each depends on the last three key steps before it, and on what
# those run, so a state is those three. Costs are counted in whole ticks, and for every state and
# number of ticks the least error is kept.

Keys: TypeAlias = tuple[Key, ...]
Judge: TypeAlias = Callable[[Keys, int, Action], float]
"""`(last key steps, end of the segment, action) -> error`."""

MEMORY = 3
"""How many key steps the error of a segment can depend on."""


@dataclass(frozen=True)
class Segment:
    """From a key step up to the next one, or to the end of the run."""

    key: Key
    end: int
    action: Action


@dataclass(frozen=True)
class Proposal:
    """The best sequence of segments within some budget."""

    segments: tuple[Segment, ...]
    error: float
    ticks: int

    @property
    def keys(self) -> Keys:
        return tuple(segment.key for segment in self.segments)


def find_best(
    count: int,
    judge: Judge,
    costs: Mapping[Action, int],
    key_costs: Sequence[int],
    budgets: Sequence[int],
    *,
    longest: int,
) -> list[Proposal | None]:
    """The proposal of least error within each budget, in ticks; None where it is too small.

    Args:
        count: UNet calls of a run, the first of which is a key step.
        costs: ticks of a step between key steps, by what it does.
        key_costs: ticks of a key step, by what it runs.
        longest: the most steps between two key steps.
    """
    table = _Table(count, costs, key_costs, most=max(0, *budgets))
    table.fill(judge, longest)
    return [table.trace_back(budget) for budget in budgets]


class _Table:
    """The least errors of every state, and how each was come by."""

    def __init__(
        self, count: int, costs: Mapping[Action, int], key_costs: Sequence[int], *, most: int
    ) -> None:
        self._count, self._costs, self._key_costs, self._most = count, costs, key_costs, most
        self._actions = list(costs)
        self._reached: dict[Keys, _Reached] = {}
        self._done = _Reached(most)

    def _find(self, state: Keys) -> _Reached:
        if state not in self._reached:
            self._reached[state] = _Reached(self._most, len(self._reached))
        return self._reached[state]

    def fill(self, judge: Judge, longest: int) -> None:
        """Go from every state to all that can follow it, from the first call to the last."""
        for variant, cost in enumerate(self._key_costs):
            if cost <= self._most:
                self._find((Key(0, variant),)).errors[cost] = 0.0
        for step in range(self._count):
            for state in [state for state in self._reached if state[-1].step == step]:
                for end in range(step + 1, min(step + longest + 1, self._count) + 1):
                    # Between neighbours nothing lies, so one action stands for all.
                    actions = self._actions if end > step + 1 else self._actions[:1]
                    for place, action in enumerate(actions):
                        error = judge(state, end, action)
                        if np.isfinite(error):
                            self._extend(state, end, place, error)

    def _extend(self, state: Keys, end: int, place: int, error: float) -> None:
        """Add a segment with one of the actions, by its place, to a state."""
        between = (end - state[-1].step - 1) * self._costs[self._actions[place]]
        reached = self._reached[state]
        for variant, cost in enumerate(self._key_costs if end < self._count else (0,)):
            spent = between + cost
            if spent > self._most:
                continue
            after = (*state, Key(end, variant))[-MEMORY:]
            target = self._done if end == self._count else self._find(after)
            total = reached.errors[: self._most + 1 - spent] + error
            target.improve(total, spent, reached.number, place)

    def trace_back(self, budget: int) -> Proposal | None:
        """The best within a budget, from its end to its beginning; None where there is none."""
        ticks = int(self._done.errors[: max(budget, 0) + 1].argmin())
        if budget < 0 or not np.isfinite(self._done.errors[ticks]):
            return None
        error, spent = float(self._done.errors[ticks]), ticks
        states = list(self._reached)
        segments: list[Segment] = []
        at, end, after = self._done, self._count, None
        while at.states[ticks] >= 0:
            state = states[at.states[ticks]]
            action = self._actions[at.actions[ticks]]
            segments.append(Segment(state[-1], end, action))
            step, cost = state[-1].step, 0 if after is None else self._key_costs[after.variant]
            ticks -= (end - step - 1) * self._costs[action] + cost
            at, end, after = self._reached[state], step, state[-1]
        return Proposal(tuple(reversed(segments)), error, spent)


class _Reached:
    """For every number of ticks: the least error of getting somewhere, and where from and how."""

    def __init__(self, most: int, number: int = -1) -> None:
        self.number = number
        self.errors = np.full(most + 1, np.inf)
        self.states = np.full(most + 1, -1)
        self.actions = np.zeros(most + 1, dtype=int)

    def improve(self, total: np.ndarray, spent: int, state: int, action: int) -> None:
        """Take what is better of `total`, the errors at `spent` ticks and on."""
        places = np.flatnonzero(total < self.errors[spent:])
        self.errors[places + spent] = total[places]
        self.states[places + spent] = state
        self.actions[places + spent] = action

"""Rivals: what a user would take instead of a plan of this package.

Each gives cases to a contest of the benchmark. A rival whose package or preset is not there gives
none and says why; nothing is ever installed. A new one is a function and an entry in `RIVALS`.
Whatever a case does to the pipeline it undoes, so that all of them can take turns in one process.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

from leansd.errors import LeansdError
from leansd.evaluation.compare import Case, Enter
from leansd.plans.anatomy import HEAD, WHOLE, Anatomy
from leansd.plans.compile import compile_plan, predict_speedup
from leansd.plans.plan import Plan
from leansd.plans.presets import preset
from leansd.plans.row import How
from leansd.runtime.hooks import patch_method
from leansd.runtime.samplers import SPACINGS, make_scheduler

OURS = "ours"

Task = Literal["text-to-image", "image-to-image"]


@dataclass(frozen=True)
class Contest:
    """What all cases of a benchmark are asked to draw.

    Attributes:
        sampler: what records call it.
        is_long: whether every variant of every rival takes part, or those near the front only.
        strength: of image-to-image, the share of the steps that run.
    """

    task: Task
    sampler: str
    steps: int
    guidance: float
    is_long: bool = False
    strength: float = 1.0

    def count_run(self, steps: int) -> int:
        """How many of so many steps run: of image-to-image the last ones, as diffusers counts."""
        return max(1, int(steps * self.strength))

    def find_cost(self, steps: int) -> float:
        """What a run in so many steps computes, as a share of the full run's."""
        return self.count_run(steps) / self.count_run(self.steps)

    def __str__(self) -> str:
        strength = "" if self.strength == 1 else f", strength {self.strength:g}"
        told = f"{self.task}, {self.sampler}, {self.steps} steps, guidance {self.guidance:g}"
        return told + strength


@dataclass(frozen=True)
class RivalContext:
    """What a rival has to know to give its cases.

    Attributes:
        pipe: of the contest's task.
        anatomy: of its UNet, with its cost.
        others: samplers besides the contest's own.
        own: the plans that are `ours`.
    """

    contest: Contest
    pipe: Any
    anatomy: Anatomy
    others: tuple[str, ...] = ()
    own: tuple[Plan, ...] = ()


GiveCases: TypeAlias = Callable[[RivalContext], Iterable[Case]]


@dataclass(frozen=True)
class Rival:
    """A family of cases.

    Attributes:
        give: its cases; none where it has nothing to offer a contest.
        package: what has to be installed, and is imported by the same name.
        competes: whether it is held against ours; what builds on ours is only shown.
        is_for_unets: whether it reaches into a UNet, or goes by more than whole steps.
    """

    name: str
    give: GiveCases
    package: str = ""
    competes: bool = True
    is_for_unets: bool = False

    def find_obstacle(self, anatomy: Anatomy) -> str:
        """Why it cannot take part with a denoiser; empty where it can."""
        if self.is_for_unets and anatomy is WHOLE:
            return "it is for UNets"
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed (pip install {self.package})"
        return ""


def make_case(context: RivalContext, plan: Plan, name: str, family: str) -> Case:
    """A plan as a case of the benchmark."""
    plan.resolve(context.anatomy)
    contest = context.contest
    calls = compile_plan(plan, context.anatomy).calls[-contest.count_run(plan.steps) :]
    cost = contest.find_cost(plan.steps) / predict_speedup(calls, context.anatomy)
    return Case(name, plan.steps, plan, family=family, cost=cost)


@contextmanager
def keep_forwards(module: Any) -> Generator[None]:
    """On leaving, every part's `forward` is what it was: packages leave their own behind."""
    parts = list(module.modules())
    before: list[Any] = [vars(part).get("forward") for part in parts]
    try:
        yield
    finally:
        for part, forward in zip(parts, before, strict=True):
            vars(part).pop("forward", None)
            if forward is not None:
                part.forward = forward


# -- fewer steps -------------------------------------------------------------------------------

SHARES = {
    True: (1.2, 1.4, 1.6, 1.8, 2.0, 2.3, 2.7, 3.2, 4.0),
    False: (1.4, 1.8, 2.3, 3.2, 4.0, 5.0, 6.0),
}
"""Times fewer steps, in long contests and in others."""
OTHER_SHARES = {True: (1.4, 1.8, 2.3, 3.2), False: (1.8, 2.3, 3.2, 4.0, 5.0, 6.0)}
"""Times fewer steps with other samplers."""


CALLS = (5, 6, 7, 8, 9, 10, 12, 15)
"""UNet calls that are looked at one by one in long contests, where each is worth much."""


def count_fewer(contest: Contest, shares: Mapping[bool, Sequence[float]]) -> list[int]:
    """Smaller step counts, the largest first."""
    counts = {max(1, round(contest.steps / share)) for share in shares[contest.is_long]}
    few = {count for count in CALLS if count <= contest.steps / 2} if contest.is_long else set()
    return sorted(counts | few, reverse=True)


def give_fewer(context: RivalContext) -> Iterable[Case]:
    """The same sampler with fewer steps."""
    steps = context.contest.steps
    for count in count_fewer(context.contest, SHARES):
        if count != steps:
            cost = context.contest.find_cost(count)
            yield Case(f"{count} steps", count, family="fewer", cost=cost)


def give_others(context: RivalContext) -> Iterable[Case]:
    """Other samplers with fewer steps: better or worse than the full run under the converged run,
    whatever they do to its own picture."""
    for sampler in context.others:
        for count in count_fewer(context.contest, OTHER_SHARES):
            yield Case(
                f"{count} steps of {sampler}",
                count,
                sampler=sampler,
                family="samplers",
                cost=context.contest.find_cost(count),
            )


# -- align your steps (Sabour et al., arXiv 2404.14507): its time steps, with the same sampler ---

ALIGNED = {
    4: (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    3: (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
"""Published sigmas of ten steps, for SD 1.5 and for SDXL, by up blocks; the last stands for 0."""


def align_steps(steps: int, blocks: int, alphas: Sequence[float]) -> list[int]:
    """Time steps of a run, as its authors interpolate: linear in log sigma over the step.

    Args:
        alphas: the noise schedule's cumulative products, by time step.
    """
    known = [math.log(sigma) for sigma in ALIGNED[blocks]]
    there = [0.5 * math.log((1 - alpha) / alpha) for alpha in alphas]
    found: list[int] = []
    for step in range(steps):
        place = step / steps * (len(known) - 1)
        low = int(place)
        wanted = known[low] + (known[low + 1] - known[low]) * (place - low)
        nearest = min(range(len(there)), key=lambda t: abs(there[t] - wanted))
        found.append(min(nearest, found[-1] - 1) if found else nearest)
    return found


def give_aligned(context: RivalContext) -> Iterable[Case]:
    """The same sampler in fewer steps at these times, where it takes a list of them.

    Whole runs only: image-to-image begins among them, wherever its strength says.
    """
    contest, blocks = context.contest, context.anatomy.up_blocks
    host = make_scheduler(context.pipe, contest.sampler)
    takes = "timesteps" in inspect.signature(host.set_timesteps).parameters
    takes = takes and not any(getattr(host.config, name, False) for name in SPACINGS)
    if contest.task != "text-to-image" or blocks not in ALIGNED or not takes:
        return
    alphas = host.alphas_cumprod.tolist()
    for count in count_fewer(contest, OTHER_SHARES):
        yield Case(
            f"{count} aligned steps",
            count,
            enter=apply_times(align_steps(count, blocks, alphas)),
            family="aligned",
            cost=contest.find_cost(count),
        )


def apply_times(times: Sequence[int]) -> Enter:
    """The pipeline's scheduler laid out at given time steps."""

    @contextmanager
    def enter(pipe: Any) -> Generator[Any]:
        def around(_: str, own: Any, *args: Any, **kwargs: Any) -> Any:
            device = kwargs.get("device", args[1] if len(args) > 1 else None)
            return own(timesteps=list(times), device=device)

        hook = patch_method(pipe.scheduler, "set_timesteps", around)
        try:
            yield pipe
        finally:
            hook.release()

    return enter


# -- the DeepCache package (Ma et al., arXiv 2312.00858) through its own helper ----------------

INTERVALS = {True: (2, 3, 5), False: (2, 3)}
BRANCHES = {True: (0, 1, 2), False: (0,)}
SHALLOW = 0.2
"""About what a step between two full ones costs, by branch 0."""


def give_deepcache(context: RivalContext) -> Iterable[Case]:
    """Every interval and branch in long contests, the shallowest branch in others."""
    contest = context.contest
    for branch in BRANCHES[contest.is_long]:
        for interval in INTERVALS[contest.is_long]:
            yield Case(
                f"deepcache 1:{interval} b{branch}",
                contest.steps,
                enter=apply_deepcache(interval, branch),
                family="deepcache",
                cost=(1 + (interval - 1) * SHALLOW * (1 + branch)) / interval,
            )


def apply_deepcache(interval: int, branch: int) -> Enter:
    """The package's helper, a fresh one each time.

    Used again, a helper counts from the first time step of its first run, which is wrong for
    image-to-image of another strength.
    """

    @contextmanager
    def enter(pipe: Any) -> Generator[Any]:
        package = importlib.import_module("DeepCache")
        with keep_forwards(pipe.unet):
            helper = package.DeepCacheSDHelper(pipe=pipe)
            helper.set_params(cache_interval=interval, cache_branch_id=branch)
            helper.enable()
            try:
                yield pipe
            finally:
                helper.disable()

    return enter


# -- T-GATE (Liu et al., arXiv 2404.02747): its package, and its schedule as a plan ------------

GATES = (0.33, 0.5)
"""Shares of the run after which cross-attention is kept and guidance left out."""
TGATE_LOADERS = {
    "StableDiffusionPipeline": "TgateSDLoader",
    "StableDiffusionXLPipeline": "TgateSDXLLoader",
}
"""The package has a pipeline call of its own for each of these classes, and for no others."""


def list_gates(context: RivalContext) -> list[int]:
    """The steps from which on the gate is shut; none in short contests."""
    contest = context.contest
    gates = {max(1, round(share * contest.steps)) for share in GATES}
    return sorted(gates) if contest.is_long else []


def give_tgate(context: RivalContext) -> Iterable[Case]:
    """The package with its defaults, where it has a call for the pipeline."""
    if type(context.pipe).__name__ not in TGATE_LOADERS:
        return
    steps = context.contest.steps
    for gate in list_gates(context):
        cost = (steps + gate) / (2 * steps)
        yield Case(f"tgate {gate}", steps, enter=apply_tgate(gate), family="tgate", cost=cost)


def give_tgate_plans(context: RivalContext) -> Iterable[Case]:
    """The schedule as plans: without the package's caching of self-attention before the gate."""
    for gate in list_gates(context):
        plan = preset("tgate", context.contest.steps, blocks=context.anatomy.up_blocks, gate=gate)
        yield make_case(context, plan, f"tgate {gate}, as a plan", "tgate-plan")


class GatedPipeline:
    """A pipeline whose call is the package's."""

    def __init__(self, pipe: Any, gate: int) -> None:
        self.__dict__["pipe"] = pipe
        self.__dict__["gate"] = gate

    def __call__(self, **arguments: Any) -> Any:
        return self.pipe.tgate(**arguments, gate_step=self.gate)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.pipe, name, value)


def apply_tgate(gate: int) -> Enter:
    """The package's call; what it leaves in the attention layers is removed."""

    @contextmanager
    def enter(pipe: Any) -> Generator[Any]:
        load = getattr(importlib.import_module("tgate"), TGATE_LOADERS[type(pipe).__name__])
        with keep_forwards(pipe.unet):
            load(pipe)
            try:
                yield GatedPipeline(pipe, gate)
            finally:
                del pipe.tgate
                for part in pipe.unet.modules():
                    vars(part).pop("cache", None)

    return enter


# -- token merging (Bolya and Hoffman, arXiv 2303.17604) through its package -------------------
# It makes every step cheaper rather than steps fewer, so it composes with all others.

RATIO = 0.5
"""The share of tokens that are merged away, the package's own default."""


def give_tomesd(context: RivalContext) -> Iterable[Case]:
    """Full runs with merged tokens."""
    if context.contest.is_long:
        yield Case("tomesd", context.contest.steps, enter=apply_tomesd, family="tomesd")


def give_composed(context: RivalContext) -> Iterable[Case]:
    """Ours with merged tokens."""
    if not context.contest.is_long:
        return
    for plan in context.own:
        case = make_case(context, plan, f"{plan.name} + tomesd", "ours+tomesd")
        yield replace(case, enter=apply_tomesd)


@contextmanager
def apply_tomesd(pipe: Any) -> Generator[Any]:
    """Tokens merged under whatever else is done to the pipeline."""
    package = importlib.import_module("tomesd")
    package.apply_patch(pipe, ratio=RATIO)
    try:
        yield pipe
    finally:
        package.remove_patch(pipe)
        for part in pipe.unet.modules():
            vars(part).pop("_tome_info", None)


# -- methods without a package for diffusers' UNets, as plans of this one ----------------------

PresetOptions: TypeAlias = Sequence[Mapping[str, Any]]


def give_presets(name: str, label: str, long: PresetOptions, short: PresetOptions) -> GiveCases:
    """A preset with one set of options a case; `label` is formatted with the options."""

    def give(context: RivalContext) -> Iterable[Case]:
        contest = context.contest
        for options in long if contest.is_long else short:
            plan = preset(name, contest.steps, blocks=context.anatomy.up_blocks, **options)
            yield make_case(context, plan, label.format(**options), name)

    return give


EVEN = (2, 3, 4, 6)
"""One step in so many is computed: of 30 steps 16, 11, 9, 6."""


def give_even(how: How, label: str, short: Sequence[int] = ()) -> GiveCases:
    """Whole steps, one in so many computed and the last one, the others made in one way; `short`
    are the intervals of contests that are not long.
    """

    def give(context: RivalContext) -> Iterable[Case]:
        steps = context.contest.steps
        for interval in EVEN if context.contest.is_long else short:
            keys = {*range(0, steps, interval), steps - 1}
            plan = Plan.between(keys, cut=HEAD, steps=steps, how=how)
            yield make_case(context, plan, f"{label} 1:{interval}", label)

    return give


def _list_spectrum(
    hows: Sequence[str], growths: Sequence[float], warm_up: int = 5
) -> PresetOptions:
    return [
        {"growth": growth, "how": how, "warm_up": warm_up} for growth in growths for how in hows
    ]


RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival("fewer", give_fewer),
        Rival("samplers", give_others),
        Rival("aligned", give_aligned),
        Rival("deepcache", give_deepcache, "DeepCache", is_for_unets=True),
        Rival("tgate", give_tgate, "tgate", is_for_unets=True),
        Rival("tgate-plan", give_tgate_plans, is_for_unets=True),
        Rival("tomesd", give_tomesd, "tomesd", is_for_unets=True),
        Rival("ours+tomesd", give_composed, "tomesd", competes=False, is_for_unets=True),
        Rival(
            "easycache",
            give_presets(
                "easycache",
                "easycache {threshold}",
                [{"threshold": threshold} for threshold in (0.02, 0.05, 0.1, 0.2)],
                [{"threshold": threshold} for threshold in (0.05, 0.1)],
            ),
            is_for_unets=True,
        ),
        Rival(
            "spectrum",
            give_presets(
                "spectrum",
                "{how} {growth}",
                [
                    *_list_spectrum(("chebyshev", "chebyshev-line"), (0, 0.25, 0.75, 2.5)),
                    # Fewer calls than its authors go down to: a shorter warm-up, too.
                    *_list_spectrum(("chebyshev-line",), (3,), warm_up=3),
                    *_list_spectrum(("chebyshev-line",), (4,), warm_up=2),
                ],
                _list_spectrum(("chebyshev-line",), (0, 0.75, 2.5)),
            ),
        ),
        # TaylorSeer's forecast, of the output; EasyCache's reuse of changes, evenly spaced.
        Rival("taylorseer", give_even("forecast", "taylorseer", EVEN[:2])),
        Rival("residual", give_even("residual", "residual")),
        # As a plan: the callback of diffusers keeps one prompt of a batch.
        Rival(
            "guidance-cutoff",
            give_presets(
                "guidance-cutoff",
                "cutoff {share}",
                [{"share": share} for share in (0.2, 0.4, 0.6)],
                [],
            ),
            is_for_unets=True,
        ),
    )
}


def choose_rivals(names: str) -> list[Rival]:
    """Rivals from a list such as `fewer,deepcache`; `all` is every one.

    Raises:
        LeansdError: there is no such rival.
    """
    if names == "all":
        return list(RIVALS.values())
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in RIVALS:
            raise LeansdError(f"no rival {name!r} (there are all, {', '.join(RIVALS)})")
    return [RIVALS[name] for name in dict.fromkeys(chosen)]

"""The studio: models that are open, plans by name, and the work that a page asks for.

One pipeline is open at a time, and one piece of work runs at a time: two on one device would slow
each other down, and no time told would be true.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from leansd.anatomy.counting import dissect
from leansd.drawing import NOT_FINITE, default_size
from leansd.errors import LeansdError
from leansd.evaluation.compare import LEAN, Comparison, OnProgress, compare_pair
from leansd.evaluation.cost import CostModel
from leansd.evaluation.prediction import Profiled
from leansd.evaluation.profile import profile
from leansd.evaluation.prompt_sets import find_guidance
from leansd.evaluation.records import stamp
from leansd.evaluation.runs import FULL
from leansd.files import name_file
from leansd.loading import load
from leansd.plans.anatomy import WHOLE, Anatomy
from leansd.plans.compile import compile_plan, predict_speedup
from leansd.plans.plan import Plan
from leansd.plans.presets import PRESETS, SPEED_PRESETS
from leansd.plans.resolve import STEPS, PlanContext, Resolved, resolve_plan
from leansd.runtime.context import describe_runs, find_denoiser, find_transformer
from leansd.runtime.samplers import list_samplers, name_sampler, set_sampler
from leansd.tuning.front import Front, Point
from leansd.tuning.host import require_tunable
from leansd.tuning.tuner import FEWEST_CALLS, tune
from leansd.ui.folders import OWN_SAMPLER, Folders, HistoryEntry, Numbers, Settings, keep_entry
from leansd.ui.job_queue import Job

SAVED = "saved: "
"""Stands before the names of saved plans among the choices."""
TUNING_BATCH = 4
TUNING_GRIDS = (1.0, 0.7)
MOST_PROMPTS = 32
PROFILE_REPEATS = 3


@dataclass
class KnownModel:
    """What the page knows of a model; it stays known when another one is opened."""

    name: str
    anatomy: Anatomy
    """With multiply-accumulates at the size that the model draws, where they can be counted."""
    denoiser: str
    """The class of what denoises."""
    params: int
    sampler: str
    """The model's own sampler."""
    samplers: tuple[str, ...]
    """The samplers that suit it."""
    guidance: float
    size: tuple[int, int]
    profiled: Profiled | None = None
    """Where everything was timed on this machine."""


@dataclass
class Opened:
    """The pipeline that is open."""

    model: KnownModel
    pipe: Any
    scheduler: Any
    denoiser: Any
    is_warm: bool = False


@dataclass(frozen=True)
class Forecast:
    """How fast a plan should be."""

    unet: float | None
    """Full run's over this run's multiply-accumulates in the UNet, or calls of a transformer; None
    where not counted."""
    run: float | None = None
    """Speed-up of the whole pipeline call, where it was profiled here."""
    seconds: float | None = None
    """Seconds of the whole pipeline call, where it was profiled here."""


@dataclass
class Studio:
    """All that pages share."""

    folders: Folders
    device: str | None = None
    _models: dict[str, KnownModel] = field(default_factory=dict[str, KnownModel])
    _opened: Opened | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # -- models --------------------------------------------------------------------------------

    def open(self, name: str) -> KnownModel:
        """What is known of a model; the first time its pipeline is opened for it.

        Raises:
            LeansdError: it is none of the models given, or cannot be opened.
        """
        if name not in self._models:
            with self._lock:
                self._open_pipeline(name)
        return self._models[name]

    def _open_pipeline(self, name: str) -> Opened:
        """The pipeline of a model; only one is in memory."""
        if self._opened is not None and self._opened.model.name == name:
            return self._opened
        source = self.folders.find_model(name)
        self._opened = None
        pipe: Any = load(source, device=self.device)
        pipe.set_progress_bar_config(disable=True)
        denoiser = find_denoiser(pipe)
        if name not in self._models:
            size, anatomy = default_size(pipe), WHOLE
            if find_transformer(pipe) is None:
                latent = (size[1] // pipe.vae_scale_factor, size[0] // pipe.vae_scale_factor)
                tokens = pipe.tokenizer.model_max_length
                anatomy = dissect(denoiser, latent=latent, tokens=tokens, name=name)
            self._models[name] = KnownModel(
                name,
                anatomy,
                type(denoiser).__name__,
                sum(each.numel() for each in denoiser.parameters()),
                name_sampler(pipe),
                list_samplers(pipe.scheduler),
                find_guidance(pipe, name),
                size,
            )
        self._opened = Opened(self._models[name], pipe, pipe.scheduler, denoiser)
        return self._opened

    @contextmanager
    def _work_on(self, settings: Settings, job: Job) -> Iterator[Opened]:
        """The pipeline with the sampler asked for, for one piece of work at a time."""
        with self._lock:
            job.check()
            opened = self._open_pipeline(settings.model)
            opened.pipe.scheduler = opened.scheduler
            if settings.sampler != OWN_SAMPLER:
                set_sampler(opened.pipe, settings.sampler)
            try:
                with job.watching(opened.denoiser):
                    yield opened
            finally:
                opened.pipe.scheduler = opened.scheduler

    # -- plans ---------------------------------------------------------------------------------

    def list_plans(self, model: KnownModel) -> list[str]:
        """Presets that suit a model, the speed presets first, and saved plans.

        None is among them that needs further UNets.
        """
        others = [name for name in PRESETS if name not in SPEED_PRESETS and _suits(name, model)]
        return [*SPEED_PRESETS, *others, *(SAVED + name for name in self.folders.list_plans())]

    def resolve(self, source: str | Plan, settings: Settings) -> Resolved:
        """The plan that a choice means for these settings, and what must be said of it.

        Args:
            source: a name of `list_plans`, or a plan, which is stretched to the steps.

        Raises:
            LeansdError: there is none, or it does not suit the model's UNet.
        """
        model = self.open(settings.model)
        if isinstance(source, str) and source.startswith(SAVED):
            source = self.folders.load_plan(source.removeprefix(SAVED))
        sampler = model.sampler if settings.sampler == OWN_SAMPLER else settings.sampler
        context = PlanContext(
            settings.steps, sampler, anatomy=model.anatomy, guidance=settings.guidance
        )
        if isinstance(source, Plan):
            self.check_plan(source, model)
        resolved = resolve_plan(source, context, fit=True)
        self.check_plan(resolved.plan, model)
        return resolved

    def check_plan(self, plan: Plan, model: KnownModel) -> None:
        """Refuse a plan that this model cannot follow here."""
        if plan.nets:
            raise LeansdError(
                f"plan {plan.name} switches to net {plan.nets[0]!r}, and the page runs one UNet: "
                "use leansd generate --net"
            )
        compile_plan(plan, model.anatomy)

    def forecast(self, plan: Plan, model: KnownModel, *, guided: bool = True) -> Forecast:
        """How fast the plan should be; where the model was profiled, in time as well."""
        # Of a transformer only whole steps are inherited, and guidance is always computed.
        guided = guided and model.anatomy is not WHOLE
        program = compile_plan(plan, model.anatomy, guided=guided)
        unet = None if model.anatomy.uncounted else predict_speedup(program.calls, model.anatomy)
        if model.profiled is None or model.profiled.cost.is_guided != guided:
            return Forecast(unet)
        cost = model.profiled.cost
        try:
            return Forecast(unet, cost.predict_speedup(program), cost.predict_run(program))
        except LeansdError:  # gates were not timed
            return Forecast(unet)

    # -- work ----------------------------------------------------------------------------------

    def draw(
        self,
        settings: Settings,
        plan: Plan,
        *,
        rounds: int,
        job: Job,
        on_progress: OnProgress = lambda progress: None,
    ) -> tuple[HistoryEntry, tuple[str, ...]]:
        """Draw in full and by the plan, in turns; the entry of the history, and what to say of it.

        Raises:
            LeansdError: there is no prompt, or the plan is for another number of steps.
            Stopped: the job was.
        """
        call = make_call(settings)
        if plan.steps != settings.steps:
            raise LeansdError(
                f"plan {plan.name} is for {plan.steps} steps, not {settings.steps}: choose it again"
            )
        with self._work_on(settings, job) as opened:
            known = PlanContext(anatomy=opened.model.anatomy, guidance=settings.guidance)
            notes = resolve_plan(plan, describe_runs(opened.pipe, known)).notes
            comparison = compare_pair(
                opened.pipe,
                plan,
                call,
                settings.seed,
                rounds=rounds,
                is_warm=opened.is_warm,
                on_progress=on_progress,
            )
            opened.is_warm = True
            numbers = read_numbers(comparison)
        pictures = comparison[FULL].images[0], comparison[LEAN].images[0]
        entry = keep_entry(self.folders.history, settings, plan, numbers, pictures)
        return entry, (*list_faults(comparison), *notes)

    def profile(
        self, settings: Settings, *, job: Job, on_progress: Callable[[int, int], None]
    ) -> Profiled:
        """Time everything on this machine; from then on plans are forecast in time as well.

        Raises:
            LeansdError: a transformer denoises.
            Stopped: the job was.
        """
        if self.open(settings.model).anatomy is WHOLE:
            raise LeansdError(
                f"units are timed in UNets, and in {settings.model} a transformer denoises; tuning "
                "times its calls as a whole"
            )
        with self._work_on(settings, job) as opened:
            told = iter(range(1, PROFILE_REPEATS + 1))
            on_progress(0, PROFILE_REPEATS)
            cost: CostModel = profile(
                opened.pipe,
                call={"guidance_scale": settings.guidance},
                repeats=PROFILE_REPEATS,
                subject=settings.model,
                on_run=lambda: on_progress(next(told), PROFILE_REPEATS),
            )
            facts = stamp(opened.pipe.device)
        model = opened.model
        model.profiled = Profiled(
            cost, model.anatomy, settings.steps, (), PROFILE_REPEATS, facts, sampler=model.sampler
        )
        return model.profiled

    def tune(
        self,
        settings: Settings,
        prompts: Sequence[str],
        *,
        speedup: float,
        tries: int,
        job: Job,
        on_progress: Callable[[str, float], None],
    ) -> tuple[Front, Point]:
        """A front, and its plan that loses least at a speed; a stopped tuning goes on.

        Raises:
            LeansdError: there are too few prompts, or no plan is that fast.
            Stopped: the job was.
        """
        if not FEWEST_CALLS <= len(prompts) <= MOST_PROMPTS:
            raise LeansdError(
                f"{len(prompts)} prompts to tune on: give {FEWEST_CALLS} to {MOST_PROMPTS}, one a "
                "line; every third decides, the rest tune"
            )
        if settings.steps < 4:
            raise LeansdError(f"{settings.steps} steps cannot be tuned: 4 are needed at least")
        with self._work_on(settings, job) as opened:
            require_tunable(opened.pipe.scheduler, settings.steps)
            front = tune(
                opened.pipe,
                list(prompts),
                steps=settings.steps,
                settings={"guidance_scale": settings.guidance},
                speeds=(),
                grids=TUNING_GRIDS,
                speedup=speedup,
                tries=tries,
                seed=settings.seed,
                batch=TUNING_BATCH,
                sampler=name_sampler(opened.pipe),
                journal=self.folders.home / "tuning" / f"{name_file(settings.model)}.jsonl",
                tell=on_progress,
            )
        return front, front.find(speedup=speedup)


def make_call(settings: Settings) -> dict[str, Any]:
    """What the pipeline is called with."""
    if not settings.prompt.strip():
        raise LeansdError("no prompt: say what to draw")
    call: dict[str, Any] = {
        "prompt": settings.prompt.strip(),
        "guidance_scale": settings.guidance,
    }
    negative = settings.negative.strip()
    return call | ({"negative_prompt": negative} if negative else {})


def read_numbers(comparison: Comparison) -> Numbers:
    """What a comparison of `FULL` and `LEAN` measured."""
    full, lean = comparison[FULL], comparison[LEAN]
    report, close, alike = lean.report, lean.mean("psnr"), lean.mean("ssim")
    assert report is not None
    assert close is not None
    assert alike is not None
    return Numbers(
        full=list(full.timing.seconds),
        lean=list(lean.timing.seconds),
        speedup=lean.speedup.median,
        low=lean.speedup.low,
        high=lean.speedup.high,
        predicted=None if report.uncounted else report.predicted_speedup,
        psnr=close,
        ssim=alike,
        calls=report.calls,
        full_calls=report.full_calls,
        bytes_kept=report.bytes_kept,
    )


def list_faults(comparison: Comparison) -> list[str]:
    """Which of the two runs gave no picture, and what to do; empty where both did."""
    if FULL in comparison.faults:
        return [
            f"no picture: the latents {NOT_FINITE} (NaN or Inf), in the full run as well, so the "
            "model itself fails here: use whole weights, in float32"
        ]
    if LEAN in comparison.faults:
        return [
            f"no picture with the plan: its latents {NOT_FINITE} (NaN or Inf), the full run is "
            "sound: choose a slower plan"
        ]
    return [
        f"{what}: all pixels are equal, as where the autoencoder overflows in half precision or a "
        "safety checker hides the picture"
        for name, what in ((FULL, "no picture in full"), (LEAN, "no picture with the plan"))
        if all(low == high for low, high in comparison[name].images[0].getextrema())  # type: ignore[misc]
    ]


def _suits(name: str, model: KnownModel) -> bool:
    """Whether a preset runs on a model with no other nets and no further choices."""
    try:
        plan = resolve_plan(name, PlanContext(STEPS, model.sampler, anatomy=model.anatomy)).plan
        return name == "full" or model.anatomy is not WHOLE or any(r.inherit for r in plan.rows)
    except LeansdError:
        return False

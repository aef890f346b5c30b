"""Comparison: the same calls from the same seeds, drawn in several ways and put side by side.

The engine of the demo, `leansd evaluate`, the benchmark, and of a full run beside a plan on the
page and in `leansd generate --compare`.
Timed cases take turns, so that a slow spell of the machine hits all of them; untimed ones run one
after the other and can be kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import nan
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from leansd.anatomy.reading import fingerprint_module
from leansd.errors import LeansdError, read_cause
from leansd.evaluation.fidelity import PSNR, SSIM, FidelityMetric, Measure, as_images
from leansd.evaluation.fingerprints import fingerprint_call, fingerprint_case, fingerprint_pipe
from leansd.evaluation.quality import Embedder, QualityJudge, embed_pictures
from leansd.evaluation.runs import (
    FULL,
    CallSet,
    PipelineCall,
    RunOutputs,
    explain_no_numbers,
    run_calls,
    sampled_by,
)
from leansd.evaluation.timing import Ratio, Timing, check_count, compare_timings, take_turns
from leansd.files import write_file
from leansd.plans.plan import Plan
from leansd.runtime import Attachment, Report
from leansd.runtime.attachment import NO_NETS
from leansd.runtime.finite import NOT_FINITE

LEAN = "lean"
"""The case that follows a plan, beside `FULL`, where two are compared."""
CONVERGED = "converged"
CONVERGED_STEPS = 150
WARM_UP_STEPS = 2
PART = 16  # pictures that are compared at once
UNTIMED, UNKNOWN = Timing(()), Ratio(nan, nan, nan)

Enter: TypeAlias = Callable[[Any], AbstractContextManager[Any]]
"""Given a pipeline, a context in which what it yields is called in the pipeline's place."""


@dataclass(frozen=True)
class Case:
    """One way to draw. Without a plan the pipeline runs as it is.

    Attributes:
        scheduler: in place of the pipeline's own.
        sampler: what records call it; the scheduler's class where it is empty.
        nets: UNets that the plan switches to.
        enter: whatever else is done to the pipeline, such as another package; undone on leaving.
        family: cases whose points make one front, `full`, `ours` or a rival's.
        cost: the expected share of the full run's time.
        may_fail: whether a comparison goes on without it, and says why.
        summary: for readers, in a line.
    """

    name: str
    steps: int
    plan: Plan | None = None
    scheduler: Any | None = None
    sampler: str = ""
    nets: Mapping[str, UNet2DConditionModel] = field(default_factory=dict, hash=False)
    enter: Enter = nullcontext
    family: str = ""
    cost: float = 1.0
    may_fail: bool = False
    summary: str = ""

    @property
    def fingerprint(self) -> str:
        """The plan's; empty without one."""
        return self.plan.fingerprint if self.plan is not None else ""


@dataclass(frozen=True)
class Drawings:
    """What a case drew: latents [n, C, h, w] and pictures [n, 3, H, W] in 8 bits."""

    latents: Tensor
    pictures: Tensor

    def find_fault(self, case: str) -> str:
        """Why there is nothing to compare in them; empty where there is."""
        bad = int((~self.latents.isfinite().flatten(1).all(1)).sum())
        if not bad:
            return ""
        if case == FULL:
            return explain_no_numbers(self.latents)
        return f"{bad} of {len(self.latents)} latents of {case} {NOT_FINITE} (NaN or Inf)"


@dataclass(frozen=True)
class RunProgress:
    """How far a comparison is; told when a run begins, after each step and when it has ended.

    Attributes:
        case: the name of the one that runs.
        step: steps done of this run's `steps`.
        turn: the number of this turn; each case runs once in it.
        done: steps of single pictures, of `total`.
        seconds: of the latest finished run of each case.
    """

    case: str
    step: int
    steps: int
    turn: int
    turns: int
    done: float
    total: float
    seconds: Mapping[str, float]


OnProgress: TypeAlias = Callable[[RunProgress], None]
"""May raise to stop a comparison; nothing stays attached."""


@dataclass(frozen=True)
class Compared:
    """What one case drew and how it fared.

    Attributes:
        pictures: [n, 3, H, W] in 8 bits; the first ones, where not all were asked for.
        measures: fidelity to every reference, and quality where a CLIP looked.
        timing: whole pipeline calls, one a turn; none where nothing was timed.
        speedup: over the full run, of the same turns; NaN where nothing was timed.
        attachment: of the plan's last run.
    """

    case: Case
    pictures: Tensor
    measures: tuple[Measure, ...]
    timing: Timing = UNTIMED
    speedup: Ratio = UNKNOWN
    attachment: Attachment | None = None

    @cached_property
    def report(self) -> Report | None:
        """The plan's run; counting takes time, so it is made when asked for."""
        return self.attachment.report() if self.attachment is not None else None

    @property
    def bytes_kept(self) -> int:
        """The most memory that what the plan kept took."""
        return self.report.bytes_kept if self.report is not None else 0

    @cached_property
    def images(self) -> tuple[Image.Image, ...]:
        return tuple(as_images(self.pictures))

    def find(self, metric: str, reference: str | None = FULL) -> Measure | None:
        """A measure against a reference; None as reference for those that have none."""
        for each in self.measures:
            if each.metric == metric and each.fields.get("reference") == reference:
                return each
        return None

    def mean(self, metric: str, reference: str | None = FULL) -> float | None:
        """The mean over the pictures; None where that was not measured."""
        found = self.find(metric, reference)
        return found.mean if found is not None else None


@dataclass(frozen=True)
class Comparison:
    """All cases by name, the first of them first.

    Attributes:
        references: what the references drew, for a further comparison with the same.
        left_out: cases that failed, and why.
        faults: cases whose latents or pictures are no numbers; those are seen black.
    """

    cases: Mapping[str, Compared]
    references: Mapping[str, Drawings]
    left_out: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)

    def require_finite(self) -> Comparison:
        """Itself without the cases that gave no numbers, which are left out.

        Raises:
            LeansdError: a reference is one of them.
        """
        for name in self.faults:
            if name in self.references or name == FULL:
                raise LeansdError(self.faults[name])
        cases = {name: each for name, each in self.cases.items() if name not in self.faults}
        return replace(self, cases=cases, left_out={**self.left_out, **self.faults})

    def __getitem__(self, name: str) -> Compared:
        return self.cases[name]

    def __iter__(self) -> Iterator[Compared]:
        return iter(self.cases.values())


@dataclass(frozen=True)
class Judging:
    """What pictures are judged by.

    Attributes:
        metrics: of each picture, beside every reference's.
        embedder: a CLIP, for the quality of sets.
        spread_sets: further sets of the full run from other seeds, to tell chance from effect.
        references: names of cases, or cases that are drawn to be compared with only.
        known: what references drew before.
    """

    metrics: Sequence[FidelityMetric] = (PSNR, SSIM)
    embedder: Embedder | None = None
    spread_sets: int = 0
    references: Sequence[str | Case] = (FULL,)
    known: Mapping[str, Drawings] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Rounds:
    """How runs are timed: cases take turns at every batch, and all pictures are in memory.

    Attributes:
        count: how often every batch is drawn; the fastest run of a batch counts.
        budget: seconds that they may take; another one begins only if it should end in time.
        is_warm: whether nothing has to run before; else the first case does, in two steps.
    """

    count: int = 1
    budget: float | None = None
    is_warm: bool = False


ONCE, PLAIN = Rounds(), Judging()


def compare_runs(
    pipe: DiffusionPipeline,
    cases: Sequence[Case],
    calls: CallSet,
    *,
    judging: Judging = PLAIN,
    rounds: Rounds | None = ONCE,
    keep: str | Path | None = None,
    shown: int | None = None,
    on_progress: OnProgress = lambda progress: None,
) -> Comparison:
    """Draw all calls in every case and compare the pictures, and the times where they are taken.

    Args:
        cases: the one called `full`, where there is one, is what times are held against.
        rounds: how cases are timed; None for one after the other, untimed.
        keep: a folder for what is drawn untimed; the same comparison goes on from there.
        shown: how many pictures of each case are handed on; all by default.

    Raises:
        LeansdError: two cases share a name, a reference is unknown, or a call cannot be run.
    """
    by_name = {each.name: each for each in cases}
    held = [_find_reference(each, by_name) for each in judging.references]
    require_distinct([*cases, *(each for each in held if each not in cases)])
    require_distinct(held)
    drawer = _Drawer(pipe, calls, keep, on_progress)
    full, known = by_name.get(FULL), judging.known
    sets = range(1, judging.spread_sets + 1) if judging.embedder is not None else range(0)
    work = [(each, 0) for each in held if each.name not in by_name and each.name not in known]
    work += [(each, 0) for each in cases if rounds is None]
    work += [(full, number) for number in sets if full is not None]
    drawer.total = sum(drawer.count_steps(*each) for each in work)

    drawn = dict(known)
    if rounds is not None:
        drawn |= drawer.race(cases, rounds)
    elif full is not None:
        drawn[FULL] = drawer.draw(full)
    # Untimed, only the references' pictures and those of the case at hand are in memory.
    drawn |= {each.name: drawer.draw(each) for each in held if each.name not in drawn}
    references = {each.name: drawn[each.name] for each in held}
    judge = None
    if judging.embedder is not None and full is not None:
        embed = partial(embed_pictures, judging.embedder)
        further = [embed(drawer.draw(full, number).pictures) for number in sets]
        judge = QualityJudge(judging.embedder, calls.prompts, embed(drawn[FULL].pictures), further)
    compared: dict[str, Compared] = {}
    faults = {name: why for name, each in drawn.items() if (why := each.find_fault(name))}
    for case in cases:
        if case.name in drawer.left_out:
            continue
        own = drawn[case.name] if case.name in drawn else drawer.draw(case)
        if case.name not in faults and (why := own.find_fault(case.name)):
            faults[case.name] = why
        others = [each for each in held if each.name != case.name]
        measures = [
            measure
            for each in others
            for measure in compare_drawings(own, references[each.name], each, judging.metrics)
        ]
        measures += judge.judge(own.pictures) if judge is not None else ()
        compared[case.name] = drawer.describe(case, own.pictures[:shown], measures)
    return Comparison(compared, references, drawer.left_out, faults)


def compare_pair(
    pipe: DiffusionPipeline,
    plan: Plan,
    call: PipelineCall,
    seed: int,
    *,
    rounds: int = 1,
    nets: Mapping[str, UNet2DConditionModel] = NO_NETS,
    is_warm: bool = False,
    on_progress: OnProgress = lambda progress: None,
) -> Comparison:
    """One call in full (`FULL`) and by a plan (`LEAN`), in turns; as often as there are rounds."""
    return compare_runs(
        pipe,
        [Case(FULL, plan.steps), Case(LEAN, plan.steps, plan, nets=nets)],
        # The same one in every turn: as many pairs of times.
        CallSet([call] * rounds, [seed] * rounds, batch=1),
        rounds=Rounds(is_warm=is_warm),
        on_progress=on_progress,
    )


def compare_drawings(
    drawn: Drawings, reference: Drawings, case: Case, metrics: Sequence[FidelityMetric]
) -> Iterator[Measure]:
    """Every fidelity to what the reference `case` drew."""
    fields = {"reference": case.name, "reference_steps": case.steps}
    for metric in metrics:
        if metric.of == "latents":
            values = metric.compare(drawn.latents, reference.latents)
        else:
            pairs = zip(drawn.pictures.split(PART), reference.pictures.split(PART), strict=True)
            values = torch.cat([metric.compare(a.float() / 255, b.float() / 255) for a, b in pairs])
        yield Measure(metric.name, metric.unit, values, fields)


def require_distinct(cases: Sequence[Case]) -> None:
    """One name, one case."""
    names = [case.name for case in cases]
    for name in names:
        if names.count(name) > 1:
            raise LeansdError(f"two cases are called {name!r}: rename one, or leave it out")


def _find_reference(reference: str | Case, cases: Mapping[str, Case]) -> Case:
    if not isinstance(reference, str):
        return reference
    if reference not in cases:
        raise LeansdError(f"no reference {reference!r}: there are {', '.join(cases)}")
    return cases[reference]


class _Drawer:
    """Runs cases batch by batch, in turns or one after the other, or reads what was kept."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        calls: CallSet,
        keep: str | Path | None,
        on_progress: OnProgress,
    ) -> None:
        self.pipe, self.calls, self.on_progress = pipe, calls, on_progress
        self.seeds, self.arguments, self.parts = calls.seeds, calls.arguments, calls.parts
        self.keep = Path(keep) if keep is not None else None
        self.weights = fingerprint_pipe(pipe) if keep is not None else ""
        self.attachments: dict[str, Attachment] = {}
        self.timings: dict[str, Timing] = {}
        self.left_out: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.done = self.total = 0.0
        self.turn, self.turns = 0, 1

    def describe(self, case: Case, pictures: Tensor, measures: Sequence[Measure]) -> Compared:
        """A case with its times, and how they compare with the full run's of the same turns."""
        base, own = (self.timings.get(name, UNTIMED) for name in (FULL, case.name))
        speedup = compare_timings(base, own) if base.seconds and own.seconds else UNKNOWN
        followed = self.attachments.get(case.name)
        return Compared(case, pictures, tuple(measures), own, speedup, followed)

    # -- untimed -----------------------------------------------------------------------------

    def count_steps(self, case: Case, number: int) -> float:
        """The steps of single pictures that are still to be run."""
        files = self._name_files(case, number)
        return sum(
            len(part) * case.steps
            for part in self.parts
            if not all(files and files[place].is_file() for place in part)
        )

    def draw(self, case: Case, number: int = 0) -> Drawings:
        """Set `number` of a case, in whole batches: a resumed one is the same to the bit."""
        files = self._name_files(case, number)
        parts: list[Drawings] = []
        for part in self.parts:
            paths = files[part.start : part.stop]
            drawn = _read_drawn(paths)
            if drawn is None:
                drawn, _ = self.run(case, part, number)
                for path, *each in zip(paths, drawn.latents, drawn.pictures, strict=False):
                    latents, picture = (value.contiguous() for value in each)
                    write_file(path, save({"latents": latents, "picture": picture}))
            parts.append(drawn)
        return _join(parts)

    # -- timed -------------------------------------------------------------------------------

    def race(self, cases: Sequence[Case], rounds: Rounds) -> dict[str, Drawings]:
        """All cases on every batch in turns; notes times and which cases failed."""
        parts, racing = len(self.parts), list(cases)
        self.turns = check_count(rounds.count, "timing rounds") * parts
        steps = sum(case.steps for case in cases)
        self.total += steps * rounds.count * len(self.calls)
        if not rounds.is_warm:
            self._run_calls(Case(FULL, WARM_UP_STEPS), self.parts[0][:1], 0, lambda *_: None)
        seconds: dict[str, list[float]] = {case.name: [] for case in cases}
        drawn: dict[str, list[Drawings]] = {case.name: [] for case in cases}
        for turn, case in take_turns(racing, rounds.count, pieces=parts, budget=rounds.budget):
            self.turn = turn
            try:
                pictures, spent = self.run(case, self.parts[turn % parts])
            except Exception as error:
                if not case.may_fail:
                    raise
                why = f"failed here: {type(error).__name__}: {read_cause(error)}"
                self.left_out[case.name] = why
                racing.remove(case)
                continue
            seconds[case.name].append(spent)
            drawn[case.name] += [pictures] if turn < parts else []
        held = self.turn // parts + 1
        self.timings = {case.name: Timing(tuple(seconds[case.name]), held) for case in racing}
        return {case.name: _join(drawn[case.name]) for case in racing}

    # -- one batch ---------------------------------------------------------------------------

    def run(self, case: Case, part: range, number: int = 0) -> tuple[Drawings, float]:
        """A case on a batch of calls, and the seconds of the whole pipeline call."""
        before = self.done

        def tell(step: int, steps: int) -> None:
            self.done = before + len(part) * case.steps * step / steps
            self.on_progress(
                RunProgress(
                    case.name,
                    step,
                    steps,
                    self.turn,
                    self.turns,
                    self.done,
                    max(self.total, self.done),
                    dict(self.seconds),
                )
            )

        tell(0, case.steps)
        outputs = self._run_calls(case, part, number, lambda step, steps, _: tell(step, steps))
        self.seconds[case.name] = sum(outputs.seconds)
        if outputs.attachment is not None:
            self.attachments[case.name] = outputs.attachment
        tell(case.steps, case.steps)
        # 8 bits, as a picture file has them: what is compared is what is seen.
        pictures = outputs.pictures.nan_to_num().mul(255).round().byte()
        return Drawings(outputs.latents, pictures), sum(outputs.seconds)

    def _run_calls(
        self, case: Case, part: range, number: int, on_step: Callable[[int, int, int], None]
    ) -> RunOutputs:
        own = case.scheduler or self.pipe.scheduler
        # A fresh one: none carries over to the next run.
        scheduler = type(own).from_config(own.config)
        # What a case does on entering is not timed: a user does it once.
        with sampled_by(self.pipe, scheduler), case.enter(self.pipe) as called:
            return run_calls(
                called,
                self.calls.pick(part, number),
                case.steps,
                case.plan,
                nets=case.nets,
                on_step=on_step,
            )

    def _name_files(self, case: Case, number: int) -> list[Path]:
        """A file a call, named by all that its content follows from; none where nothing is kept."""
        if self.keep is None or case.enter is not nullcontext:
            return []
        scheduler = case.scheduler or self.pipe.scheduler
        facts: dict[str, Any] = {
            "weights": self.weights,
            "plan": case.fingerprint,
            "steps": case.steps,
            "scheduler": type(scheduler).__name__,
            "options": dict(scheduler.config),
            "settings": dict(self.calls.settings),
        }
        if case.nets:
            facts["nets"] = {name: fingerprint_module(net) for name, net in case.nets.items()}
        folder = self.keep / fingerprint_case(facts)
        seeds = self.calls.pick(range(len(self.calls)), number).seeds
        return [
            folder / f"{seed}-{fingerprint_call(each, seed)}.safetensors"
            for seed, each in zip(seeds, self.arguments, strict=True)
        ]


def _read_drawn(paths: Sequence[Path]) -> Drawings | None:
    """What is kept of a batch, a file a call; None where some cannot be read."""
    try:
        kept = [load_file(path) for path in paths]
        latents, pictures = ([each[of] for each in kept] for of in ("latents", "picture"))
    except (OSError, SafetensorError, KeyError):
        return None
    return Drawings(torch.stack(latents), torch.stack(pictures)) if kept else None


def _join(parts: Sequence[Drawings]) -> Drawings:
    latents, pictures = ([getattr(part, of) for part in parts] for of in ("latents", "pictures"))
    return Drawings(torch.cat(latents), torch.cat(pictures))

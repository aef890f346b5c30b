"""The benchmark: all contestants of a contest in one process, in turns, on the same batches.

Time and pictures come from the same runs. A round is one batch drawn by everybody, in an order that
turns by one place each round; a speed-up is the median of the rounds' own ratios to the full run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from leansd.errors import LeansdError
from leansd.evaluation.compare import CONVERGED, CONVERGED_STEPS, Case, Drawings, compare_drawings
from leansd.evaluation.contest import FULL, OURS, Contest, Contestant, Grounds, send_full
from leansd.evaluation.fidelity import Measure, list_metrics
from leansd.evaluation.quality import Embedded, Embedder, QualityJudge, embed_pictures
from leansd.evaluation.records import Record
from leansd.evaluation.rivals import Rival
from leansd.evaluation.runs import PipelineCall, expand_calls, run_calls, split_calls
from leansd.evaluation.timing import Timing, compare_timings

OnRun = Callable[[str, float], None]
"""Told who ran a batch, and what that cost in full runs of a batch, as expected."""


@dataclass(frozen=True)
class Stage:
    """What a contest is run on.

    Attributes:
        calls: for the pipeline of the contest's task; call `i` has seed `seed + i`.
        schedulers: by the name of their sampler, the contest's own among them.
        spread_sets: further sets of the full run from other seeds, to tell chance from effect.
    """

    subject: str
    calls: Sequence[PipelineCall]
    schedulers: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0
    batch: int = 8
    embedder: Embedder | None = None
    spread_sets: int = 2
    converged_steps: int = CONVERGED_STEPS


@dataclass(frozen=True)
class LineUp:
    """Who takes part in a contest, the full run first, and who does not and why."""

    contestants: tuple[Contestant, ...]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Runs:
    """All rounds of a contest.

    Attributes:
        seconds: of every round, by contestant.
        drawings: of all rounds, by contestant; pictures in 8 bits.
        left_out: rivals that failed here, and why.
    """

    seconds: Mapping[str, tuple[float, ...]]
    drawings: Mapping[str, Drawings]
    left_out: Mapping[str, str]


def line_up(grounds: Grounds, own: Sequence[Contestant], rivals: Sequence[Rival]) -> LineUp:
    """Everybody for a contest.

    Raises:
        LeansdError: two have the same name.
    """
    contestants = [send_full(grounds.contest), *own]
    left_out: dict[str, str] = {}
    for rival in rivals:
        obstacle = rival.find_obstacle()
        if obstacle:
            left_out[rival.name] = obstacle
        else:
            contestants += rival.send(grounds)
    names = [each.name for each in contestants]
    for name in names:
        if names.count(name) > 1:
            raise LeansdError(
                f"two contestants are called {name!r}: rename a plan, or leave it out"
            )
    return LineUp(tuple(contestants), left_out)


def run_rounds(
    contest: Contest, pipe: Any, stage: Stage, line: LineUp, on_run: OnRun = lambda name, cost: None
) -> Runs:
    """Everybody on every batch, after a warm-up round that does not count.

    A rival that fails is left out from there on; ours and the full run must not.
    """
    racing = list(line.contestants)
    parts = split_calls(stage.calls, stage.batch)
    seconds: dict[str, list[float]] = {each.name: [] for each in racing}
    drawn: dict[str, list[Drawings]] = {each.name: [] for each in racing}
    left_out = dict(line.left_out)
    for turn, part in enumerate([parts[0], *parts]):
        shift = turn % len(racing)
        for each in racing[shift:] + racing[:shift]:
            try:
                drawings, spent = run_batch(contest, pipe, stage, each, part)
            except Exception as error:
                if each.family in (FULL, OURS):
                    raise
                left_out[each.name] = f"failed here: {_first_line(error)}"
                racing.remove(each)
                continue
            if turn:
                seconds[each.name].append(spent)
                drawn[each.name].append(drawings)
            on_run(each.name, each.cost)
    names = [each.name for each in racing]
    return Runs(
        {name: tuple(seconds[name]) for name in names},
        {name: join_drawings(drawn[name]) for name in names},
        left_out,
    )


def run_batch(
    contest: Contest, pipe: Any, stage: Stage, contestant: Contestant, part: range
) -> tuple[Drawings, float]:
    """One contestant on one batch of calls, and the seconds of the whole pipeline call."""
    own = stage.schedulers[contestant.sampler or contest.sampler]
    before = pipe.scheduler
    pipe.scheduler = own.__class__.from_config(own.config)  # none carries over to the next run
    try:
        # What contestants do on entering is not timed: a user does it once.
        with contestant.enter(pipe) as called:
            finals = run_calls(
                called,
                [stage.calls[place] for place in part],
                contestant.steps,
                seed=stage.seed + part.start,
                batch=len(part),
                settings=stage.settings,
            )
    finally:
        pipe.scheduler = before
    pictures = finals.pictures.mul(255).round().byte()
    return Drawings(finals.latents, pictures), sum(finals.seconds)


def draw_set(
    contest: Contest,
    pipe: Any,
    stage: Stage,
    contestant: Contestant,
    on_run: OnRun = lambda name, cost: None,
) -> Drawings:
    """All calls by one contestant, untimed."""
    drawn: list[Drawings] = []
    for part in split_calls(stage.calls, stage.batch):
        drawn.append(run_batch(contest, pipe, stage, contestant, part)[0])
        on_run(contestant.name, contestant.cost)
    return join_drawings(drawn)


def draw_converged(
    contest: Contest, pipe: Any, stage: Stage, on_run: OnRun = lambda name, cost: None
) -> Drawings:
    """The same sampler in many more steps: what all step counts of it approximate."""
    steps = stage.converged_steps
    contestant = Contestant(CONVERGED, CONVERGED, steps, steps / contest.steps)
    return draw_set(contest, pipe, stage, contestant, on_run)


def draw_spread(
    contest: Contest, pipe: Any, stage: Stage, on_run: OnRun = lambda name, cost: None
) -> list[Embedded]:
    """Sets of the full run from other seeds, as the CLIP sees them; none without a CLIP."""
    if stage.embedder is None:
        return []
    count = len(stage.calls)
    sets: list[Embedded] = []
    for number in range(1, stage.spread_sets + 1):
        other = replace(stage, seed=stage.seed + number * count)
        drawn = draw_set(contest, pipe, other, send_full(contest), on_run)
        sets.append(embed_pictures(stage.embedder, drawn.pictures))
    return sets


def summarise(
    contest: Contest,
    stage: Stage,
    line: LineUp,
    runs: Runs,
    converged: Drawings,
    spread: Sequence[Embedded] = (),
    *,
    fields: Mapping[str, Any],
) -> list[Record]:
    """All numbers of a contest; `fields` are on every record."""
    judge = make_judge(stage, runs.drawings[FULL].pictures, spread)
    full = Timing(runs.seconds[FULL])
    shared = {
        **fields,
        "subject": stage.subject,
        "seed": stage.seed,
        **describe_contest(contest),
        "calls": len(stage.calls),
        "batch": stage.batch,
    }
    left_out = "; ".join(f"{name}: {why}" for name, why in runs.left_out.items())
    records: list[Record] = []
    for each in line.contestants:
        if each.name not in runs.seconds:
            continue
        base = {
            **shared,
            "plan": each.name,
            "fingerprint": each.fingerprint,
            "family": each.family,
            "run_steps": each.steps,
            "run_sampler": each.sampler or contest.sampler,
        }
        timing = Timing(runs.seconds[each.name])
        rounds: dict[str, Any] = {
            "rounds": len(timing.seconds),
            "each": _join_numbers(timing.seconds),
        }
        if each.family == FULL and left_out:
            rounds["left_out"] = left_out
        records.append(
            Record(**base, **rounds, metric="seconds", value=timing.median, unit="s a batch")
        )
        ratio = compare_timings(full, timing)
        span: dict[str, Any] = {"low": ratio.low, "high": ratio.high, "rounds": len(timing.seconds)}
        records.append(Record(**base, **span, metric="speedup", value=ratio.median, unit="x"))
        records += [
            measure.summarise(base)
            for measure in _measure(each, contest, stage, runs, converged, judge)
        ]
    return records


def describe_contest(contest: Contest) -> dict[str, Any]:
    """The fields that tell a contest from others."""
    return {
        "task": contest.task,
        "sampler": contest.sampler,
        "steps": contest.steps,
        "guidance": contest.guidance,
    }


def make_judge(stage: Stage, full: Tensor, spread: Sequence[Embedded]) -> QualityJudge | None:
    """The quality of sets beside the full run's pictures [n, 3, H, W]; None without a CLIP."""
    if stage.embedder is None:
        return None
    prompts = [call.get("prompt") for call in expand_calls(stage.calls)]
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    own = embed_pictures(stage.embedder, full)
    return QualityJudge(stage.embedder, texts if len(texts) == len(prompts) else None, own, spread)


def join_drawings(parts: Sequence[Drawings]) -> Drawings:
    latents, pictures = ([getattr(part, of) for part in parts] for of in ("latents", "pictures"))
    return Drawings(torch.cat(latents), torch.cat(pictures))


def _measure(
    each: Contestant,
    contest: Contest,
    stage: Stage,
    runs: Runs,
    converged: Drawings,
    judge: QualityJudge | None,
) -> Iterator[Measure]:
    drawn = runs.drawings[each.name]
    limit = Case(CONVERGED, stage.converged_steps)
    measured = compare_drawings(drawn, converged, limit, list_metrics())
    if each.family != FULL:
        reference = Case(FULL, contest.steps)
        full = runs.drawings[FULL]
        measured = chain(compare_drawings(drawn, full, reference, list_metrics()), measured)
    if judge is not None:
        measured = chain(measured, judge.judge(drawn.pictures))
    yield from measured


def _join_numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__

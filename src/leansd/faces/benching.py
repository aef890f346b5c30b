"""Holding a benchmark: contest after contest, each on record as soon as it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leansd.anatomy.cost import dissect
from leansd.evaluation.bench import (
    LineUp,
    Stage,
    draw_converged,
    draw_spread,
    line_up,
    run_batch,
    run_rounds,
    summarise,
)
from leansd.evaluation.compare import Drawings
from leansd.evaluation.contest import STRENGTH, Contest, Grounds, send_full
from leansd.evaluation.fingerprints import fingerprint_pipe
from leansd.evaluation.quality import Embedder
from leansd.evaluation.records import Record, stamp
from leansd.evaluation.resuming import SETTINGS, fingerprint_contest, list_done, put_contest
from leansd.evaluation.rivals import Rival
from leansd.faces.contests import LONG, OTHERS, choose_plans, draw_inputs, list_settings, send_own
from leansd.loading import as_image_to_image
from leansd.runtime.samplers import make_scheduler

OnWork = Callable[[str, float], None]
"""Told what runs, and how many expected seconds of work it was."""


@dataclass(frozen=True)
class Setup:
    """What the user asked for."""

    model: str
    prompts: Sequence[str]
    rivals: Sequence[Rival]
    plans: Sequence[str]
    seed: int
    batch: int
    embedder: Embedder | None
    spread_sets: int
    converged_steps: int


@dataclass(frozen=True)
class Entry:
    """A contest that is ready to be held."""

    contest: Contest
    pipe: Any
    stage: Stage
    line: LineUp
    settings: str


def prepare(pipe: Any, setup: Setup, contests: Sequence[Contest]) -> list[Entry]:
    """Line up everybody for every contest; draws the pictures that image-to-image starts from."""
    weights, anatomy = fingerprint_pipe(pipe), dissect(pipe.unet)
    names = dict.fromkeys([*(each.sampler for each in contests), *OTHERS])
    schedulers = {name: make_scheduler(pipe, name) for name in names}
    tasks: dict[str, tuple[Any, Sequence[Any]]] = {"text-to-image": (pipe, setup.prompts)}
    entries: list[Entry] = []
    for contest in contests:
        if contest.task not in tasks:
            other: Any = as_image_to_image(pipe)
            other.set_progress_bar_config(disable=True)
            tasks[contest.task] = (
                other,
                draw_inputs(
                    pipe,
                    setup.prompts,
                    schedulers[contest.sampler],
                    guidance=contest.guidance,
                    batch=setup.batch,
                ),
            )
        runner, calls = tasks[contest.task]
        others = tuple(name for name in OTHERS if name != contest.sampler)
        own = choose_plans(setup.plans, contest, anatomy.up_blocks)
        grounds = Grounds(contest, runner, anatomy, others, own)
        stage = Stage(
            subject=setup.model,
            calls=calls,
            schedulers=schedulers,
            settings=list_settings(contest),
            seed=setup.seed,
            batch=setup.batch,
            embedder=setup.embedder,
            spread_sets=setup.spread_sets if contest.steps == LONG or contest.is_long else 0,
            converged_steps=setup.converged_steps,
        )
        line = line_up(grounds, send_own(grounds), setup.rivals)
        settings = fingerprint_contest(contest, stage, line, weights)
        entries.append(Entry(contest, runner, stage, line, settings))
    return entries


def drop_done(entries: Sequence[Entry], path: Path) -> list[Entry]:
    """The entries that a file of records does not hold yet."""
    done = list_done(path)
    return [entry for entry in entries if entry.settings not in done]


def time_step(entry: Entry) -> float:
    """Seconds that a step of a full batch takes here, from one run after a warm-up."""
    full = send_full(entry.contest)
    part = range(min(entry.stage.batch, len(entry.stage.calls)))
    _ = run_batch(entry.contest, entry.pipe, entry.stage, full, part)
    start = time.perf_counter()
    run_batch(entry.contest, entry.pipe, entry.stage, full, part)
    return (time.perf_counter() - start) / count_run_steps(entry.contest)


def count_run_steps(contest: Contest) -> float:
    """The steps that a full run takes."""
    return contest.steps * (STRENGTH if contest.task == "image-to-image" else 1)


def estimate(entries: Sequence[Entry], step: float) -> float:
    """The expected seconds of all contests, at so many seconds a step of a full batch."""
    seen: set[tuple[Any, ...]] = set()
    steps = 0.0
    for entry in entries:
        contest, stage = entry.contest, entry.stage
        rounds = -(-len(stage.calls) // stage.batch)
        share = (rounds + 1) * sum(each.cost for each in entry.line.contestants)
        share += rounds * stage.spread_sets if stage.embedder is not None else 0
        if name_limit(contest) not in seen:
            share += rounds * stage.converged_steps / contest.steps
            seen.add(name_limit(contest))
        steps += share * count_run_steps(contest)
    return steps * step


def name_limit(contest: Contest) -> tuple[Any, ...]:
    """What contests have in common that have the same converged run."""
    return contest.task, contest.sampler, contest.guidance


def hold(
    entries: Sequence[Entry],
    path: Path,
    *,
    step: float = 1.0,
    on_work: OnWork = lambda what, seconds: None,
    on_end: Callable[[Entry, Sequence[Record]], None] = lambda entry, records: None,
) -> None:
    """Hold all contests; the records of each are in the file before the next begins."""
    limits: dict[tuple[Any, ...], Drawings] = {}
    for entry in entries:
        contest, pipe, stage = entry.contest, entry.pipe, entry.stage
        unit = step * count_run_steps(contest)

        def on_run(name: str, cost: float, unit: float = unit, contest: Contest = contest) -> None:
            on_work(f"{contest}: {name}", cost * unit)

        if name_limit(contest) not in limits:
            limits[name_limit(contest)] = draw_converged(contest, pipe, stage, on_run)
        spread = draw_spread(contest, pipe, stage, on_run)
        runs = run_rounds(contest, pipe, stage, entry.line, on_run)
        fields: Mapping[str, Any] = {**stamp(pipe.device), SETTINGS: entry.settings}
        limit = limits[name_limit(contest)]
        records = summarise(contest, stage, entry.line, runs, limit, spread, fields=fields)
        put_contest(path, records)
        on_end(entry, records)

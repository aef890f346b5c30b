"""`leansd bench`: ours and every rival in one process, in turns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import typer

from leansd.cli.command import Result, command, option
from leansd.cli.options import (
    Calls,
    Clip,
    ConvergedSteps,
    DeviceOptions,
    Force,
    ModelOption,
    Opening,
    SeedsForSpread,
    complete_plan,
    complete_sampler,
)
from leansd.cli.terminal import follow, note, warn
from leansd.evaluation.prompt_sets import choose_prompts, read_prompts
from leansd.files import check_file, check_folder
from leansd.text import describe_duration

if TYPE_CHECKING:
    from leansd.evaluation.bench import BenchSettings, PreparedContest
    from leansd.evaluation.compare import RunProgress
    from leansd.evaluation.records import Record
    from leansd.evaluation.standings import Margin, Standing

app = typer.Typer(add_completion=False)
CALLS = Calls(count=64, seed=500_000)


@dataclass(frozen=True)
class Field:
    """Who is measured, and under which samplers and step counts."""

    rivals: str = option("all", "all, or some: fewer, samplers, deepcache, tgate, tomesd ...")
    plans: list[str] | None = option(
        None,
        "Ours: a preset, a plan file, or a folder of SAMPLER-STEPS-GOAL.json; once "
        "for each. The speed presets by default.",
        autocompletion=complete_plan,
    )
    sampler: list[str] | None = option(
        None,
        "Once for each; dpm++2m, ddim and euler by default, and dpm++2m-karras, unipc, dpm++sde, "
        "euler-a at one step count; flow-euler and flow-dpm++2m where the model predicts a flow.",
        autocompletion=complete_sampler,
    )
    steps: list[int] | None = option(None, "Once for each; 20, 30 and 50 by default.", min=2)
    quick: bool = option(False, "A first look: 8 prompts, one sampler and step count.", "--quick")
    force: Force = False

    def limit(self, calls: Calls) -> Calls:
        """The calls of a contest: fewer of them in a first look."""
        count = calls.count or 64
        if not self.quick:
            return replace(calls, count=count)
        return replace(calls, count=min(count, 8), batch=min(calls.batch, 2))

    def check(self, converged_steps: int) -> tuple[list[str], list[int]]:
        """Samplers that are named, and step counts.

        Raises:
            LeansdError: there is no such sampler, or runs are too long.
        """
        from leansd.evaluation.bench import STEPS, check_plans
        from leansd.evaluation.compare import CONVERGED
        from leansd.evaluation.evaluation import make_reference
        from leansd.runtime.samplers import check_sampler

        check_plans(self.plans or [])
        samplers = list(dict.fromkeys(self.sampler or ()))
        counts = list(dict.fromkeys(self.steps or STEPS))
        for name in samplers:
            check_sampler(name)
        make_reference(CONVERGED, max(counts), converged_steps)
        return samplers, counts


@command(
    app,
    "bench",
    "leansd bench --quick --rivals fewer,deepcache --out quick.jsonl",
    "leansd bench --sampler ddim --steps 30 --count 16 --report ddim",
    keeps=True,
)
def bench(
    *,
    model: ModelOption = "emoji",
    field: Field,
    calls: Calls = CALLS,
    converged_steps: ConvergedSteps = 150,
    seeds_for_spread: SeedsForSpread = 2,
    clip: Clip = None,
    out: Path = option(Path("benchmarks/results/bench.jsonl"), "File of records."),
    report: Path = option(Path("bench"), "Folder for plots and the page."),
    resume: bool = option(True, "Go on where a stopped run with the same settings was."),
    place: DeviceOptions,
) -> Result:
    """Measure ours against every rival: time and fidelity of the same runs, interleaved.

    Every contest is on record when it is over; the same command goes on with the next.
    """
    from leansd.evaluation.bench import choose_lineup, drop_done, list_contests, prepare

    # Everything that can be wrong is found before a weight is read.
    check_file(out)
    check_folder(report)
    opening = Opening(place.device, place.dtype)
    opening.check_model(model)
    samplers, counts = field.check(converged_steps)
    calls = field.limit(calls)
    settings = replace(
        _choose_settings(model, field, calls, clip),
        spread_sets=seeds_for_spread,
        converged_steps=converged_steps,
    )

    pipe = opening.open(model)
    if settings.embedder is not None:
        settings.embedder.clip.to(pipe.device)
    guidance = calls.find_guidance(pipe, model)
    lineup = choose_lineup(pipe)
    hosts = () if samplers else lineup.hosts
    contests = list_contests(
        samplers or lineup.samplers, counts, guidance, hosts=hosts, quick=field.quick
    )
    entries = prepare(pipe, settings, contests)
    waiting = drop_done(entries, out) if resume else entries
    _hold(waiting, settings, out, f"{len(waiting)} of {len(entries)} contests on {pipe.device}")
    facts = {"model": model, "seed": calls.seed, "count": calls.count, "batch": calls.batch}
    lacks = "no quality of sets: the model has no CLIP of its own, give one by --clip"
    return _give_standings(
        _read_held(out, entries),
        {**facts, "held": len(waiting)},
        [lacks] if settings.embedder is None else [],
        out,
        report,
        pipe.device,
    )


def _choose_settings(model: str, field: Field, calls: Calls, clip: Path | None) -> "BenchSettings":

    from leansd.evaluation.bench import BenchSettings, choose_plans
    from leansd.evaluation.extractors import find_embedder
    from leansd.evaluation.rivals import choose_rivals
    from leansd.tuning.front import read_plans

    texts = read_prompts(calls.prompts) if calls.prompts is not None else None
    return BenchSettings(
        model=model,
        prompts=choose_prompts(model, calls.count or 0, texts),
        rivals=choose_rivals(field.rivals),
        choose_plans=partial(
            choose_plans,
            field.plans or (),
            read_front=read_plans,
            force=field.force,
            tell=cache(warn),  # each contest has the same to say
        ),
        seed=calls.seed,
        batch=calls.batch,
        embedder=find_embedder(model, clip),
    )


def _hold(
    waiting: "Sequence[PreparedContest]", settings: "BenchSettings", out: Path, which: str
) -> None:
    """Holds contests; says before how long they take, and what goes on."""
    from leansd.evaluation.bench import estimate, hold, time_step

    step = time_step(waiting[0], settings) if waiting else 0.0
    lengths = estimate(waiting, settings, step)
    expected = dict(zip((each.contest for each in waiting), lengths, strict=True))
    note(
        f"{which}, {len(settings.prompts)} pictures each: about "
        f"{describe_duration(sum(lengths))} at {step:.3f} s a step of {settings.batch}"
    )
    with follow("") as bar:

        def show(each: "PreparedContest", far: "RunProgress") -> None:
            before = sum(lengths[: list(expected).index(each.contest)])
            done = before + expected[each.contest] * far.done / far.total
            bar.count(done, round(sum(lengths)), f"{each.contest}: {far.case}")

        hold(
            waiting,
            settings,
            out,
            on_progress=show,
            on_end=lambda entry, records: note(f"on record: {entry.contest}"),
        )


def _read_held(out: Path, entries: "Sequence[PreparedContest]") -> "list[Record]":
    from leansd.evaluation.bench import SETTINGS
    from leansd.evaluation.records import get_field, load_records

    held = {entry.fingerprint for entry in entries}
    return [record for record in load_records(out) if get_field(record, SETTINGS) in held]


def _give_standings(
    records: "Sequence[Record]",
    facts: dict[str, Any],
    remarks: list[str],
    out: Path,
    report: Path,
    device: Any,
) -> Result:

    from leansd.evaluation.standings import (
        describe_quality,
        list_left_out,
        read_standings,
        tabulate_computing,
        tabulate_margins,
    )
    from leansd.report.measurements import report_bench

    standings = read_standings(records)
    shown: list[Any] = []
    for standing in standings:
        quality = describe_quality(standing)
        lines = [*([quality] if quality else []), *list_left_out(standing)]
        shown += [
            tabulate_margins(standing),
            tabulate_computing(standing),
            *(fill(line, 80) for line in lines),
        ]
    return Result(
        facts={**facts, "contests": [_list_margins(each) for each in standings]},
        shown=[*shown, *remarks],
        files=[out],
        pages={report / "report.html": report_bench(standings)},
        device=device,
    )


def _list_margins(standing: "Standing") -> dict[str, Any]:
    from leansd.evaluation.runs import FULL
    from leansd.evaluation.standings import PREDICTED, SHARED, SINGLE, list_left_out

    return {
        **standing.fields,
        "left_out": list_left_out(standing),
        "margins": [
            {**_describe_margin(margin), "reference": reference}
            for reference in standing.references
            for margin in standing.find_margins(reference)
        ],
        "computing": [
            {**_describe_margin(margin), "reference": FULL, "shared": reading is SHARED}
            for reading in (SINGLE, SHARED)
            for margin in standing.find_margins(by=PREDICTED, reading=reading)
        ],
    }


def _describe_margin(margin: "Margin") -> dict[str, Any]:
    return {
        "speed": margin.speed,
        "ours": margin.ours and margin.ours.quality,
        "plan": margin.ours and margin.ours.name,
        "rival": margin.rival and margin.rival.quality,
        "family": margin.family,
        "margin": margin.value,
    }

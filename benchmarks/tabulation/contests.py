"""Contests: ours and the best rival, at equal time, at equal computing and in UNet calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from leansd.evaluation.bench import STRENGTH
from leansd.evaluation.records import Record, load_records
from leansd.evaluation.rivals import CALLS, OURS, Contest
from leansd.evaluation.runs import FULL
from leansd.evaluation.standings import (
    MEASURED,
    PREDICTED,
    SHARED,
    SINGLE,
    SPEEDS,
    Reading,
    Standing,
    read_front,
    read_standings,
    show_margin,
    summarise_margin,
)
from leansd.plans.presets import SPEED_PRESETS
from leansd.text import Table
from tabulation.cells import RESULTS, get, name_devices, tabulate_ratio

FLOW_RIVALS = {
    "fewer": "fewer steps",
    "samplers": "fewer steps of DPM-Solver++ 2M or UniPC",
    "spectrum": "Spectrum",
    "taylorseer": "TaylorSeer, evenly spaced",
    "residual": "EasyCache's reuse, evenly spaced",
}
MARGINS = ("ours and the best rival, dB to full", *(f"at {speed:g}x" for speed in SPEEDS))


def tabulate_bench() -> str:
    """For each contest of `leansd bench`: ours and the best rival at the same speed."""
    records = load_records(RESULTS / "bench.jsonl")
    standings = read_standings(records)
    tables = {
        "At equal time, by the clock:": tabulate_margins(standings, MEASURED, SINGLE),
        "At equal computing, by what is computed (adaptive plans left out):": tabulate_margins(
            standings, PREDICTED, SINGLE
        ),
        "At equal computing over many pictures: two plans draw a share each, and so do any two "
        "rivals:": tabulate_margins(standings, PREDICTED, SHARED),
        "The same in UNet calls, leads over the best rival in dB:": tabulate_few_margins(standings),
    }
    return join_tables(records, tables)


def tabulate_second() -> str:
    """The same on the second model by what is computed: presets alone, and plans tuned there."""
    records = load_records(RESULTS / "second.jsonl")
    standings = read_standings(records)
    unfitted = [keep_presets(each) for each in standings]
    tables = {
        "The presets, at equal computing:": tabulate_margins(unfitted, PREDICTED, SINGLE),
        "Those and plans tuned there:": tabulate_margins(standings, PREDICTED, SINGLE),
        "The same in UNet calls, leads over the best rival in dB, where two plans, or any two "
        "rivals, draw a share each:": tabulate_few_margins(standings),
    }
    return join_tables(records, tables)


def join_tables(records: Sequence[Record], tables: Mapping[str, Table]) -> str:
    """Under what circumstances was measured, then each table behind what is said of it."""
    full = next(record for record in records if record.plan == FULL)
    circumstances = (
        f"{full.subject}, {get(full, 'calls')} pictures a contest in batches of "
        f"{get(full, 'batch')}; {name_devices(records)}; torch {full.torch}:"
    )
    parts = (f"{told}\n\n{table.markdown()}" for told, table in tables.items())
    return "\n\n".join((circumstances, *parts)) + "\n"


def keep_presets(standing: Standing) -> Standing:
    """The contest as if presets were all that is ours."""
    names = {
        name
        for name in standing.names
        if standing.get_family(name) != OURS or name in SPEED_PRESETS
    }
    cells = {key: record for key, record in standing.cells.items() if key[0] in names}
    return replace(standing, cells=cells)


def tabulate_few_margins(standings: Sequence[Standing]) -> Table:
    """A row a contest, a column a number of UNet calls; two plans, or any two rivals, share."""
    rows: list[tuple[str, ...]] = []
    for standing in standings:
        contest = tell_strength(standing.contest)
        full = contest.count_run(contest.steps)
        margins = standing.find_margins(
            speeds=[full / calls for calls in CALLS], by=PREDICTED, reading=SHARED
        )
        cells = (
            "–" if each.value is None else f"{show_margin(each)} ({each.family})"
            for each in margins
        )
        rows.append((standing.title, *cells))
    return Table(("UNet calls", *(str(calls) for calls in CALLS)), tuple(rows))


def tell_strength(contest: Contest) -> Contest:
    """The contest with the usual strength of image-to-image, which records do not name."""
    unnamed = contest.task == "image-to-image" and contest.strength == 1
    return replace(contest, strength=STRENGTH) if unnamed else contest


def tabulate_margins(standings: Sequence[Standing], by: str, reading: Reading) -> Table:
    """A row a contest, a column a speed."""
    rows = [
        (
            standing.title,
            *(summarise_margin(each) for each in standing.find_margins(by=by, reading=reading)),
        )
        for standing in standings
    ]
    return Table(MARGINS, tuple(rows))


def tabulate_flow() -> str:
    """Ours on the flow model, and what each rival reaches by as much computing."""
    records = load_records(RESULTS / "flow.jsonl")
    full = next(record for record in records if record.plan == "full")
    parts = [
        f"Stable Diffusion 3's transformer, {get(full, 'calls')} pictures a contest in batches of "
        f"{get(full, 'batch')}, dB to the full run; {full.device}; torch {full.torch}:\n"
    ]
    for standing in read_standings(records):
        points = standing.list_points(FULL, PREDICTED)
        head = (standing.title, "speed-up, measured", "**ours**", *FLOW_RIVALS.values())
        parts += ["| " + " | ".join(head) + " |", "|---" * 2 + "|---:" * (len(head) - 2) + "|"]
        for own in points[OURS]:
            found = [read_front(points.get(name, []), own.speed) for name in FLOW_RIVALS]
            columns = (
                f"{round(standing.fields['steps'] / own.speed)} calls",
                tabulate_ratio(standing.cells[own.name, MEASURED, None]),
                f"**{own.quality:.1f}**",
                *("–" if each is None else f"{each.quality:.1f}" for each in found),
            )
            parts.append("| " + " | ".join(columns) + " |")
        parts.append("")
    return "\n".join(parts)

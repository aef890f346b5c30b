"""Reports of measurements: an evaluation, a benchmark, a profile, scores of a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from leansd.evaluation.compare import CONVERGED
from leansd.evaluation.evaluation import Evaluation
from leansd.evaluation.extractors import find_prompt, open_picture
from leansd.evaluation.fidelity import as_images
from leansd.evaluation.picture_sets import PictureEntry
from leansd.evaluation.prediction import (
    EXAMPLE,
    Profiled,
    find_worst,
    show_milliseconds,
    show_seconds,
    tabulate_blocks,
    tabulate_gains,
    tabulate_predictions,
    tabulate_split,
)
from leansd.evaluation.records import Record, get_field
from leansd.evaluation.rivals import OURS
from leansd.evaluation.runs import FULL
from leansd.evaluation.scoring import Scored, Scoring
from leansd.evaluation.set_metrics import METRICS, ReferenceKind, Score
from leansd.evaluation.standings import (
    Standing,
    describe_quality,
    list_left_out,
    tabulate_all,
    tabulate_computing,
    tabulate_margins,
)
from leansd.report.drawings import Bar, draw_bars
from leansd.report.page import (
    DECIBELS,
    Chart,
    Drawing,
    Listing,
    PictureGrid,
    Prose,
    ReportPage,
    Section,
    attach_records,
    count,
    show_differences,
)
from leansd.report.plots import Family, PlotPoint, plot_families, plot_tradeoff
from leansd.text import Table

# -- evaluate ------------------------------------------------------------------------------------

FIDELITY = {
    "psnr": ("PSNR", ".1f"),
    "ssim": ("SSIM", ".3f"),
    "lpips": ("LPIPS", ".4f"),
    "latent_error": ("latent error", ".3f"),
}
QUALITY = {"clip_score": ("CLIP score", ".2f"), "retrieval": ("retrieval", ".3f")}


def report_evaluation(
    evaluation: Evaluation, references: Sequence[str], prompts: Sequence[str], notes: Sequence[str]
) -> ReportPage:
    """Fidelity to every reference, the quality of sets, pictures; `notes` say what is missing."""
    records = evaluation.records
    first = records[0]
    fronts = [_plot_cases(records, name, f"front-{place}") for place, name in enumerate(references)]
    full, *others = (
        (name, "", as_images(pictures)) for name, pictures in evaluation.pictures.items()
    )
    how = (
        f"Model {first.subject}, {get_field(first, 'calls')} pictures, picture i from seed "
        f"{first.seed} + i, {get_field(first, 'steps')} steps of {get_field(first, 'sampler')}, "
        f"guidance {get_field(first, 'guidance')}. Predicted: multiply-accumulates of the UNet, "
        "the full run's over the case's."
    )
    quality = tabulate_quality(records)
    sections: list[Section] = [
        Chart(
            "Speed against fidelity",
            [drawing for drawing in fronts if drawing is not None],
            ["Further right is faster, further up is closer. Diamonds are runs without a plan."],
        ),
        show_differences("The same prompts, the same seeds", prompts[: len(full[2])], full, others),
        *(
            Listing(f"Fidelity to {name}", tabulate_fidelity(records, name), [_explain(name)])
            for name in references
        ),
        *([Listing(quality.caption, quality, _explain_quality(records))] if quality else []),
        Prose("How this was measured", [how, *notes]),
    ]
    return ReportPage(
        title=f"How true the pictures of plans are: {first.subject}",
        summary=summarise_evaluation(records),
        measured=f"{get_field(first, 'calls')} pictures of {first.subject} from the same seeds: "
        + ", ".join(dict.fromkeys(record.plan for record in records)),
        sections=sections,
        attachments=[
            attach_records(records),
            attach_records(evaluation.values, "values.jsonl"),
        ],
    )


def tabulate_fidelity(records: Sequence[Record], reference: str) -> Table:
    """Every case against one reference."""
    found = {
        (record.plan, record.metric): record
        for record in records
        if get_field(record, "reference") == reference and record.metric in FIDELITY
    }
    metrics = [metric for metric in FIDELITY if any(has == metric for _, has in found)]
    gains = _list_gains(records)
    rows = [
        (
            plan,
            f"{gains[plan]:.2f}x",
            *(
                show_spread(found[plan, metric], "standard_error", FIDELITY[metric][1])
                for metric in metrics
            ),
        )
        for plan in dict.fromkeys(plan for plan, _ in found)
    ]
    heads = (FIDELITY[metric][0] for metric in metrics)
    return Table(("plan", "predicted", *heads), tuple(rows), f"Against {reference}")


def tabulate_quality(records: Sequence[Record]) -> Table | None:
    """Every case as a set; None where no CLIP looked at it."""
    sets = [record for record in records if get_field(record, "clip") is not None]
    if not sets:
        return None
    columns: dict[tuple[str, Any], tuple[str, str]] = {}
    cells: dict[str, dict[tuple[str, Any], str]] = {}
    for record in sets:
        reference = get_field(record, "reference")
        key = record.metric, reference
        name, form = QUALITY.get(record.metric, (f"Fréchet (CLIP) to {reference}", ".3f"))
        columns[key] = name, form
        cells.setdefault(record.plan, {})[key] = show_spread(record, "seed_spread", form)
    rows = ((plan, *(row.get(key, "–") for key in columns)) for plan, row in cells.items())
    clip = get_field(sets[0], "clip")
    heads = (name for name, _ in columns.values())
    return Table(("plan", *heads), tuple(rows), f"Quality of sets, seen by {clip}")


def show_spread(record: Record, spread: str, form: str) -> str:
    """`31.2 ±0.4`."""
    width = get_field(record, spread)
    return f"{record.value:{form}}" + (f" ±{width:{form}}" if width is not None else "")


def summarise_evaluation(records: Sequence[Record]) -> str:
    """How close the plans' pictures are to the full run's, in a sentence."""
    gains = _list_gains(records)
    close = {
        record.plan: record.value
        for record in records
        if record.metric == "psnr" and get_field(record, "reference") == FULL and record.fingerprint
    }
    told = [
        f"{name} does {gain:.1f} times less work and stays {close[name]:.0f} dB close"
        for name, gain in gains.items()
        if gain > 1 and name in close
    ]
    if not told:
        return "No plan was compared with the full run, only runs without one."
    return (
        f"Compared with pictures drawn in full, {'; '.join(told)} (above about 40 dB differences "
        "are hard to see)."
    )


def _list_gains(records: Sequence[Record]) -> dict[str, float]:
    return {each.plan: each.value for each in records if each.metric == "predicted_speedup"}


def _plot_cases(records: Sequence[Record], reference: str, name: str) -> Drawing | None:
    """All cases against a reference; None where nothing of them was measured."""
    gains = _list_gains(records)
    points = [
        PlotPoint(each.plan, gains[each.plan], each.value, is_rival=not each.fingerprint)
        for each in records
        if each.metric == "psnr"
        and get_field(each, "reference") == reference
        and each.plan in gains
    ]
    if not points:
        return None
    return plot_tradeoff(
        points,
        x_name="predicted speed-up of the UNet",
        y_name=f"PSNR to {reference}, dB",
        name=name,
        caption=f"Against {reference}.",
    )


def _explain(reference: str) -> str:
    spread = "After ±, the standard error over the pictures."
    if reference == FULL:
        return f"The full run from the same seeds: is it still the same picture? {spread}"
    what = "the same sampler in many more steps" if reference == CONVERGED else "another run"
    return (
        f"{reference} is {what}, from the same seeds. Who only copies the full run's own "
        f"discretisation error gains nothing here; the first row is what that error is. {spread}"
    )


def _explain_quality(records: Sequence[Record]) -> list[str]:
    return [
        "CLIP score: 100 x cosine of picture and prompt. Retrieval: share of pictures that suit "
        "their own prompt better than every other prompt of the set.",
        "Fréchet (CLIP): the distance of FID in that CLIP's pooled features, so no FID; `leansd "
        "evaluate --pictures` has the field's. Against the full run of other seeds "
        "no case has the advantage of shared noise, and the full run's own value is what chance "
        "gives.",
        "After ±, the deviation between sets of the full run from different seeds: what chance "
        "alone does to a set. Same seeds pair the pictures, which tells smaller differences apart."
        if any(get_field(record, "seed_spread") is not None for record in records)
        else "Without --seeds-for-spread there is no telling chance from effect.",
    ]


# -- bench ---------------------------------------------------------------------------------------


def report_bench(standings: Sequence[Standing]) -> ReportPage:
    """For every contest the plots, the margins and everything that was measured."""
    first = next(iter(standings[0].cells.values()))
    drawn = get_field(first, "calls")
    return ReportPage(
        title=f"Lean plans and their rivals on {first.subject}",
        summary=summarise_bench(standings),
        measured=f"{count(len(standings), 'contest')} on {first.subject}, {drawn} pictures each, "
        "everybody in turns in one process",
        sections=[
            *(section for each in standings for section in _show_contest(each)),
            Prose("How this was measured", describe_bench(standings[0])),
        ],
        attachments=[attach_records([r for each in standings for r in each.cells.values()])],
    )


def summarise_bench(standings: Sequence[Standing]) -> str:
    """How far ours are ahead at twice the speed, over all contests."""
    margins = [each.find_margins(speeds=(2.0,))[0].value for each in standings]
    told = [margin for margin in margins if margin is not None]
    ahead = sum(value > 0 for value in told)
    if not told:
        return "At twice the speed there is nothing to compare: one side has no plan so fast."
    if len(told) == 1:
        word = "closer to" if ahead else "further from"
        return (
            f"At twice the speed, pictures drawn after our plans are {word} the originals than "
            f"those of the best other method: by {abs(told[0]):.1f} dB."
        )
    return (
        f"At twice the speed, our plans' pictures are closer to the originals than those "
        f"of the best other method in {ahead} of {len(told)} contests, by {min(told):+.1f} to "
        f"{max(told):+.1f} dB."
    )


def _show_contest(standing: Standing) -> list[Section]:
    left_out = [f"Left out: {line}." for line in list_left_out(standing)]
    quality = describe_quality(standing)
    notes = [DECIBELS, *left_out, *([f"Quality of {quality}."] if quality else [])]
    title = standing.title[:1].upper() + standing.title[1:]
    return [
        Chart(
            f"{title}: speed against fidelity",
            [_plot_contest(standing, reference) for reference in standing.references],
            ["Further right is faster, further up is closer. A line joins what no other of its "
             "kind beats; ours is strong."],
        ),
        Listing(f"{title}: ours and the best rival", tabulate_margins(standing), notes),
        Listing(f"{title}: the same by what is computed", tabulate_computing(standing)),
        Listing(f"{title}: all contestants", tabulate_all(standing)),
    ]  # fmt: skip


def _plot_contest(standing: Standing, reference: str) -> Drawing:
    """All contestants of a contest, a line a family."""
    families = [
        Family(
            family,
            [(point.speed, point.quality) for point in points],
            is_ours=family == OURS,
        )
        for family, points in standing.list_points(reference).items()
    ]
    slug = re.sub(r"[^A-Za-z0-9-]+", "-", standing.slug)
    return plot_families(
        families,
        x_name="speed-up, measured, whole pipeline",
        y_name=f"PSNR to the {reference} run, dB",
        name=slug if reference == FULL else f"{slug}-{reference}",
        caption=f"Against the {reference} run.",
    )


def describe_bench(standing: Standing) -> list[str]:
    """The circumstances and how to read the tables."""
    first = next(iter(standing.cells.values()))
    return [
        "A round is one batch drawn by everybody in turns; a speed-up is the median of the rounds' "
        "own ratios to the full run, with their range. Time is that of the whole pipeline call; a "
        "warm-up round does not count. Pictures and times are of the same runs.",
        "A point counts for every speed up to its own. Between neighbouring points of its front a "
        "rival is taken to reach what lies on the line between them over the logarithm of the "
        "speed; ours is only what was measured.",
        "By what is computed, there is a second way to read: where many pictures are drawn, two of "
        "our plans share them, and so do any two rivals.",
        "The converged run is the same sampler in many more steps: who only copies the full run's "
        "own discretisation error gains nothing there. Samplers of other names are rivals as well.",
        f"Model {first.subject}, {get_field(first, 'calls')} pictures in batches of "
        f"{get_field(first, 'batch')}, picture i from seed {first.seed} + i. The "
        f"first contest was held on {first.device}, {first.time}, with leansd {first.leansd}, "
        f"torch {first.torch} and diffusers {first.diffusers}.",
    ]


# -- profile -------------------------------------------------------------------------------------


def report_profile(profiled: Profiled, records: Sequence[Record]) -> ReportPage:
    """Where the time goes, what plans gain of it, and how true the predictions are."""
    cost = profiled.cost
    width, height = cost.size
    drawn = count(cost.pictures, "picture")
    split = [
        f"{drawn}, {profiled.steps} UNet calls, as the model predicts them from what was measured.",
        "What no plan touches bounds what plans gain: the faster the UNet, the larger the share of "
        "the decoder.",
    ]
    gains = ["UNet: all its calls. Whole call: text encoder, scheduler and decoder included."]
    if profiled.vae is not None:
        split.append(name_vae(profiled))
        gains.append("With the other VAE: over the full run with the model's own.")
    sections: list[Section] = [
        Chart("Where the seconds of a call go", [_draw_stages(profiled)]),
        Listing("Where a whole call spends its time", tabulate_split(profiled), split),
        Listing("What the presets gain here (predicted)", tabulate_gains(profiled), gains),
    ]
    if profiled.predictions:
        sections.append(
            Listing(
                "Predicted against measured",
                tabulate_predictions(profiled.predictions),
                [
                    "Plans that the model was not made from, run in turns with the probing runs; "
                    "seconds in the UNet, median of the rounds. Speed-up: over the full run of the "
                    "same round, median and range.",
                    "Largest error of a predicted speed-up: "
                    f"{find_worst(profiled.predictions):.1%}.",
                ],
            )
        )
    sections += [
        Chart(
            "Every unit",
            [draw_unit_times(profiled)],
            ["In running order, whole batch: time here next to multiply-accumulates anywhere."],
        ),
        Listing("Blocks", tabulate_blocks(profiled), _explain_blocks(profiled)),
        Prose(
            "How this was measured",
            [
                f"{count(profiled.repeats, 'probing run')} after one to warm up: calls that "
                "compute everything, cut the UNet at several depths, leave out whole steps and run "
                "half the batch, every unit timed where it runs. Medians; fixed part and copies by "
                "least squares.",
            ],
        ),
    ]
    return ReportPage(
        title=f"What {cost.subject} costs here",
        summary=summarise_profile(profiled),
        measured=f"{drawn} of {width} x {height} pixels a call of {cost.subject}",
        sections=sections,
        attachments=[attach_records(records)],
    )


def summarise_profile(profiled: Profiled) -> str:
    """Seconds in full and with the example plan, in a sentence."""
    full, lean = (sum(profiled.split(plan).values()) for plan in (profiled.full, profiled.example))
    what = "a picture" if profiled.cost.pictures == 1 else f"{profiled.cost.pictures} pictures"
    return (
        f"Drawing {what} in {profiled.steps} steps takes {show_seconds(full)} here; with the plan "
        f"{EXAMPLE} it should take {show_seconds(lean)}: {full / lean:.1f} times faster."
    )


def _draw_stages(profiled: Profiled) -> Drawing:
    """Seconds by stage, in full and under the example."""
    full, lean = profiled.split(profiled.full), profiled.split(profiled.example)
    bars = [
        Bar(name, (own, lean[name]), f"{show_seconds(own)}, {show_seconds(lean[name])}")
        for name, own in full.items()
    ]
    most = max(full, key=lambda stage: full[stage])
    share = full[most] / sum(full.values())
    alt = f"{most} takes most: {share:.0%} of a full call, {show_seconds(lean[most])} under a plan."
    return draw_bars(bars, names=("full", EXAMPLE), alt=alt, name="stages")


def draw_unit_times(profiled: Profiled) -> Drawing:
    """Every unit's share of the time of a call and of its multiply-accumulates."""
    times = {unit.at: profiled.cost.units[unit.at]["whole"] for unit in profiled.anatomy}
    total, macs = sum(times.values()), sum(unit.macs for unit in profiled.anatomy) or 1
    bars = [
        Bar(
            unit.at,
            (times[unit.at] / total, unit.macs / macs),
            show_milliseconds(times[unit.at]),
        )
        for unit in profiled.anatomy
    ]
    most = sorted(times, key=lambda at: -times[at])[:3]
    told = ", ".join(f"{at} ({times[at] / total:.0%})" for at in most)
    names = ("share of time", "share of MACs")
    return draw_bars(bars, names=names, alt=f"Most time is spent in {told}.", name="units")


def name_vae(profiled: Profiled) -> str:
    """One line on the other autoencoder."""
    vae = profiled.vae
    assert vae is not None
    kind = "" if vae.is_trained else " (random weights: its time is real, its pictures are not)"
    return (
        f"VAE {vae.name}{kind} would decode in {show_seconds(vae.decode)}, the model's own takes "
        f"{show_seconds(profiled.cost.decode)}."
    )


def _explain_blocks(profiled: Profiled) -> list[str]:
    notes = [
        "A block's time has its units' and what it spends besides them. Fixed: what every call "
        "spends, whatever it computes.",
        f"Copying what is kept and inherited: {profiled.cost.per_byte * 2**30 * 1000:.0f} ms a "
        "GiB read or written.",
    ]
    if profiled.cost.is_guided:
        notes.append("Half batch: the conditional half alone, measured where it ran alone.")
    peaks = profiled.cost.peak_bytes
    if peaks:
        at = max(peaks, key=lambda each: peaks[each])
        notes.append(f"Most memory on top of what was there: {at}, {peaks[at] / 2**20:.0f} MiB.")
    return notes


# -- evaluate --pictures -------------------------------------------------------------------------

SHOWN = 7
SIDE = 160  # of a picture on the page, in pixels at most
BEST_IS_LEAST = (ReferenceKind.GAUSSIAN, ReferenceKind.PARTNERS)


def report_scores(scoring: Scoring, scored: Scored, notes: Sequence[str]) -> ReportPage:
    """The scores of a set, its best and worst pictures; `notes` say what was not measured."""
    table = tabulate_scores(scoring, scored)
    entries = list(scoring.pictures.entries)
    some = entries[:: max(1, len(entries) // SHOWN)][:SHOWN]
    grids = list(_show_extremes(scoring, scored)) or [
        _show_entries("Some of the pictures", some, [entry.id for entry in some])
    ]
    meanings = [METRICS[name].meaning for name in scored.scores]
    told = [f"{scores[0].title} {_show(scores[0])}" for scores in scored.scores.values()]
    values = [attach_records(scored.values, "values.jsonl")] if scored.values else []
    return ReportPage(
        title="Scores of a set of pictures",
        summary=f"As a set the pictures score {', '.join(told)}.",
        measured=f"{len(scoring.pictures)} pictures of {scoring.pictures.folder}",
        sections=[
            Listing(table.caption, table, meanings),
            *grids,
            *([Prose("What these numbers are not", notes)] if notes else []),
        ],
        attachments=[attach_records(scored.records), *values],
    )


def tabulate_scores(scoring: Scoring, scored: Scored) -> Table:
    """One row a number, with who saw what."""
    rows = []
    for name, scores in scored.scores.items():
        metric = METRICS[name]
        against = "–"
        if metric.against is ReferenceKind.PROMPTS:
            against = "the prompts"
        elif metric.against.needs_reference and scoring.reference is not None:
            against = scoring.reference.name
        seen_by = scoring.names[metric.extractor]
        rows += [(score.title, _show(score), against, seen_by) for score in scores]
    caption = f"{len(scoring.pictures)} pictures of {scoring.pictures.folder}"
    return Table(("metric", "value", "against", "seen by"), tuple(rows), caption)


def _show(score: Score) -> str:
    """`31.42 ±0.05`, with as many digits as mean something."""
    digits = 4 if abs(score.value) < 2 else 2
    spread = "".join(f" ±{value:.{digits}f}" for value in score.spread.values())
    return f"{score.value:.{digits}f}{spread}"


def _show_extremes(scoring: Scoring, scored: Scored) -> Iterator[PictureGrid]:
    """The best and the worst pictures by each metric that has a value a picture."""
    for name, scores in scored.scores.items():
        metric = METRICS[name]
        entries = list(scoring.find_features(name).pictures.entries)
        for score in scores:
            if score.values is None:
                continue
            ranked = torch.argsort(score.values, stable=True).tolist()
            if metric.against not in BEST_IS_LEAST:
                ranked.reverse()
            number = min(SHOWN, len(entries) // 2) or 1
            for word, places in (("Best", ranked[:number]), ("Worst", ranked[-number:][::-1])):
                values = [f"{score.values[place]:.3g}" for place in places]
                chosen = [entries[place] for place in places]
                yield _show_entries(f"{word} by {score.title}", chosen, values)


def _show_entries(title: str, entries: Sequence[PictureEntry], heads: Sequence[str]) -> PictureGrid:
    """Pictures under their heads and prompts, with what they are compared with below."""
    samples = [entry.read() for entry in entries]
    pictures = [open_picture(sample.picture, sample.id) for sample in samples]
    prompts = [find_prompt(s.facts, each) for s, each in zip(samples, pictures, strict=True)]
    columns = [
        f"{head}: {prompt}" if prompt else head for head, prompt in zip(heads, prompts, strict=True)
    ]
    others = [open_picture(s.other, f"beside {s.id}") for s in samples if s.other is not None]
    rows = [("pictures", "", [_shrink(picture) for picture in pictures])]
    rows += [("reference", "", [_shrink(picture) for picture in others])] if others else []
    return PictureGrid(title, columns, rows)


def _shrink(picture: Image.Image) -> Image.Image:
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return small

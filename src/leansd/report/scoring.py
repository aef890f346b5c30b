"""Scores of a set as a table and as report sections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image

from leansd.report.sections import (
    Grid,
    Listing,
    Origin,
    Prose,
    Report,
    Section,
    attach_records,
)
from leansd.scoring.metrics import METRICS
from leansd.scoring.metrics.metric import Against, Score
from leansd.scoring.pictures import Entry
from leansd.scoring.reading import read_samples
from leansd.scoring.samples import find_prompt, open_picture
from leansd.scoring.scores import Scored, Scoring
from leansd.text import Table

SHOWN = 7
SIDE = 160  # of a picture on the page, in pixels at most
BEST_IS_LEAST = (Against.GAUSSIAN, Against.PARTNERS)


def tabulate_scores(scoring: Scoring, scored: Scored) -> Table:
    """One row a number, with who saw what."""
    rows = []
    for name, scores in scored.scores.items():
        metric = METRICS[name]
        against = "–"
        if metric.against is Against.PROMPTS:
            against = "the prompts"
        elif metric.against.needs_reference and scoring.reference is not None:
            against = scoring.reference.name
        rows += [
            (score.title, _show(score), against, scoring.names[metric.extractor])
            for score in scores
        ]
    caption = f"{len(scoring.pictures)} pictures of {scoring.pictures.folder}"
    return Table(("metric", "value", "against", "seen by"), tuple(rows), caption)


def make_report(scoring: Scoring, scored: Scored, notes: Sequence[str], origin: Origin) -> Report:
    """The scores of a set, its best and worst pictures; `notes` say what was not measured."""
    table = tabulate_scores(scoring, scored)
    sections: list[Section] = [
        Listing(table.caption, table, [METRICS[name].meaning for name in scored.scores])
    ]
    grids = list(_make_grids(scoring, scored))
    sections += grids or [_make_sample(scoring)]
    if notes:
        sections.append(Prose("What these numbers are not", notes))
    count, folder = len(scoring.pictures), scoring.pictures.folder
    attachments = [attach_records(scored.records)]
    if scored.values:
        attachments.append(attach_records(scored.values, "values.jsonl"))
    return Report(
        title="Scores of a set of pictures",
        summary=_summarise(scored),
        measured=f"{count} pictures of {folder}",
        sections=sections,
        origin=origin,
        attachments=attachments,
    )


def _summarise(scored: Scored) -> str:
    """Every metric's first number, in a sentence."""
    told = [f"{scores[0].title} {_show(scores[0])}" for scores in scored.scores.values()]
    return f"As a set the pictures score {', '.join(told)}."


def _show(score: Score) -> str:
    """`31.42 ±0.05`, with as many digits as mean something."""
    digits = 4 if abs(score.value) < 2 else 2
    spread = "".join(f" ±{value:.{digits}f}" for value in score.spread.values())
    return f"{score.value:.{digits}f}{spread}"


def _make_grids(scoring: Scoring, scored: Scored) -> Iterator[Grid]:
    """The best and the worst pictures by each metric that has a value a picture."""
    for name, scores in scored.scores.items():
        metric = METRICS[name]
        entries = list(scoring.features[metric.against].pictures.entries)
        for score in (each for each in scores if each.values is not None):
            assert score.values is not None
            least_first = torch.argsort(score.values, stable=True).tolist()
            if metric.against not in BEST_IS_LEAST:
                least_first.reverse()
            number = min(SHOWN, len(entries) // 2) or 1
            for word, places in (
                ("best", least_first[:number]),
                ("worst", least_first[-number:][::-1]),
            ):
                values = [f"{score.values[place]:.3g}" for place in places]
                chosen = [entries[place] for place in places]
                yield _lay_out(f"{word.capitalize()} by {score.title}", chosen, values)


def _make_sample(scoring: Scoring) -> Grid:
    """Pictures from all over the set."""
    entries = list(scoring.pictures.entries)
    chosen = entries[:: max(1, len(entries) // SHOWN)][:SHOWN]
    return _lay_out("Some of the pictures", chosen, [entry.id for entry in chosen])


def _lay_out(title: str, entries: Sequence[Entry], heads: Sequence[str]) -> Grid:
    """Pictures under their heads and prompts, with what they are compared with below."""
    samples = read_samples(entries)
    pictures = [open_picture(sample.picture, sample.id) for sample in samples]
    prompts = [find_prompt(s.facts, each) for s, each in zip(samples, pictures, strict=True)]
    columns = [
        f"{head}: {prompt}" if prompt else head for head, prompt in zip(heads, prompts, strict=True)
    ]
    rows: list[tuple[str, str, Sequence[Image.Image]]] = [
        ("pictures", "", [_shrink(picture) for picture in pictures])
    ]
    others = [open_picture(s.other, f"beside {s.id}") for s in samples if s.other is not None]
    if others:
        rows.append(("reference", "", [_shrink(picture) for picture in others]))
    return Grid(title, columns, rows)


def _shrink(picture: Image.Image) -> Image.Image:
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return small

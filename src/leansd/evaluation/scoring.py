"""Scores of a set of pictures: FID, IS, CLIP score, LPIPS, precision and recall, as records."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from leansd.cluster import finish_tasks
from leansd.errors import LeansdError
from leansd.evaluation.extraction import (
    EXTRACTION,
    ExtractionConfig,
    Features,
    RunExtraction,
    load_statistics,
)
from leansd.evaluation.extractors import EXTRACTORS, fingerprint_weights, require_weights
from leansd.evaluation.picture_sets import (
    ExtractionTask,
    PictureSet,
    digest,
    list_pictures,
    read_facts,
)
from leansd.evaluation.records import Record, stamp
from leansd.evaluation.set_metrics import METRICS, Reference, ReferenceKind, Score
from leansd.loading import find_device

KEPT = "seen"
"""The folder beside the report that what was seen is kept in."""
FEW = 10_000
"""Below so many pictures an FID says more about their number than papers' do."""

TINY = "tiny-"
"""How the names of metrics of the embedded model's own CLIP begin."""

OnPictures: TypeAlias = Callable[[int, int], None]
"""Called with the pictures that have been looked at, and how many there are to look at."""


@dataclass(frozen=True)
class Scoring:
    """All that is needed to score a set.

    Attributes:
        metrics: by their names.
        names: of the extractors, as tables call them.
        features: of the set.
        paired: of the set beside its partners.
    """

    metrics: tuple[str, ...]
    config: ExtractionConfig
    names: Mapping[str, str]
    features: Features
    paired: Features
    reference: Reference | None

    @property
    def pictures(self) -> PictureSet:
        return self.features.pictures

    def find_features(self, metric: str) -> Features:
        """What a metric's numbers are made from."""
        is_paired = METRICS[metric].against is ReferenceKind.PARTNERS
        return self.paired if is_paired else self.features


@dataclass(frozen=True)
class Scored:
    """All numbers of a set.

    Attributes:
        scores: by metric.
        records: one a number.
        values: one a picture, where a number is a mean.
    """

    scores: Mapping[str, Sequence[Score]]
    records: Sequence[Record]
    values: Sequence[Record]


def locate_cache() -> Path:
    """Where what was seen of references is kept, unless somebody says otherwise."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "leansd" / "features"


def list_ready(weights: Mapping[str, Path], reference: str | Path | None) -> tuple[str, ...]:
    """The metrics that can be measured with the weights at hand: the field's, or the tiny CLIP's.

    LPIPS has to be asked for, because it compares pictures one by one.
    """
    kinds = {ReferenceKind.PROMPTS, ReferenceKind.NOTHING}
    if reference is not None:
        kinds |= {ReferenceKind.GAUSSIAN}
        kinds |= {ReferenceKind.FEATURES} if Path(reference).is_dir() else set()
    possible = [name for name, metric in METRICS.items() if metric.against in kinds]
    field = [name for name in possible if METRICS[name].extractor in weights]
    return tuple(field or (name for name in possible if name.startswith(TINY)))


def find_weights(given: Mapping[str, str | Path]) -> dict[str, Path]:
    """The weights of extractors that are given, or on this machine already.

    The tiny CLIP is not among them: it stands in where nothing else is there.
    """
    unknown = [name for name in given if name not in EXTRACTORS]
    if unknown:
        raise LeansdError(f"no extractor {unknown[0]!r}: weights are of {', '.join(EXTRACTORS)}")
    found: dict[str, Path] = {}
    for name, extractor in EXTRACTORS.items():
        path = Path(given[name]).expanduser() if name in given else extractor.find()
        if path is not None and (name in given or not name.startswith(TINY)):
            found[name] = require_weights(name, extractor, path)
    return found


def plan_scoring(
    pictures: str | Path,
    reference: str | Path | None,
    metrics: Sequence[str] | None,
    weights: Mapping[str, str | Path],
    *,
    config: ExtractionConfig,
    keep: Path,
    cache: Path | None = None,
) -> Scoring:
    """See that everything is there before a picture is looked at.

    Args:
        metrics: by default those whose weights are there, or else the tiny CLIP's own.
        keep: where what is seen of the set is kept, so that a stopped run goes on.
        cache: where what is seen of the reference is kept.

    Raises:
        LeansdError: something is not.
    """
    find_device(config.device)
    found = find_weights(weights)
    if metrics is None:
        metrics = list_ready(found, reference)
    _check_metrics(metrics, reference)
    extractors = dict.fromkeys(METRICS[name].extractor for name in metrics)
    paths = {
        name: require_weights(name, EXTRACTORS[name], found.get(name) or EXTRACTORS[name].find())
        for name in extractors
    }
    prints = {name: fingerprint_weights(path) for name, path in paths.items()}
    marks = {name: digest([mark, config.size]) for name, mark in prints.items()}
    names = {name: EXTRACTORS[name].name(path, prints[name]) for name, path in paths.items()}
    drawn = Features(keep, list_pictures(pictures), marks)
    paired, other = drawn, None
    if reference is not None:
        other = _open_reference(reference, metrics, marks, cache or locate_cache())
    if isinstance(other, Features) and _list_against(metrics, ReferenceKind.PARTNERS):
        paired = Features(keep, drawn.pictures.pair(other.pictures), marks)
    return Scoring(
        tuple(metrics),
        replace(config, weights={name: str(path.resolve()) for name, path in paths.items()}),
        names,
        drawn,
        paired,
        other,
    )


def _list_against(metrics: Sequence[str], *kinds: ReferenceKind) -> list[str]:
    """Those that hold pictures against something of these kinds."""
    return [name for name in metrics if METRICS[name].against in kinds]


def _check_metrics(metrics: Sequence[str], reference: str | Path | None) -> None:
    """Refuses names of no metric, none at all, and those that lack the reference they need.

    Raises:
        LeansdError: there is one of them.
    """
    for name in metrics:
        if name not in METRICS:
            raise LeansdError(f"no metric {name!r}: there are {', '.join(METRICS)}")
    if not metrics:
        raise LeansdError(f"no metric: choose among {', '.join(METRICS)}")
    alone = [name for name in metrics if METRICS[name].against.needs_reference]
    if alone and reference is None:
        raise LeansdError(
            f"{alone[0]} compares pictures with others: give --reference FOLDER"
            + (" or STATISTICS" if METRICS[alone[0]].against is ReferenceKind.GAUSSIAN else "")
        )


def _open_reference(
    reference: str | Path, metrics: Sequence[str], marks: Mapping[str, str], cache: Path
) -> Reference:
    """The pictures of a folder, or the statistics in a file.

    Raises:
        LeansdError: there are none, or a metric needs pictures and there are only statistics.
    """
    if Path(reference).is_dir():
        return Features(cache, list_pictures(reference), marks)
    statistics = load_statistics(reference, marks)
    lacking = _list_against(metrics, ReferenceKind.FEATURES, ReferenceKind.PARTNERS)
    if lacking:
        raise LeansdError(
            f"{lacking[0]} needs the reference's pictures, and {reference} has only "
            "statistics: give --reference FOLDER"
        )
    return statistics


def carry_out(
    scoring: Scoring,
    *,
    work: RunExtraction = EXTRACTION.run_here,
    on_pictures: OnPictures = lambda done, total: None,
    on_metric: Callable[[str], None] = lambda name: None,
) -> Scored:
    """Look at what has not been looked at yet, and make the numbers.

    Args:
        on_metric: called with the name of each metric before it is computed.
    """
    looks = _list_looks(scoring)
    tasks = [task for features, names in looks for task in features.list_missing(names)]
    total = sum(len(task.part.entries) for task in tasks)
    done = 0

    def count(task: ExtractionTask) -> None:
        nonlocal done
        done += len(task.part.entries)
        on_pictures(done, total)

    for features, names in looks:
        missing = features.list_missing(names)
        finish_tasks(work, scoring.config, missing, features.keep, count, "the features")
    base = _describe(scoring)
    entries = [entry.id for entry in scoring.pictures.entries]
    scores: dict[str, Sequence[Score]] = {}
    records: list[Record] = []
    values: list[Record] = []
    for name in scoring.metrics:
        on_metric(name)
        scores[name] = METRICS[name].score(scoring.find_features(name), scoring.reference)
        for score in scores[name]:
            facts: dict[str, Any] = {**base, **_describe_metric(scoring, name), **score.fields}
            facts |= {"metric": score.metric, "unit": ""}
            spread: dict[str, Any] = dict(score.spread)
            records.append(Record(**facts, **spread, value=score.value))
            if score.values is not None:
                values += [
                    Record(**{**facts, "picture": entry}, value=value)
                    for entry, value in zip(entries, score.values.tolist(), strict=True)
                ]
    return Scored(scores, records, values)


def score(
    pictures: str | Path,
    reference: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    *,
    weights: Mapping[str, str | Path] | None = None,
    size: int | None = None,
    batch: int = 32,
    device: str | None = None,
    ray: str | None = None,
    workers: int | None = None,
    threads: int = 0,
    keep: str | Path | None = None,
    cache: str | Path | None = None,
) -> list[Record]:
    """How good a set of pictures is: FID, IS, CLIP score, LPIPS, precision and recall.

    Args:
        pictures: a folder of tar shards with sidecars, or of pictures.
        reference: such a folder, or a file of statistics (`.safetensors`, or `.npz` with mu and
            sigma).
        metrics: names of `set_metrics.METRICS`; by default those whose weights are there, or else
            the tiny CLIP's own.
        weights: paths by extractor (`inception`, `clip`, `lpips`); nothing is ever downloaded.
        size: what the middle square of every picture is made first, in pixels.
        ray: a Ray cluster's address, or `local`; by default it all happens in this process.
        keep: a folder for what was seen of the pictures; by default the cache.
        cache: a folder for what was seen of the reference; by default the user's own.

    Raises:
        LeansdError: weights, pictures or a reference are missing or do not suit.
    """
    home = Path(cache) if cache is not None else locate_cache()
    scoring = plan_scoring(
        pictures,
        reference,
        metrics,
        weights or {},
        config=ExtractionConfig({}, size, batch, threads, device),
        keep=Path(keep) if keep is not None else home,
        cache=home,
    )
    return list(carry_out(scoring, work=EXTRACTION.place(ray, workers)).records)


def _list_looks(scoring: Scoring) -> list[tuple[Features, list[str]]]:
    """What is to be looked at, and by which: of a reference only what is not known yet."""
    looks: dict[int, tuple[Features, list[str]]] = {}

    def add(features: Features, extractor: str) -> None:
        names = looks.setdefault(id(features), (features, []))[1]
        if extractor not in names:
            names.append(extractor)

    reference = scoring.reference
    for name in scoring.metrics:
        extractor, against = METRICS[name].extractor, METRICS[name].against
        add(scoring.find_features(name), extractor)
        if isinstance(reference, Features) and (
            against is ReferenceKind.FEATURES
            or (
                against is ReferenceKind.GAUSSIAN
                and not reference.locate_gaussian(extractor).is_file()
            )
        ):
            add(reference, extractor)
    return list(looks.values())


def _describe(scoring: Scoring) -> dict[str, Any]:
    """The fields that all records of a set share."""
    facts = read_facts(next(scoring.pictures.entries))
    own = {name: facts[name] for name in ("steps", "sampler", "guidance") if name in facts}
    size = {"resize": scoring.config.size} if scoring.config.size is not None else {}
    return {
        **stamp(find_device(scoring.config.device)),
        **own,
        **size,
        "subject": str(facts.get("model") or scoring.pictures.folder.resolve().name),
        "plan": str(facts.get("plan", "")),
        "pictures": len(scoring.pictures),
    }


def _describe_metric(scoring: Scoring, name: str) -> dict[str, Any]:
    metric = METRICS[name]
    fields: dict[str, Any] = {
        "extractor": scoring.names[metric.extractor],
        "weights": scoring.features.marks[metric.extractor],
    }
    if metric.against.needs_reference and scoring.reference is not None:
        fields["reference"] = scoring.reference.name
        fields["reference_pictures"] = scoring.reference.count
    return fields


def list_notes(scoring: Scoring, *, asked: bool) -> list[str]:
    """What a reader of the numbers should know.

    Args:
        asked: whether the metrics were named; else it is said what others there would be.
    """
    notes: list[str] = []
    count = len(scoring.pictures)
    if "fid" in scoring.metrics and count < FEW:
        notes.append(f"FID of {count} pictures: too large by an amount that depends on the number")
    if not asked and all(name.startswith(TINY) for name in scoring.metrics):
        notes.append(
            "measured in the eyes of the tiny CLIP only, which knows emoji: numbers of papers need "
            "other weights"
        )
        users: dict[str, list[str]] = {}
        for name, metric in METRICS.items():
            if not name.startswith(TINY):
                users.setdefault(metric.extractor, []).append(name)
        notes += [
            f"--weights {name}=PATH: {EXTRACTORS[name].weights} ({', '.join(names)})"
            for name, names in users.items()
        ]
    return notes

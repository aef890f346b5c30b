"""An evaluation as tables and as a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leansd.evaluation.compare import CONVERGED
from leansd.evaluation.evaluation import Evaluation
from leansd.evaluation.records import Record
from leansd.evaluation.runs import FULL
from leansd.report.differences import NOTE, as_images, list_differences
from leansd.report.plots import Point, plot_tradeoff
from leansd.report.sections import (
    Chart,
    Drawing,
    Grid,
    Listing,
    Origin,
    Prose,
    Report,
    Section,
    attach_records,
)
from leansd.text import Table

FIDELITY = {
    "psnr": ("PSNR", ".1f"),
    "ssim": ("SSIM", ".3f"),
    "lpips": ("LPIPS", ".4f"),
    "latent_error": ("latent error", ".3f"),
}
QUALITY = {"clip_score": ("CLIP score", ".2f"), "retrieval": ("retrieval", ".3f")}


def tabulate_fidelity(records: Sequence[Record], reference: str) -> Table:
    """Every case against one reference."""
    found = {
        (record.plan, record.metric): record
        for record in records
        if get_field(record, "reference") == reference and record.metric in FIDELITY
    }
    metrics = [metric for metric in FIDELITY if any(has == metric for _, has in found)]
    plans = list(dict.fromkeys(plan for plan, _ in found))
    gains = {r.plan: r.value for r in records if r.metric == "predicted_speedup"}
    rows = [
        (
            plan,
            f"{gains[plan]:.2f}x",
            *(
                show_spread(found[plan, metric], "standard_error", FIDELITY[metric][1])
                for metric in metrics
            ),
        )
        for plan in plans
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


def get_field(record: Record, name: str) -> Any:
    """A field that not every record has."""
    return (record.__pydantic_extra__ or {}).get(name)


def show_spread(record: Record, spread: str, form: str) -> str:
    """`31.2 ±0.4`."""
    width = get_field(record, spread)
    return f"{record.value:{form}}" + (f" ±{width:{form}}" if width is not None else "")


def make_report(
    evaluation: Evaluation,
    references: Sequence[str],
    prompts: Sequence[str],
    notes: Sequence[str],
    origin: Origin,
) -> Report:
    """Fidelity to every reference, the quality of sets, pictures; `notes` say what is missing."""
    records = evaluation.records
    first = records[0]
    fronts = [draw_front(records, name, f"front-{place}") for place, name in enumerate(references)]
    sections: list[Section] = [
        Chart(
            "Speed against fidelity",
            [drawing for drawing in fronts if drawing is not None],
            ["Further right is faster, further up is closer. Diamonds are runs without a plan."],
        ),
        _make_grid(evaluation, prompts),
    ]
    sections += [
        Listing(f"Fidelity to {name}", tabulate_fidelity(records, name), [_explain(name)])
        for name in references
    ]
    quality = tabulate_quality(records)
    if quality is not None:
        sections.append(Listing(quality.caption, quality, _explain_quality(records)))
    sections.append(Prose("How this was measured", [_describe(records), *notes]))
    return Report(
        title=f"How true the pictures of plans are: {first.subject}",
        summary=summarise(records),
        measured=f"{get_field(first, 'calls')} pictures of {first.subject} from the same seeds: "
        + ", ".join(dict.fromkeys(record.plan for record in records)),
        sections=sections,
        origin=origin,
        attachments=[
            attach_records(records),
            attach_records(evaluation.values, "values.jsonl"),
        ],
    )


def summarise(records: Sequence[Record]) -> str:
    """How close the plans' pictures are to the full run's, in a sentence."""
    close = {
        record.plan: record.value
        for record in records
        if record.metric == "psnr" and get_field(record, "reference") == FULL
    }
    gains = {
        r.plan: r.value for r in records if r.metric == "predicted_speedup" and r.plan in close
    }
    told = [
        f"{name} does {gains[name]:.1f} times less work and stays {close[name]:.0f} dB close"
        for name in gains
        if gains[name] > 1 and _has_plan(records, name)
    ]
    if not told:
        return "No plan was compared with the full run, only runs without one."
    return (
        f"Compared with pictures drawn in full, {'; '.join(told)} (above about 40 dB differences "
        "are hard to see)."
    )


def _has_plan(records: Sequence[Record], name: str) -> bool:
    """Whether a case of this name followed a plan."""
    return any(record.plan == name and record.fingerprint for record in records)


def draw_front(records: Sequence[Record], reference: str, name: str) -> Drawing | None:
    """All cases against a reference; None where nothing of them was measured."""
    gains = {r.plan: r.value for r in records if r.metric == "predicted_speedup"}
    points = [
        Point(
            record.plan,
            gains[record.plan],
            record.value,
            gains[record.plan],
            gains[record.plan],
            is_rival=not record.fingerprint,
        )
        for record in records
        if record.metric == "psnr"
        and get_field(record, "reference") == reference
        and record.plan in gains
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


def _make_grid(evaluation: Evaluation, prompts: Sequence[str]) -> Grid:
    drawn = {name: as_images(pictures) for name, pictures in evaluation.pictures.items()}
    full = drawn.pop(FULL)
    apart = list_differences(full, drawn)
    rows = [(FULL, "", full)]
    for name, pictures in drawn.items():
        rows += [(name, "", pictures), ("difference", f"{name} - full", apart[name])]
    return Grid("The same prompts, the same seeds", prompts[: len(full)], rows, [NOTE])


def _describe(records: Sequence[Record]) -> str:
    first = records[0]
    return (
        f"Model {first.subject}, {get_field(first, 'calls')} pictures, picture i from seed "
        f"{first.seed} + i, {get_field(first, 'steps')} steps of {get_field(first, 'sampler')}, "
        f"guidance {get_field(first, 'guidance')}. Predicted: multiply-accumulates of the UNet, "
        "the full run's over the case's."
    )

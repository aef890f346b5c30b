"""An evaluation as tables and as report sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from leansd.faces.report.sections import Grid, Listing, Prose, Section
from leansd.measuring.evaluation import CONVERGED, Evaluation
from leansd.measuring.measures import FULL
from leansd.measuring.records import Record
from leansd.measuring.tables import Table

LOUDER = 4  # times that differences are amplified in the picture grid
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


def make_sections(
    evaluation: Evaluation, references: Sequence[str], prompts: Sequence[str], notes: Sequence[str]
) -> list[Section]:
    """The report of an evaluation; `notes` say what could not be measured."""
    records = evaluation.records
    sections: list[Section] = [
        Listing(f"Fidelity to {name}", tabulate_fidelity(records, name), [_explain(name)])
        for name in references
    ]
    quality = tabulate_quality(records)
    if quality is not None:
        sections.append(Listing(quality.caption, quality, _explain_quality(records)))
    sections.append(_make_grid(evaluation, prompts))
    sections.append(Prose("How this was measured", [_describe(records), *notes]))
    return sections


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
    pictures = evaluation.pictures
    shown = prompts[: len(pictures[FULL])]
    rows: list[tuple[str, str, Sequence[Image.Image]]] = []
    for name, drawn in pictures.items():
        rows.append((name, "", as_images(drawn)))
        if name != FULL:
            apart = (drawn.float() - pictures[FULL].float()).mul(LOUDER).add(128)
            rows.append(("difference", f"{name} - full", as_images(apart.clamp(0, 255).byte())))
    note = f"A difference is amplified {LOUDER} times; grey is none."
    return Grid("The same prompts, the same seeds", shown, rows, [note])


def as_images(pictures: Tensor) -> list[Image.Image]:
    """8-bit pictures [n, 3, H, W] for a page."""
    return [Image.fromarray(each.permute(1, 2, 0).contiguous().numpy()) for each in pictures]


def _describe(records: Sequence[Record]) -> str:
    first = records[0]
    return (
        f"Model {first.subject}, {get_field(first, 'calls')} pictures, picture i from seed "
        f"{first.seed} + i, {get_field(first, 'steps')} steps of {get_field(first, 'sampler')}, "
        f"guidance {get_field(first, 'guidance')}. Predicted: multiply-accumulates of the UNet, "
        f"the full run's over the case's. {first.device}; leansd {first.leansd}, torch "
        f"{first.torch}, diffusers {first.diffusers}, Python {first.python}; {first.time}."
    )

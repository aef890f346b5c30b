"""An export as a report: the files, and whether they do what the net does."""

from __future__ import annotations

from leansd.exporting.exporter import Exported
from leansd.plans.anatomy import Anatomy
from leansd.report.drawings import Bar, draw_bars, draw_plan
from leansd.report.sections import (
    Chart,
    Drawing,
    Listing,
    Origin,
    Prose,
    Report,
    Section,
)
from leansd.report.words import count
from leansd.text import Table

MEGABYTE = 1e6
LONGEST = 13
"""Characters of a file's name that fit beside a bar."""
FORMS = {"onnx": "ONNX Runtime"}
"""What reads a form, where it is not called the same."""


def make_report(written: Exported, net: str, form: str, anatomy: Anatomy, origin: Origin) -> Report:
    """Files, the check, what is lost, and the plan where there is one."""
    sections: list[Section] = [
        Chart("Size of the files", [_draw_sizes(written)]),
        Listing("Files", tabulate_files(written)),
        Prose("Whether it is the same", describe_check(written)),
    ]
    if written.plan is not None:
        sections.append(Chart("The plan", [draw_plan(written.plan, anatomy, written.plan.name)]))
    return Report(
        title=f"{net} for {FORMS.get(form, form)}",
        summary=summarise(written, form),
        measured=f"the files that {net} was written to, and what they give beside PyTorch"
        if written.difference is not None
        else f"the files that {net} was written to",
        sections=sections,
        origin=origin,
    )


def summarise(written: Exported, form: str) -> str:
    """How much was written, and whether it can be trusted, in a sentence."""
    size = sum(written.files.values()) / MEGABYTE
    where = FORMS.get(form, form)
    told = f"The network is written for {where}, {len(written.files)} files of {size:.1f} MB"
    if written.difference is not None:
        return f"{told}, and run there it differs by {written.difference:.1g} at the most."
    if written.losses:
        return f"{told}; {count(len(written.losses), 'thing')} it does otherwise there."
    return f"{told}; nothing is lost."


def describe_check(written: Exported) -> list[str]:
    """What was checked and what is lost."""
    told = list(written.losses)
    if written.difference is not None:
        told.append(
            "Every graph was run in ONNX Runtime and in PyTorch on the same inputs: the largest "
            f"difference of any number is {written.difference:.1e}."
        )
    return told or ["Nothing of the net is lost: stock diffusers opens it as it is."]


def tabulate_files(written: Exported) -> Table:
    """A row a file."""
    rows = tuple((name, f"{size / MEGABYTE:.2f}") for name, size in written.files.items())
    return Table(("file", "MB"), rows)


def _draw_sizes(written: Exported) -> Drawing:
    bars = [
        Bar(_shorten(name), (size / MEGABYTE,), f"{size / MEGABYTE:.2f} MB")
        for name, size in written.files.items()
    ]
    alt = "; ".join(f"{name}: {size / MEGABYTE:.2f} MB" for name, size in written.files.items())
    return draw_bars(bars, names=("size",), alt=f"{alt}.", name="files")


def _shorten(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"

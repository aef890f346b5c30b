"""Reports of networks: where a UNet spends what, a surgery, a cut, an export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from leansd.evaluation.records import Record
from leansd.evaluation.redundancy import Spent, tabulate_spent
from leansd.exporting.exporter import Exported
from leansd.plans.address import get_block
from leansd.plans.anatomy import Anatomy
from leansd.plans.grid import add_key
from leansd.report.drawings import KINDS, Bar, draw_bars, draw_plan, draw_shape
from leansd.report.figures import LIGHT, TEXT, name_axes, open_axes, open_figure
from leansd.report.page import (
    AttachedFile,
    Chart,
    Drawing,
    Listing,
    Prose,
    ReportPage,
    Section,
    attach_records,
    count,
)
from leansd.report.plans import attach_plan
from leansd.report.plots import Curve, plot_curves
from leansd.surgery.edits import Surgery
from leansd.surgery.preview import Preview
from leansd.text import Table
from leansd.tuning.cutting import NAMES, Cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# -- anatomy -------------------------------------------------------------------------------------

LABELS = {"resnet": "ResNet", "transformer": "attention", "": "sampler, ends"}


def report_anatomy(spent: Spent, records: Sequence[Record]) -> ReportPage:
    """Parameters and work by block and by unit: both figures, every number."""
    what = "Latency" if spent.seconds else "Multiply-accumulates"
    told = summarise_anatomy(spent)
    return ReportPage(
        title=f"Where {spent.subject} keeps its weights and spends its work",
        summary=told,
        measured=f"parameters and computation{', and time,' if spent.seconds else ''} of the units "
        f"of {spent.subject}'s UNet",
        sections=[
            Chart(
                "Parameters and computation by block",
                [Drawing("blocks", draw_blocks([spent]), told)],
                [
                    "Attention's matrix products are in it; published counts often leave them out.",
                    "What costs much and holds little is where thinning pays.",
                ],
            ),
            Chart(f"{what} and parameters by unit", [Drawing("units", draw_units([spent]), told)]),
            Listing("Every block and unit", tabulate_spent(spent)),
            Prose("How this was measured", [_describe(spent)]),
        ],
        attachments=[attach_records(records)],
    )


def summarise_anatomy(spent: Spent) -> str:
    """What the outermost blocks hold and what they take, in a sentence."""
    first, last = spent.blocks[0], spent.blocks[-1]
    shares = {
        metric: sum(spent.share(metric, block) for block in (first, last))
        for metric in ("params", "macs")
    }
    work = f"{shares['macs']:.1%}" if spent.whole["unet_macs"] else "an unknown part (not counted)"
    text = (
        f"The outermost blocks {first} and {last} hold {shares['params']:.1%} of the weights and "
        f"do {work} of the work"
    )
    if spent.seconds:
        inside = sum(
            seconds for at, seconds in spent.seconds.items() if get_block(at) in (first, last)
        )
        text += f", in {inside / spent.whole['call_time']:.1%} of the time"
    return f"{text}."


def _describe(spent: Spent) -> str:
    fields = spent.fields
    size = f"{fields['latent_width']} x {fields['latent_height']}"
    text = f"{size} latents, {fields['tokens']} text tokens; MACs are of one sample."
    if not spent.seconds:
        return text
    return (
        f"{text} Times are medians of whole UNet calls on {fields['batch']} samples of random "
        "inputs, every unit timed where it runs, after one call to warm up."
    )


def draw_blocks(models: Sequence[Spent]) -> Figure:
    """Parameters and computation by block: shares of the whole UNet, a panel a model."""
    wide = 400.0
    figure = open_figure(wide * len(models), 246)
    for place, spent in enumerate(models):
        axes = open_axes(
            figure, left=42 + wide * place, right=8 + wide * (len(models) - 1 - place), top=42,
            bottom=24, rules="y",
        )  # fmt: skip
        for offset, metric, colour, label in (
            (-0.2, "params", "series-8", f"parameters, {spent.whole['unet_params'] / 1e6:.1f} M"),
            (+0.2, "macs", "compute", f"computation, {spent.whole['unet_macs'] / 1e9:.1f} GMAC"),
        ):
            shares = [100 * spent.share(metric, block) for block in spent.blocks]
            places = [each + offset for each in range(len(shares))]
            bars = axes.bar(places, shares, 0.38, color=LIGHT[colour], label=label)
            axes.bar_label(bars, fmt="%.0f", fontsize=TEXT - 1.5, padding=1, color=LIGHT["ink"])
        axes.set_xticks(range(len(spent.blocks)), spent.blocks)
        name_axes(axes, y="share of the UNet, %")
        _finish(axes, _name(spent), columns=2)
    return figure


def draw_units(models: Sequence[Spent]) -> Figure:
    """Latency and parameters by unit, two panels a model; MACs where a model was not timed."""
    tall = 310.0
    figure = open_figure(740, tall * len(models))
    for place, spent in enumerate(models):
        above, below = tall * place, tall * (len(models) - 1 - place)
        top = open_axes(figure, left=48, right=8, top=above + 42, bottom=below + 174, rules="y")
        bottom = open_axes(figure, left=48, right=8, top=above + 150, bottom=below + 66, rules="y")
        if spent.seconds:
            work = {at: seconds * 1000 for at, seconds in spent.seconds.items()}
            samples = spent.fields["batch"]
            title = f"{_name(spent)}, {samples} samples a call, {spent.fields['device']}"
            _draw_row(top, spent, work, "latency, ms")
        else:
            work = {at: macs / 1e9 for at, macs in spent.macs.items()}
            title = _name(spent)
            _draw_row(top, spent, work, "GMAC")
        top.tick_params(labelbottom=False)
        _finish(top, title, columns=len(KINDS))
        millions = {at: params / 1e6 for at, params in spent.params.items()}
        _draw_row(bottom, spent, millions, "parameters, M")
    return figure


def _draw_row(axes: Axes, spent: Spent, values: Mapping[str, float], what: str) -> None:
    addresses = list(spent.kinds)
    for kind, colour in KINDS.items():
        own = [
            place
            for place, at in enumerate(addresses)
            if (spent.kinds[at] if spent.kinds[at] in KINDS else "") == kind
        ]
        heights = [values[addresses[place]] for place in own]
        axes.bar(own, heights, 0.78, color=LIGHT[colour], label=LABELS[kind])
    axes.set_xticks(range(len(addresses)), addresses, rotation=90)
    axes.set_xlim(-0.7, len(addresses) - 0.3)
    name_axes(axes, y=what)
    for place in range(1, len(addresses)):
        if get_block(addresses[place]) != get_block(addresses[place - 1]):
            axes.axvline(place - 0.5, color=LIGHT["line"], linewidth=0.8, zorder=0)


def _finish(axes: Axes, title: str, columns: int) -> None:
    """The title, and the names of the colours between it and the axes."""
    axes.set_title(title, fontsize=TEXT + 0.5, loc="left", color=LIGHT["ink"], pad=24)
    add_key(axes, y=-axes.get_window_extent().height - 16, columns=columns)


def _name(spent: Spent) -> str:
    return (
        f"{spent.subject}, {spent.fields['latent_width']}x{spent.fields['latent_height']} latents"
    )


# -- operate -------------------------------------------------------------------------------------


def report_surgery(seen: Preview, model: str) -> ReportPage:
    """What goes and what is left, as shapes, numbers and addresses."""
    weights = seen.after.params / seen.before.params
    uncounted = seen.before.uncounted or seen.after.uncounted
    work = f"{seen.after.macs / seen.before.macs:.0%}" if not uncounted else "an unknown part"
    changes = seen.list_changes()
    shapes = [
        draw_shape(
            seen.before,
            gone=list_under(seen.gone, seen.before),
            alt=f"Of {model} goes: {', '.join(seen.gone) or 'nothing'}.",
            caption=f"{model}, and what goes.",
            name="before",
        ),
        draw_shape(
            seen.after,
            replaced=list_under(seen.replaced, seen.after),
            alt=f"The new UNet has {len(seen.after) - 2} units.",
            caption=f"{seen.after.name}: what is left.",
            name="after",
        ),
    ]
    sections: list[Section] = [
        Chart("The UNet", shapes),
        Listing("What is left", tabulate_sizes(seen)),
        *([Listing("What changes", tabulate_changes(changes))] if changes else []),
    ]
    return ReportPage(
        title=f"{seen.surgery.name} on {model}",
        summary=(
            f"The new network keeps {weights:.0%} of the weights and does {work} of the work "
            "of the original; until it is trained it draws worse."
        ),
        measured=f"what surgery {seen.surgery.name} ({seen.surgery.fingerprint}) leaves of "
        f"{model}'s UNet; counted, not measured",
        sections=sections,
        attachments=[attach_surgery(seen.surgery)],
    )


def attach_surgery(surgery: Surgery) -> AttachedFile:
    return AttachedFile("surgery.yaml", surgery.write(), "the surgery")


def list_under(addresses: Iterable[str], anatomy: Anatomy) -> set[str]:
    """The units that some addresses mean, or that they lie within."""
    named = [f"{each}." for each in addresses]
    return {
        unit.at
        for unit in anatomy
        if any(f"{unit.at}.".startswith(each) or each.startswith(f"{unit.at}.") for each in named)
    }


def tabulate_sizes(seen: Preview) -> Table:
    """Before, after and the change of everything that is counted."""
    before, after = seen.before, seen.after
    rows = [
        ("units", float(len(before) - 2), float(len(after) - 2), "{:.0f}"),
        ("parameters", before.params / 1e6, after.params / 1e6, "{:.2f} M"),
        ("MACs of a call", before.macs / 1e9, after.macs / 1e9, "{:.2f} G"),
    ]
    if before.uncounted or after.uncounted:
        del rows[-1]
    if seen.seconds is not None:
        old, new = (1000 * each for each in seen.seconds)
        rows.append(("time of the units", old, new, "{:.2f} ms"))
    return Table(
        ("", "before", "after", "change"),
        tuple(
            (name, form.format(old), form.format(new), f"{100 * (new / old - 1):+.1f} %")
            for name, old, new, form in rows
        ),
    )


def tabulate_changes(changes: Mapping[str, Sequence[str]]) -> Table:
    rows = ((name, str(len(each)), ", ".join(each)) for name, each in changes.items())
    return Table(("what", "count", "where"), tuple(rows))


# -- cut -----------------------------------------------------------------------------------------

PLAIN = {"ms": "time", "macs": "work", "params": "weights"}
"""What a budget is of, in everybody's words."""


def report_cut(cut: Cut, anatomy: Anatomy) -> ReportPage:
    """The UNet with what goes, error over cost, every candidate."""
    gone = {unit.at for unit in anatomy for each in cut.removals if each.takes(unit.at)}
    names = ", ".join(each.name for each in cut.removals) or "nothing"
    thinned = [each.name for each in cut.removals if any(".t" in at for at in each.addresses)]
    shape = draw_shape(
        anatomy,
        gone=gone,
        alt=f"Of the UNet goes: {names}.",
        caption="Transformer blocks that go: " + ", ".join(thinned) if thinned else "",
    )
    plot = plot_curves(
        [Curve("front", [sorted((100 * cost, error) for cost, error in cut.front)])],
        points={cut.surgery.name: (100 * cut.cost, cut.measured_error)},
        x_name=f"{NAMES[cut.of]} left, %",
        y_name="squared error over the output",
        name="error",
    )
    return ReportPage(
        title=f"A cut of {anatomy.name}",
        summary=(
            f"Without {len(cut.removals)} of its parts the network has {cut.cost:.0%} of its "
            f"{PLAIN[cut.of]} left, and before any training its output is off by "
            f"{cut.measured_error:.1%}."
        ),
        measured=f"what every part that can go does to the output of {anatomy.name}'s UNet",
        sections=[
            Chart("What goes", [shape], [str(cut)]),
            Chart(
                "Error over cost",
                [plot],
                [
                    "The line is the knapsack's front: at every cost the least sum of the errors "
                    "of what goes. The point is the chosen cut, built and measured before any "
                    "training.",
                ],
            ),
            Listing(
                "Everything that can go",
                cut.tabulate(),
                [
                    "Error: squared error of the guided output over the output, with this removed "
                    "alone. The least error for what it saves comes first.",
                    "Pairs of a down and an up layer exclude others of their level, and so do a "
                    "layer and the attention in it.",
                ],
            ),
            Prose(
                "How this was found",
                [
                    "Full runs are drawn and the UNet's calls at evenly spread time steps kept. "
                    "What can go is taken out alone, and the output of the UNet without it "
                    "compared on these calls; guided, as the scheduler gets it. Errors are taken "
                    "to add up (LAPTOP-Diff, arXiv 2404.11098), the knapsack is solved exactly, "
                    "and neighbours of its answer are built and measured.",
                ],
            ),
        ],
        attachments=[attach_surgery(cut.surgery)],
    )


# -- export --------------------------------------------------------------------------------------

MEGABYTE = 1e6
LONGEST = 13
"""Characters of a file's name that fit beside a bar."""
FORMS = {"onnx": "ONNX Runtime"}
"""What reads a form, where it is not called the same."""


def report_export(written: Exported, net: str, form: str, anatomy: Anatomy) -> ReportPage:
    """The files, whether they do what the net does, and the plan where there is one."""
    sizes = {name: size / MEGABYTE for name, size in written.files.items()}
    bars = [
        Bar(name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…", (size,), f"{size:.2f} MB")
        for name, size in sizes.items()
    ]
    alt = "; ".join(f"{name}: {size:.2f} MB" for name, size in sizes.items())
    plan = written.plan
    followed = f" for plan {plan.identity}" if plan else ""
    checked = "" if written.difference is None else ", and what they give beside PyTorch"
    return ReportPage(
        title=f"{net} for {FORMS.get(form, form)}",
        summary=summarise_export(written, form),
        measured=f"the files that {net} was written to{followed}{checked}",
        sections=[
            Chart(
                "Size of the files", [draw_bars(bars, names=("size",), alt=f"{alt}.", name="files")]
            ),
            Listing("Files", tabulate_files(written)),
            Prose("Whether it is the same", describe_check(written)),
            *([Chart("The plan", [draw_plan(plan, anatomy, plan.name)])] if plan else []),
        ],
        attachments=[attach_plan(plan)] if plan else [],
    )


def tabulate_files(written: Exported) -> Table:
    rows = tuple((name, f"{size / MEGABYTE:.2f}") for name, size in written.files.items())
    return Table(("file", "MB"), rows)


def summarise_export(written: Exported, form: str) -> str:
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

"""What surgery leaves of a UNet, and what it takes to train it."""

from __future__ import annotations

import json

from leansd.emoji.location import model_folder
from leansd.evaluation.records import load_records
from tabulation.cells import RESULTS, get, get_number, tabulate_ratio


def tabulate_surgeries() -> str:
    """What each named surgery leaves, as `leansd.preview` counts it."""
    records = load_records(RESULTS / "surgeries.jsonl")
    cells = {(each.subject, each.plan, each.metric): each for each in records}
    lines = ["| surgery | of | edits | units | parameters | MACs |", "|---" * 6 + "|"]
    for model, name in dict.fromkeys((each.subject, each.plan) for each in records):
        params, macs, units = (cells[model, name, each] for each in ("params", "macs", "units"))
        counts = (
            f"{each.value / scale:.1f} {unit} ({each.value / get_number(each, 'before') - 1:+.1%})"
            for each, scale, unit in ((params, 1e6, "M"), (macs, 1e9, "G"))
        )
        edits = f"`{get(params, 'edits')}`".replace(", ", "`, `")
        lines.append(f"| {name} | {model} | {edits} | {units.value:.0f} | {' | '.join(counts)} |")
    return "\n".join([*lines, ""])


def tabulate_cuts() -> str:
    """What cuts of equal cost leave of a UNet's output: the preset's, and ours at its cost."""
    records = load_records(RESULTS / "cuts.jsonl")
    cells = {(each.plan, each.metric): each.value for each in records}
    first = records[0]
    ways = {"preset": "{}", "by addition": "knapsack at {}", "by trial": "cut at {}"}
    heads = [f"{way}: {what}" for way in ways for what in ("error", "PSNR")]
    lines = ["| at the MACs of | left | " + " | ".join(heads) + " |", "|---" * 8 + "|"]
    for name in dict.fromkeys(str(get(each, "at_cost_of")) for each in records):
        if name == "full":
            continue
        numbers = [
            f"{cells[way.format(name), 'output_error']:.2g} | "
            f"{cells[way.format(name), 'psnr']:.1f} dB"
            for way in ways.values()
        ]
        left = cells[name, "macs"] / cells["full", "macs"]
        lines.append(f"| {name} | {left:.1%} | " + " | ".join(numbers) + " |")
    setting = (
        f"{first.subject}, {get(first, 'pictures')} held-out pictures, "
        f"{get(first, 'steps')} steps, "
        f"guidance {get(first, 'guidance'):g}; chosen on {get(first, 'calibration')} others:\n"
    )
    return "\n".join([setting, *lines, ""])


def tabulate_gri() -> str:
    """GRI against full attention, one shallow self-attention and a whole UNet, on each device."""
    records = load_records(RESULTS / "gri.jsonl")
    speedups = [each for each in records if each.metric == "speedup" and each.plan != "full"]
    # Records are appended, so that the latest of a kind stands.
    cells = {(each.device, each.subject, get(each, "latent"), each.plan): each for each in speedups}
    plans = list(dict.fromkeys(each.plan for each in speedups))
    parts: list[str] = []
    for device in dict.fromkeys(each.device for each in speedups):
        first = next(each for each in speedups if each.device == device)
        parts.append(f"{device}, {get(first, 'dtype')}; torch {first.torch}:\n")
        parts += ["| | " + " | ".join(plans) + " |", "|---" * (len(plans) + 1) + "|"]
        for subject, latent in dict.fromkeys(key[1:3] for key in cells if key[0] == device):
            row = (tabulate_ratio(cells[device, subject, latent, plan]) for plan in plans)
            parts.append(f"| {subject}, {latent} x {latent} | " + " | ".join(row) + " |")
        parts.append("")
    return "\n".join(parts)


def tabulate_assembly() -> str:
    """What each assembled UNet computes and gains against the full one."""
    records = load_records(RESULTS / "assembly.jsonl")
    cells = {(each.plan, each.metric): each for each in records}
    full = cells["full", "seconds"]
    latent = get(full, "latent")
    parts = [
        f"{full.subject}'s size, random weights, latents of {latent} x {latent}, a batch of "
        f"{get(full, 'batch')} ({full.value:.2f} s a call in full; {full.device}; "
        f"torch {full.torch}):\n",
        "| UNet | parameters | GMAC a sample | speed-up |",
        "|---|---|---|---|",
    ]
    plans = list(dict.fromkeys(each.plan for each in records))
    for plan in sorted(plans, key=lambda plan: cells[plan, "speedup"].value):
        params, macs = cells[plan, "params"].value, cells[plan, "macs"].value
        ratio = "1.00x" if plan == "full" else tabulate_ratio(cells[plan, "speedup"])
        parts.append(f"| {plan} | {params:.1f} M | {macs:.1f} | {ratio} |")
    return "\n".join([*parts, ""])


def tabulate_modes() -> str:
    """What one sample's step takes in each mode of incubation."""
    cells = {(each.plan, each.metric): each.value for each in load_records(RESULTS / "modes.jsonl")}
    parts = [
        "| stage | trains | forward, teacher + student | backward | weights and optimizer "
        "| activations of a sample | with gradient checkpointing |",
        "|---" * 7 + "|",
    ]
    for plan in dict.fromkeys(plan for plan, _ in cells):
        own = {metric: value for (name, metric), value in cells.items() if name == plan}
        parts.append(
            f"| {plan} | {own['trained'] / 1e6:.3g} M "
            f"| {own['teacher_macs'] / 1e9:.0f} + {own['student_macs'] / 1e9:.0f} G "
            f"| {own['backward_macs'] / 1e9:.0f} G | {own['weights'] / 2**30:.1f} GiB "
            f"| {own['activations'] / 2**30:.2f} GiB "
            f"| {own['activations_checkpointed'] / 2**30:.2f} GiB |"
        )
    return "\n".join([*parts, ""])


def tabulate_judged() -> str:
    """What an independent classifier makes of the bundled model's pictures, beside real ones."""
    told = json.loads((model_folder() / "evaluation.json").read_text(encoding="utf-8"))
    lines = ["| named right by the judge | drawn | real |", "|---|---|---|"]
    for key, title in (("train", "training captions"), ("held_out", "held-out pairs")):
        drawn, real = told[key]["generated"]["top1"], told[key]["real"]["top1"]
        lines.append(f"| {told[key]['count']} {title} | {drawn:.1%} | {real:.1%} |")
    return "\n".join([*lines, ""])

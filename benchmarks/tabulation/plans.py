"""Presets and few calls, predictions against clocks, and what the engine costs."""

from __future__ import annotations

from collections.abc import Sequence

from leansd.evaluation.records import Record, load_records
from leansd.evaluation.standings import PREDICTED
from leansd.plans.presets import SPEED_PRESETS
from leansd.plans.presets.tuned import load_tuned
from leansd.tuning.front import Front
from tabulation.cells import RESULTS, get, get_number, name_devices, tabulate_ratio

HEADLINE = ("dpm++2m-karras", "dpm++2m", "ddim")
"""The samplers of the README: the one that people use most, and one of either order."""
JUDGED = ("top1", "lost", "won", "frechet")
COLUMNS = ("", "speed-up, measured", "predicted", "PSNR to full", "SSIM", "CLIP score (tiny CLIP)")


def tabulate_presets() -> str:
    """For each sampler: what each way of drawing gains and what it loses against the full run."""
    records = load_records(RESULTS / "presets.jsonl")
    parts = []
    for sampler in dict.fromkeys(get(record, "sampler") for record in records):
        chosen = [record for record in records if get(record, "sampler") == sampler]
        cells = {(record.plan, record.metric): record for record in chosen}
        full = cells["full", "seconds"]
        parts.append(
            f"**{sampler}**, {get(full, 'steps')} steps, guidance {get(full, 'guidance'):g}, "
            f"{get(full, 'prompts')} pictures "
            f"({full.value:.2f} s each in full; {full.device}; torch {full.torch}):\n"
        )
        parts += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        plans = list(dict.fromkeys(record.plan for record in chosen))
        plans.sort(key=lambda name: cells[name, "speedup"].value)
        parts += [*(tabulate_row(plan, cells) for plan in plans), ""]
    return "\n".join(parts)


def tabulate_tuned() -> str:
    """Every sampler and step count that presets are tuned for: each beside as many plain steps."""
    lines = ["| | " + " | ".join(f"`{name}`" for name in SPEED_PRESETS) + " |", "|---" * 5 + "|"]
    for (sampler, steps), plans in sorted(load_tuned().items()):
        front = Front.load(RESULTS / "fronts" / f"{sampler}-{steps}.json")
        points = (*front.points, *front.dominated)
        plain = {point.plan.steps: point.psnr for point in points if point.is_plain}
        cells = [f"{sampler}, {steps} steps"]
        for name in SPEED_PRESETS:
            if name not in plans:
                cells.append("–")
                continue
            rows = plans[name].rows
            ours = next(point for point in points if point.plan.rows == rows)
            calls = len(ours.plan.keys)
            beside = f"{plain[calls]:.1f}" if calls in plain else "–"
            cells.append(f"{calls}: **{ours.psnr:.1f}**, {beside}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def tabulate_judged_plans() -> str:
    """What an independent classifier names right under presets, and in as many plain steps."""
    records = load_records(RESULTS / "judged-plans.jsonl")
    parts: list[str] = []
    for sampler in dict.fromkeys(get(record, "sampler") for record in records):
        chosen = [record for record in records if get(record, "sampler") == sampler]
        cells = {(record.plan, record.metric): record for record in chosen}
        first = chosen[0]
        parts.append(
            f"**{sampler}**, {get(first, 'steps')} steps, guidance {get(first, 'guidance'):g}, "
            f"{get(first, 'pictures')} training captions:\n"
        )
        head = ("", "UNet calls", "named right", "lost", "won", "Fréchet distance to real pictures")
        parts += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for plan in dict.fromkeys(record.plan for record in chosen):
            top1, lost, won, apart = (cells[plan, metric] for metric in JUDGED)
            name = f"**{plan}**" if top1.fingerprint else plan
            parts.append(
                f"| {name} | {get(top1, 'calls')} | {top1.value:.1%} | {lost.value:.0f} "
                f"| {won.value:.0f} | {apart.value:.2f} |"
            )
        parts.append("")
    return "\n".join(parts)


def tabulate_headline() -> str:
    """The preset for twice the speed beside as few steps of the same sampler, in few lines."""
    records = load_records(RESULTS / "presets.jsonl")
    return tabulate_beside_fewer(records, ("balanced",), HEADLINE)


def tabulate_elsewhere() -> str:
    """The same on a model that no preset was tuned on."""
    records = load_records(RESULTS / "untuned.jsonl")
    return tabulate_beside_fewer(records, ("balanced",), HEADLINE)


def tabulate_untuned() -> str:
    """All speed presets and samplers there."""
    return tabulate_beside_fewer(load_records(RESULTS / "untuned.jsonl"), tuple(SPEED_PRESETS))


def tabulate_beside_fewer(
    records: Sequence[Record], presets: Sequence[str], samplers: Sequence[str] = ()
) -> str:
    """Presets beside the number of plain steps that is nearest in predicted cost.

    Args:
        samplers: those to show, in this order; all by default.
    """
    head = ("30 steps with", "preset", "speed-up", "dB to the full run", "fewer steps", "dB")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for sampler in samplers or dict.fromkeys(get(record, "sampler") for record in records):
        cells = {(r.plan, r.metric): r for r in records if get(r, "sampler") == sampler}
        predicted = {plan: r.value for (plan, name), r in cells.items() if name == PREDICTED}
        fewer = [plan for plan in predicted if plan.endswith(" steps")]
        for preset in presets:
            nearest = min(fewer, key=lambda plan: abs(predicted[plan] - predicted[preset]))
            columns = (
                str(sampler),
                f"`{preset}`",
                tabulate_ratio(cells[preset, "speedup"]),
                f"**{cells[preset, 'psnr'].value:.1f} dB**",
                f"{nearest}, {tabulate_ratio(cells[nearest, 'speedup'])}",
                f"{cells[nearest, 'psnr'].value:.1f} dB",
            )
            lines.append("| " + " | ".join(columns) + " |")
    return "\n".join([*lines, ""])


def tabulate_comfyui() -> str:
    """In ComfyUI: presets beside as many plain steps, and its caches and forecasts."""
    records = load_records(RESULTS / "comfyui.jsonl")
    head = ("sampler, scheduler", "preset", "model calls", "dB", "as many plain steps")
    head += ("EasyCache", "LazyCache", "Spectrum")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for setting in dict.fromkeys((get(r, "sampler"), get(r, "scheduler")) for r in records):
        cells = {
            (record.plan, record.metric): record.value
            for record in records
            if (get(record, "sampler"), get(record, "scheduler")) == setting
        }

        def show(plan: str, cells: dict[tuple[str, str], float] = cells) -> str:
            calls = cells[plan, "model_calls"]
            return f"{cells[plan, 'psnr']:.1f} ({calls:g})"

        for preset in (plan for plan in SPEED_PRESETS if (plan, "psnr") in cells):
            calls = cells[preset, "model_calls"]
            plain = cells.get((f"{calls:g} steps", "psnr"))
            columns = (
                ", ".join(map(str, setting)),
                f"`{preset}`",
                f"{calls:g} of 20",
                f"**{cells[preset, 'psnr']:.1f}**",
                "" if plain is None else f"{plain:.1f}",
                show(f"EasyCache as {preset}"),
                show(f"LazyCache as {preset}"),
                f"{cells[f'Spectrum as {preset}', 'psnr']:.1f}",
            )
            lines.append("| " + " | ".join(columns) + " |")
    return "\n".join([*lines, ""])


def tabulate_row(plan: str, cells: dict[tuple[str, str], Record]) -> str:
    speedup = cells[plan, "speedup"]
    psnr, ssim, clip = (cells.get((plan, metric)) for metric in ("psnr", "ssim", "clip_score"))
    house = plan in ("quality", "balanced", "fast", "turbo")
    columns = (
        f"**{plan}**" if house else plan,
        tabulate_ratio(speedup) if psnr is not None else "1.00x",
        f"{cells[plan, 'predicted_speedup'].value:.2f}x",
        f"{psnr.value:.1f} dB" if psnr else "",
        f"{ssim.value:.3f}" if ssim else "",
        f"{clip.value:.1f}" if clip else "",
    )
    return "| " + " | ".join(columns) + " |"


def tabulate_prediction() -> str:
    """The UNet's speed-up under plans that the profile was not made from, and as measured."""
    records = load_records(RESULTS / "prediction.jsonl")
    held = [each for each in records if each.metric == "unet_speedup" and each.plan != "full"]
    cells = {(each.subject, each.plan, each.metric): each for each in records}
    parts: list[str] = []
    for subject in dict.fromkeys(each.subject for each in held):
        first = next(each for each in held if each.subject == subject)
        parts += [
            f"{subject}, {get(first, 'width')} x {get(first, 'height')} pixels, "
            f"{get(first, 'steps')} steps, {get(first, 'repeats')} repeats; {first.device}; "
            f"torch {first.torch}:\n",
            "| plan | predicted | measured | off by |",
            "|---|---|---|---|",
        ]
        for each in (each for each in held if each.subject == subject):
            predicted = cells[subject, each.plan, "predicted_unet_speedup"].value
            parts.append(
                f"| {each.plan} | {predicted:.2f}x | {tabulate_ratio(each)} "
                f"| {predicted / each.value - 1:+.1%} |"
            )
        parts.append("")
    return "\n".join(parts)


def tabulate_overhead() -> str:
    """What the engine itself costs, beside the package whose plan it follows."""
    records = load_records(RESULTS / "overhead.jsonl")
    cells = {(each.plan, each.metric): each for each in records}
    ours, theirs = cells["leansd", "speedup"], cells["DeepCache", "speedup"]
    rows = [
        f"| {name} | {tabulate_ratio(each)} |"
        for name, each in (("this package", ours), ("the DeepCache package", theirs))
    ]
    predicted = cells["leansd", "predicted_speedup"].value
    return "\n".join(
        [
            f"{ours.subject}'s size, random weights, 512 px, {get(ours, 'rounds')} paired rounds; "
            f"{ours.device}; torch {ours.torch}:\n",
            f"| DeepCache's 1:{get(ours, 'interval')}, shallowest branch, by | speed-up |",
            "|---|---|",
            *rows,
            f"| the times of the units that it runs | {predicted:.2f}x |",
            "",
            f"The wrapper around a unit adds {cells['full', 'wrapper'].value:.1f} microseconds.",
            "",
        ]
    )


def tabulate_gpu() -> str:
    """Eager, compiled and CUDA-graph runs of every plan on a GPU, or that there are none."""
    path = RESULTS / "gpu.jsonl"
    modes = ("eager", "compiled", "CUDA graphs")
    parts = ["| plan on a GPU | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    if not path.exists():
        return "\n".join([*parts, "| any" + " | not measured" * len(modes) + " |", ""])
    records = load_records(path)
    checks = [each.value for each in records if each.metric == "check"]
    told = [f"{sum(checks):.0f} of {len(checks)} checks hold.\n"] if checks else []
    for subject in dict.fromkeys(each.subject for each in records if each.metric == "speedup"):
        own = [each for each in records if each.subject == subject and each.metric != "check"]
        first = own[0]
        cells = {(each.plan, get(each, "mode")): each for each in own if each.metric == "speedup"}
        told += [
            f"{subject}, {get(first, 'dtype')}, {get(first, 'width')} px, batch "
            f"{get(first, 'batch')}, {get(first, 'steps')} steps ({first.value:.2f} s in full, "
            f"eager; {first.device}; torch {first.torch}):\n",
            *parts,
        ]
        for plan in dict.fromkeys(plan for plan, _ in cells):
            row = (f"{cells[plan, mode].value:.2f}x" for mode in modes)
            told.append(f"| {plan} | " + " | ".join(row) + " |")
        told.append("")
    return "\n".join(told)


def tabulate_joint() -> str:
    """The joint search, each axis alone, and rivals that switch nets, on calls held out."""
    records = load_records(RESULTS / "joint.jsonl")
    first = records[0]
    parts = [
        f"{first.subject}, {get(first, 'steps')} steps, guidance {get(first, 'guidance'):g}, "
        f"{get(first, 'pictures')} pictures; {first.device}; torch {first.torch}; timed in turns:\n"
    ]
    for sampler in dict.fromkeys(get(each, "sampler") for each in records):
        own = [each for each in records if get(each, "sampler") == sampler]
        cells = {(each.plan, get_number(each, "goal"), each.metric): each for each in own}
        goals = sorted({goal for _, goal, _ in cells})
        parts += [
            f"| {sampler} | " + " | ".join(f"for {goal:g}x" for goal in goals) + " |",
            "|---" * (1 + len(goals)) + "|",
        ]
        for plan in dict.fromkeys(each.plan for each in own):
            row: list[str] = []
            for goal in goals:
                close, fast = (cells.get((plan, goal, m)) for m in ("psnr", "speedup"))
                reached = close is not None and fast is not None
                row.append(
                    f"{close.value:.1f} dB at {fast.value:.2f}x" if reached else "not so fast"
                )
            parts.append(f"| {plan} | " + " | ".join(row) + " |")
        parts.append("")
    return "\n".join(parts)


def tabulate_few_calls() -> str:
    """Tuned plans with few UNet calls before and after mixes were fitted, beside fewer steps."""
    settings: dict[tuple[object, ...], list[Record]] = {}
    for each in load_records(RESULTS / "few-calls.jsonl"):
        place = tuple(get(each, field) for field in ("sampler", "steps", "guidance", "calls"))
        settings.setdefault((each.subject, *place), []).append(each)
    return "\n".join(map(_tabulate_few_calls_of, settings.values()))


def _tabulate_few_calls_of(records: Sequence[Record]) -> str:
    """The same of one setting."""
    cells = {(get(each, "unet_calls"), each.plan, each.metric): each for each in records}
    first = records[0]
    calls, held = get_number(first, "calls"), get_number(first, "held_out")
    lines = [
        f"{first.subject}, {get(first, 'sampler')}, {get(first, 'steps')} steps, guidance "
        f"{get(first, 'guidance'):g}; fitted on {calls - held:.0f} runs, measured on {held:.0f} "
        f"others; {name_devices(records)}; torch {first.torch}:\n",
        "| UNet calls | | PSNR, mean of pictures | PSNR of the mean error | fitted in |",
        "|---:|---|---:|---:|---:|",
    ]
    cases = {(count, plan) for count, plan, _ in cells}
    for count, plan in sorted(cases, key=lambda case: (case[0], cells[*case, "psnr"].value)):
        mean, whole = (cells[count, plan, m] for m in ("psnr", "psnr_of_mean_error"))
        seconds = (mean.model_extra or {}).get("seconds", 0.0)
        spent = f"{seconds / 60:.0f} min" if seconds else ""
        lines.append(f"| {count} | {plan} | {mean.value:.1f} | {whole.value:.1f} | {spent} |")
    return "\n".join([*lines, ""])


def tabulate_imports() -> str:
    """What importing takes, and its share of importing torch."""
    records = load_records(RESULTS / "imports.jsonl")
    first = records[0]
    lines = ["| imported in a new process | ms of the processor | of torch's |", "|---|---:|---:|"]
    for each in records:
        low, high = (1e3 * get_number(each, name) for name in ("low", "high"))
        lines.append(
            f"| {each.plan} | {1e3 * each.value:.0f} ({low:.0f} to {high:.0f}) "
            f"| {get_number(each, 'share'):.1%} |"
        )
    setting = f"{get(first, 'rounds')} rounds in turns; {first.device}; torch {first.torch}:\n"
    return "\n".join([setting, *lines, ""])

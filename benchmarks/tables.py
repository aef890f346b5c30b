"""Write the tables of README.md and some pages of docs from the committed records.

Nothing in them is typed by hand.

python benchmarks/tables.py           rewrite the tables
python benchmarks/tables.py --check   fail if they are not what the records say
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from leansd.faces.standings import read_standings, tabulate_summary
from leansd.measuring.records import Record, load_records

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("", "speed-up, measured", "predicted", "PSNR to full", "SSIM", "CLIP score (tiny CLIP)")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- table: (?P<name>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


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


def tabulate_gpu() -> str:
    """Eager, compiled and CUDA-graph runs of every plan on a GPU, or that there are none."""
    path = RESULTS / "gpu.jsonl"
    modes = ("eager", "compiled", "CUDA graphs")
    parts = ["| plan on a GPU | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    if not path.exists():
        return "\n".join([*parts, "| any" + " | not measured" * len(modes) + " |", ""])
    records = load_records(path)
    first = records[0]
    cells = {(each.plan, get(each, "mode")): each for each in records if each.metric == "speedup"}
    for plan in dict.fromkeys(plan for plan, _ in cells):
        row = (f"{cells[plan, mode].value:.2f}x" for mode in modes)
        parts.append(f"| {plan} | " + " | ".join(row) + " |")
    setting = (
        f"{first.subject}, {get(first, 'dtype')}, {get(first, 'width')} px, batch "
        f"{get(first, 'batch')}, {get(first, 'steps')} steps ({first.value:.2f} s in full, eager; "
        f"{first.device}; torch {first.torch}):\n"
    )
    return "\n".join([setting, *parts, ""])


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


def tabulate_incubation() -> str:
    """What became of each net of `benchmarks/incubated.py`; over the seeds of its training."""
    records = load_records(RESULTS / "incubation.jsonl")
    found: dict[tuple[str, str], list[float]] = {}
    for each in records:
        found.setdefault((each.plan, each.metric), []).append(each.value)
    first = records[0]
    metrics = ("teacher_error", "psnr", "ssim", "retrieval", "frechet")
    parts = [
        f"{first.subject}; errors of {get(first, 'errors')} held-out pictures at {MOMENTS} time "
        f"steps, times 1,000; {get(first, 'captions')} of their captions drawn in "
        f"{get(first, 'steps')} steps, guidance {get(first, 'guidance'):g}; {first.device}; "
        f"torch {first.torch}. Of several trainings their mean, the least and the most:\n",
        "| net | trained | MACs | speed-up | noise off by | PSNR | SSIM | retrieval | Fréchet |",
        "|---" * 9 + "|",
    ]
    cells = {(each.plan, each.metric): each for each in records}
    for plan in dict.fromkeys(each.plan for each in records):
        speed = tabulate_ratio(cells[plan, "speedup"]) if plan != "teacher" else "1.00x"
        values = [tabulate_values(found.get((plan, metric), []), metric) for metric in metrics]
        seeds = {get(each, "training_seed") for each in records if each.plan == plan} - {None}
        trained = str(len(seeds)) if "untrained" not in plan and plan != "pruned" else ""
        macs = f"{cells[plan, 'macs'].value:.3f} G"
        parts.append(f"| {plan} | {trained} | {macs} | {speed} | " + " | ".join(values) + " |")
    return "\n".join([*parts, ""])


def tabulate_values(values: list[float], metric: str) -> str:
    """Their mean and range; errors per thousand, each net's over its time steps first."""
    if not values:
        return ""
    if metric == "teacher_error":
        values = [1000 * sum(part) / len(part) for part in batch(values, MOMENTS)]
    digits = {"psnr": 1, "frechet": 1, "ssim": 3, "retrieval": 3}.get(metric, 2)
    mean, low, high = sum(values) / len(values), min(values), max(values)
    spread = f" ({low:.{digits}f} to {high:.{digits}f})" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


MOMENTS = 10
"""Time steps that errors of predictions are measured at."""


def batch(values: list[float], size: int) -> list[list[float]]:
    return [values[place : place + size] for place in range(0, len(values), size)]


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


def tabulate_ratio(record: Record) -> str:
    return f"{record.value:.2f}x ({get(record, 'low'):.2f} to {get(record, 'high'):.2f})"


def get(record: Record, name: str) -> object:
    """A case's own field of a record."""
    return (record.model_extra or {})[name]


def get_number(record: Record, name: str) -> float:
    """A case's own field that is a number."""
    return float(str(get(record, name)))


def tabulate_bench() -> str:
    """For each contest of `leansd bench`: ours and the best rival at the same speed."""
    records = load_records(RESULTS / "bench.jsonl")
    full = next(record for record in records if record.plan == "full")
    circumstances = (
        f"{full.subject}, {get(full, 'calls')} pictures a contest in batches of "
        f"{get(full, 'batch')}; {full.device}; torch {full.torch}:"
    )
    return f"{circumstances}\n\n{tabulate_summary(read_standings(records)).markdown()}\n"


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
            f"{cells[way.format(name), 'output_error']:.4f} | "
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


def tabulate_bulk() -> str:
    """What drawing in bulk took, here: in one process, and on Ray with one worker and with two."""
    path = RESULTS / "bulk.jsonl"
    if not path.exists():
        return "Not measured yet: `python benchmarks/bulk.py`.\n"
    records = load_records(path)
    cells = {(each.plan, each.metric): each for each in records}
    first = records[0]
    parts = [
        f"{first.subject}, {get(first, 'pictures')} pictures by the plan {get(first, 'drawn_by')}, "
        f"{get(first, 'steps')} steps, rounds: {get(first, 'rounds')}; {first.device}; torch "
        f"{first.torch}:\n",
        "| | a picture | to start |",
        "|---|---|---|",
    ]
    for plan in dict.fromkeys(each.plan for each in records):
        each, start = (cells[plan, m].value for m in ("seconds_a_picture", "seconds_to_start"))
        parts.append(f"| {plan} | {each:.2f} s | {start:.1f} s |")
    return "\n".join([*parts, ""])


def tabulate_host() -> str:
    """What the host does for a picture, as measured."""
    records = read_scale(calculated=False)
    first = records[0]
    parts = [
        f"{first.device}; torch {first.torch}:\n",
        "| for a picture of 512 px | |",
        "|---|---|",
    ]
    for each in records:
        if each.metric == "processor_seconds":
            parts.append(f"| {each.plan} | {each.value * 1000:.2g} ms |")
        else:
            parts.append(f"| the picture, as a PNG | {each.value:.2f} MB |")
    return "\n".join([*parts, ""])


def tabulate_scale() -> str:
    """What fleets would do with one job, as calculated."""
    records = read_scale(calculated=True)
    first = records[0]
    parts = [
        f"{get(first, 'pictures'):,} pictures of {first.subject}, "
        f"{get_number(first, 'seconds'):.2f} s each on a GPU in full, speed-up "
        f"{get(first, 'speedup'):g}x, {get(first, 'euro'):g} € an hour:\n",
        "| GPUs | shard | in all | pictures/s | pictures/€ | most waiting for |",
        "|" + "---|" * 6,
    ]
    cells = {(get(r, "gpus"), get(r, "shard"), r.metric): r for r in records}
    for gpus, shard in dict.fromkeys((get(each, "gpus"), get(each, "shard")) for each in records):
        job = cells[gpus, shard, "job_seconds"]
        rate, yielded = (
            cells[gpus, shard, f"pictures_a_{each}"].value for each in ("second", "euro")
        )
        parts.append(
            f"| {gpus:,} | {shard} | {show_time(job.value)} | {rate:.3g} | {yielded:,.0f} | "
            f"{get(job, 'limit')} |"
        )
    return "\n".join([*parts, ""])


def tabulate_steady() -> str:
    """What a job without an end asks of the driver, as calculated."""
    records = read_scale(calculated=True)
    cells = {(get(each, "gpus"), each.metric): each.value for each in records}
    first = records[0]
    parts = [
        f"| GPUs | pictures/s | of the driver's network ({get(first, 'line'):g} GB/s) | "
        "of a core of the driver |",
        "|" + "---|" * 4,
    ]
    for gpus in dict.fromkeys(get(each, "gpus") for each in records):
        rate, line, driver = (
            cells[gpus, f"steady_{each}"] for each in ("pictures_a_second", "line", "driver")
        )
        parts.append(f"| {gpus:,} | {rate:,.4g} | {line:.1%} | {driver:.1%} |")
    return "\n".join([*parts, ""])


def read_scale(*, calculated: bool) -> list[Record]:
    """What `benchmarks/scale.py` calculated, or what it measured."""
    records = load_records(RESULTS / "scale.jsonl")
    return [each for each in records if get(each, "calculated") == calculated]


def show_time(seconds: float) -> str:
    """`5 h 8 min` or `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"


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


TABLES: dict[str, Callable[[], str]] = {
    "cuts": tabulate_cuts,
    "presets": tabulate_presets,
    "bench": tabulate_bench,
    "gpu": tabulate_gpu,
    "overhead": tabulate_overhead,
    "gri": tabulate_gri,
    "assembly": tabulate_assembly,
    "incubation": tabulate_incubation,
    "joint": tabulate_joint,
    "modes": tabulate_modes,
    "prediction": tabulate_prediction,
    "surgeries": tabulate_surgeries,
    "bulk": tabulate_bulk,
    "host": tabulate_host,
    "scale": tabulate_scale,
    "steady": tabulate_steady,
    "imports": tabulate_imports,
}


def fill(page: str) -> str:
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found['name']]()}\n{found[3]}", page)


def main() -> None:
    for path in PAGES:
        old = path.read_text(encoding="utf-8")
        new = fill(old)
        if "--check" in sys.argv[1:]:
            if new != old:
                sys.exit(f"{path.name} is not what the records say: run benchmarks/tables.py")
        else:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()

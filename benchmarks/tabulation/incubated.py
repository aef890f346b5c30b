"""What became of the nets of `benchmarks/incubated.py`, over the seeds of their trainings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import mean

from leansd.evaluation.records import Record, load_records
from tabulation.cells import RESULTS, get, tabulate_ratio

TEACHER, OTHER, FULL = "teacher", "teacher, other noise", "full"
FEWER = ("teacher, 7 steps", "teacher, 6 steps", "teacher, 5 steps")
BARE = (TEACHER, "pruned", "assembled, untrained")
"""What no goal is for."""
UNTRAINED = (*BARE, OTHER, *FEWER)
LIGHTER = (*FEWER, "1112", "bk", "lean", "leaner", "leanest")
"""Nets with a third less time or more, and what a user would take instead."""
AT_FULL_SIZE = {
    "assembled": "asdm-1222",
    FULL: "asdm-1222 + gri + condconv",
    "direct": "asdm-1222 + gri + condconv",
    "1122 GRI": "asdm-1122 + gri",
    "1112 GRI": "asdm-1112 + gri",
    "1112": "asdm-1112",
    "bk": "bk-base",
    "lean": "lean",
    "leaner": "leaner",
    "leanest": "leanest",
}
"""The surgeries that `benchmarks/assembly.py` has timed at Stable Diffusion 1.5's size."""
COMPARED = ("no CLME", "raw experts", "no GRI", "no mid", "no VGG", "ended", "direct")
"""What is held against `full`, training by training."""
DIGITS = {"psnr": 1, "frechet": 1, "ssim": 3, "retrieval": 3, "teacher_error": 1}

Values = Mapping[tuple[str, str], Mapping[int, float]]
"""By net and metric: a value for each seed of training, or for what is held against it."""


def tabulate_incubation() -> str:
    """Every net, trained or not."""
    records = load_records(RESULTS / "incubation.jsonl")
    values = read_values(records)
    first = records[0]
    parts = [
        f"{first.subject}; errors of {get(first, 'errors')} held-out pictures at "
        f"{len(list_moments(records))} time steps, times 1,000; {get(first, 'captions')} of their "
        f"captions drawn in {get(first, 'steps')} steps, guidance {get(first, 'guidance'):g}; "
        f"{first.device}; torch {first.torch}. Of several trainings, each from noise of its own, "
        "their mean, the least and the most:\n",
        "| net | trained | MACs | speed-up | noise off by | PSNR | SSIM | retrieval | Fréchet |",
        "|---" * 9 + "|",
    ]
    cells = {(each.plan, each.metric): each for each in records}
    for plan in list_plans(records):
        timed = cells.get((plan, "speedup")) if plan != TEACHER else None
        speed = tabulate_ratio(timed) if timed else f"{1 / (1 - save_calls(cells, plan)):.2f}x"
        trained = str(len(values[plan, "psnr"])) if plan not in UNTRAINED else ""
        macs = f"{cells[plan, 'macs'].value:.3f} G"
        columns = [
            tabulate_values(list(values.get((plan, metric), {}).values()), show(metric))
            for metric in ("teacher_error", "psnr", "ssim", "retrieval", "frechet")
        ]
        parts.append(f"| {plan} | {trained} | {macs} | {speed} | " + " | ".join(columns) + " |")
    return "\n".join([*parts, ""])


def tabulate_goals() -> str:
    """Retrieval and Fréchet distance against the teacher's of the same noise; time at full size."""
    records = load_records(RESULTS / "incubation.jsonl")
    values, times = read_values(records), read_times(records)
    parts = ["| net | less time at SD 1.5's size | retrieval | Fréchet |", "|---" * 4 + "|"]
    for plan in list_plans(records):
        if plan not in BARE:
            columns = tabulate_changes(values, plan)
            parts.append(f"| {plan} | {times.get(plan, '')} | " + " | ".join(columns) + " |")
    return "\n".join([*parts, ""])


def tabulate_lighter() -> str:
    """The light nets beside fewer steps of the whole one."""
    records = load_records(RESULTS / "incubation.jsonl")
    values, times = read_values(records), read_times(records)
    first = records[0]
    parts = [
        f"{first.subject}; {get(first, 'captions')} held-out captions in {get(first, 'steps')} "
        f"steps, dpm++2m, guidance {get(first, 'guidance'):g}; of several trainings or noises "
        "the mean and the range; retrieval and Fréchet distance beside the teacher's:\n",
        "| net | less time at SD 1.5's size | PSNR | retrieval | Fréchet |",
        "|---" * 5 + "|",
    ]
    for plan in (each for each in LIGHTER if (each, "psnr") in values):
        ratio = tabulate_values(list(values[plan, "psnr"].values()), show("psnr"))
        columns = [times[plan], f"{ratio} dB", *tabulate_changes(values, plan)]
        parts.append(f"| {plan} | " + " | ".join(columns) + " |")
    return "\n".join([*parts, ""])


def tabulate_ingredients() -> str:
    """What is otherwise where an ingredient of `full` is left out, training by training."""
    values = read_values(load_records(RESULTS / "incubation.jsonl"))
    parts = ["| | trainings | PSNR | noise off by | retrieval | Fréchet |", "|---" * 6 + "|"]
    for plan in (each for each in COMPARED if (each, "psnr") in values):
        pairs = {
            metric: pair(values, metric, plan, FULL)
            for metric in ("psnr", "teacher_error", "retrieval", "frechet")
        }
        columns = [
            tabulate_values([one - other for one, other in found], show_difference(metric))
            for metric, found in pairs.items()
        ]
        parts.append(f"| {plan} | {len(pairs['psnr'])} | " + " | ".join(columns) + " |")
    return "\n".join([*parts, ""])


def read_values(records: list[Record]) -> Values:
    """Errors per thousand, the mean over time steps."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for each in records:
        if each.metric in DIGITS:
            own = found.setdefault((each.plan, each.metric), {})
            scale = 1000 if each.metric == "teacher_error" else 1
            own.setdefault(int(str(get(each, "turn"))), []).append(scale * each.value)
    return {key: {turn: mean(all_) for turn, all_ in own.items()} for key, own in found.items()}


def read_times(records: list[Record]) -> dict[str, str]:
    """What a net saves of the time, where its surgery was timed at full size; fewer steps save
    calls."""
    cells = {(each.plan, each.metric): each for each in records}
    timed = {
        each.plan: 1 - 1 / each.value
        for each in load_records(RESULTS / "assembly.jsonl")
        if each.metric == "speedup"
    }
    saved = {plan: timed[surgery] for plan, surgery in AT_FULL_SIZE.items()}
    saved |= {plan: save_calls(cells, plan) for plan in FEWER}
    return {plan: f"{share:.1%}" for plan, share in saved.items()}


def save_calls(cells: Mapping[tuple[str, str], Record], plan: str) -> float:
    """The share of UNet calls that are not made."""
    calls = cells.get((plan, "calls"))
    return 1 - calls.value / float(str(get(calls, "steps"))) if calls else 0.0


def tabulate_changes(values: Values, plan: str) -> list[str]:
    """Retrieval and Fréchet distance, as changes of the teacher's of the same noise."""
    return [
        tabulate_values(
            [one / other - 1 for one, other in pair(values, metric, plan, TEACHER)],
            "{:+.1%}".format,
        )
        for metric in ("retrieval", "frechet")
    ]


def list_plans(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(each.plan for each in records))


def list_moments(records: list[Record]) -> set[object]:
    return {get(each, "timestep") for each in records if each.metric == "teacher_error"}


def pair(values: Values, metric: str, plan: str, other: str) -> list[tuple[float, float]]:
    """The values of two nets that drew from the same noise."""
    ones, others = values.get((plan, metric), {}), values[other, metric]
    return [(ones[turn], others[turn]) for turn in ones]


def show(metric: str) -> Callable[[float], str]:
    """How values of a metric are written."""
    return f"{{:.{DIGITS[metric]}f}}".format


def show_difference(metric: str) -> Callable[[float], str]:
    """How differences of a metric are written: signed, a digit more."""
    return f"{{:+.{DIGITS[metric] + 1}f}}".format


def tabulate_values(values: list[float], write: Callable[[float], str]) -> str:
    """Their mean and range."""
    if not values:
        return ""
    spread = f" ({write(min(values))} to {write(max(values))})" if len(values) > 1 else ""
    return f"{write(mean(values))}{spread}"

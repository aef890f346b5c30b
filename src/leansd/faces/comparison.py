"""The same prompts from the same seeds, in full and under each plan, timed in turns.

What a user would do without this package, fewer steps at about the cost of `balanced`, is one of
the contestants.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from diffusers import DiffusionPipeline
from PIL.Image import Image

from leansd.drawing import Painting, Request, paint
from leansd.evaluation.fidelity import psnr, ssim
from leansd.evaluation.records import Record, stamp
from leansd.evaluation.timing import Ratio, Timing, compare_timings, time_cases
from leansd.faces.outlines import predict_gain
from leansd.faces.scoring import Scorer
from leansd.plans.anatomy import Anatomy
from leansd.plans.plan import Plan
from leansd.plans.presets import PRESETS
from leansd.runtime.samplers import name_sampler
from leansd.text import Table

FULL = "full"
FEWER = "fewer steps"


@dataclass(frozen=True)
class Contestant:
    """One way to draw. Without a plan the pipeline runs as it is."""

    name: str
    summary: str
    steps: int
    plan: Plan | None = None


@dataclass(frozen=True)
class Entry:
    """What one contestant drew and how it fared against the full run; means over the prompts."""

    contestant: Contestant
    pictures: tuple[Image, ...]
    timing: Timing
    speedup: Ratio
    predicted: float
    psnr: float | None
    ssim: float | None
    clip: float | None
    bytes_kept: int

    @property
    def is_full(self) -> bool:
        return self.contestant.name == FULL


@dataclass(frozen=True)
class Comparison:
    """All entries, the full run first, with the circumstances they share."""

    subject: str
    prompts: tuple[str, ...]
    seed: int
    steps: int
    guidance: float
    sampler: str
    size: tuple[int, int]
    circumstances: dict[str, str]
    anatomy: Anatomy
    entries: tuple[Entry, ...]


def line_up(anatomy: Anatomy, steps: int, plans: Mapping[str, Plan]) -> list[Contestant]:
    """The full run, every preset of the house, and fewer steps at about the cost of `balanced`."""
    fewer = max(1, round(steps / predict_gain(plans["balanced"], anatomy)))
    return [
        Contestant(FULL, f"the whole UNet at each of {steps} steps", steps),
        *(Contestant(name, PRESETS[name].summary, steps, plan) for name, plan in plans.items()),
        Contestant(FEWER, f"the whole UNet, {fewer} steps of the same sampler", fewer),
    ]


def compare_plans(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    subject: str,
    anatomy: Anatomy,
    base: Request,
    contestants: Sequence[Contestant],
    scorer: Scorer | None = None,
    on_step: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Draw every prompt with every contestant, the first of which is the full run.

    Prompt `i` has seed `base.seed + i`.
    A round is one prompt drawn by all contestants, so that a slow spell of the machine hits them
    alike and a speed-up is the median of as many paired ratios as there are prompts.
    """
    requests = [
        replace(base, prompt=prompt, seed=base.seed + turn) for turn, prompt in enumerate(prompts)
    ]
    done: dict[str, dict[int, Painting]] = {each.name: {} for each in contestants}

    def make_case(each: Contestant) -> Callable[[int], None]:
        def draw(turn: int) -> None:
            done[each.name][turn] = paint(
                pipe,
                replace(requests[turn], steps=each.steps),
                each.plan,
                lambda step, total: on_step(each.name),
            )

        return draw

    paint(pipe, replace(requests[0], steps=2))  # warm-up
    timings = time_cases(
        {each.name: make_case(each) for each in contestants},
        rounds=len(requests),
        warmup=0,
        device=pipe.device,
    )
    full = [done[FULL][turn].image for turn in range(len(requests))]
    entries = tuple(
        _judge(
            each,
            [done[each.name][turn] for turn in range(len(requests))],
            timings,
            full,
            prompts,
            scorer,
            base.steps,
        )
        for each in contestants
    )
    return Comparison(
        subject=subject,
        prompts=tuple(prompts),
        seed=base.seed,
        steps=base.steps,
        guidance=float(pipe.guidance_scale),
        sampler=name_sampler(pipe),
        size=full[0].size,
        circumstances=stamp(pipe.device),
        anatomy=anatomy,
        entries=entries,
    )


def _judge(
    each: Contestant,
    paintings: Sequence[Painting],
    timings: dict[str, Timing],
    full: Sequence[Image],
    prompts: Sequence[str],
    scorer: Scorer | None,
    steps: int,
) -> Entry:
    pictures = tuple(painting.image for painting in paintings)
    report = paintings[0].report  # every prompt runs the same plan
    against = None if each.name == FULL else full
    return Entry(
        contestant=each,
        pictures=pictures,
        timing=timings[each.name],
        speedup=compare_timings(timings[FULL], timings[each.name]),
        predicted=(report.predicted_speedup if report is not None else steps / each.steps),
        psnr=float(psnr(pictures, against).mean()) if against else None,
        ssim=float(ssim(pictures, against).mean()) if against else None,
        clip=statistics.fmean(scorer(pictures, prompts)) if scorer else None,
        bytes_kept=report.bytes_kept if report is not None else 0,
    )


def list_records(comparison: Comparison) -> list[Record]:
    """Every number of the comparison as a record."""
    records = []
    for entry in comparison.entries:
        each = entry.contestant
        case = {
            **comparison.circumstances,
            "subject": comparison.subject,
            "plan": each.name,
            "fingerprint": each.plan.fingerprint if each.plan is not None else "",
            "seed": comparison.seed,
            "steps": each.steps,
            "sampler": comparison.sampler,
            "guidance": comparison.guidance,
            "prompts": len(comparison.prompts),
            "width": comparison.size[0],
            "height": comparison.size[1],
        }
        spread = {"low": min(entry.timing.seconds), "high": max(entry.timing.seconds)}
        ratio = {"low": entry.speedup.low, "high": entry.speedup.high}
        records += [
            Record(**case, metric="seconds", value=entry.timing.median, unit="s", **spread),
            Record(**case, metric="speedup", value=entry.speedup.median, unit="x", **ratio),
            Record(**case, metric="predicted_speedup", value=entry.predicted, unit="x"),
            Record(**case, metric="bytes_kept", value=entry.bytes_kept, unit="B"),
        ]
        for metric, value, unit in (
            ("psnr", entry.psnr, "dB"),
            ("ssim", entry.ssim, ""),
            ("clip_score", entry.clip, ""),
        ):
            if value is not None:
                records.append(Record(**case, metric=metric, value=value, unit=unit))
    return records


def tabulate_comparison(comparison: Comparison) -> Table:
    """The comparison as people read it; without scores there is no column for them."""
    scored = any(entry.clip is not None for entry in comparison.entries)
    rows = []
    for entry in comparison.entries:
        each, ratio = entry.contestant, entry.speedup
        rows.append(
            (
                each.name,
                f"{entry.timing.median:.2f} s",
                "1.00x" if entry.is_full else str(ratio),
                f"{entry.predicted:.2f}x",
                _show(entry.psnr, ".1f"),
                _show(entry.ssim, ".3f"),
                *((_show(entry.clip, ".1f"),) if scored else ()),
                _show_bytes(entry.bytes_kept),
            )
        )
    columns = ("plan", "time", "speed-up", "predicted", "PSNR", "SSIM")
    return Table((*columns, *(("CLIP",) if scored else ()), "kept"), tuple(rows))


def _show(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _show_bytes(count: int) -> str:
    if not count:
        return "–"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"

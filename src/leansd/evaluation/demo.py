"""The demo: the same prompts from the same seeds, in full and under each preset, timed in turns.

What a user would do without this package, fewer steps at about the cost of `balanced`, is one of
the cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from diffusers import DiffusionPipeline

from leansd.drawing import find_scale
from leansd.evaluation.compare import Case, Compared, Judging, OnProgress, Rounds, compare_runs
from leansd.evaluation.quality import Embedder
from leansd.evaluation.records import Record, stamp
from leansd.evaluation.runs import FULL, CallSet
from leansd.plans.anatomy import Anatomy
from leansd.plans.compile import compile_plan, predict_speedup
from leansd.plans.plan import Plan
from leansd.plans.presets import PRESETS
from leansd.runtime.samplers import name_sampler
from leansd.text import Table

FEWER = "fewer steps"
ROUNDS = Rounds(3, budget=90.0)


@dataclass(frozen=True)
class Demo:
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
    entries: tuple[Compared, ...]
    rounds: int = 1
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Cases without numbers, and why."""

    def predict(self, entry: Compared) -> float:
        """How many times less work it is: by what its plan did, or by its steps alone."""
        report = entry.report
        return report.predicted_speedup if report is not None else self.steps / entry.case.steps


def list_cases(anatomy: Anatomy, steps: int, plans: Mapping[str, Plan]) -> list[Case]:
    """The full run, the presets, and fewer steps at about the cost of `balanced`.

    Presets that mean the full run, as they do where steps are few, are left out; of the steps half
    are run then.
    """
    plans = {name: plan for name, plan in plans.items() if plan.name != FULL}
    gain = 2.0
    if "balanced" in plans:
        gain = predict_speedup(compile_plan(plans["balanced"], anatomy).calls, anatomy)
    fewer = max(1, round(steps / (gain if isfinite(gain) else 2.0)))
    return [
        Case(FULL, steps, summary=f"the whole UNet at each of {steps} steps"),
        *(Case(name, steps, plan, summary=PRESETS[name].summary) for name, plan in plans.items()),
        Case(FEWER, fewer, summary=f"the whole UNet, {fewer} steps of the same sampler"),
    ]


def run_demo(
    pipe: DiffusionPipeline,
    cases: Sequence[Case],
    calls: CallSet,
    *,
    subject: str,
    anatomy: Anatomy,
    embedder: Embedder | None = None,
    rounds: Rounds = ROUNDS,
    on_progress: OnProgress = lambda progress: None,
) -> Demo:
    """Draw every prompt in every case, the first of which is the full run.

    Of the rounds the fastest run of a prompt counts; a speed-up is the median over the prompts.
    """
    comparison = compare_runs(
        pipe,
        cases,
        calls,
        judging=Judging(embedder=embedder),
        rounds=rounds,
        on_progress=on_progress,
    ).require_finite()
    entries = tuple(comparison)
    return Demo(
        subject=subject,
        prompts=tuple(calls.prompts or ()),
        seed=calls.seeds[0],
        steps=cases[0].steps,
        guidance=find_scale(pipe, calls.settings.get("guidance_scale")) or 0.0,
        sampler=name_sampler(pipe),
        size=entries[0].images[0].size,
        circumstances=stamp(pipe.device),
        anatomy=anatomy,
        entries=entries,
        rounds=entries[0].timing.rounds,
        left_out=comparison.left_out,
    )


def list_records(demo: Demo) -> list[Record]:
    records: list[Record] = []
    for entry in demo.entries:
        case: dict[str, Any] = {
            **demo.circumstances,
            "subject": demo.subject,
            "plan": entry.case.name,
            "fingerprint": entry.case.fingerprint,
            "seed": demo.seed,
            "steps": entry.case.steps,
            "sampler": demo.sampler,
            "guidance": demo.guidance,
            "prompts": len(demo.prompts),
            "width": demo.size[0],
            "height": demo.size[1],
        }
        seconds, speedup = entry.timing.seconds, entry.speedup
        spread = {"low": min(seconds), "high": max(seconds)}
        ratio = {"low": speedup.low, "high": speedup.high}
        rows: list[tuple[str, float | None, str, dict[str, Any]]] = [
            ("seconds", entry.timing.median, "s", spread),
            ("speedup", speedup.median, "x", ratio),
            ("predicted_speedup", demo.predict(entry), "x", {}),
            ("bytes_kept", entry.bytes_kept, "B", {}),
            ("psnr", entry.mean("psnr"), "dB", {}),
            ("ssim", entry.mean("ssim"), "", {}),
            ("clip_score", entry.mean("clip_score", None), "", {}),
        ]
        records += [
            Record(**case, **fields, metric=metric, value=value, unit=unit)
            for metric, value, unit, fields in rows
            if value is not None and isfinite(value)
        ]
    return records


def tabulate_demo(demo: Demo) -> Table:
    """The demo as people read it; without scores there is no column for them."""
    scored = any(entry.find("clip_score", None) for entry in demo.entries)
    rows = [
        (
            entry.case.name,
            f"{entry.timing.median:.2f} s",
            "1.00x" if entry.case.name == FULL else str(entry.speedup),
            f"{demo.predict(entry):.2f}x",
            _show(entry.mean("psnr"), ".1f"),
            _show(entry.mean("ssim"), ".3f"),
            *((_show(entry.mean("clip_score", None), ".1f"),) if scored else ()),
            _show_bytes(entry.bytes_kept),
        )
        for entry in demo.entries
    ]
    columns = ("plan", "time", "speed-up", "predicted", "PSNR", "SSIM")
    return Table((*columns, *(("CLIP",) if scored else ()), "kept"), tuple(rows))


def _show(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _show_bytes(count: int) -> str:
    if not count:
        return "–"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"

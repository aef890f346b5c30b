"""A report of every kind, from data that is quickly made."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image

import leansd
from leansd.bulk.jobs import BulkJob, place_order, read_sheet
from leansd.drawing import Request
from leansd.evaluation.compare import (
    CONVERGED,
    LEAN,
    Case,
    Compared,
    Comparison,
    Drawings,
    compare_drawings,
)
from leansd.evaluation.demo import FEWER, Demo
from leansd.evaluation.evaluation import Evaluation
from leansd.evaluation.extraction import ExtractionConfig
from leansd.evaluation.fidelity import PSNR, SSIM, Measure
from leansd.evaluation.prediction import Prediction, Profiled
from leansd.evaluation.records import Record, load_records, stamp
from leansd.evaluation.redundancy import list_records, read_spent
from leansd.evaluation.runs import FULL
from leansd.evaluation.scoring import carry_out, plan_scoring
from leansd.evaluation.standings import read_standings
from leansd.evaluation.timing import Ratio, Timing
from leansd.exporting.exporter import Exported
from leansd.incubation.estimate import Estimate, StageCost
from leansd.incubation.recipe import load_recipe
from leansd.incubation.training_log import TrainingLog, read_run
from leansd.plans.plan import Plan
from leansd.plans.presets import PRESETS, SPEED_PRESETS, preset
from leansd.report import measurements, nets, plans, training
from leansd.report.page import Provenance, ReportPage
from leansd.shards import DrawnPicture, name_shard, pack_shard
from leansd.surgery.edits import Surgery
from leansd.tuning.cutting import Cut, CutCandidate
from leansd.tuning.front import Front, Point
from leansd.tuning.removals import Removal
from test_profile import make_cost
from tiny import tiny_unet

ANATOMY = leansd.dissect(tiny_unet(), name="tiny")
ORIGIN = Provenance("leansd demo --prompts 'a <b>red</b> apple' --steps 30", stamp("cpu"))
PROMPTS = ("a <b>red</b> apple", "a pizza", "a cat's face")
STEPS = 30


def draw(seed: int, shift: float = 0.0, side: int = 64) -> Image.Image:
    """A soft blob on a coloured ground; a little of another one with a shift."""
    rng = np.random.default_rng(seed)
    ground, blob = rng.integers(60, 240, (2, 3))
    ys, xs = np.mgrid[0:side, 0:side] / side - 0.5
    soft = 1 / (1 + np.exp(24 * (np.hypot(xs + shift * 0.02, ys) - 0.3)))[..., None]
    return Image.fromarray((ground * (1 - soft) + blob * soft).astype(np.uint8))


def as_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def make_demo() -> Demo:
    entries: list[Compared] = []
    names = [FULL, *SPEED_PRESETS, FEWER]
    for place, name in enumerate(names):
        plan = preset(name, STEPS) if name in SPEED_PRESETS else None
        summary = (
            PRESETS[name].summary if name in SPEED_PRESETS else f"the whole UNet, {STEPS} steps"
        )
        gain = 1 + 0.45 * place
        values = {"psnr": 60 - 7 * gain, "ssim": 0.99} if place else {}
        measures = [
            Measure(of, "", torch.tensor([x]), {"reference": FULL}) for of, x in values.items()
        ]
        done: Any = SimpleNamespace(predicted_speedup=gain * 1.05, bytes_kept=2**20)
        attached: Any = SimpleNamespace(report=lambda done=done: done)
        entries.append(
            Compared(
                Case(name, STEPS if plan or not place else 14, plan, summary=summary),
                torch.stack([as_tensor(draw(seed, place)) for seed in range(len(PROMPTS))]),
                (*measures, Measure("clip_score", "", torch.tensor([88.0]), {})),
                Timing((2.0 / gain, 2.1 / gain)),
                Ratio(gain, gain * 0.95, gain * 1.1),
                attached if plan else None,
            )
        )
    return Demo(
        "tiny", PROMPTS, 0, STEPS, 4.0, "dpm++2m", (64, 64), stamp("cpu"), ANATOMY, tuple(entries)
    )


def report_demo(folder: Path) -> ReportPage:
    return plans.report_comparison(make_demo())


def make_drift() -> Iterator[Record]:
    shared = {**stamp("cpu"), "subject": "tiny", "plan": "no plan", "unit": ""}
    for step in range(1, STEPS):
        for place, at in enumerate(ANATOMY.addresses):
            for lane in ("unconditional", "conditional"):
                value = 0.01 * (1 + place % 7) * (1 + step % 5)
                yield Record(
                    **shared, metric="unit_drift", value=value, at=at, lane=lane, step=step
                )
        for place, at in enumerate(("mid", "up0.up", "up1.up", "head")):
            how, gap = ("reuse", 1) if step % 2 else ("forecast", 2)
            fields = {"at": at, "step": step, "how": how, "gap": gap}
            yield Record(**shared, metric="cut_error", value=0.02 * (place + step), **fields)
        yield Record(**shared, metric="guidance_drift", value=0.1 + step / 100, step=step)


def report_tune(folder: Path) -> ReportPage:
    tuned = [preset(name, STEPS, sampler="dpm++2m") for name in SPEED_PRESETS]
    points = [Point(plan, 1.5 + 0.6 * n, 600 - 90 * n, 52 - 6 * n) for n, plan in enumerate(tuned)]
    plain = [Point(Plan.full(19, name="19 steps"), 1.55, 580, 43.1)]
    plain += [Point(Plan.full(9, name="9 steps"), 3.2, 300, 29.3)]
    front = Front.of("0123", "dpm++2m", STEPS, [*points, *plain])
    return plans.report_tuning(front, points[1], ANATOMY, list(make_drift()))


def report_profile(folder: Path) -> ReportPage:
    cost = make_cost()
    plans = [preset(name, STEPS) for name in ("full", "balanced")]
    predictions = tuple(
        Prediction(plan, 2.0 / gain, Timing((2.05 / gain,)), gain, Ratio(gain, gain, gain))
        for plan, gain in zip(plans, (1.0, 2.0), strict=True)
    )
    profiled = Profiled(cost, ANATOMY, STEPS, predictions, 5, stamp("cpu"))
    return measurements.report_profile(profiled, cost.list_records(stamp("cpu")))


def report_anatomy(folder: Path) -> ReportPage:
    records = list_records(ANATOMY, None, stamp("meta"))
    (spent,) = read_spent(records)
    return nets.report_anatomy(spent, records)


def report_bench(folder: Path) -> ReportPage:
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "bench.jsonl"
    standings = read_standings(load_records(results))
    return measurements.report_bench(standings[:2])


def report_evaluation(folder: Path) -> ReportPage:
    shared = {**stamp("cpu"), "subject": "tiny", "seed": 1000, "calls": 3, "steps": STEPS}
    shared |= {"sampler": "ddim", "guidance": 4.0}
    cases = {"full": 1.0, "balanced": 2.1, "turbo": 3.3, "unipc:15": 2.0}
    records = []
    for place, (name, gain) in enumerate(cases.items()):
        case = {**shared, "plan": name, "fingerprint": "ab12" if name in SPEED_PRESETS else ""}
        records.append(Record(**case, metric="predicted_speedup", value=gain, unit="x"))
        for reference in ("full", CONVERGED):
            if name != reference:
                fields = {"reference": reference, "standard_error": 0.4}
                value = 50 - 4 * place - 5 * (reference == CONVERGED)
                records.append(Record(**case, metric="psnr", value=value, unit="dB", **fields))
                records.append(Record(**case, metric="ssim", value=0.99, unit="", **fields))
        records.append(
            Record(
                **case, metric="clip_score", value=88.1, unit="", clip="tiny CLIP", seed_spread=1
            )
        )
    pictures = {
        name: torch.stack([_as_tensor(draw(seed, place)) for seed in range(3)])
        for place, name in enumerate(cases)
    }
    evaluation = Evaluation(records, records[:2], pictures)
    return measurements.report_evaluation(evaluation, ["full", CONVERGED], PROMPTS, ["No LPIPS."])


def _as_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def report_cut(folder: Path) -> ReportPage:
    gone = [Removal(("dn0.l1", "up3.l1")), Removal(("mid",)), Removal(("dn2.l1.attn",))]
    candidates = [CutCandidate(each, 0.01 * n, 0.08 + 0.01 * n) for n, each in enumerate(gone, 1)]
    front = tuple((1 - 0.05 * n, 0.004 * n**2) for n in range(9))
    surgery = Surgery("light").drop("dn0.l1", "up3.l1", "mid")
    cut = Cut(surgery, "macs", 0.8, 0.79, 0.03, 0.045, tuple(gone[:2]), tuple(candidates), front)
    return nets.report_cut(cut, ANATOMY)


def report_plan(folder: Path) -> ReportPage:
    return plans.report_plan(preset("turbo", STEPS), ANATOMY, 3.33)


def report_surgery(folder: Path) -> ReportPage:
    surgery = Surgery("light").drop("dn0.l1", "up3.l1").drop("mid.l0.attn")
    seen = leansd.preview(tiny_unet(), surgery, latent=8)
    return nets.report_surgery(seen, "tiny")


def report_export(folder: Path) -> ReportPage:
    files = {"graphs.json": 4_000, "key-0123456789.onnx": 1_200_000, "cut.onnx": 300_000}
    written = Exported(folder, files, preset("fast", STEPS), 1.3e-6)
    return nets.report_export(written, "tiny", "onnx", ANATOMY)


def pair_up(request: Request) -> tuple[Request, Comparison]:
    full, lean = (as_tensor(draw(request.seed, shift))[None] for shift in (0, 1))
    case, nothing = Case(FULL, STEPS), torch.zeros(1)
    drawn = Drawings(nothing, lean), Drawings(nothing, full)
    measures = tuple(compare_drawings(*drawn, case, (PSNR, SSIM)))
    gain = 2.0 / 1.1
    entries = {
        FULL: Compared(case, full, (), Timing((2.0,)), Ratio(1.0, 1.0, 1.0)),
        LEAN: Compared(Case(LEAN, STEPS), lean, measures, Timing((1.1,)), Ratio(gain, gain, gain)),
    }
    return request, Comparison(entries, {})


def report_comparison(folder: Path) -> ReportPage:
    pairs = [pair_up(Request(prompt=each, seed=seed)) for seed, each in enumerate(PROMPTS)]
    return plans.report_pairs(pairs, preset("balanced", STEPS), ANATOMY)


def report_job(folder: Path) -> ReportPage:
    rows = [{"id": f"p{n}", "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
    lines = [json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join([*lines, '{"id": 3}']) + "\n")
    out = folder / "out"
    plan = preset("fast", STEPS).to_dict()
    job = BulkJob("tiny", STEPS, plan, shard=2)
    order = place_order(read_sheet(folder / "rows.jsonl"), out, job)
    for part in order.parts:
        drawn = [DrawnPicture(item.row.id, draw(item.row.number), {}) for item in part.items]
        (out / part.name).write_bytes(pack_shard(drawn))
    return plans.report_job(order, out, 12.5)


RECIPE = """
model: tiny
data: {kind: random, prompts: [a]}
validation: {prompts: [a red apple, a pizza], every: 100}
stages:
  - {name: warm, steps: 300, losses: {output: {}}}
  - {name: whole, nets: {base: warm}, steps: 600, losses: {output: {}, features: {}}}
"""


def write_run(folder: Path, *, ended: bool = True) -> TrainingLog:
    """A run of two stages, the second of which was stopped."""
    (folder / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(folder / "recipe.yaml")
    rng = np.random.default_rng(0)
    for stage, last, names in (("warm", 300, ("output",)), ("whole", 450, ("output", "features"))):
        seen = folder / stage / "validation"
        seen.mkdir(parents=True)
        rows = []
        for step in range(10, last + 1, 10):
            parts = {n: 0.8 / (1 + step / 60) * rng.uniform(0.9, 1.1) + 0.05 for n in names}
            row = {"step": step, **parts, "loss": sum(parts.values()), "norm": 2 / (1 + step / 90)}
            row |= {"learning_rate": 1e-4 * min(1, step / 100), "steps_per_second": 3, "skipped": 0}
            rows.append(json.dumps(row) + "\n")
        (folder / stage / "losses.jsonl").write_text("".join(rows))
        for step in range(100, last + 1, 100):
            drawn = [draw(seed, shift) for shift in (0, 8 - step / 100) for seed in range(2)]
            make_image_grid(drawn, 2, 2).save(seen / f"step-{step:08d}.png")
            with (seen / "losses.jsonl").open("a") as log:
                log.write(json.dumps({"step": step, "psnr": 12 + step / 50}) + "\n")
    return read_run(recipe, folder, ended=ended)


def report_training(folder: Path) -> ReportPage:
    return training.report_training(write_run(folder), RECIPE)


def report_training_under_way(folder: Path) -> ReportPage:
    return training.report_training(write_run(folder, ended=False), RECIPE)


def report_estimate(folder: Path) -> ReportPage:
    stages = tuple(
        StageCost(
            name, "end-to-end", 1000 * (n + 1), 8000, 10**7, 10**6 * (n + 1), 10**10, 7 * 10**9,
            14 * 10**9, 2**30, 2**26, 2**31, 8000,
        )
        for n, name in enumerate(("warm", "whole"))
    )  # fmt: skip
    return training.report_estimate(Estimate("light", 8, stages, 5e10, "cpu"))


def report_scoring(folder: Path) -> ReportPage:
    drawn = [DrawnPicture(f"{n:02d}", draw(n), {"prompt": PROMPTS[n % 3]}) for n in range(6)]
    (folder / "drawn").mkdir()
    (folder / "drawn" / name_shard(0)).write_bytes(pack_shard(drawn))
    scoring = plan_scoring(
        folder / "drawn", None, ["tiny-clip"], {}, config=ExtractionConfig({}), keep=folder,
        cache=folder,
    )  # fmt: skip
    scored = carry_out(scoring)
    return measurements.report_scores(scoring, scored, ["seen by the tiny CLIP only"])


KINDS: dict[str, Callable[[Path], ReportPage]] = {
    name.removeprefix("report_"): make
    for name, make in globals().items()
    if name.startswith("report_")
}

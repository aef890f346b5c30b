"""What incubation made of the embedded model: every net of `benchmarks/incubation.py` measured.

    python benchmarks/incubated.py --data emoji [--arm full] [--captions 96]

On pictures that nobody was trained on: the error of the predicted noise by time step, against the
noise itself and against the teacher's prediction. On their captions: pictures of the same seeds as
the teacher's, by PSNR and SSIM, retrieval and the Fréchet distance to the training pictures in the
tiny CLIP's features. Every training draws from noise of its own, the teacher from the same, and
from other noise as well: so much do sets differ by chance. The teacher in fewer steps is what a
user would take instead. Nets take turns with the teacher to be timed. Records go to
`benchmarks/results/incubation.jsonl`, where what is there on the same terms is not measured again,
the curves to `incubation-curves.jsonl`, a grid of pictures to `docs/images/incubation.png`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from incubation import (
    ASSEMBLED,
    DIRECT,
    EVERY,
    FASTER,
    FULL,
    LIGHT,
    RECIPES,
    ROOT,
    RUNS,
    SEEDS,
    Study,
)
from PIL import Image, ImageDraw
from torch import Tensor

import leansd
from leansd.anatomy.counting import count_macs
from leansd.cli.terminal import hush_libraries
from leansd.core.devices import seed_generator
from leansd.evaluation.extractors import find_embedder
from leansd.evaluation.fidelity import psnr, ssim
from leansd.evaluation.prompt_sets import GUIDANCE
from leansd.evaluation.quality import (
    Embedder,
    clip_score,
    embed_pictures,
    embed_prompts,
    frechet_distance,
    measure_gaussian,
    rank_prompts,
)
from leansd.evaluation.records import (
    Record,
    load_records,
    put_records,
    stamp,
    write_records,
)
from leansd.evaluation.runs import CallSet, run_calls
from leansd.evaluation.timing import compare_timings, time_cases
from leansd.files import write_file
from leansd.incubation.noise import DiffusionSchedule, make_generator
from leansd.incubation.recipe import load_recipe
from leansd.incubation.training_log import FILE
from leansd.runtime.samplers import make_scheduler

RESULTS = ROOT / "benchmarks" / "results"
RECORDS = RESULTS / "incubation.jsonl"
CURVES = RESULTS / "incubation-curves.jsonl"
PICTURE = ROOT / "docs" / "images" / "incubation.png"
SIDE = 8
"""Pictures of each net in a row."""
NAMES = 140
"""Pixels that names have beside them."""
TEACHER, OTHER = "teacher", "teacher, other noise"
PRUNED, UNTRAINED = "pruned", "assembled, untrained"
FEWER = (7, 6, 5)
"""Steps of the teacher's that a user would take instead."""
SEED = 500_000
"""Far from what anything was trained on."""
MOMENTS = tuple(range(50, 1000, 100))
SHOWN = (TEACHER, PRUNED, LIGHT, UNTRAINED, ASSEMBLED, FULL, *FASTER, DIRECT, *RECIPES)


@dataclass(frozen=True)
class Ground:
    """What nets are measured on; made once."""

    pipe: Any
    embedder: Embedder
    schedule: DiffusionSchedule
    latents: Tensor
    """Of held-out pictures, [n, 4, h, w]."""
    texts: Tensor
    """Of their captions, [n, tokens, width]."""
    captions: tuple[str, ...]
    real: Tensor
    """The tiny CLIP's features of the training pictures."""

    def noise(self, number: int) -> Tensor:
        """The noise that all nets are given at one time step."""
        generator = make_generator(SEED, "held out", number)
        return torch.randn(self.latents.shape, generator=generator)


def prepare_ground(folder: Path, captions: int, errors: int) -> Ground:
    """Everything that is the same for all nets."""
    pipe: Any = leansd.load("emoji", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(pipe, "dpm++2m")
    embedder = find_embedder("emoji")
    assert embedder is not None
    said, held_out = read_folder(folder / "held-out")
    order = torch.randperm(len(said), generator=seed_generator(SEED)).tolist()
    few = order[:errors]
    texts, _ = pipe.encode_prompt([said[place] for place in few], "cpu", 1, False)
    return Ground(
        pipe=pipe,
        embedder=embedder,
        schedule=DiffusionSchedule.read(pipe.scheduler),
        latents=encode_pixels(pipe.vae, held_out[few]) * pipe.vae.config.scaling_factor,
        texts=texts,
        captions=tuple(said[place] for place in order[:captions]),
        real=embed_pictures(embedder, read_folder(folder / "train")[1]).features,
    )


def read_folder(folder: Path) -> tuple[list[str], Tensor]:
    """Plain captions and pictures, 8 bits [n, 3, H, W], that a folder's metadata name."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    pixels = []
    for row in rows:
        with Image.open(folder / row["file_name"]) as picture:
            pixels.append(torch.from_numpy(np.asarray(picture.convert("RGB")).copy()))
    return [row["text"][0] for row in rows], torch.stack(pixels).movedim(-1, 1)


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """The latents of 8-bit pictures [n, 3, H, W], whichever kind of autoencoder it is."""
    return retrieve_latents(vae.encode(pixels.float() / 127.5 - 1), sample_mode="argmax")


def predict_noise(ground: Ground, unet: UNet2DConditionModel) -> Tensor:
    """Predictions [moments, n, 4, h, w] for the noised held-out latents."""
    predictions: list[Tensor] = []
    for number, moment in enumerate(MOMENTS):
        timesteps = torch.full((len(ground.latents),), moment)
        noised = ground.schedule.add_noise(ground.latents, ground.noise(number), timesteps)
        predictions.append(unet(noised, timesteps, ground.texts).sample)
    return torch.stack(predictions)


def choose_seed(turn: int) -> int:
    """The seed of the first picture that the net of a training draws; far from those of others."""
    return SEED + 1_000 * turn


def draw(ground: Ground, unet: UNet2DConditionModel, steps: int, seed: int) -> Tensor:
    """A picture of every caption, 8 bits [n, 3, H, W]."""
    before = ground.pipe.unet
    ground.pipe.unet = unet
    try:
        settings = {"guidance_scale": GUIDANCE}
        finals = run_calls(
            ground.pipe, CallSet(ground.captions, seed=seed, batch=16, settings=settings), steps
        )
    finally:
        ground.pipe.unet = before
    return finals.pictures.mul(255).round().byte()


def judge(ground: Ground, drawn: Tensor) -> Iterator[tuple[str, float, str]]:
    """Metric, value and unit of a set of pictures by itself."""
    seen = embed_pictures(ground.embedder, drawn)
    choices = embed_prompts(ground.embedder, ground.captions)
    own = list(range(len(ground.captions)))
    ranks = rank_prompts(seen.vectors, choices, own)
    yield "retrieval", float((ranks == 0).double().mean()), ""
    yield "retrieval_top5", float((ranks < 5).double().mean()), ""
    yield "clip_score", float(clip_score(seen.vectors, choices).mean()), ""
    own, real = measure_gaussian(seen.features), measure_gaussian(ground.real)
    yield "frechet", frechet_distance(own, real), ""


def open_untrained(study: Study) -> UNet2DConditionModel:
    """What surgery alone leaves of the teacher with a trained light net."""
    teacher = leansd.load("emoji", device="cpu").unet
    stages = {stage.name: stage for stage in load_recipe("emoji-asdm.yaml").stages}
    nets = {"original": teacher, LIGHT: leansd.load_unet(study.get_net(LIGHT), device="cpu")}
    assembled, _ = leansd.operate(nets, stages[ASSEMBLED].surgery)
    return assembled


def list_nets(study: Study, arms: list[str]) -> Iterator[tuple[str, UNet2DConditionModel]]:
    """All that there is of one seed."""
    if Path(study.get_net(LIGHT)).exists():
        yield UNTRAINED, open_untrained(study)
    for arm in arms:
        if Path(study.get_net(arm)).exists():
            yield arm, leansd.load_unet(study.get_net(arm), device="cpu")


def main(
    data: Annotated[
        Path, typer.Option(help="What `python -m models.emoji pictures --out` wrote.")
    ] = Path("emoji"),
    seed: Annotated[list[int], typer.Option()] = SEEDS,
    arm: Annotated[list[str], typer.Option()] = EVERY,
    captions: int = 96,
    errors: Annotated[int, typer.Option(help="held-out pictures for noise errors")] = 32,
    steps: int = 10,
    rounds: int = 5,
    runs: Path = RUNS,
) -> None:
    hush_libraries()
    ground = prepare_ground(data, captions, errors)
    teacher = ground.pipe.unet
    shared: dict[str, Any] = {
        **stamp("cpu"), "subject": "emoji", "captions": captions, "errors": errors, "steps": steps,
        "guidance": GUIDANCE,
    }  # fmt: skip
    taught = predict_noise(ground, teacher)
    aims = {turn: draw(ground, teacher, steps, choose_seed(turn)) for turn in seed}
    noises = torch.stack([ground.noise(number) for number in range(len(MOMENTS))])
    timed: dict[str, UNet2DConditionModel] = {TEACHER: teacher}
    drop_other_terms({"captions": captions, "errors": errors, "steps": steps})
    done = list_done()

    def measure(
        name: str,
        unet: UNet2DConditionModel,
        turn: int,
        *,
        trained: int | None = None,
        noise: int | None = None,
        calls: int = steps,
    ) -> None:
        noise = choose_seed(turn if noise is None else noise)
        if calls == steps:
            timed.setdefault(name, unet)
        row = runs / "shown" / f"{name}.png"
        is_shown = name in SHOWN and turn == SEEDS[0]
        if (name, trained, noise) in done and (row.exists() or not is_shown):
            return
        records: list[Record] = []
        base = {**shared, "plan": name, "training_seed": trained, "turn": turn}

        def add(metric: str, value: float, unit: str = "", **fields: Any) -> None:
            records.append(
                Record(**base, **fields, seed=noise, metric=metric, value=value, unit=unit)
            )

        drawn = aims[turn] if name == TEACHER else draw(ground, unet, calls, noise)
        predicted = taught if unet is teacher else predict_noise(ground, unet)
        for place, moment in enumerate(MOMENTS):
            error = (predicted[place] - noises[place]).square().mean()
            add("noise_error", float(error), timestep=moment)
            if unet is not teacher:
                off = (predicted[place] - taught[place]).square().mean()
                add("teacher_error", float(off), timestep=moment)
        if name != TEACHER:
            one, other = drawn / 255, aims[turn] / 255
            add("psnr", float(psnr(one, other).mean()), "dB")
            add("ssim", float(ssim(one, other).mean()))
        for metric, value, unit in judge(ground, drawn):
            add(metric, value, unit)
        add("macs", count_macs(unet).total / 1e9, "GMAC")
        add("params", sum(each.numel() for each in unet.parameters()) / 1e6, "M")
        add("calls", calls)
        put_records(RECORDS, records, place_record)
        if is_shown:
            row.parent.mkdir(parents=True, exist_ok=True)
            pasted = torch.cat(list(drawn[:SIDE]), dim=2).movedim(0, -1)
            Image.fromarray(pasted.numpy()).save(row, optimize=True)
        said = {each.metric: each.value for each in records}
        print(name, turn, {key: round(value, 4) for key, value in said.items()}, flush=True)

    for number in seed:
        measure(TEACHER, teacher, number)
        measure(OTHER, teacher, number, noise=number + len(SEEDS))
        for few in FEWER:
            measure(f"{TEACHER}, {few} steps", teacher, number, calls=few)
    measure(PRUNED, leansd.operate(teacher, "bk-base")[0], seed[0])
    for number in seed:
        study = Study(number, runs.resolve(), Path())
        for name, unet in list_nets(study, arm):
            measure(name, unet, number, trained=number)
    put_records(RECORDS, list(time_nets(timed, ground, rounds, shared)), place_record)
    keep_curves(runs)
    rows = {name: runs / "shown" / f"{name}.png" for name in SHOWN}
    shown = {name: row for name, row in rows.items() if row.exists()}
    stack_rows(shown).save(PICTURE, optimize=True)


def drop_other_terms(terms: Mapping[str, int]) -> None:
    """Take from the records what was measured otherwise."""
    records = load_records(RECORDS) if RECORDS.exists() else []
    same = [each for each in records if terms.items() <= (each.model_extra or {}).items()]
    if len(same) < len(records):
        write_records(RECORDS, same)


Place = tuple[str, int | None, int | None]
"""A net, the seed of its training, the seed of the noise that it draws from; no noise for times."""


def list_done() -> set[Place]:
    """What is on record."""
    return set(map(place_record, load_records(RECORDS) if RECORDS.exists() else []))


def place_record(record: Record) -> Place:
    return record.plan, (record.model_extra or {}).get("training_seed"), record.seed


def stack_rows(rows: Mapping[str, Path]) -> Image.Image:
    """Pictures of the same width below each other, beside their names."""
    opened = {name: Image.open(row) for name, row in rows.items()}
    width, height = next(iter(opened.values())).size
    sheet = Image.new("RGB", (NAMES + width, height * len(opened)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (name, row) in enumerate(opened.items()):
        sheet.paste(row, (NAMES, height * place))
        pen.text((4, height * (place + 0.5)), name, fill="black", anchor="lm", font_size=13)
    return sheet


def time_nets(
    nets: Mapping[str, UNet2DConditionModel], ground: Ground, rounds: int, shared: dict[str, Any]
) -> Iterator[Record]:
    """One call of every net, in turns."""
    count = min(16, len(ground.latents))
    timesteps = torch.full((count,), MOMENTS[len(MOMENTS) // 2])

    def call(unet: UNet2DConditionModel, turn: int) -> None:
        unet(ground.latents[:count], timesteps, ground.texts[:count])

    timings = time_cases({name: partial(call, net) for name, net in nets.items()}, rounds=rounds)
    for name, timing in timings.items():
        ratio = compare_timings(timings[TEACHER], timing)
        yield Record(
            **shared, plan=name, metric="speedup", value=ratio.median, unit="x", low=ratio.low,
            high=ratio.high, rounds=rounds, batch=count,
        )  # fmt: skip


def keep_curves(runs: Path) -> None:
    """The losses of all runs that there are, every fifth line of them, beside those of earlier
    runs, as one file."""
    curves: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in CURVES.read_text(encoding="utf-8").splitlines() if CURVES.exists() else ():
        row = json.loads(line)
        curves.setdefault((row["arm"], row["seed"]), []).append(row)
    for number in SEEDS:
        study = Study(number, runs.resolve(), Path())
        for arm in EVERY:
            files = sorted(study.get_folder(arm).glob(f"*/{FILE}"))
            if files:
                curves[arm, number] = [
                    {"arm": arm, "seed": number, "stage": file.parent.name} | json.loads(line)
                    for file in files
                    for line in file.read_text(encoding="utf-8").splitlines()[::5]
                ]
    places = sorted(curves, key=lambda place: (EVERY.index(place[0]), place[1]))
    rows = [json.dumps(row) + "\n" for place in places for row in curves[place]]
    write_file(CURVES, "".join(rows))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)

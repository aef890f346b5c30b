"""`leansd emoji`: train the embedded model from its packages, measure it, write its card."""

from pathlib import Path
from typing import Annotated

import typer

from leansd.cli.command import Json, Quiet, give_examples
from leansd.cli.completions import offer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="The embedded model: train it, measure it, write its card.",
    epilog=give_examples(
        "leansd emoji grid --out grid.png",
        "leansd emoji train --out runs/emoji --minutes 240",
    ),
)

Data = Annotated[
    Path | None,
    typer.Option(help="Folder with the npm packages in node_modules; installed by npm otherwise."),
]
Cache = Annotated[Path, typer.Option(help="Where npm installs the packages.")]
Model = Annotated[
    Path | None, typer.Option(help="Model folder; the embedded one by default.", exists=False)
]
Where = Annotated[str, typer.Option(help="cpu or cuda.", autocompletion=offer("cpu", "cuda"))]
CACHE = Path("~/.cache/leansd/emoji")


@app.command(
    short_help="Train autoencoder, CLIP and UNet.",
    epilog=give_examples(
        "leansd emoji train --out runs/emoji --minutes 240",
        "leansd emoji train --out runs/emoji --minutes 240 --resume",
    ),
)
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoints, logs, model.")],
    data: Data = None,
    cache: Cache = CACHE,
    device: Where = "cpu",
    minutes: Annotated[float | None, typer.Option(help="Training time, all stages.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoiser steps, instead of --minutes.")] = None,
    size: Annotated[int, typer.Option(help="Picture side: 64, or 128 for a GPU.")] = 64,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train autoencoder, CLIP and UNet from the packages to a pipeline in OUT/model."""
    from leansd.cli.command import quote_command
    from leansd.cli.terminal import (
        hush_libraries,
        note,
        open_progress,
        show,
        show_json,
    )
    from leansd.emoji.curves import plot_curves
    from leansd.emoji.recipe import STAGES, choose_recipe, read_pictures, train_model
    from leansd.emoji.training import Budget
    from leansd.errors import LeansdError
    from leansd.evaluation.records import stamp
    from leansd.incubation.training_log import read_log
    from leansd.report import Origin, write_report
    from leansd.report.training import report_training

    hush_libraries()
    recipe = choose_recipe(size)
    check_device(device)
    if minutes is None and steps is None:
        minutes = 240.0
    if minutes is not None and steps is not None:
        raise LeansdError("give --minutes or --steps, not both")
    budget = Budget(steps=steps, minutes=minutes)
    pictures = read_pictures(data, cache.expanduser(), recipe.size)
    note(f"{len(pictures.train)} pictures to train on, {len(pictures.held_out)} held out")
    with open_progress() as progress:
        bars = {stage: progress.add_task(stage, total=1000) for stage in STAGES}

        def report(stage: str, row: dict[str, float]) -> None:
            words = f"{stage} loss {row['loss']:.4f}"
            done = int(1000 * row["progress"])
            progress.update(bars[stage], completed=done, description=words)

        model = train_model(
            recipe, pictures, out, budget, device=device, resume=resume, report=report
        )
    plot_curves(out)
    stages = dict.fromkeys(STAGES)
    log = read_log(out, stages, name="emoji", subject="emoji", state="finished")
    origin = Origin(quote_command(), stamp(device))
    write_report(out / "report.html", report_training(log), origin)
    show(f"wrote {model}")
    if as_json:
        show_json(
            {
                "command": "emoji train",
                "model": str(model),
                "train": len(pictures.train),
                "held_out": len(pictures.held_out),
            }
        )


@app.command(
    short_help="Measure a trained model.",
    epilog=give_examples(
        "leansd emoji evaluate --count 50 --out evaluation.json",
    ),
)
def evaluate(
    model: Model = None,
    data: Data = None,
    cache: Cache = CACHE,
    out: Annotated[
        Path | None, typer.Option(help="JSON to write; MODEL/evaluation.json by default.")
    ] = None,
    device: Where = "cpu",
    count: Annotated[int, typer.Option(min=1, help="Training captions, and held-out pairs.")] = 200,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 30,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure reconstruction, caption retrieval and Fréchet distance of a trained model."""
    from leansd.cli.command import quote_command
    from leansd.cli.terminal import hush_libraries, open_progress, show, show_json
    from leansd.emoji.assembly import load_clip, load_pipeline
    from leansd.emoji.evaluation import evaluate_model
    from leansd.emoji.recipe import read_pictures
    from leansd.emoji.training import save_json
    from leansd.evaluation.records import stamp
    from leansd.report import Origin, write_report
    from leansd.report.recognising import make_report

    hush_libraries()
    check_device(device)
    folder = find_model(model)
    pipe = load_pipeline(folder).to(device)
    clip, _ = load_clip(folder)
    pictures = read_pictures(
        data, cache.expanduser(), pipe.unet.config.sample_size * pipe.vae_scale_factor
    )
    with open_progress() as progress:
        task = progress.add_task("pictures", total=2 * count)
        result = evaluate_model(
            pipe,
            clip.to(device),
            pictures,
            count=count,
            steps=steps,
            guidance=guidance,
            seed=seed,
            on_batch=lambda drawn: progress.advance(task, drawn),
        )
    path = out or folder / "evaluation.json"
    save_json(result, path)
    if out is not None:  # a model's folder holds what belongs to the model
        origin = Origin(quote_command(), stamp(device))
        write_report(out.with_suffix(".html"), make_report(result, folder.name), origin)
    show(f"wrote {path}")
    if as_json:
        show_json({"command": "emoji evaluate", **result, "files": [str(path)]})


@app.command(
    epilog=give_examples(
        "leansd emoji grid --out grid.png",
        "leansd emoji grid --out one.png --prompt 'a panda face'",
    )
)
def grid(
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    model: Model = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; repeat it. 36 of the card's by default.")
    ] = None,
    columns: Annotated[int, typer.Option(min=1, help="Pictures in a row.")] = 6,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 30,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    device: Where = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw a grid of pictures."""
    from leansd.cli.terminal import hush_libraries, open_progress, show, show_json
    from leansd.emoji.assembly import load_pipeline
    from leansd.emoji.card import GRID_PROMPTS
    from leansd.emoji.drawing import draw_captions, paste_grid, save_picture

    hush_libraries()
    check_device(device)
    prompts = prompt or list(GRID_PROMPTS)
    pipe = load_pipeline(find_model(model)).to(device)
    with open_progress() as progress:
        task = progress.add_task("pictures", total=len(prompts))
        drawn = draw_captions(
            pipe,
            prompts,
            steps=steps,
            guidance=guidance,
            seed=seed,
            on_batch=lambda count: progress.advance(task, count),
        )
    save_picture(paste_grid(drawn, columns), out)
    show(f"wrote {out}")
    if as_json:
        show_json(
            {
                "command": "emoji grid",
                "prompts": prompts,
                "steps": steps,
                "guidance": guidance,
                "seed": seed,
                "files": [str(out)],
            }
        )


@app.command(
    short_help="Write the pictures with captions, to train on.",
    epilog=give_examples(
        "leansd emoji pictures --out emoji",
    ),
)
def pictures(
    out: Annotated[Path, typer.Option(help="Folder to write: train and held-out.")],
    data: Data = None,
    cache: Cache = CACHE,
    size: Annotated[int, typer.Option(min=8, help="Picture side in pixels.")] = 64,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the pictures with captions as Hugging Face's imagefolder, for `leansd incubate`."""
    from leansd.cli.terminal import note, show, show_json
    from leansd.emoji.folder import write_pictures
    from leansd.emoji.recipe import read_pictures

    found = read_pictures(data, cache.expanduser(), size)
    write_pictures(found, out)
    note(f"{len(found.train)} pictures to train on, {len(found.held_out)} held out")
    show(f"wrote {out}")
    if as_json:
        show_json(
            {
                "command": "emoji pictures",
                "folder": str(out),
                "train": len(found.train),
                "held_out": len(found.held_out),
            }
        )


@app.command(
    short_help="Train a small VGG, for the vgg loss.",
    epilog=give_examples(
        "leansd emoji vgg --out runs/vgg --steps 500",
    ),
)
def vgg(
    out: Annotated[Path, typer.Option(help="Folder of the run; a run in it goes on.")],
    data: Data = None,
    cache: Cache = CACHE,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 2500,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    device: Where = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a small VGG to tell emoji groups apart: OUT/vgg.safetensors, for the `vgg` loss."""
    from leansd.cli.terminal import open_progress, show, show_json
    from leansd.emoji.recipe import read_pictures
    from leansd.emoji.training import Budget
    from leansd.incubation.vgg_training import PIXELS, train_vgg

    check_device(device)
    found = read_pictures(data, cache.expanduser(), PIXELS)
    with open_progress() as progress:
        task = progress.add_task("vgg", total=1000)
        result = train_vgg(
            found,
            out,
            Budget(steps=steps),
            seed=seed,
            device=device,
            on_log=lambda row: progress.update(task, completed=int(1000 * row["progress"])),
        )
    told = f"{result['train']:.1%} in training, {result['held_out']:.1%} held out"
    show(f"groups told right: {told}")
    show(f"wrote {out / 'vgg.safetensors'}")
    if as_json:
        show_json({"command": "emoji vgg", **result})


@app.command(
    short_help="Write the model card.",
    epilog=give_examples(
        "leansd emoji card",
    ),
)
def card(
    model: Model = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the model card, MODEL/README.md, from MODEL/evaluation.json and MODEL/training.json."""
    from leansd.cli.terminal import show, show_json
    from leansd.emoji.card import write_card

    path = write_card(find_model(model))
    show(f"wrote {path}")
    if as_json:
        show_json({"command": "emoji card", "files": [str(path)]})


def find_model(model: Path | None) -> Path:
    """Return the given model folder, or the embedded one."""
    from leansd.emoji.location import model_folder
    from leansd.errors import LeansdError

    if model is None:
        return model_folder()
    if not (model / "model_index.json").is_file():
        raise LeansdError(f"no model in {model}: it has no model_index.json")
    return model


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    import torch

    from leansd.errors import LeansdError

    if device not in {"cpu", "cuda"}:
        raise LeansdError(f"unknown device {device!r}: cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise LeansdError("no CUDA device here: use --device cpu")

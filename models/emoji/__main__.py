"""`python -m models.emoji`: train the embedded model, measure it, draw with it, write its card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from leansd.errors import LeansdError
from models.emoji.stages import Stopped, save_json

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Option(help="The run's folder: packages, checkpoints, logs, model.")]
RUN = Path("runs/emoji")
Name = Annotated[str, typer.Option("--recipe", help="emoji, or second.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 is all.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Data = Annotated[
    Path | None, typer.Option(help="A folder whose node_modules has the packages; else npm's.")
]


def _report(stage: str, row: dict[str, float]) -> None:
    step, seconds = int(row["step"]), row["seconds"]
    rest = " ".join(
        f"{name} {value:.4f}" for name, value in row.items() if name not in ("step", "seconds")
    )
    print(f"{stage} step {step} {seconds / 60:.1f} min {rest}", flush=True)


def _set_threads(threads: int, device: str) -> None:
    if threads:
        torch.set_num_threads(threads)
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise LeansdError(f"--device {device}: there is no such device here")


@app.command()
def train(
    out: Out = RUN,
    recipe: Name = "emoji",
    until: Annotated[str, typer.Option(help="The last stage: vae, text or unet.")] = "unet",
    steps: Annotated[
        int | None, typer.Option(min=1, help="The UNet's last step; without it: until stopped.")
    ] = None,
    data: Data = None,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Train every stage, each from its checkpoint if there is one."""
    from models.emoji.recipe import STAGES, choose_recipe, train_model

    _set_threads(threads, device)
    if until not in STAGES:
        raise LeansdError(f"--until {until}: choose from {', '.join(STAGES)}")
    train_model(
        choose_recipe(recipe),
        out,
        data=data,
        until=until,
        steps=steps,
        device=device,
        report=_report,
    )


@app.command()
def decay(
    out: Out = RUN,
    recipe: Name = "emoji",
    steps: Annotated[int, typer.Option(min=1, help="Over how many steps.")] = 3000,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Take the UNet's rate down to 0 on a branch; the constant-rate state is kept."""
    from models.emoji.recipe import choose_recipe, decay_model

    _set_threads(threads, device)
    decay_model(choose_recipe(recipe), out, steps, device=device, report=_report)


@app.command()
def assemble(
    out: Out = RUN,
    recipe: Name = "emoji",
    average: Annotated[
        str | None, typer.Option(help="Which moving average; `none` is the raw UNet.")
    ] = None,
) -> None:
    """Write OUT/model, the stock pipeline in half precision, from the checkpoints."""
    from models.emoji.assembly import save_model
    from models.emoji.recipe import choose_recipe, describe_run, load_eyes, load_run

    chosen = choose_recipe(recipe)
    size = save_model(load_run(out, chosen, average), out / "model", load_eyes(chosen, out))
    save_json(describe_run(out, chosen), out / "model" / "training.json")
    print(f"{out / 'model'}: {size:.1f} MB")


@app.command()
def grid(
    out: Out = RUN,
    recipe: Name = "emoji",
    average: Annotated[str | None, typer.Option(help="As in assemble.")] = None,
    to: Annotated[Path | None, typer.Option(help="The PNG. Default: OUT/grid.png.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 30,
    guidance: float = 7.5,
    seed: int = 0,
    threads: Threads = 0,
) -> None:
    """Draw the card's 36 pictures from the checkpoints, whatever they show."""
    from leansd.emoji.prompts import GRID_PROMPTS
    from models.emoji.drawing import draw_captions, paste_grid, save_picture
    from models.emoji.recipe import choose_recipe, load_run

    _set_threads(threads, "cpu")
    pipe = load_run(out, choose_recipe(recipe), average)
    drawn = draw_captions(pipe, GRID_PROMPTS, steps=steps, guidance=guidance, seed=seed)
    target = to or out / "grid.png"
    save_picture(paste_grid(drawn, columns=9), target)
    print(target)


@app.command()
def eyes(
    out: Out = RUN,
    recipe: Name = "emoji",
    steps: Annotated[int, typer.Option(min=1)] = 3000,
    data: Data = None,
    threads: Threads = 0,
) -> None:
    """Train the eyes of the tiny CLIP that the model carries."""
    from models.emoji.recipe import choose_recipe, train_eyes

    _set_threads(threads, "cpu")
    train_eyes(choose_recipe(recipe), out, steps, data=data, report=_report)


@app.command()
def pictures(
    out: Annotated[Path, typer.Option(help="Folder to write: train and held-out.")],
    cache: Annotated[Path, typer.Option(help="Where packages and pixels are kept.")] = RUN,
    size: Annotated[int, typer.Option(min=8, help="Picture side in pixels.")] = 128,
    data: Data = None,
) -> None:
    """Write the pictures with captions as Hugging Face's imagefolder, for `leansd incubate`."""
    from models.emoji.data import read_pictures
    from models.emoji.folder import write_pictures

    found = read_pictures(data, cache, size, print)
    write_pictures(found, out)
    print(f"{out}: {len(found.train)} pictures to train on, {len(found.held_out)} held out")


@app.command()
def vgg(
    out: Annotated[Path, typer.Option(help="Folder of the run; a run in it goes on.")],
    cache: Annotated[Path, typer.Option(help="Where packages and pixels are kept.")] = RUN,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 2500,
    data: Data = None,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Train a small VGG to tell groups apart: OUT/vgg.safetensors, for the `vgg` loss."""
    from models.emoji.data import read_pictures
    from models.emoji.vgg import PIXELS, train_vgg

    _set_threads(threads, device)
    found = read_pictures(data, cache, PIXELS, print)
    result = train_vgg(found, out, steps, device=device, report=_report)
    print(
        f"groups told right: {result['train']:.1%} in training, {result['held_out']:.1%} held out"
    )


@app.command()
def judge(
    out: Out = RUN,
    recipe: Name = "emoji",
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    data: Data = None,
    threads: Threads = 0,
) -> None:
    """Train the judge on the real pictures, and check it on a style it has never seen."""
    from models.emoji.data import UNSEEN, read_pictures, read_unseen_style
    from models.emoji.judge import Judge, JudgeLearner, rank_names
    from models.emoji.recipe import choose_recipe, name_pairs
    from models.emoji.stages import train_stage

    _set_threads(threads, "cpu")
    size = choose_recipe(recipe).size
    pictures = read_pictures(data, out, size, print)
    names = name_pairs(pictures.split.train)
    torch.manual_seed(0)
    own = Judge(sorted(set(names)))
    learner = JudgeLearner(own, pictures.train, names, batch=64, rate=2e-3, steps=steps, seed=7)
    train_stage(learner, out / "judge", steps, report=_report)
    own.eval()
    style = UNSEEN[0]
    sets = {
        "held_out": (pictures.held_out, name_pairs(pictures.split.held_out)),
        style: read_unseen_style(data, out, size),
    }
    found = {}
    for key, (pixels, own_names) in sets.items():
        ranks = rank_names(own, pixels, own_names)
        found[key] = {
            "count": len(ranks),
            "top1": round(sum(rank < 1 for rank in ranks) / len(ranks), 3),
            "top5": round(sum(rank < 5 for rank in ranks) / len(ranks), 3),
        }
        print(key, found[key])
    save_json({"style": style, "sets": found}, out / "judge" / "check.json")


@app.command()
def evaluate(
    out: Out = RUN,
    recipe: Name = "emoji",
    count: Annotated[int, typer.Option(min=2, help="Training captions to draw.")] = 200,
    steps: Annotated[int, typer.Option(min=1)] = 30,
    guidance: float = 7.5,
    data: Data = None,
    threads: Threads = 0,
) -> None:
    """Measure OUT/model with the judge; write its evaluation, grid, neighbours and card."""
    import json

    from leansd.emoji.clip import load_clip
    from leansd.emoji.prompts import GRID_PROMPTS
    from models.emoji.assembly import load_pipeline
    from models.emoji.card import write_card
    from models.emoji.data import read_pictures
    from models.emoji.drawing import draw_captions, paste_grid, save_picture
    from models.emoji.evaluation import evaluate_model, find_neighbours
    from models.emoji.judge import load_judge
    from models.emoji.recipe import choose_recipe
    from models.emoji.stages import load_state

    _set_threads(threads, "cpu")
    model = out / "model"
    pipe = load_pipeline(model)
    own = load_judge(out / "judge" / "state.pt")
    pictures = read_pictures(data, out, choose_recipe(recipe).size, print)
    latents = load_state(out / "latents.pt")
    clip = load_clip(model) if (model / "clip").exists() else None
    result = evaluate_model(
        pipe, own, pictures, latents, clip=clip, count=count, steps=steps, guidance=guidance
    )
    check = out / "judge" / "check.json"
    if check.exists():
        found = json.loads(check.read_text(encoding="utf-8"))
        result["judge"] = {"style": found["style"], **found["sets"][found["style"]]}
    save_json(result, model / "evaluation.json")
    drawn = draw_captions(pipe, GRID_PROMPTS, steps=steps, guidance=guidance)
    save_picture(paste_grid(drawn, columns=9), model / "grid.png")
    some = drawn[::3]
    by_pixels, by_features = find_neighbours(own, some, pictures.train)
    rows = torch.cat([some, pictures.train[by_pixels], pictures.train[by_features]])
    save_picture(paste_grid(rows, columns=len(some)), model / "neighbours.png")
    print(write_card(model))


@app.command()
def plans(
    out: Out = RUN,
    recipe: Name = "emoji",
    sampler: Annotated[list[str], typer.Option(help="Repeat for several.")] = ["dpm++2m"],  # noqa: B006
    count: Annotated[int, typer.Option(min=2, help="Training captions to draw.")] = 200,
    steps: Annotated[int, typer.Option(min=2)] = 30,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            "--plans", help="Presets, files and folders of fronts; the speed presets by default."
        ),
    ] = None,
    results: Annotated[Path, typer.Option(help="Records.")] = Path(
        "benchmarks/results/judged-plans.jsonl"
    ),
    data: Data = None,
    threads: Threads = 0,
) -> None:
    """What OUT/judge names in the bundled model's pictures under plans, and in fewer steps."""
    import leansd
    from leansd.cli.terminal import follow
    from leansd.evaluation.records import put_records
    from models.emoji.data import read_pictures
    from models.emoji.evaluation import choose_pairs
    from models.emoji.judge import load_judge
    from models.emoji.judged_plans import judge_plans
    from models.emoji.recipe import choose_recipe

    _set_threads(threads, "cpu")
    own, pipe = load_judge(out / "judge" / "state.pt"), leansd.load("emoji", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    pictures = read_pictures(data, out, choose_recipe(recipe).size, print)
    chosen = choose_pairs(pictures.split.train, count, seed=0)
    for each in sampler:
        with follow(each) as bar:
            records = judge_plans(
                pipe,
                own,
                [pictures.split.train[place] for place in chosen],
                pictures.train[chosen],
                sampler=each,
                steps=steps,
                sources=plan or (),
                on_progress=lambda far: bar.count(far.done, far.total, far.case),
            )
        for record in records:
            print(f"{each} {record.plan}: {record.metric} {record.value:g}")
        put_records(results, records, lambda record: (record.model_extra or {}).get("sampler"))


@app.command()
def flow(
    out: Out = Path("runs/flow"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 32 pictures.")] = 2200,
    data: Data = None,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Train a small Stable Diffusion 3 on the embedded model's latents: OUT/model."""
    from leansd.emoji.location import model_folder
    from models.emoji.assembly import load_pipeline
    from models.emoji.data import read_pictures
    from models.emoji.flow import build_flow_pipeline, save_flow, train_flow

    _set_threads(threads, device)
    pipe = build_flow_pipeline(load_pipeline(model_folder()))
    pictures = read_pictures(data, out, pipe.vae.config.sample_size, print)
    train_flow(pipe, pictures, out, steps, device=device, report=_report)
    save_flow(pipe, out / "model")
    print(out / "model")


@app.command()
def publish(
    out: Out = RUN,
    nets: Annotated[
        Path | None, typer.Option(help="Instead the lighter UNets that lie in this folder.")
    ] = None,
) -> None:
    """Put OUT/model into the package; with --nets, the UNets trained from it."""
    from leansd.emoji.location import model_folder
    from models.emoji.publication import publish_model, publish_nets

    package = model_folder()
    if nets is None:
        publish_model(out / "model", package)
        print(package)
        return
    for folder in publish_nets(nets, package):
        print(folder)


def main() -> int:
    """Run the command line; a user's mistake is one line and exit code 2."""
    try:
        app(standalone_mode=False)
    except LeansdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except typer.Exit as error:
        return error.exit_code
    except Stopped:
        print("stopped: the checkpoint is written, the same command goes on from it")
        return 143
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("click", "typer"):
            print(f"error: {error.format_message()}", file=sys.stderr)  # type: ignore[attr-defined]
            return 2
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The recipe, packages to pipeline: sizes, budgets and the order of the stages."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from leansd.errors import LeansdError
from models.emoji.assembly import assemble_pipeline
from models.emoji.autoencoder import AutoencoderLearner, build_autoencoder, encode_pixels
from models.emoji.data import Pair, Pictures, read_pictures, write_captions
from models.emoji.denoiser import DenoiserLearner, LatentSet, build_unet
from models.emoji.eyes import EyesLearner, build_clip
from models.emoji.stages import (
    Learner,
    Report,
    load_state,
    save_json,
    save_state,
    train_stage,
)
from models.emoji.text import (
    TextLearner,
    build_tower,
    embed_captions,
    embed_sentences,
    save_tokenizer,
    train_tokenizer,
    write_lessons,
)

STAGES = ("vae", "text", "unet")
TRUNK, DECAYED = "unet", "unet-decayed"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained."""

    size: int = 128
    vae_channels: tuple[int, ...] = (16, 16, 48, 96)
    vae_crop: int = 64
    vae_batch: int = 8
    vae_rate: float = 6e-3
    vae_steps: int = 1800
    vae_freeze_at: int = 1300
    words: int = 2000
    text_width: int = 128
    text_layers: int = 4
    text_batch: int = 64
    text_rate: float = 1e-3
    text_steps: int = 2000
    channels: tuple[int, ...] = (32, 64, 128, 160)
    heads: tuple[int, ...] = (2, 4, 4, 5)
    unet_batch: int = 32
    unet_rate: float = 3e-3
    averages: tuple[float, ...] = (0.998, 0.9995)
    seed: int = 0

    @property
    def latent(self) -> int:
        """The side of the latents."""
        return self.size // 2 ** (len(self.vae_channels) - 1)


RECIPES = {
    "emoji": Recipe(),
    # Not shipped: another picture size, factor, width and tower, to try on it what was tuned on
    # the first one. Its budgets are an hour's on one core: `train --steps 700`.
    "second": Recipe(
        size=64,
        vae_channels=(24, 48, 96),
        vae_crop=64,
        vae_steps=600,
        vae_freeze_at=450,
        text_width=96,
        text_layers=3,
        text_steps=600,
        channels=(40, 80, 120, 120),
        heads=(2, 4, 6, 6),
        seed=100,
    ),
}


@dataclass(frozen=True)
class Parts:
    """The networks of one recipe."""

    vae: AutoencoderKL
    text: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel


def choose_recipe(name: str) -> Recipe:
    """Return the recipe of that name."""
    if name not in RECIPES:
        raise LeansdError(f"no recipe {name!r}: choose from {', '.join(RECIPES)}")
    return RECIPES[name]


def build_parts(recipe: Recipe, tokenizer: CLIPTokenizer) -> Parts:
    """Build the untrained networks, each from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    vae = build_autoencoder(recipe.vae_channels, recipe.size)
    torch.manual_seed(recipe.seed)
    text = build_tower(tokenizer, width=recipe.text_width, layers=recipe.text_layers)
    torch.manual_seed(recipe.seed)
    unet = build_unet(
        recipe.channels, recipe.heads, latent=recipe.latent, text_width=recipe.text_width
    )
    return Parts(vae, text, tokenizer, unet)


def train_model(
    recipe: Recipe,
    out: Path,
    *,
    data: Path | None = None,
    until: str = "unet",
    steps: int | None = None,
    device: str = "cpu",
    report: Report | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Train autoencoder, text tower and UNet, each from its checkpoint if there is one.

    `steps` ends the UNet's training; without it that goes on until it is stopped, and is taken up
    again by the same call.
    """
    with _claim_folder(out, recipe):
        pictures = read_pictures(data, out, recipe.size, say)
        parts = build_parts(recipe, _make_tokenizer(recipe, pictures, out / "tokenizer"))
        _train_once(
            out / "vae",
            lambda: _make_autoencoder_learner(recipe, parts, pictures, device),
            parts.vae,
            recipe.vae_steps,
            report,
        )
        if until == "vae":
            return
        _train_once(
            out / "text",
            lambda: _make_text_learner(recipe, parts, pictures, device),
            parts.text,
            recipe.text_steps,
            report,
        )
        if until == "text":
            return
        latents = cache_latents(
            out / "latents.pt",
            parts.vae,
            pictures,
            partial(embed_captions, parts.text.eval(), parts.tokenizer),
        )
        learner = make_denoiser_learner(recipe, parts.unet, latents, device)
        try:
            train_stage(
                learner, out / TRUNK, steps, report=report, save_seconds=120, keep_every=10_000
            )
        finally:
            learner.close()


def decay_model(
    recipe: Recipe, out: Path, steps: int, *, device: str = "cpu", report: Report | None = None
) -> None:
    """Take the UNet's rate down to 0 over `steps` steps, on a branch beside the training.

    A branch that was begun is finished first; delete its folder for a new one.
    """
    branch = out / DECAYED
    with _claim_folder(out, recipe):
        if not (out / "latents.pt").exists() or not (out / TRUNK / "state.pt").exists():
            raise LeansdError(f"{out} has no UNet in training: run `train` first")
        if not (branch / "decay.json").exists():
            branch.mkdir(exist_ok=True)
            shutil.copyfile(out / TRUNK / "state.pt", branch / "state.pt")
            first = int(load_state(branch / "state.pt")["step"])
            save_json({"first": first, "steps": steps}, branch / "decay.json")
        decay = json.loads((branch / "decay.json").read_text(encoding="utf-8"))
        parts = build_parts(recipe, CLIPTokenizer.from_pretrained(out / "tokenizer"))
        latents = load_latents(out / "latents.pt")
        learner = make_denoiser_learner(
            recipe, parts.unet, latents, device, decay=(decay["first"], decay["steps"])
        )
        try:
            train_stage(learner, branch, decay["first"] + decay["steps"], report=report)
        finally:
            learner.close()


def make_denoiser_learner(
    recipe: Recipe,
    unet: UNet2DConditionModel,
    latents: LatentSet,
    device: str,
    decay: tuple[int, int] | None = None,
) -> DenoiserLearner:
    """Return the last stage's learner, spread over up to four processes on a CPU."""
    cores = torch.get_num_threads() if device == "cpu" else 1
    processes = max(1, min(cores, 4, recipe.unet_batch // 8))
    return DenoiserLearner(
        unet,
        latents,
        batch=recipe.unet_batch,
        rate=recipe.unet_rate,
        seed=recipe.seed + 3,
        averages=recipe.averages,
        decay=decay,
        device=device,
        sidecars=processes - 1,
    )


def load_run(out: Path, recipe: Recipe, average: str | None = None) -> StableDiffusionPipeline:
    """Assemble the pipeline from the checkpoints in `out`.

    Without `average`: the UNet of the decayed branch where that is finished, else its longest
    moving average.
    """
    for stage in STAGES:
        if not (out / stage / "state.pt").exists():
            raise LeansdError(f"{out} has no trained {stage} yet: run `train` first")
    parts = build_parts(recipe, CLIPTokenizer.from_pretrained(out / "tokenizer"))
    parts.vae.load_state_dict(load_state(out / "vae" / "state.pt")["learner"]["vae"])
    parts.text.load_state_dict(load_state(out / "text" / "state.pt")["learner"]["tower"])
    branch = DECAYED if average is None and (out / DECAYED / "decay.json").exists() else TRUNK
    state = load_state(out / branch / "state.pt")["learner"]
    choices = list(state["averages"])
    if average is None:
        average = choices[0] if branch == DECAYED else choices[-1]
    if average not in (*choices, "none"):
        raise LeansdError(f"no average {average}: choose from {', '.join(choices)}, none")
    parts.unet.load_state_dict(state["unet"] if average == "none" else state["averages"][average])
    return assemble_pipeline(parts.vae, parts.text, parts.tokenizer, parts.unet)


def train_eyes(
    recipe: Recipe,
    out: Path,
    steps: int,
    *,
    data: Path | None = None,
    report: Report | None = None,
) -> None:
    """Give the run's text tower eyes, in `out/eyes`; the UNet's training need not stand still."""
    if not (out / "text" / "done").exists():
        raise LeansdError(f"{out} has no trained text tower yet: run `train` first")
    pictures = read_pictures(data, out, recipe.size, print)
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    learner = EyesLearner(
        _build_eyes(recipe, out, tokenizer),
        tokenizer,
        pictures.split.train,
        pictures.train,
        batch=64,
        rate=1e-3,
        steps=steps,
        seed=recipe.seed + 9,
    )
    train_stage(learner, out / "eyes", steps, report=report)


def load_eyes(recipe: Recipe, out: Path) -> CLIPModel | None:
    """Load the run's CLIP, where its eyes were trained."""
    path = out / "eyes" / "state.pt"
    if not path.exists():
        return None
    clip = _build_eyes(recipe, out, CLIPTokenizer.from_pretrained(out / "tokenizer"))
    clip.load_state_dict(load_state(path)["learner"]["clip"])
    return clip.eval()


def _build_eyes(recipe: Recipe, out: Path, tokenizer: CLIPTokenizer) -> CLIPModel:
    text = build_tower(tokenizer, width=recipe.text_width, layers=recipe.text_layers)
    text.load_state_dict(load_state(out / "text" / "state.pt")["learner"]["tower"])
    torch.manual_seed(recipe.seed)
    return build_clip(text)


def describe_run(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Return the recipe and what each stage has spent, from the checkpoints in `out`."""
    batches = {"vae": recipe.vae_batch, "text": recipe.text_batch}
    stages = {}
    for stage in (*STAGES, DECAYED):
        path = out / stage / "state.pt"
        if path.exists():
            state = load_state(path)
            stages[stage] = {
                "steps": int(state["step"]),
                "minutes": round(float(state["seconds"]) / 60, 1),
                "samples": int(state["step"]) * batches.get(stage, recipe.unet_batch),
            }
    return {"recipe": dataclasses.asdict(recipe), "stages": stages}


def name_pairs(pairs: Sequence[Pair]) -> list[str]:
    """Return the concept of each pair."""
    return [pair.concept.name for pair in pairs]


def load_latents(path: Path) -> LatentSet:
    """Read the cached latents of the training pictures."""
    state = load_state(path)
    return LatentSet(state["latents"], state["texts"], state["empty"])


def _train_once(
    folder: Path,
    make: Callable[[], Learner],
    module: torch.nn.Module,
    steps: int,
    report: Report | None,
) -> None:
    # A finished autoencoder or tower stays as it is, however long the UNet goes on.
    if not (folder / "done").exists():
        train_stage(make(), folder, steps, report=report)
        (folder / "done").touch()
    own = {"vae": "vae", "text": "tower"}[folder.name]
    # Laid out as if it had just been built: what follows is bit-equal whether or not it was
    # trained in this process.
    module.to(memory_format=torch.contiguous_format).eval()
    module.load_state_dict(load_state(folder / "state.pt")["learner"][own])


def _make_autoencoder_learner(
    recipe: Recipe, parts: Parts, pictures: Pictures, device: str
) -> AutoencoderLearner:
    return AutoencoderLearner(
        parts.vae,
        torch.cat([pictures.train, pictures.others]),
        pictures.train,
        crop=recipe.vae_crop,
        batch=recipe.vae_batch,
        rate=recipe.vae_rate,
        steps=recipe.vae_steps,
        freeze_at=recipe.vae_freeze_at,
        seed=recipe.seed + 1,
        device=device,
    )


def _make_text_learner(
    recipe: Recipe, parts: Parts, pictures: Pictures, device: str
) -> TextLearner:
    pairs = pictures.split.train
    words = {pair.concept.name: pair.concept.words for pair in pairs}
    sentences = embed_sentences([words[name] for name in sorted(words)])
    return TextLearner(
        parts.text,
        write_lessons(parts.tokenizer, pairs, pictures.train, sentences),
        batch=recipe.text_batch,
        rate=recipe.text_rate,
        steps=recipe.text_steps,
        seed=recipe.seed + 2,
        device=device,
    )


def _make_tokenizer(recipe: Recipe, pictures: Pictures, folder: Path) -> CLIPTokenizer:
    if not (folder / "vocab.json").exists():
        pairs = sorted({*pictures.split.train, *pictures.split.held_out})
        captions = [caption for pair in pairs for caption in write_captions(pair)]
        save_tokenizer(train_tokenizer(captions, recipe.words), folder)
    return CLIPTokenizer.from_pretrained(folder)


def cache_latents(
    path: Path,
    vae: AutoencoderKL,
    pictures: Pictures,
    embed: Callable[[list[str]], torch.Tensor],
) -> LatentSet:
    """Return what a denoiser learns from, made once and kept in a file.

    Args:
        embed: captions to what stands for them, (captions, tokens, width).
    """
    if not path.exists():
        vae.eval()
        split = pictures.split
        state = {
            "latents": encode_pixels(vae, pictures.train).cpu().contiguous(),
            "texts": [embed(write_captions(pair)) for pair in split.train],
            "empty": embed([""])[0],
            "held_out_latents": encode_pixels(vae, pictures.held_out).cpu().contiguous(),
            "held_out_texts": [embed(write_captions(pair)) for pair in split.held_out],
        }
        save_state(state, path)
    return load_latents(path)


@contextmanager
def _claim_folder(out: Path, recipe: Recipe) -> Iterator[None]:
    # One recipe and one process at a time.
    path = out / "recipe.json"
    mine = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        # How long a stage is trained is no part of what it is.
        changed = sorted(
            name for name in mine if mine[name] != theirs.get(name) and "_steps" not in name
        )
        if changed:
            raise LeansdError(f"{out} was begun with another recipe: {', '.join(changed)} differ")
    pid = out / "pid"
    if pid.exists() and _is_alive(pid.read_text(encoding="utf-8")):
        raise LeansdError(f"{out} is being trained by process {pid.read_text().strip()}")
    out.mkdir(parents=True, exist_ok=True)
    save_json(mine, path)
    pid.write_text(f"{os.getpid()}\n", encoding="utf-8")
    try:
        yield
    finally:
        pid.unlink(missing_ok=True)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError):
        return False
    return True

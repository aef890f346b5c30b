"""The whole recipe, packages to pipeline: sizes, budgets and the order of the stages."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTokenizer

from leansd.emoji.assembly import assemble_pipeline, save_model
from leansd.emoji.autoencoder import AutoencoderLearner, build_autoencoder, encode_pixels
from leansd.emoji.clip import ClipLearner, build_clip, save_tokenizer, tokenize, train_tokenizer
from leansd.emoji.data import (
    STYLES,
    Pair,
    Split,
    find_modules,
    find_pictures,
    list_pairs,
    load_pixels,
    read_catalogue,
    split_pairs,
    write_captions,
)
from leansd.emoji.denoiser import DenoiserLearner, LatentSet, build_unet
from leansd.emoji.training import (
    Budget,
    Learner,
    load_state,
    save_json,
    save_state,
    train_stage,
)
from leansd.errors import LeansdError

Report = Callable[[str, dict[str, float]], None]
STAGES = ("vae", "clip", "unet")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained, for one picture size."""

    size: int
    vae_width: int
    vae_blocks: tuple[int, ...] = (0, 2, 3)
    vae_batch: int = 8
    vae_rate: float = 2e-3
    clip_width: int = 128
    clip_layers: int = 4
    clip_batch: int = 64
    clip_rate: float = 1e-3
    channels: tuple[int, ...] = (32, 64, 128, 160)
    heads: tuple[int, ...] = (2, 4, 4, 5)
    unet_batch: int = 32
    unet_rate: float = 1e-3
    # Shares of the styles, in the order of STYLES: one first, all of them later.
    narrow: tuple[float, ...] = (1.0, 0.0, 0.0)
    wide: tuple[float, ...] = (0.45, 0.32, 0.23)
    widen_at: float = 0.55
    decay_from: float = 0.62
    # How a budget is spent on the three stages: shares of the minutes, steps per denoiser step.
    minute_shares: tuple[float, ...] = (0.09, 0.13, 0.78)
    step_shares: tuple[float, ...] = (0.4, 0.2, 1.0)
    seed: int = 0

    @property
    def latent(self) -> int:
        """The side of the latents."""
        return self.size // 2 ** (len(self.vae_blocks) - 1)

    def budget(self, stage: str, total: Budget) -> Budget:
        """Return one stage's part of the whole budget."""
        place = STAGES.index(stage)
        if total.steps is not None:
            return Budget(steps=max(1, int(total.steps * self.step_shares[place])))
        return Budget(minutes=(total.minutes or 0) * self.minute_shares[place])


RECIPES = {
    64: Recipe(size=64, vae_width=32),
    # For a GPU: 32x32 latents and 21.9 M parameters.
    128: Recipe(
        size=128,
        vae_width=64,
        vae_batch=32,
        clip_width=192,
        clip_layers=6,
        clip_batch=256,
        channels=(64, 128, 192, 192),
        heads=(2, 4, 6, 6),
        unet_batch=128,
        wide=(1.0, 1.0, 1.0),
        widen_at=0.2,
        decay_from=0.8,
    ),
}


@dataclass(frozen=True)
class Pictures:
    """The split with its pixels, both uint8 (pictures, 3, size, size)."""

    split: Split
    train: torch.Tensor
    held_out: torch.Tensor


def read_pictures(data: Path | None, cache: Path, size: int) -> Pictures:
    """Read every picture of the split from the packages."""
    modules = find_modules(data, cache)
    paths = find_pictures(modules)
    split = split_pairs(list_pairs(read_catalogue(modules), paths))

    def load(pairs: tuple[Pair, ...]) -> torch.Tensor:
        return load_pixels([paths[pair.emoji.code, pair.style] for pair in pairs], size)

    return Pictures(split, load(split.train), load(split.held_out))


def train_model(
    recipe: Recipe,
    pictures: Pictures,
    out: Path,
    budget: Budget,
    *,
    device: str = "cpu",
    resume: bool = False,
    report: Report | None = None,
) -> Path:
    """Train autoencoder, CLIP and UNet, each from its checkpoint if there is one.

    Return the folder of the finished model, `out/model`.
    """
    _claim_folder(out, recipe, resume)
    tokenizer = _make_tokenizer(pictures.split, out / "tokenizer")
    parts = build_parts(recipe, tokenizer)

    def run(stage: str, learner: Learner) -> None:
        heard = report and (lambda row: report(stage, row))
        train_stage(learner, out / stage, recipe.budget(stage, budget), on_log=heard)

    autoencoder = AutoencoderLearner(
        parts.vae,
        pictures.train,
        batch=recipe.vae_batch,
        rate=recipe.vae_rate,
        seed=recipe.seed + 1,
        device=device,
    )
    _run_once(out / "vae", autoencoder, run)
    ids = [tokenize(tokenizer, write_captions(pair)) for pair in pictures.split.train]
    contrast = ClipLearner(
        parts.clip,
        pictures.train,
        ids,
        batch=recipe.clip_batch,
        rate=recipe.clip_rate,
        seed=recipe.seed + 2,
        device=device,
    )
    _run_once(out / "clip", contrast, run)
    denoiser = make_denoiser_learner(
        recipe, parts.unet, _cache_latents(out / "latents.pt", parts, pictures), device
    )
    try:
        run("unet", denoiser)
    finally:
        denoiser.close()
    parts.unet.load_state_dict(denoiser.average_weights())
    pipe = assemble_pipeline(parts.vae, parts.clip, tokenizer, parts.unet)
    save_model(pipe, parts.clip, out / "model")
    save_json(describe_run(out, recipe), out / "model" / "training.json")
    return out / "model"


@dataclass(frozen=True)
class Parts:
    """The networks of one recipe."""

    vae: AutoencoderTiny
    clip: CLIPModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel


def build_parts(recipe: Recipe, tokenizer: CLIPTokenizer) -> Parts:
    """Build the untrained networks, each from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    vae = build_autoencoder(recipe.vae_width, recipe.vae_blocks)
    torch.manual_seed(recipe.seed)
    clip = build_clip(
        tokenizer, size=recipe.size, width=recipe.clip_width, layers=recipe.clip_layers
    )
    torch.manual_seed(recipe.seed)
    unet = build_unet(
        recipe.channels, recipe.heads, latent=recipe.latent, text_width=recipe.clip_width
    )
    return Parts(vae, clip, tokenizer, unet)


def choose_recipe(size: int) -> Recipe:
    """Return the recipe for a picture size."""
    if size not in RECIPES:
        raise LeansdError(
            f"no recipe for --size {size}: choose from {', '.join(map(str, RECIPES))}"
        )
    return RECIPES[size]


def describe_run(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Return the recipe and what each stage has spent, from the checkpoints in `out`."""
    batches = {"vae": recipe.vae_batch, "clip": recipe.clip_batch, "unet": recipe.unet_batch}
    stages = {}
    for stage in STAGES:
        state = load_state(out / stage / "state.pt")
        stages[stage] = {
            "steps": int(state["step"]),
            "minutes": round(float(state["seconds"]) / 60, 1),
            "samples": int(state["step"]) * batches[stage],
        }
    return {"recipe": dataclasses.asdict(recipe), "stages": stages}


def make_denoiser_learner(
    recipe: Recipe, unet: UNet2DConditionModel, latents: LatentSet, device: str
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
        narrow=recipe.narrow,
        wide=recipe.wide,
        widen_at=recipe.widen_at,
        decay_from=recipe.decay_from,
        device=device,
        sidecars=processes - 1,
    )


@torch.no_grad()
def embed_captions(clip: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return what the UNet attends to: (captions, tokens, width), as the pipeline computes it."""
    device = next(clip.parameters()).device
    ids = tokenize(tokenizer, captions).to(device)
    return clip.text_model(input_ids=ids).last_hidden_state.cpu()


def load_run(out: Path, recipe: Recipe) -> tuple[StableDiffusionPipeline, CLIPModel]:
    """Assemble the pipeline from the checkpoints in `out`, with the UNet's moving average."""
    parts = build_parts(recipe, CLIPTokenizer.from_pretrained(out / "tokenizer"))
    states = {stage: load_state(out / stage / "state.pt")["learner"] for stage in STAGES}
    parts.vae.load_state_dict(states["vae"]["vae"])
    parts.clip.load_state_dict(states["clip"]["clip"])
    parts.unet.load_state_dict(states["unet"]["average"])
    pipe = assemble_pipeline(parts.vae, parts.clip.eval(), parts.tokenizer, parts.unet)
    return pipe, parts.clip


def _run_once(folder: Path, learner: Learner, run: Callable[[str, Learner], None]) -> None:
    # A finished autoencoder or CLIP stays as it is when the UNet is given more time.
    if (folder / "done").exists():
        learner.load_state_dict(load_state(folder / "state.pt")["learner"])
        return
    run(folder.name, learner)
    (folder / "done").touch()


def _make_tokenizer(split: Split, folder: Path) -> CLIPTokenizer:
    if not (folder / "vocab.json").exists():
        pairs = sorted({*split.train, *split.held_out})
        captions = [caption for pair in pairs for caption in write_captions(pair)]
        save_tokenizer(train_tokenizer(captions), folder)
    return CLIPTokenizer.from_pretrained(folder)


def _cache_latents(path: Path, parts: Parts, pictures: Pictures) -> LatentSet:
    if not path.exists():
        vae, clip = parts.vae.eval(), parts.clip.eval()
        state = {
            "latents": encode_pixels(vae, pictures.train).cpu(),
            "texts": [
                embed_captions(clip, parts.tokenizer, write_captions(pair))
                for pair in pictures.split.train
            ],
            "empty": embed_captions(clip, parts.tokenizer, [""])[0],
            "styles": [STYLES.index(pair.style) for pair in pictures.split.train],
        }
        save_state(state, path)
    return LatentSet(**load_state(path))


def _claim_folder(out: Path, recipe: Recipe, resume: bool) -> None:
    path = out / "recipe.json"
    mine = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        save_json(mine, path)
        return
    if not resume:
        raise LeansdError(f"{out} holds a run already: continue it with --resume, or choose --out")
    theirs = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in mine if mine[name] != theirs.get(name))
    if changed:
        raise LeansdError(f"{out} was begun with another recipe: {', '.join(changed)} differ")

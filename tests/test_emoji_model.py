"""The embedded model: opened by stock diffusers, of the right shape, small, and it draws."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from models.emoji.assembly import LIMIT_MB, build_scheduler
from models.emoji.drawing import draw_captions
from models.emoji.eyes import clip_score
from transformers import CLIPTokenizer

from leansd.emoji import location
from leansd.emoji.clip import MAX_TOKENS, load_clip
from leansd.emoji.location import model_folder
from leansd.errors import LeansdError

# The lean UNet stands beside the model: it has an allowance of its own.
SECOND_LIMIT_MB = 20


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return StableDiffusionPipeline.from_pretrained(model_folder(), local_files_only=True)


def test_unet_has_the_units_of_stable_diffusion_1(pipe: StableDiffusionPipeline) -> None:
    unet = pipe.unet
    kinds = [type(block).__name__ for block in unet.down_blocks]
    assert kinds == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    kinds = [type(block).__name__ for block in unet.up_blocks]
    assert kinds == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    units = 0
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        for name in ("resnets", "attentions", "downsamplers", "upsamplers"):
            units += len(getattr(block, name, None) or ())
    assert units == 44


def test_samplers_made_from_its_configuration_do_not_clip_latents(
    pipe: StableDiffusionPipeline,
) -> None:
    for scheduler in (DDIMScheduler, DDPMScheduler):
        assert scheduler.from_config(pipe.scheduler.config).config.clip_sample is False
    assert build_scheduler().config.clip_sample is False


def test_noise_schedule_is_stable_diffusions(pipe: StableDiffusionPipeline) -> None:
    config = pipe.scheduler.config
    assert (config.beta_start, config.beta_end) == (0.00085, 0.012)
    assert (config.beta_schedule, config.num_train_timesteps) == ("scaled_linear", 1000)
    assert config.prediction_type == "epsilon"


def test_tokenizer_and_text_tower_fit(pipe: StableDiffusionPipeline) -> None:
    assert isinstance(pipe.tokenizer, CLIPTokenizer)
    text = pipe.text_encoder.config
    assert len(pipe.tokenizer) == text.vocab_size
    assert pipe.tokenizer.model_max_length == text.max_position_embeddings == MAX_TOKENS
    assert text.eos_token_id == pipe.tokenizer.eos_token_id
    assert text.hidden_size == pipe.unet.config.cross_attention_dim


def test_text_tower_is_the_clips(pipe: StableDiffusionPipeline) -> None:
    clip, _ = load_clip(model_folder())
    theirs = clip.text_model.state_dict()
    for name, value in pipe.text_encoder.state_dict().items():
        assert torch.equal(value, theirs[name.removeprefix("text_model.")]), name


def test_pictures_are_finite_and_answer_the_caption(pipe: StableDiffusionPipeline) -> None:
    captions = ["a red heart, twemoji style", "a lemon, twemoji style"]
    drawn = draw_captions(pipe, captions, steps=8, seed=3)
    assert drawn.shape == (2, 3, 128, 128)
    assert drawn.float().std() > 10
    clip, tokenizer = load_clip(model_folder())
    right = sum(clip_score(clip, tokenizer, drawn, captions))
    assert right > sum(clip_score(clip, tokenizer, drawn, captions[::-1]))
    # A picture depends on its own seed, not on its place in a batch.
    alone = draw_captions(pipe, captions[1:], steps=8, seed=4)
    assert (alone[0].int() - drawn[1].int()).abs().max() <= 2


def test_files_are_small_half_precision_and_plain() -> None:
    folder = model_folder()
    files = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {path: path.stat().st_size for path in files}
    second = sum(size for path, size in sizes.items() if path.is_relative_to(folder / "lean"))
    assert second <= SECOND_LIMIT_MB * 1e6
    assert sum(sizes.values()) - second <= LIMIT_MB * 1e6
    suffixes = {path.suffix for path in files}
    assert suffixes <= {".json", ".txt", ".safetensors", ".md", ".png"}


def test_it_draws_what_it_is_asked_for() -> None:
    folder = model_folder()
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert result["vae_psnr"]["mean"] >= 26
    # Of an independent classifier's first guesses, beside its own on real pictures.
    assert result["train"]["count"] == 200
    assert result["train"]["of_ceiling"] >= 0.8
    assert result["held_out"]["count"] > 100
    assert result["held_out"]["generated"]["top1"] >= 0.5
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{100 * result['train']['generated']['top1']:.1f} %" in card
    assert f"{result['vae_psnr']['mean']} dB" in card
    for credit in ("CC-BY 4.0", "Apache-2.0", "MIT", "Twemoji", "Noto", "Fluent"):
        assert credit in card
    for name in ("grid.png", "neighbours.png"):
        assert (folder / name).is_file()
        assert name in card


def test_missing_model_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "__file__", str(tmp_path / "location.py"))
    with pytest.raises(LeansdError, match="no embedded model"):
        model_folder()

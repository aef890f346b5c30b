"""Measurements of the embedded model, on small made-up inputs."""

from pathlib import Path

import pytest
import torch

from leansd.emoji.assembly import assemble_pipeline, load_clip, load_pipeline, save_model
from leansd.emoji.autoencoder import build_autoencoder
from leansd.emoji.card import write_card
from leansd.emoji.clip import build_clip, train_tokenizer
from leansd.emoji.curves import plot_curves, smooth_values
from leansd.emoji.data import Emoji, Pair, Split, write_captions
from leansd.emoji.denoiser import build_unet
from leansd.emoji.evaluation import choose_pairs, evaluate_model, measure_frechet, rank_captions
from leansd.emoji.recipe import STAGES, Pictures, Recipe, describe_run, train_model
from leansd.emoji.training import Budget, save_json
from leansd.errors import LeansdError

RECIPE = Recipe(
    size=32,
    vae_width=8,
    vae_blocks=(0, 1, 1),
    vae_batch=2,
    clip_width=32,
    clip_layers=1,
    clip_batch=4,
    channels=(8, 16, 16, 16),
    heads=(1, 1, 1, 1),
    unet_batch=2,
)


@pytest.fixture
def pictures() -> Pictures:
    """Six emojis in three styles; noise for pictures."""
    emojis = [Emoji(f"1f{n:03x}", name) for n, name in enumerate(("apple", "fish", "tree", "car"))]
    pairs = [Pair(emoji, style) for emoji in emojis for style in ("twemoji", "noto", "fluent")]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Pictures(Split(tuple(pairs[:10]), tuple(pairs[10:])), pixels[:10], pixels[10:])


def test_rank_of_the_right_caption() -> None:
    texts = torch.eye(4)
    images = torch.eye(4)
    assert rank_captions(images, texts, choices=4) == [0, 0, 0, 0]
    images[0] = torch.tensor([0.1, 0.5, 0.9, 0.0])
    assert rank_captions(images, texts, choices=4) == [2, 0, 0, 0]
    assert rank_captions(images, texts, choices=2) == [1, 0, 0, 0], "only within its group"


def test_chosen_pairs_are_fixed_by_the_seed() -> None:
    assert choose_pairs(range(50), 5, 1) == choose_pairs(range(50), 5, 1)
    assert choose_pairs(range(50), 5, 1) != choose_pairs(range(50), 5, 2)
    assert choose_pairs(range(3), 5, 1) == [0, 1, 2]


def test_frechet_distance_of_a_set_to_itself_is_zero(pictures: Pictures) -> None:
    tokenizer = train_tokenizer(["an apple"], words=540)
    torch.manual_seed(0)
    clip = build_clip(tokenizer, size=32, width=32, layers=1).eval()
    assert measure_frechet(clip, pictures.train, pictures.train) == pytest.approx(0, abs=1e-2)
    assert measure_frechet(clip, pictures.train, 255 - pictures.train // 4) > 0.1


def test_pipeline_survives_the_disk(tmp_path: Path, pictures: Pictures) -> None:
    torch.manual_seed(0)
    captions = [write_captions(pair)[0] for pair in pictures.split.train]
    tokenizer = train_tokenizer(captions, words=540)
    clip = build_clip(tokenizer, size=32, width=32, layers=1).eval()
    vae = build_autoencoder(8, [0, 1, 1])
    unet = build_unet((8, 16, 16, 16), (1, 1, 1, 1), latent=8, text_width=32)
    pipe = assemble_pipeline(vae, clip, tokenizer, unet)
    for _ in range(2):  # the second time over the first
        save_model(pipe, clip, tmp_path / "model")
    loaded = load_pipeline(tmp_path / "model")
    again, _ = load_clip(tmp_path / "model")
    for mine, theirs in ((unet, loaded.unet), (vae, loaded.vae), (clip, again)):
        kept = theirs.state_dict()
        for name, value in mine.state_dict().items():
            assert kept[name].dtype == value.dtype, name
            if value.is_floating_point():
                assert torch.equal(value.half().float(), kept[name]), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.slow
def test_whole_recipe_trains_measures_and_writes_its_card(
    tmp_path: Path, pictures: Pictures
) -> None:
    model = train_model(RECIPE, pictures, tmp_path / "run", Budget(steps=5))
    assert set(describe_run(tmp_path / "run", RECIPE)["stages"]) == set(STAGES)
    with pytest.raises(LeansdError, match="--resume"):
        train_model(RECIPE, pictures, tmp_path / "run", Budget(steps=5))
    train_model(RECIPE, pictures, tmp_path / "run", Budget(steps=6), resume=True)
    assert plot_curves(tmp_path / "run").stat().st_size > 0
    with pytest.raises(LeansdError, match="leansd emoji evaluate"):
        write_card(model)
    clip, _ = load_clip(model)
    result = evaluate_model(load_pipeline(model), clip, pictures, count=2, steps=2)
    save_json(result, model / "evaluation.json")
    card = write_card(model).read_text(encoding="utf-8")
    assert f"{result['vae_psnr']['held_out_mean']} dB" in card
    assert "saw 12 samples" in card


def test_smooth_values() -> None:
    assert smooth_values([1.0, 2.0, 3.0, 4.0], share=0.5) == [1.0, 1.5, 2.5, 3.5]

"""A killed and resumed training run ends in the very same weights."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from leansd.emoji.autoencoder import (
    AutoencoderLearner,
    build_autoencoder,
    encode_pixels,
    whiten_latents,
)
from leansd.emoji.clip import ClipLearner, build_clip, save_tokenizer, tokenize, train_tokenizer
from leansd.emoji.denoiser import DenoiserLearner, LatentSet, build_unet
from leansd.emoji.training import Budget, Learner, load_state, train_stage
from leansd.errors import LeansdError

CAPTIONS = ["a red apple, noto style", "a blue fish, noto style", "a green tree, noto style"]


def draw_pictures(count: int = 12, size: int = 32) -> torch.Tensor:
    """Discs of random place and colour on white: uint8 (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(5)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    pictures = torch.full((count, 3, size, size), 255, dtype=torch.uint8)
    for picture in pictures:
        centre = torch.rand(2, generator=generator) * size
        disc = (y - centre[0]).square() + (x - centre[1]).square() < (size / 3) ** 2
        colour = torch.randint(0, 256, (3, 1), generator=generator, dtype=torch.uint8)
        picture[:, disc] = colour
    return pictures


def make_autoencoder() -> Learner:
    torch.manual_seed(1)
    vae = build_autoencoder(8, [0, 1, 1])
    return AutoencoderLearner(vae, draw_pictures(), batch=2, rate=1e-3, seed=1)


def make_clip() -> Learner:
    torch.manual_seed(1)
    tokenizer = train_tokenizer(CAPTIONS, words=540)
    clip = build_clip(tokenizer, size=32, width=32, layers=1)
    ids = [tokenize(tokenizer, CAPTIONS) for _ in range(12)]
    return ClipLearner(clip, draw_pictures(), ids, batch=4, rate=1e-3, seed=1)


def make_denoiser(sidecars: int = 0, latent: int = 8) -> DenoiserLearner:
    torch.manual_seed(1)
    unet = build_unet((8, 16, 16, 16), (1, 1, 1, 1), latent=latent, text_width=16)
    texts = [torch.randn(2, 6, 16) for _ in range(12)]
    pictures = LatentSet(
        torch.randn(12, 4, latent, latent), texts, torch.randn(6, 16), [0, 1, 2] * 4
    )
    return DenoiserLearner(
        unet,
        pictures,
        batch=2,
        rate=1e-3,
        seed=1,
        narrow=(1, 0, 0),
        wide=(1, 1, 1),
        widen_at=0.5,
        sidecars=sidecars,
    )


@pytest.mark.parametrize("make", [make_autoencoder, make_clip, make_denoiser])
def test_resumed_run_equals_uninterrupted_run(make, tmp_path: Path) -> None:
    budget = Budget(steps=6)
    train_stage(make(), tmp_path / "whole", budget)
    for stop in (2, 5, None):
        train_stage(make(), tmp_path / "parts", budget, stop_after=stop, log_every=1)
    whole = load_state(tmp_path / "whole" / "state.pt")
    parts = load_state(tmp_path / "parts" / "state.pt")
    assert whole["step"] == parts["step"] == 6
    flat_whole, flat_parts = flatten(whole["learner"]), flatten(parts["learner"])
    assert flat_whole.keys() == flat_parts.keys()
    for name, value in flat_whole.items():
        assert torch.equal(value, flat_parts[name]), name
    assert len((tmp_path / "parts" / "losses.jsonl").read_text().splitlines()) == 6


def flatten(state: object, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a nested state by its path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else []
    if isinstance(state, list):
        items = enumerate(state)
    found: dict[str, torch.Tensor] = {}
    for key, value in items:
        found.update(flatten(value, f"{prefix}/{key}"))
    return found


@pytest.mark.slow
def test_sidecar_learns_what_one_process_learns() -> None:
    # At 16 the innermost norms see 2x2 maps; of the 1x1 maps of 8 gradients are mostly rounding.
    alone, shared = make_denoiser(latent=16), make_denoiser(sidecars=1, latent=16)
    for progress in (0.1, 0.9):
        # From the same weights each time: AdamW would make a mountain of a rounding error.
        shared.unet.load_state_dict(alone.unet.state_dict())
        losses = [learner.learn(7, progress)["loss"] for learner in (alone, shared)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        for mine, theirs in zip(alone.unet.parameters(), shared.unet.parameters(), strict=True):
            assert torch.allclose(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    shared.close()


def test_log_ahead_of_checkpoint_is_cut(tmp_path: Path) -> None:
    train_stage(make_denoiser(), tmp_path, Budget(steps=4), stop_after=2, log_every=1)
    with (tmp_path / "losses.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    train_stage(make_denoiser(), tmp_path, Budget(steps=4), log_every=1)
    assert len((tmp_path / "losses.jsonl").read_text().splitlines()) == 4


def test_white_latents_and_same_picture() -> None:
    torch.manual_seed(0)
    vae, pixels = build_autoencoder(8, [0, 1, 1]).eval(), draw_pictures(24)
    whiten_latents(vae, pixels)
    flat = encode_pixels(vae, pixels).movedim(1, 0).flatten(1)
    assert torch.allclose(flat.mean(1), torch.zeros(4), atol=1e-3)
    assert torch.allclose(torch.cov(flat), torch.eye(4), atol=2e-2)


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(CAPTIONS, words=540)
    save_tokenizer(tokenizer, tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert {"vocab.json", "merges.txt"} <= {path.name for path in tmp_path.iterdir()}
    ids = tokenize(tokenizer, ["A RED apple, noto style"])
    assert torch.equal(ids, tokenize(loaded, ["a red  apple, noto style"]))
    assert ids.shape == (1, 24)
    assert loaded.decode(ids[0], skip_special_tokens=True) == "a red apple , noto style"


def test_corrupt_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(LeansdError, match=r"cannot read checkpoint .*state\.pt"):
        train_stage(make_denoiser(), tmp_path, Budget(steps=1))


@pytest.mark.parametrize("bad", [{}, {"steps": 1, "minutes": 1.0}, {"steps": 0}])
def test_bad_budget(bad: dict) -> None:
    with pytest.raises(LeansdError):
        Budget(**bad)

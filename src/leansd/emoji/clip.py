"""A tiny CLIP: its text tower conditions the denoiser, its vision tower scores pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from leansd.emoji.training import draw_generator, set_rate, warm_stable_decay

MAX_TOKENS = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_MEAN, _STD = 0.75, 0.33  # of white-backed pictures, in [0, 1]


def train_tokenizer(captions: Iterable[str], words: int = 2000) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary in CLIP's own format."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    blank = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = blank.normalizer
    learner.pre_tokenizer = blank.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        min_frequency=2,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        show_progress=False,
    )
    learner.train_from_iterator(list(captions), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, and the two marks last.
    entries = letters + [letter + "</w>" for letter in letters]
    entries += ["".join(pair) for pair in merges]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys([*entries, BOS, EOS]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save it with the classic `vocab.json` and `merges.txt` beside the new format."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


def build_clip(tokenizer: CLIPTokenizer, *, size: int, width: int, layers: int) -> CLIPModel:
    """Build an untrained CLIP for pictures of `size` pixels."""
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 32),
        "projection_dim": width,
    }
    text = {
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**tower, "image_size": size, "patch_size": size // 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Return token ids, (captions, 24), padded and cut as the pipeline does it."""
    batch = tokenizer(
        list(captions),
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    return batch.input_ids


def normalize_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8 (batch, 3, side, side) to the vision tower's float range."""
    return normalize_floats(pixels.float().div(255))


def normalize_floats(pictures: torch.Tensor) -> torch.Tensor:
    """Map pictures (batch, 3, side, side) in [0, 1] to the vision tower's float range."""
    return pictures.sub(_MEAN).div(_STD)


def embed_tokens(clip: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Embed token ids (captions, 24) as unit vectors (captions, width)."""
    pooled = clip.text_model(input_ids=ids).pooler_output
    return F.normalize(clip.text_projection(pooled), dim=-1)


def embed_pixels(clip: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """Embed normalized pixels (batch, 3, side, side) as unit vectors (batch, width)."""
    pooled = clip.vision_model(pixel_values=pixels).pooler_output
    return F.normalize(clip.visual_projection(pooled), dim=-1)


def jitter_pixels(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, zoom, turn and tint pictures (batch, 3, side, side) in [0, 1] on white."""
    count = len(pixels)

    def draw(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, zoom = draw(-0.15, 0.15), draw(0.9, 1.2)
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack(
        [cosine, -sine, draw(-0.12, 0.12), sine, cosine, draw(-0.12, 0.12)], dim=1
    ).view(count, 2, 3)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False).to(pixels.device)
    # The padding is zero, so work on the negative: zero is white there.
    moved = 1 - F.grid_sample(1 - pixels, grid, align_corners=False)
    tint = 1 + 0.1 * torch.randn(count, 3, 1, 1, generator=generator).clamp(-2, 2)
    return (moved * tint.to(pixels.device)).clamp(0, 1)


class ClipLearner:
    """Trains both towers to find each other's partner in a batch."""

    def __init__(
        self,
        clip: CLIPModel,
        pixels: torch.Tensor,
        captions: Sequence[torch.Tensor],
        *,
        batch: int,
        rate: float,
        seed: int,
        device: str = "cpu",
    ) -> None:
        """Take uint8 pixels (pictures, 3, side, side) and ids (variants, 24) of each picture."""
        self.clip = clip.to(device).train()
        self.pixels, self.captions = pixels, captions
        self.batch, self.rate, self.seed, self.device = batch, rate, seed, device
        matrices = [p for p in clip.parameters() if p.ndim >= 2]
        others = [p for p in clip.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=rate,
            betas=(0.9, 0.98),
            fused=True,
        )

    def learn(self, step: int, progress: float) -> dict[str, float]:
        """Take one step on a random batch of different pictures."""
        generator = draw_generator(self.seed, step)
        size = min(self.batch, len(self.pixels))
        rows = torch.randperm(len(self.pixels), generator=generator)[:size]
        draws = torch.rand(size, generator=generator)
        ids = [
            self.captions[row][int(draw**1.5 * len(self.captions[row]))]
            for row, draw in zip(rows.tolist(), draws.tolist(), strict=True)
        ]
        pixels = jitter_pixels(self.pixels[rows].float().div(255), generator).to(self.device)
        images = embed_pixels(self.clip, pixels.sub(_MEAN).div(_STD))
        # The tower is causal, so columns after the longest caption change nothing: save them.
        tokens = torch.stack(ids)
        longest = int((tokens != tokens[:, -1:]).sum(1).max()) + 1
        texts = embed_tokens(self.clip, tokens[:, :longest].to(self.device))
        logits = self.clip.logit_scale.clamp(max=4.6).exp() * images @ texts.T
        target = torch.arange(size, device=self.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        factor = warm_stable_decay(progress, warm=0.04, decay_from=0.4)
        set_rate(self.optimizer, self.rate * factor)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.clip.parameters(), 1.0)
        self.optimizer.step()
        hits = (logits.argmax(1) == target).float().mean()
        return {"loss": loss.item(), "top1": hits.item()}

    def state_dict(self) -> dict[str, Any]:
        """Return weights and optimizer."""
        return {"clip": self.clip.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.clip.load_state_dict(state["clip"])
        self.optimizer.load_state_dict(state["optimizer"])

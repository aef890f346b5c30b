"""The tiny CLIP that the model carries: its own text tower, and eyes that learn to agree with it.

The text tower stands still, so it is the one that conditions the UNet. What this CLIP says of a
drawn picture flatters it, for both were taught by the same tower; the judge was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from leansd.emoji.clip import normalize_floats
from models.emoji.data import Pair, write_captions
from models.emoji.judge import disturb_pixels, shrink_pixels
from models.emoji.stages import draw_generator, set_rate, warm_then_decay
from models.emoji.text import tokenize

SIDE = 64


def build_clip(text: CLIPTextModel) -> CLIPModel:
    """Build a CLIP around a trained text tower, its eyes as wide and as deep."""
    own = text.config.to_dict()
    vision = {
        **{
            name: own[name]
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "projection_dim",
            )
        },
        "image_size": SIDE,
        "patch_size": SIDE // 8,
    }
    config = CLIPConfig(text_config=own, vision_config=vision, projection_dim=own["projection_dim"])
    clip = CLIPModel(config)
    state = text.state_dict()
    if not all(name in clip.text_model.state_dict() for name in state):
        state = {name.removeprefix("text_model."): value for name, value in state.items()}
    clip.text_model.load_state_dict(state)
    clip.text_model.requires_grad_(False)
    return clip


class EyesLearner:
    """Trains vision tower and both projections to find each other's partner in a batch."""

    def __init__(
        self,
        clip: CLIPModel,
        tokenizer: CLIPTokenizer,
        pairs: Sequence[Pair],
        pixels: torch.Tensor,
        *,
        batch: int,
        rate: float,
        steps: int,
        seed: int,
    ) -> None:
        """Take uint8 pixels (pictures, 3, side, side) of the pairs."""
        self.clip = clip.train()
        self.batch, self.rate, self.steps, self.seed = batch, rate, steps, seed
        self.pictures = torch.cat([shrink_pixels(part) for part in pixels.split(256)])
        self.texts = _embed_pooled(clip, tokenizer, pairs)
        trained = [p for p in clip.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True
        )

    def learn(self, step: int) -> dict[str, float]:
        """Take one step on a random batch of different pictures."""
        generator = draw_generator(self.seed, step)
        rows = torch.randperm(len(self.pictures), generator=generator)[: self.batch]
        draws = torch.rand(len(rows), generator=generator)
        pooled = torch.stack(
            [
                self.texts[row][int(draw**1.5 * len(self.texts[row]))]
                for row, draw in zip(rows.tolist(), draws.tolist(), strict=True)
            ]
        )
        seen = normalize_floats(disturb_pixels(self.pictures[rows], generator))
        inside = self.clip.vision_model(pixel_values=seen).pooler_output
        images = F.normalize(self.clip.visual_projection(inside), dim=-1)
        texts = F.normalize(self.clip.text_projection(pooled), dim=-1)
        logits = self.clip.logit_scale.clamp(max=4.6).exp() * images @ texts.T
        target = torch.arange(len(rows))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        set_rate(self.optimizer, self.rate * warm_then_decay(step, self.steps, decay_from=0.4))
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


@torch.no_grad()
def embed_images(clip: CLIPModel, pictures: torch.Tensor, batch: int = 100) -> torch.Tensor:
    """Embed uint8 pictures (count, 3, side, side) of any size as unit vectors (count, width)."""
    device, side = next(clip.parameters()).device, clip.config.vision_config.image_size
    rows = []
    for part in pictures.split(batch):
        small = F.interpolate(part.to(device).float().div(255), size=(side, side), mode="area")
        pixels = normalize_floats(small)
        pooled = clip.vision_model(pixel_values=pixels).pooler_output
        rows.append(F.normalize(clip.visual_projection(pooled), dim=-1))
    return torch.cat(rows).cpu()


@torch.no_grad()
def embed_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Embed captions as unit vectors (captions, width)."""
    device = next(clip.parameters()).device
    pooled = clip.text_model(input_ids=tokenize(tokenizer, texts).to(device)).pooler_output
    return F.normalize(clip.text_projection(pooled), dim=-1).cpu()


def clip_score(
    clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: torch.Tensor, texts: Sequence[str]
) -> list[float]:
    """Return 100 x cosine similarity of each uint8 picture (count, 3, side, side) and its text."""
    likeness = embed_images(clip, pictures) * embed_texts(clip, tokenizer, texts)
    return (100 * likeness.sum(1)).tolist()


@torch.no_grad()
def _embed_pooled(
    clip: CLIPModel, tokenizer: CLIPTokenizer, pairs: Sequence[Pair]
) -> list[torch.Tensor]:
    # The still tower's states of every caption, before the projection: (variants, width) each.
    return [
        clip.text_model(input_ids=tokenize(tokenizer, write_captions(pair))).pooler_output
        for pair in pairs
    ]

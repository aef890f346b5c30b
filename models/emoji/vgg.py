"""A small VGG16 that tells emoji groups apart: the eyes of the `vgg` loss for the embedded model.

It sees pictures as small as the loss shows them, one pixel for each of the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from leansd.incubation.vgg import CONVOLUTIONS, Vgg
from models.emoji.data import Pictures
from models.emoji.stages import Report, draw_generator, set_rate, train_stage, warm_then_decay

WIDTHS = (16, 32, 64, 64, 64)
PIXELS = 64
"""Of the pictures that it is trained on, before they are scaled."""
SIDE = 16
"""Of the embedded model's latents."""
SHIFT = 1
"""The most pixels that a picture is moved by, either way."""


@dataclass(frozen=True)
class Labelled:
    """Pictures [N, 3, side, side] in [-1, 1] and the numbers of their groups [N]."""

    pictures: Tensor
    labels: Tensor


def label_pictures(pictures: Pictures, side: int = SIDE) -> tuple[Labelled, Labelled]:
    """Training and held-out pictures, scaled by averaging, with the numbers of their groups."""
    split = pictures.split
    groups = sorted({pair.concept.group for pair in (*split.train, *split.held_out)})
    numbers = {group: number for number, group in enumerate(groups)}

    def label(pixels: Tensor, pairs: Sequence[Any]) -> Labelled:
        small = F.adaptive_avg_pool2d(pixels.float() / 127.5 - 1, side)
        return Labelled(small, torch.tensor([numbers[pair.concept.group] for pair in pairs]))

    return label(pictures.train, split.train), label(pictures.held_out, split.held_out)


class Classifier(nn.Module):
    """A VGG whose every stage, averaged over its pixels, has a say in the group."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.vgg = Vgg(WIDTHS).requires_grad_(True)
        for each in self.vgg.features:
            if isinstance(each, nn.Conv2d):
                nn.init.kaiming_normal_(each.weight, nonlinearity="relu")
                assert each.bias is not None
                nn.init.zeros_(each.bias)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in WIDTHS)
        self.head = nn.Linear(sum(WIDTHS), groups)

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores [B, groups] of pictures [B, 3, H, W] in [-1, 1]."""
        means = [seen.mean((2, 3)) for seen in self.vgg(pictures)]
        return self.head(
            torch.cat([norm(m) for norm, m in zip(self.norms, means, strict=True)], dim=1)
        )


class GroupLearner:
    """Trains the classifier, on batches that only the seed and the step decide."""

    def __init__(
        self,
        data: Labelled,
        groups: int,
        *,
        batch: int = 64,
        rate: float = 2e-3,
        steps: int,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.steps = steps
        torch.manual_seed(seed)
        self.net = Classifier(groups).to(device).train()
        self.data, self.batch, self.rate, self.seed, self.device = data, batch, rate, seed, device
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=rate, weight_decay=0.05)

    def learn(self, step: int) -> dict[str, float]:
        """Take one step on a random batch, mirrored and moved at random."""
        generator = draw_generator(self.seed, step)
        rows = torch.randint(len(self.data.labels), (self.batch,), generator=generator)
        moves = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
        mirrored = torch.rand(self.batch, generator=generator) < 0.5
        pictures = self.data.pictures[rows].roll(moves, (2, 3))
        pictures = torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)
        scores = self.net(pictures.to(self.device))
        labels = self.data.labels[rows].to(self.device)
        loss = F.cross_entropy(scores, labels, label_smoothing=0.1)
        self.optimizer.zero_grad()
        loss.backward()
        set_rate(
            self.optimizer, self.rate * warm_then_decay(step, self.steps, warm=25, decay_from=0.5)
        )
        self.optimizer.step()
        right = (scores.argmax(1) == labels).float().mean()
        return {"loss": loss.item(), "right": right.item()}

    def state_dict(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


@torch.no_grad()
def measure_accuracy(net: Classifier, data: Labelled) -> float:
    """The share of pictures whose group is told right."""
    device = net.head.weight.device
    found = net.eval()(data.pictures.to(device)).argmax(1).cpu()
    return float((found == data.labels).float().mean())


def train_vgg(
    pictures: Pictures,
    folder: Path,
    steps: int,
    *,
    seed: int = 0,
    device: str = "cpu",
    report: Report | None = None,
) -> dict[str, float]:
    """Train in `folder`, from its checkpoint if there is one, to `folder/vgg.safetensors`.

    Returns:
        the shares of training and held-out pictures that are told right, the number of groups
        and the steps taken.
    """
    train, held_out = label_pictures(pictures)
    groups = int(torch.cat([train.labels, held_out.labels]).max()) + 1
    learner = GroupLearner(train, groups, steps=steps, seed=seed, device=device)
    train_stage(learner, folder, steps, report=report)
    vgg = learner.net.vgg.cpu()
    state = {name: tensor.detach().contiguous() for name, tensor in vgg.state_dict().items()}
    assert len(state) == 2 * sum(CONVOLUTIONS)
    learner.net.to(device)
    result = {
        "train": round(measure_accuracy(learner.net, train), 3),
        "held_out": round(measure_accuracy(learner.net, held_out), 3),
        "groups": groups,
        "steps": steps,
    }
    save_file(state, folder / "vgg.safetensors", {k: str(v) for k, v in result.items()})
    return result

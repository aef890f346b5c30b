"""The judge: a classifier of concepts, of real pictures only and independent of the generator.

It is never used in the generator's training and shares no weight with it. What it says of drawn
pictures is read against what it says of real ones that it has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from leansd.errors import LeansdError
from models.emoji.muon import make_optimizer
from models.emoji.stages import draw_generator, load_state, set_rate, warm_then_decay

SIDE = 64  # what it looks at; larger pictures are shrunk
CHANNELS = (32, 64, 128, 192)


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(8, outer), nn.GroupNorm(8, outer)])
        self.skip = nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = F.silu(self.norms[0](self.first(x)))
        return F.silu(self.skip(x) + self.norms[1](self.second(inside)))


class Judge(nn.Module):
    """A small residual net: pictures (batch, 3, 64, 64) in [0, 1] to (batch, concepts)."""

    def __init__(self, concepts: Sequence[str]) -> None:
        super().__init__()
        self.concepts = tuple(concepts)
        blocks = [nn.Conv2d(3, CHANNELS[0], 3, 2, 1), nn.SiLU()]
        for inner, outer in zip((CHANNELS[0], *CHANNELS), CHANNELS, strict=False):
            blocks.append(_Block(inner, outer, 1 if inner == outer else 2))
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(CHANNELS[-1] * 2, len(self.concepts))

    def look(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the features (batch, 384): means and peaks over the picture."""
        inside = self.body(pictures.sub(0.75).div(0.33))
        return torch.cat([inside.mean((2, 3)), inside.amax((2, 3))], dim=1)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(self.look(pictures))


def shrink_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8 (batch, 3, side, side) to what the judge looks at, (batch, 3, 64, 64) in [0, 1]."""
    return F.interpolate(pixels.float().div(255), size=(SIDE, SIDE), mode="area")


def disturb_pixels(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, zoom, shift, tint, blur, cover and soil pictures (batch, 3, side, side) on white."""
    count, _, side, _ = pictures.shape

    def draw(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    angle, zoom = draw(-0.35, 0.35), draw(0.8, 1.35)
    squeeze = draw(0.85, 1.15)
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    mirror = torch.where(draw(0, 1) < 0.3, -1.0, 1.0)
    rows = [mirror * cosine * squeeze, -sine, draw(-0.15, 0.15)]
    rows += [mirror * sine * squeeze, cosine, draw(-0.15, 0.15)]
    grid = F.affine_grid(
        torch.stack(rows, 1).view(count, 2, 3), list(pictures.shape), align_corners=False
    )
    # The padding is zero, so work on the negative: zero is white there.
    moved = 1 - F.grid_sample(1 - pictures, grid, align_corners=False)
    # Colours: mixed a little, some pictures grey, light and contrast changed.
    mix = torch.eye(3) + draw(-0.12, 0.12, 3, 3)
    grey = torch.full((3, 3), 1 / 3)
    mix = torch.where((draw(0, 1) < 0.1)[:, None, None], grey, mix)
    tinted = 1 - torch.einsum("boc,bchw->bohw", mix, 1 - moved)
    tinted = (tinted - 0.5) * draw(0.75, 1.25, 1, 1, 1) + 0.5 + draw(-0.1, 0.1, 1, 1, 1)
    small = F.interpolate(F.avg_pool2d(tinted, 2), size=(side, side), mode="bilinear")
    tinted = torch.lerp(tinted, small, draw(0, 1, 1, 1, 1) ** 2)
    place = torch.arange(side)
    corner, size = draw(-0.2, 1, 2) * side, draw(0, 0.35, 1) * side
    inside = (place > corner[:, :, None]) & (place < (corner + size)[:, :, None])
    covered = (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
    tinted = torch.where(covered, draw(0, 1, 3, 1, 1), tinted)
    soil = torch.randn(pictures.shape, generator=generator) * draw(0, 0.08, 1, 1, 1)
    return (tinted + soil).clamp(0, 1)


class JudgeLearner:
    """Trains the judge on disturbed real pictures."""

    def __init__(
        self,
        judge: Judge,
        pixels: torch.Tensor,
        names: Sequence[str],
        *,
        batch: int,
        rate: float,
        steps: int,
        seed: int,
    ) -> None:
        """Take uint8 pixels (pictures, 3, side, side) and each picture's concept."""
        self.judge = judge.train()
        self.pictures = torch.cat([shrink_pixels(part) for part in pixels.split(256)])
        self.classes = find_classes(judge, names)
        self.batch, self.rate, self.steps, self.seed = batch, rate, steps, seed
        self.optimizer = make_optimizer(judge, rate, ("body.0", "head"))

    def learn(self, step: int) -> dict[str, float]:
        """Take one step on a random batch."""
        generator = draw_generator(self.seed, step)
        rows = torch.randint(len(self.pictures), (self.batch,), generator=generator)
        named = self.judge(disturb_pixels(self.pictures[rows], generator))
        loss = F.cross_entropy(named, self.classes[rows], label_smoothing=0.1)
        set_rate(self.optimizer, self.rate * warm_then_decay(step, self.steps, warm=50))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        hits = (named.argmax(1) == self.classes[rows]).float().mean()
        return {"loss": loss.item(), "top1": hits.item()}

    def state_dict(self) -> dict[str, Any]:
        """Return weights, optimizer and the concepts in the order of the classes."""
        return {
            "judge": self.judge.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "concepts": list(self.judge.concepts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.judge.load_state_dict(state["judge"])
        self.optimizer.load_state_dict(state["optimizer"])


def load_judge(path: Path) -> Judge:
    """Load a trained judge from its checkpoint."""
    if not path.exists():
        raise LeansdError(f"no judge in {path}: `python -m models.emoji judge` trains one")
    state = load_state(path)["learner"]
    judge = Judge(state["concepts"])
    judge.load_state_dict(state["judge"])
    return judge.eval()


def find_classes(judge: Judge, names: Sequence[str]) -> torch.Tensor:
    """Return the class of each name, (names,)."""
    places = {name: place for place, name in enumerate(judge.concepts)}
    unknown = sorted({name for name in names if name not in places})
    if unknown:
        raise LeansdError(f"the judge knows no {', '.join(unknown[:3])}: train it again")
    return torch.tensor([places[name] for name in names])


@torch.no_grad()
def rank_names(judge: Judge, pixels: torch.Tensor, names: Sequence[str]) -> list[int]:
    """Return the rank, 0 is best, that the judge gives to each uint8 picture's own name."""
    classes = find_classes(judge, names)
    named = torch.cat([judge(shrink_pixels(part)) for part in pixels.split(256)])
    own = named.gather(1, classes[:, None])
    return (named > own).sum(1).tolist()


@torch.no_grad()
def look_at(judge: Judge, pixels: torch.Tensor) -> torch.Tensor:
    """Return the judge's features of uint8 pictures (count, 3, side, side), (count, 384)."""
    return torch.cat([judge.look(shrink_pixels(part)) for part in pixels.split(256)])

"""The emoji pictures as a folder for trainers, and the small VGG that tells their groups apart."""

import json
from pathlib import Path

import pytest
import torch
from models.emoji.data import STYLES, Concept, Pair, Pictures, Split
from models.emoji.folder import write_pictures
from PIL import Image

from leansd.errors import LeansdError
from leansd.incubation.data.samples import Sample, list_folder

GROUPS = ("food-fruit", "sky-weather")


def make_pictures(size: int = 32) -> Pictures:
    """Fruit is red and weather blue."""
    concepts = [Concept(f"thing-{n}", GROUPS[n % 2]) for n in range(12)]
    pairs = [Pair(concept, style) for concept in concepts for style in STYLES]
    split = Split(tuple(pairs[:-6]), tuple(pairs[-6:]))

    def paint(some: tuple[Pair, ...]) -> torch.Tensor:
        pixels = torch.full((len(some), 3, size, size), 255, dtype=torch.uint8)
        for picture, pair in zip(pixels, some, strict=True):
            kept = 0 if pair.concept.group == GROUPS[0] else 2
            picture[[channel for channel in range(3) if channel != kept], 4:-4, 4:-4] = 0
        return pixels

    return Pictures(split, paint(split.train), paint(split.held_out), paint(()))


def test_the_folder_is_what_incubation_reads(tmp_path: Path) -> None:
    pictures = make_pictures()
    write_pictures(pictures, tmp_path / "emoji")
    write_pictures(pictures, tmp_path / "emoji")  # once more over the same
    (shard,) = list_folder(tmp_path / "emoji" / "train")
    samples = list(shard.read())
    assert len(samples) == len(pictures.split.train)
    first = samples[0]
    assert isinstance(first, Sample)
    assert first.captions[0] == "a thing 0, noto style"
    with Image.open(tmp_path / "emoji" / "train" / first.key) as drawn:
        assert drawn.getpixel((16, 16)) == (255, 0, 0)
    rows = (tmp_path / "emoji" / "held-out" / "metadata.jsonl").read_text().splitlines()
    assert {json.loads(row)["group"] for row in rows} == set(GROUPS)


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(LeansdError, match="holds something else"):
        write_pictures(make_pictures(), tmp_path)


def test_the_vgg_learns_groups_and_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from models.emoji.vgg import train_vgg

    from leansd.incubation.vgg import load_vgg

    pictures = make_pictures()
    result = train_vgg(pictures, tmp_path / "whole", 60)
    assert result["groups"] == 2
    assert result["held_out"] == 1.0
    vgg = load_vgg(tmp_path / "whole" / "vgg.safetensors", stages=3)
    red, blue = pictures.held_out[0], pictures.held_out[-1]
    seen = vgg(torch.stack([red, blue]).float() / 127.5 - 1)
    assert [each.shape[1] for each in seen] == [16, 32, 64]
    assert not torch.allclose(seen[2][0], seen[2][1])


def test_the_embedded_models_own_vgg_is_there() -> None:
    pytest.importorskip("torchvision")
    from leansd.incubation.vgg import load_vgg

    assert [each.shape[-1] for each in load_vgg("emoji")(torch.zeros(1, 3, 16, 16))] == [
        *(16, 8, 4, 2, 1)
    ]

"""The catalogue, the split, the captions and the pixels, on packages written by the test."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from leansd.emoji.data import (
    PACKAGES,
    STYLES,
    Emoji,
    Pair,
    add_article,
    find_modules,
    find_pictures,
    list_pairs,
    load_pixels,
    read_catalogue,
    split_pairs,
    write_captions,
)
from leansd.errors import LeansdError

APPLE = Emoji("1f34e", "red apple", ("apple", "fruit", "health"), "food-drink", "food-fruit")


def make_pairs(count: int) -> list[Pair]:
    emojis = [Emoji(f"1f{number:03x}", f"thing {number}") for number in range(count)]
    return [Pair(emoji, style) for emoji in emojis for style in STYLES]


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A node_modules folder with three emojis, one of them a flag."""
    folder = tmp_path / "node_modules"
    for name in PACKAGES:
        (folder / name).mkdir(parents=True)
        (folder / name / "package.json").write_text("{}")
    base = folder / "emojibase-data"
    (base / "en").mkdir()
    (base / "meta").mkdir()
    entries = [
        {"hexcode": "1F34E", "label": "red apple", "tags": ["Fruit"], "group": 4, "subgroup": 42},
        {"hexcode": "2600-FE0F", "label": "sun", "tags": [], "group": 5, "subgroup": 59},
        {"hexcode": "1F1E6", "label": "flag", "tags": [], "group": 9, "subgroup": 98},
        {"hexcode": "1F1E7", "label": "regional indicator"},
    ]
    (base / "en" / "data.json").write_text(json.dumps(entries))
    names = {
        "groups": {"4": "food-drink", "5": "travel-places", "9": "flags"},
        "subgroups": {"42": "food-fruit", "59": "sky-weather", "98": "country-flag"},
    }
    (base / "meta" / "groups.json").write_text(json.dumps(names))
    fluent = folder / "@lobehub" / "fluent-emoji-3d" / "assets"
    noto = folder / "emoji-datasource-google" / "img" / "google" / "64"
    for path in (fluent / "1f34e.webp", fluent / "2600-fe0f.webp", noto / "1f34e.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(path, lossless=True)
    return folder


def test_split_never_takes_every_style_of_an_emoji() -> None:
    split = split_pairs(make_pairs(1000))
    trained = {pair.emoji for pair in split.train}
    assert trained == {pair.emoji for pair in make_pairs(1000)}
    codes = [pair.emoji.code for pair in split.held_out]
    assert len(codes) == len(set(codes))
    assert 0.08 < len(codes) / 3000 < 0.12
    assert not set(split.train) & set(split.held_out)
    assert {pair.style for pair in split.held_out} == set(STYLES)


def test_split_is_deterministic_and_local() -> None:
    pairs = make_pairs(200)
    split = split_pairs(pairs)
    assert split == split_pairs(pairs[::-1])
    # Another catalogue changes nothing for the emojis that stay.
    kept = {pair for pair in split.held_out if pair.emoji.code < "1f064"}
    assert set(split_pairs(make_pairs(100)).held_out) == kept


def test_emoji_of_one_style_is_never_held_out() -> None:
    pairs = [pair for pair in make_pairs(500) if pair.style == "noto"]
    assert split_pairs(pairs).held_out == ()


def test_captions_name_thing_and_style() -> None:
    captions = write_captions(Pair(APPLE, "noto"))
    assert captions[0] == "a red apple, noto style"
    assert "a red apple, fruit, noto style" in captions
    assert "a red apple, apple, noto style" not in captions
    assert all("red apple" in caption and caption.endswith("noto style") for caption in captions)
    assert len(captions) == len(set(captions))


@pytest.mark.parametrize(
    ("name", "noun"),
    [
        ("red apple", "a red apple"),
        ("eagle", "an eagle"),
        ("grapes", "grapes"),
        ("glass of milk", "a glass of milk"),
    ],
)
def test_article(name: str, noun: str) -> None:
    assert add_article(name) == noun


def test_packages_are_read(modules: Path) -> None:
    catalogue = read_catalogue(modules)
    assert [emoji.name for emoji in catalogue] == ["red apple", "sun"]
    assert catalogue[0].keywords == ("fruit",)
    pictures = find_pictures(modules)
    pairs = list_pairs(catalogue, pictures)
    assert [(pair.emoji.code, pair.style) for pair in pairs] == [
        ("1f34e", "noto"),
        ("1f34e", "fluent"),
        ("2600", "fluent"),
    ]
    pixels = load_pixels([pictures[pair.emoji.code, pair.style] for pair in pairs], 16)
    assert pixels.shape == (3, 3, 16, 16)
    assert torch.equal(pixels, torch.full_like(pixels, 255)), "transparent must be white"


def test_data_folder_is_checked(modules: Path, tmp_path: Path) -> None:
    assert find_modules(modules, tmp_path) == modules
    assert find_modules(modules.parent, tmp_path) == modules
    (modules / "emojibase-data" / "package.json").unlink()
    with pytest.raises(LeansdError, match="no package emojibase-data"):
        find_modules(modules, tmp_path)


def test_missing_npm_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LeansdError, match="npm") as caught:
        find_modules(None, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_failing_npm_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        "#!/bin/sh\n"
        "echo 'npm warn some advice' >&2\n"
        "echo 'npm error code ETARGET' >&2\n"
        "echo 'npm error notarget No matching version found.' >&2\n"
        "exit 1\n"
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent))
    with pytest.raises(LeansdError, match="No matching version found") as caught:
        find_modules(None, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_broken_catalogue_is_one_clear_line(modules: Path) -> None:
    (modules / "emojibase-data" / "en" / "data.json").write_text("{")
    with pytest.raises(LeansdError, match=r"cannot read .*data\.json"):
        read_catalogue(modules)

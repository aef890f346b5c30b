"""Emoji pictures with captions, read from npm packages: catalogue, split, pixels, captions."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from leansd.errors import LeansdError

if TYPE_CHECKING:
    import torch

PACKAGES = {
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "emojibase-data": "17.0.0",
}
STYLES = ("twemoji", "noto", "fluent")
HELD_OUT_SHARE = 0.1

# What a small network can learn to draw at 64 px: no letters, no keycaps, no flags, no people.
GROUPS = frozenset({"smileys-emotion", "animals-nature", "food-drink"})
SUBGROUPS = frozenset(
    {
        "place-geographic",
        "place-building",
        "place-other",
        "transport-ground",
        "transport-water",
        "transport-air",
        "sky-weather",
        "event",
        "sport",
        "game",
        "arts-crafts",
        "clothing",
        "musical-instrument",
        "music",
        "phone",
        "computer",
        "light-video",
        "money",
        "tool",
        "household",
    }
)


@dataclass(frozen=True, order=True)
class Emoji:
    """One emoji, whatever its style."""

    code: str
    name: str
    keywords: tuple[str, ...] = ()
    group: str = ""
    subgroup: str = ""


@dataclass(frozen=True, order=True)
class Pair:
    """One emoji in one style: one picture."""

    emoji: Emoji
    style: str


@dataclass(frozen=True)
class Split:
    """Training pairs and held-out pairs, both in a fixed order."""

    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]


def install_packages(folder: Path) -> Path:
    """Let npm put the packages under `folder` and return its `node_modules`."""
    modules = folder / "node_modules"
    if all((modules / name / "package.json").is_file() for name in PACKAGES):
        return modules
    npm = shutil.which("npm")
    if npm is None:
        raise LeansdError(
            "the emoji pictures come as npm packages and there is no `npm` on PATH:"
            " install Node.js, or give a node_modules folder that has them with --data"
        )
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
    command = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--no-save"]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [row for row in done.stderr.splitlines() if row.lower().startswith("npm err")]
        lines = [row for row in said if " code " not in row]  # that one only repeats the next
        reason = lines[0].split(maxsplit=2)[-1] if lines else f"exit code {done.returncode}"
        raise LeansdError(f"npm could not install the emoji packages into {folder}: {reason}")
    return modules


def find_modules(data: Path | None, cache: Path) -> Path:
    """Return the `node_modules` to read: the one in `data`, or one installed into `cache`."""
    if data is None:
        return install_packages(cache)
    modules = data if data.name == "node_modules" else data / "node_modules"
    missing = [name for name in PACKAGES if not (modules / name / "package.json").is_file()]
    if missing:
        raise LeansdError(f"--data {data}: no package {', '.join(missing)} in {modules}")
    return modules


def read_catalogue(modules: Path) -> list[Emoji]:
    """Read the drawable emojis, sorted by code."""
    folder = modules / "emojibase-data"
    entries = _read_json(folder / "en" / "data.json")
    names = _read_json(folder / "meta" / "groups.json")
    catalogue = []
    for entry in entries:
        group = names["groups"].get(str(entry.get("group")), "")
        subgroup = names["subgroups"].get(str(entry.get("subgroup")), "")
        if group not in GROUPS and subgroup not in SUBGROUPS:
            continue
        catalogue.append(
            Emoji(
                code=_strip_selectors(entry["hexcode"]),
                name=clean_text(entry["label"]),
                keywords=tuple(clean_text(tag) for tag in entry.get("tags", ())),
                group=group,
                subgroup=subgroup,
            )
        )
    return sorted(catalogue)


def find_pictures(modules: Path) -> dict[tuple[str, str], Path]:
    """Map (code, style) to the picture's file."""
    fluent = modules / "@lobehub/fluent-emoji-3d" / "assets"
    found = {
        (_strip_selectors(path.stem), "fluent"): path for path in sorted(fluent.glob("*.webp"))
    }
    for style, vendor in (("noto", "google"), ("twemoji", "twitter")):
        folder = modules / f"emoji-datasource-{vendor}" / "img" / vendor / "64"
        for path in sorted(folder.glob("*.png")):
            found[_strip_selectors(path.stem), style] = path
    return found


def list_pairs(emojis: Iterable[Emoji], pictures: Iterable[tuple[str, str]]) -> list[Pair]:
    """Pair every emoji with the styles that have a picture of it."""
    known = set(pictures)
    return [Pair(e, style) for e in emojis for style in STYLES if (e.code, style) in known]


def split_pairs(pairs: Sequence[Pair], share: float = HELD_OUT_SHARE) -> Split:
    """Hold out about `share` of the pairs, by a hash of the code alone.

    An emoji loses at most one style, and only if it has others: it is never held out entirely.
    """
    styles: dict[Emoji, list[str]] = {}
    for pair in pairs:
        styles.setdefault(pair.emoji, []).append(pair.style)
    train, held_out = [], []
    for pair in sorted(pairs):
        own = sorted(styles[pair.emoji])
        digest = hashlib.sha256(pair.emoji.code.encode()).digest()
        drawn = int.from_bytes(digest[:4], "big") / 2**32 < share * len(own)
        chosen = own[digest[4] % len(own)] if drawn and len(own) > 1 else None
        (held_out if pair.style == chosen else train).append(pair)
    return Split(tuple(train), tuple(held_out))


def write_captions(pair: Pair) -> list[str]:
    """Return the caption variants of a picture, the plain one first."""
    noun = add_article(pair.emoji.name)
    style = f"{pair.style} style"
    captions = [f"{noun}, {style}", f"{pair.emoji.name}, {style}", f"an emoji of {noun}, {style}"]
    words = set(pair.emoji.name.split())
    extra = [word for word in pair.emoji.keywords if word and not words & set(word.split())]
    captions += [f"{noun}, {word}, {style}" for word in extra[:5]]
    return captions


def add_article(name: str) -> str:
    """Put `a` or `an` before a name that takes one."""
    first = name.split()[0]
    if (first.endswith("s") and not first.endswith("ss")) or first in {"the", "no"}:
        return name
    return f"{'an' if first[0] in 'aeiou' else 'a'} {name}"


def clean_text(text: str) -> str:
    """Lower-case and spell what a CLIP tokenizer splits badly."""
    text = text.lower().replace("’", "'").replace("“", "").replace("”", "").replace(":", "")
    return " ".join(text.split())


def load_pixels(paths: Iterable[Path], size: int) -> torch.Tensor:
    """Read pictures on white: uint8, (pictures, 3, size, size)."""
    import numpy as np
    import torch
    from PIL import Image

    rows = []
    for path in paths:
        with Image.open(path) as image:
            rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        flat = Image.alpha_composite(white, rgba).convert("RGB")
        if flat.size != (size, size):
            flat = flat.resize((size, size), Image.Resampling.LANCZOS)
        rows.append(np.asarray(flat).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(rows))


def _strip_selectors(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LeansdError(f"cannot read {path}: {error}") from error

"""Emoji pictures with captions, drawn from the vectors of npm packages: names, split, pixels."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from leansd.emoji.prompts import add_article
from leansd.errors import LeansdError
from models.emoji.stages import load_state, save_state

# A style, the package that has it, and its version.
STYLES = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
}
KEYWORDS = ("emojibase-data", "17.0.0")
# A style that neither the generator nor the judge learns from: the judge is checked on it.
UNSEEN = ("emojione", "@iconify-json/emojione", "1.2.3")
PACKAGES = dict([*STYLES.values(), KEYWORDS])
RENDERER = "resvg-py"
HELD_OUT_SHARE = 0.1
CONCEPTS = Path(__file__).with_name("concepts.txt")


@dataclass(frozen=True, order=True)
class Concept:
    """One thing to draw, whatever its style; `name` is the icons' name, `red-apple`."""

    name: str
    group: str = ""
    keywords: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The name as it is written in a caption."""
        return self.name.replace("-", " ").replace("t rex", "t-rex").replace("t shirt", "t-shirt")


@dataclass(frozen=True, order=True)
class Pair:
    """One concept in one style: one picture."""

    concept: Concept
    style: str


@dataclass(frozen=True)
class Split:
    """Training pairs and held-out pairs, both in a fixed order."""

    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]


@dataclass(frozen=True)
class Pictures:
    """The split with its pixels, all uint8 (pictures, 3, size, size).

    `others` are pictures of names outside the vocabulary, for the autoencoder alone.
    """

    split: Split
    train: torch.Tensor
    held_out: torch.Tensor
    others: torch.Tensor


def install_packages(folder: Path, packages: dict[str, str] = PACKAGES) -> Path:
    """Let npm put the packages under `folder` and return its `node_modules`."""
    modules = folder / "node_modules"
    if all(_read_version(modules / name) == version for name, version in packages.items()):
        return modules
    npm = shutil.which("npm")
    if npm is None:
        raise LeansdError(
            "the emoji pictures come as npm packages and there is no `npm` on PATH:"
            " install Node.js, or give a node_modules folder that has them with --data"
        )
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}@{version}" for name, version in packages.items()]
    command = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--no-save"]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [row for row in done.stderr.splitlines() if row.lower().startswith("npm err")]
        lines = [row for row in said if " code " not in row]  # that one only repeats the next
        reason = lines[0].split(maxsplit=2)[-1] if lines else f"exit code {done.returncode}"
        raise LeansdError(f"npm could not install the emoji packages into {folder}: {reason}")
    return modules


def find_modules(data: Path | None, cache: Path, packages: dict[str, str] = PACKAGES) -> Path:
    """Return the `node_modules` to read: the one in `data`, or one installed into `cache`."""
    if data is None:
        return install_packages(cache, packages)
    modules = data if data.name == "node_modules" else data / "node_modules"
    missing = [name for name in packages if _read_version(modules / name) is None]
    if missing:
        raise LeansdError(f"--data {data}: no package {', '.join(missing)} in {modules}")
    return modules


def read_concepts(path: Path = CONCEPTS) -> list[tuple[str, str]]:
    """Read (name, group) of every concept, sorted by name."""
    group, found = "", []
    for row in path.read_text(encoding="utf-8").splitlines():
        row = row.split("#")[0].strip()
        if row.startswith("["):
            group = row.strip("[]")
        elif row:
            found.append((row, group))
    return sorted(found)


def read_icons(modules: Path, style: str) -> dict[str, str]:
    """Map each icon's name, aliases too, to its SVG."""
    package = STYLES[style][0] if style in STYLES else UNSEEN[1]
    icons = _read_json(modules / package / "icons.json")
    width, height = icons.get("width", 16), icons.get("height", 16)
    found: dict[str, str] = {}
    for name, icon in icons["icons"].items():
        wide, high = icon.get("width", width), icon.get("height", height)
        found[name] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            f' viewBox="0 0 {wide} {high}">{icon["body"]}</svg>'
        )
    for name, alias in icons.get("aliases", {}).items():
        # One that is also turned would be another picture under the parent's drawing.
        if alias["parent"] in found and set(alias) == {"parent"}:
            found.setdefault(name, found[alias["parent"]])
    return found


def read_keywords(modules: Path) -> dict[str, tuple[str, ...]]:
    """Map an icon's name to what else people call it."""
    chars = _read_json(modules / STYLES["noto"][0] / "chars.json")
    entries = _read_json(modules / KEYWORDS[0] / "en" / "data.json")
    tags = {_strip_selectors(entry["hexcode"]): entry.get("tags", ()) for entry in entries}
    found: dict[str, tuple[str, ...]] = {}
    for code, name in chars.items():
        words = set(name.split("-"))
        own = [tag.lower() for tag in tags.get(_strip_selectors(code), ())]
        kept = [tag for tag in own if tag.isascii() and tag.isalpha() and tag not in words]
        found.setdefault(name, tuple(kept[:4]))
    return found


def read_groups(modules: Path) -> dict[str, str]:
    """Map an icon's name to Unicode's subgroup of it, `food-fruit`."""
    chars = _read_json(modules / STYLES["noto"][0] / "chars.json")
    folder = modules / KEYWORDS[0]
    names = _read_json(folder / "meta" / "groups.json")["subgroups"]
    entries = _read_json(folder / "en" / "data.json")
    own = {_strip_selectors(e["hexcode"]): names.get(str(e.get("subgroup")), "") for e in entries}
    return {name: own.get(_strip_selectors(code), "") for code, name in chars.items()}


def split_pairs(concepts: Iterable[Concept], share: float = HELD_OUT_SHARE) -> Split:
    """Hold out about `share` of the pairs, by a hash of the name alone.

    A concept loses at most one style: it is never held out entirely.
    """
    styles = sorted(STYLES)
    train, held_out = [], []
    for concept in sorted(concepts):
        digest = hashlib.sha256(concept.name.encode()).digest()
        drawn = int.from_bytes(digest[:4], "big") / 2**32 < share * len(styles)
        chosen = styles[digest[4] % len(styles)] if drawn else None
        for style in styles:
            (held_out if style == chosen else train).append(Pair(concept, style))
    return Split(tuple(train), tuple(held_out))


def write_captions(pair: Pair) -> list[str]:
    """Return the caption variants of a picture, the plain one first."""
    words = pair.concept.words
    noun, style = add_article(words), f"{pair.style} style"
    captions = [f"{noun}, {style}", f"{words}, {style}", f"an emoji of {noun}, {style}"]
    return captions + [f"{noun}, {word}, {style}" for word in pair.concept.keywords]


def render_icons(drawings: Sequence[str], size: int) -> torch.Tensor:
    """Draw SVGs on white: uint8, (pictures, 3, size, size)."""
    import io

    import numpy as np
    from PIL import Image

    try:
        import resvg_py
    except ImportError:
        raise LeansdError(f"the pictures are SVG: pip install {RENDERER}") from None
    rows = []
    for drawing in drawings:
        # Twice the size and then halved: edges as a browser shows them.
        png = resvg_py.svg_to_bytes(svg_string=drawing, width=2 * size, height=2 * size)
        with Image.open(io.BytesIO(bytes(png))) as image:
            rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        flat = Image.alpha_composite(white, rgba).convert("RGB")
        if flat.size != (size, size):
            flat = flat.resize((size, size), Image.Resampling.BOX)
        rows.append(np.asarray(flat).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(rows))


def read_pictures(
    data: Path | None, cache: Path, size: int, say: Callable[[str], None] | None = None
) -> Pictures:
    """Read the split and draw every picture, once: the pixels are kept in `cache`."""
    modules = find_modules(data, cache / "packages")
    icons = {style: read_icons(modules, style) for style in STYLES}
    keywords, groups = read_keywords(modules), read_groups(modules)
    names = read_concepts()
    for style, own in icons.items():
        missing = [name for name, _ in names if name not in own]
        if missing:
            raise LeansdError(f"{STYLES[style][0]} has no icon {', '.join(missing[:5])}")
    concepts = [
        Concept(name, groups.get(name) or group, keywords.get(name, ())) for name, group in names
    ]
    split = split_pairs(concepts)
    known = {name for name, _ in names}
    common = set.intersection(*(set(own) for own in icons.values())) - known
    others = [
        icons[style][name] for name in sorted(common) for style in STYLES if "skin-tone" not in name
    ]
    train = [icons[pair.style][pair.concept.name] for pair in split.train]
    held_out = [icons[pair.style][pair.concept.name] for pair in split.held_out]
    digest = hashlib.sha256("\n".join([str(size), *train, *held_out, *others]).encode())
    path = cache / f"pixels-{size}.pt"
    if path.exists():
        state = load_state(path)
        if state["digest"] == digest.hexdigest():
            return Pictures(split, state["train"], state["held_out"], state["others"])
    if say:
        say(f"drawing {len(train) + len(held_out) + len(others)} pictures of {size} px")
    kept = {
        "digest": digest.hexdigest(),
        "train": render_icons(train, size),
        "held_out": render_icons(held_out, size),
        "others": render_icons(others, size),
    }
    save_state(kept, path)
    return Pictures(split, kept["train"], kept["held_out"], kept["others"])


def read_unseen_style(data: Path | None, cache: Path, size: int) -> tuple[torch.Tensor, list[str]]:
    """Draw the concepts in a style that is not trained on: uint8 pixels, and each one's name."""
    packages = {**PACKAGES, UNSEEN[1]: UNSEEN[2]}
    icons = read_icons(find_modules(data, cache / "packages", packages), UNSEEN[0])
    names = [name for name, _ in read_concepts() if name in icons]
    if not names:
        raise LeansdError(f"{UNSEEN[1]} {UNSEEN[2]} has none of the concepts' names")
    return render_icons([icons[name] for name in names], size), names


def _strip_selectors(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _read_version(package: Path) -> str | None:
    path = package / "package.json"
    return _read_json(path).get("version") if path.is_file() else None


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LeansdError(f"cannot read {os.fspath(path)}: {error}") from error

"""The licence of a model, as its own card says: what is made of its weights inherits it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download
from yaml import YAMLError

from leansd.errors import LeansdError
from leansd.loading import EMBEDDED, locate

FILE = "README.md"


@dataclass(frozen=True)
class Licence:
    """A licence in the words of the Hub's metadata."""

    license: str = "unknown"
    """The Hub's identifier: `apache-2.0`, `creativeml-openrail-m`, `other`."""
    license_name: str | None = None
    """What `other` is called."""
    license_link: str | None = None

    def __str__(self) -> str:
        return self.license_name or self.license


UNKNOWN = Licence()
SEVERAL = Licence("other", "several-see-where-it-comes-from")


def find_licence(model: str | Path) -> Licence:
    """The licence that a model's card names; `UNKNOWN` where there is no card or it names none.

    Args:
        model: `emoji`, the folder of a model or of a UNet, or a hub id, whose card is read from the
            cache where the hub is out of reach.
    """
    file = _find_card(model)
    if file is None:
        return UNKNOWN
    try:
        data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError):
        return UNKNOWN
    named = data.get("license")
    if isinstance(named, list):
        named = named[0] if len(named) == 1 else "other"
    if not named:
        return UNKNOWN
    return Licence(str(named), data.get("license_name"), data.get("license_link"))


def join_licences(licences: Iterable[Licence]) -> Licence:
    """The licence of what is made of several nets: theirs if it is one, else all of them."""
    different = set(licences)
    return different.pop() if len(different) == 1 else SEVERAL if different else UNKNOWN


def _find_card(model: str | Path) -> Path | None:
    path = Path(model).expanduser()
    if str(model) != EMBEDDED and path.is_dir():
        # That of a whole model stands above its UNet's folder.
        homes = (path, path.parent) if path.name == "unet" else (path,)
        return next((home / FILE for home in homes if (home / FILE).is_file()), None)
    try:
        where = locate(model)
        if isinstance(where, Path):
            return where / FILE if (where / FILE).is_file() else None
        return Path(hf_hub_download(where, FILE))
    except (LeansdError, OSError, ValueError):
        return None

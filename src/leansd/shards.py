"""Shards: tar files of pictures with their facts beside them, as webdataset reads them.

Their bytes follow from the pictures and facts alone: who drew them when leaves no trace.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from leansd.errors import LeansdError

PICTURE, FACTS = ".png", ".json"


@dataclass(frozen=True)
class DrawnPicture:
    """A picture with what is to be said of it."""

    id: str
    picture: Image.Image
    facts: Mapping[str, Any]
    name: str = ""
    """The name of its files, without an ending and so without a dot; its id by default."""


def pack_shard(drawn: Iterable[DrawnPicture]) -> bytes:
    """A tar of `NAME.png` and `NAME.json`, in the order of the pictures."""
    buffer = io.BytesIO()
    # PAX differs from USTAR only where a name is too long for that.
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for each in drawn:
            png = io.BytesIO()
            each.picture.save(png, format="PNG")
            facts = json.dumps(dict(each.facts), sort_keys=True, ensure_ascii=False)
            for ending, content in ((PICTURE, png.getvalue()), (FACTS, facts.encode())):
                member = tarfile.TarInfo((each.name or each.id) + ending)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def read_shard(path: Path) -> Iterator[DrawnPicture]:
    """The pictures of a shard with their facts, in their order.

    Raises:
        LeansdError: it is damaged.
    """
    try:
        with tarfile.open(path) as tar:
            waiting: tuple[str, Image.Image] | None = None
            for member in tar:
                file = tar.extractfile(member)
                content = file.read() if file is not None else b""
                name = Path(member.name)
                if name.suffix == PICTURE:
                    waiting = name.stem, Image.open(io.BytesIO(content)).convert("RGB")
                elif name.suffix == FACTS and waiting is not None and waiting[0] == name.stem:
                    facts = json.loads(content)
                    yield DrawnPicture(facts.get("id", name.stem), waiting[1], facts, name.stem)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise LeansdError(f"{path} is damaged: {error}; remove it, and run again") from error


def name_shard(number: int) -> str:
    return f"shard-{number:06d}.tar"


def list_shards(folder: Path) -> list[Path]:
    """The whole shards in a folder."""
    return sorted(folder.glob("shard-*.tar"))

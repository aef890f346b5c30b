"""A job: all that decides which pictures come out, and the folder that they go to.

Work is cut into shards of neighbouring rows. A shard is whole or not there, so what is left to do
can be seen in the folder, whoever stopped when.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from leansd.bulk.rows import Row
from leansd.bulk.shards import name_shard
from leansd.errors import LeansdError
from leansd.files import write_file
from leansd.version import __version__

FILE = "job.json"


@dataclass(frozen=True)
class Job:
    """Plain values only: it travels to other machines."""

    model: str
    steps: int
    plan: Mapping[str, Any] | None = None
    """The document of a plan; None runs in full."""
    nets: Mapping[str, str] = field(default_factory=dict)
    """Folders of the UNets that the plan switches to."""
    guidance: float | None = None
    sampler: str | None = None
    size: tuple[int, int] | None = None
    seed: int = 0
    """Row `n` has seed `seed + n`, unless it has one of its own."""
    strength: float = 0.8
    """Of rows with a picture to start from that do not say."""
    batch: int = 8
    shard: int = 256
    """Rows of a shard."""
    threads: int = 0
    """Of torch on a CPU, whose sums depend on them; 0 for as many as there are."""
    device: str | None = None
    home: str = "."
    """The folder that paths of pictures start from."""
    source: str = ""
    """Digest of the file of rows."""

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of all that decides what comes out, but for the machine."""
        facts = {**asdict(self), "leansd": __version__}
        for name in ("home", "device"):
            del facts[name]
        return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Part:
    """The rows of one shard."""

    number: int
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        return name_shard(self.number)


def cut_parts(rows: Sequence[Row], size: int) -> list[Part]:
    """Neighbouring rows, so many a shard."""
    return [
        Part(number, tuple(rows[begin : begin + size]))
        for number, begin in enumerate(range(0, len(rows), size))
    ]


def list_missing(parts: Sequence[Part], folder: Path) -> list[Part]:
    """What is still to be drawn."""
    return [part for part in parts if not (folder / part.name).is_file()]


def claim_folder(folder: Path, job: Job) -> None:
    """Make a job's folder, or see that it is this job's.

    Raises:
        LeansdError: it holds another job, or something else.
    """
    file = folder / FILE
    if file.is_file():
        try:
            other = json.loads(file.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError) as error:
            raise LeansdError(f"{file} cannot be read: {error}; choose another folder") from error
        if other != job.fingerprint:
            raise LeansdError(
                f"{folder} holds the pictures of another job: see {file}, or choose another folder"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise LeansdError(f"{folder} is not empty and holds no job: choose another folder")
    facts = {"fingerprint": job.fingerprint, "leansd": __version__, **asdict(job)}
    write_file(file, json.dumps(facts, indent=1) + "\n")

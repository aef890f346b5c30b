"""Files of pictures as bytes, read where they are; no torch, so that readers start at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leansd.errors import LeansdError
from leansd.scoring.pictures import Entry, Place


@dataclass(frozen=True)
class Sample:
    """The files of a picture, as they are."""

    id: str
    picture: bytes
    facts: bytes | None = None
    other: bytes | None = None


def read_samples(entries: Sequence[Entry]) -> list[Sample]:
    """The files of some pictures."""
    return [
        Sample(
            entry.id,
            entry.picture.read(),
            entry.facts.read() if entry.facts is not None else None,
            entry.other.read() if entry.other is not None else None,
        )
        for entry in entries
    ]


def read_facts(entry: Entry) -> dict[str, Any]:
    """What a JSON sidecar says; nothing where there is none."""
    try:
        found = json.loads(entry.facts.read()) if entry.facts is not None else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_part(row: Mapping[str, Any]) -> dict[str, Any]:
    """The files of a part as a row of lists, for Ray, or what is wrong with them."""
    samples: list[Sample] = []
    mistake = ""
    try:
        samples = read_samples([unpack_entry(entry) for entry in json.loads(row["entries"])])
    except LeansdError as error:
        mistake = str(error)
    return {
        "mistake": mistake,
        "number": row["number"],
        "extractors": row["extractors"],
        "id": [sample.id for sample in samples],
        "picture": [sample.picture for sample in samples],
        "facts": [sample.facts for sample in samples],
        "other": [sample.other for sample in samples],
    }


def unpack_entry(entry: Mapping[str, Any]) -> Entry:
    """An entry that travelled as JSON."""
    picture, facts, other = (
        Place(**place) if place is not None else None
        for place in (entry["picture"], entry["facts"], entry["other"])
    )
    assert picture is not None
    return Entry(entry["id"], picture, facts, other)

"""What all tables read records with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from leansd.evaluation.records import Record

RESULTS = Path(__file__).parent.parent / "results"


def name_devices(records: Sequence[Record]) -> str:
    """The devices that records were taken on, as where contests were held on several days."""
    return " or ".join(dict.fromkeys(each.device for each in records))


def tabulate_ratio(record: Record) -> str:
    return f"{record.value:.2f}x ({get(record, 'low'):.2f} to {get(record, 'high'):.2f})"


def get(record: Record, name: str) -> object:
    """A case's own field of a record."""
    return (record.model_extra or {})[name]


def get_number(record: Record, name: str) -> float:
    """A case's own field that is a number."""
    return float(str(get(record, name)))

"""What a stage has logged: one flat JSON line for every so many steps."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE = "losses.jsonl"


@dataclass(frozen=True)
class Curves:
    """A file of losses by step."""

    path: Path

    def add(self, row: Mapping[str, float]) -> None:
        """Write one line more."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(row)) + "\n")

    def cut(self, step: int) -> None:
        """Take out what is ahead of a checkpoint, or cut off by a kill: it is trained again."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _read_step(line) <= step]
        if len(kept) == len(lines):
            return
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, self.path)

    def load(self) -> list[dict[str, float]]:
        """All lines."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def _read_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")

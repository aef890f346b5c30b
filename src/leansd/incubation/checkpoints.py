"""Checkpoints that are whole or not there.

Each is a folder that is written beside its place and moved there in one go; all processes take
part, since with sharded states each holds a part. A kill leaves the one before as it was.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from leansd.errors import LeansdError
from leansd.incubation.averages import Average

PARTIAL, OLD = ".partial", ".old"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Position:
    """Where a stage is."""

    step: int
    stream: Mapping[str, Any]
    skipped: int = 0
    row: int = 0
    sums: Mapping[str, float] = field(default_factory=dict)
    """Of what was not logged yet, over `count` steps."""
    count: int = 0


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage."""

    folder: Path
    keep: int

    def find_last(self) -> Path | None:
        """The newest whole one."""
        there = sorted(self._list())
        return there[-1] if there else None

    def clean(self) -> None:
        """Take away what a kill left half-written or half-deleted."""
        for ending in (PARTIAL, OLD):
            for path in self.folder.glob("*" + ending):
                shutil.rmtree(path, ignore_errors=True)

    def save(self, accelerator: Accelerator, average: Average | None, position: Position) -> Path:
        """Write one, with the state of all processes.

        Raises:
            LeansdError: it cannot be written; those before are untouched.
        """
        whole = self.folder / f"step-{position.step:08d}"
        partial = whole.with_name(whole.name + PARTIAL)
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        with reporting(f"cannot write a checkpoint into {self.folder}", self.find_last()):
            partial.mkdir(parents=True, exist_ok=True)
            accelerator.save_state(str(partial))
            rank = accelerator.process_index
            (partial / f"position-{rank}.json").write_text(json.dumps(vars(position)))
            if average is not None and accelerator.is_main_process:
                save_file(average.tensors, partial / "average.safetensors")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(whole, ignore_errors=True)
            os.replace(partial, whole)
            for old in sorted(self._list())[: -self.keep]:
                discard(old)
        accelerator.wait_for_everyone()
        return whole

    def load(self, accelerator: Accelerator, average: Average | None, path: Path) -> Position:
        """Go on from one.

        Raises:
            LeansdError: it cannot be read, or is of another number of processes.
        """
        file = path / f"position-{accelerator.process_index}.json"
        if len(list(path.glob("position-*.json"))) != accelerator.num_processes:
            raise LeansdError(
                f"{path} was written by another number of processes than "
                f"{accelerator.num_processes}; resume with as many"
            )
        try:
            accelerator.load_state(str(path))
            position = Position(**json.loads(file.read_text()))
            if average is not None:
                tensors = load_file(path / "average.safetensors")
                average.load(tensors, updates=position.step - position.skipped)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if isinstance(error, LeansdError):
                raise
            raise LeansdError(f"cannot read the checkpoint {path}: {error}") from error
        return position

    def _list(self) -> Iterator[Path]:
        if self.folder.is_dir():
            yield from (path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))


def discard(folder: Path) -> None:
    """Take a folder away; killed half-way, it is not there either."""
    gone = folder.with_name(folder.name + OLD)
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when all is written."""
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    with reporting(f"cannot write {folder}"):
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            discard(folder)
        os.replace(partial, folder)


@contextmanager
def reporting(what: str, last: Path | None = None) -> Iterator[None]:
    """Say plainly what could not be written, and what is intact."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, LeansdError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        intact = f"; {last} is whole: make room and resume" if last is not None else ""
        raise LeansdError(f"{what}: {reason}{intact}") from error

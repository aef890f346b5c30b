"""Output files: checked before the work starts, and never seen half-written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from leansd.errors import LeansdError


def check_folder(folder: str | Path) -> Path:
    """Say now, and without creating anything, whether files can be written into `folder`."""
    folder = Path(folder)
    home = folder
    while not os.path.lexists(home):
        home = home.parent
    if not home.is_dir():
        raise LeansdError(
            f"cannot write into {folder}: {home} is not a folder; choose another output folder"
        )
    if not os.access(home, os.W_OK | os.X_OK):
        raise LeansdError(
            f"cannot write into {folder}: no permission in {home}; choose another output folder"
        )
    return folder


def check_file(path: str | Path) -> Path:
    """Say now, and without creating anything, whether `path` can be written as a file."""
    path = Path(path)
    check_folder(path.parent)
    if path.is_dir():
        raise LeansdError(f"cannot write {path}: it is a folder; give a file name in it")
    return path


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Write `content` beside `path` and move it there in one go, making missing folders."""
    path = check_file(path)
    data = content.encode() if isinstance(content, str) else content
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(data)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise LeansdError(f"cannot write {path}: {error.strerror or error}") from error
    return path


PARTIAL, OLD = ".partial", ".old"
"""What a kill may leave of something big; the next writing takes it away."""


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A place beside `path` for a big file or a folder, moved to `path` when all is written.

    Raises:
        LeansdError: it cannot be written; what was at `path` stays.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    try:
        discard(partial)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if path.is_dir():
            discard(path)
        os.replace(partial, path)
    except OSError as error:
        raise LeansdError(f"cannot write {path}: {error.strerror or error}") from error


def discard(path: Path) -> None:
    """Take a file or a folder away; killed half-way, it is not there either."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path.with_name(path.name + OLD)
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)

"""Output files: checked before the work starts, and never seen half-written."""

import os
import platform
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EEXIST, EISDIR, ENOTEMPTY
from hashlib import sha256
from itertools import count
from pathlib import Path
from uuid import uuid4

from leansd.errors import LeansdError, OutputError

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind, and two runs are not kept apart
    fcntl = None


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


@contextmanager
def holding(folder: str | Path) -> Iterator[None]:
    """Keeps others that hold it from working in `folder` meanwhile; a kill lets go.

    Raises:
        LeansdError: another process works there, or the folder cannot be made.
    """
    folder = Path(folder)
    if fcntl is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LeansdError(
                f"another run is at work in {folder}: wait until it is over, or choose another "
                "folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            # Closing it is not enough where a process that was started meanwhile has it open, too.
            fcntl.flock(place, fcntl.LOCK_UN)
    finally:
        os.close(place)


def check_file(path: str | Path) -> Path:
    """Say now, and without creating anything, whether `path` can be written as a file."""
    path = Path(path)
    check_folder(path.parent)
    if path.is_dir():
        raise LeansdError(f"cannot write {path}: it is a folder; give a file name in it")
    return path


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Writes `content` beside `path` and moves it there in one go, making missing folders.

    Raises:
        OutputError: it cannot be written; what was there stays.
    """
    path = check_file(path)
    with _draft(path, content) as draft:
        os.replace(draft, path)
    return path


@contextmanager
def _draft(path: Path, content: str | bytes) -> Iterator[Path]:
    """A whole file beside `path`, to be moved there; gone afterwards."""
    draft = _name_draft(path, PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        try:
            draft.write_bytes(content.encode() if isinstance(content, str) else content)
            yield draft
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


PARTIAL, OLD = ".partial", ".old"
"""What a kill may leave; the next process that writes there takes it away."""
_HOST = sha256(platform.node().encode()).hexdigest()[:6]
_DRAFT = re.compile(rf"\.{_HOST}-(\d+)-[0-9a-f]{{8}}({re.escape(PARTIAL)}|{re.escape(OLD)})")


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A place beside `path` for a big file or a folder, moved to `path` when all is written.

    Whoever writes there at the same time has a place of its own; the last one to be done stays.

    Raises:
        OutputError: it cannot be written; what was at `path` stays.
    """
    path = Path(path)
    partial = _name_draft(path, PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        try:
            yield partial
            _move(partial, path)
        finally:
            discard(partial)
    except Exception as error:
        # By name: what writes weights is not imported for the sake of its errors.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise OutputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from error


def discard(path: Path) -> None:
    """Take a file or a folder away; killed half-way, it is not there either."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = _name_draft(path, OLD)
    with suppress(FileNotFoundError):  # another process was faster
        os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _move(partial: Path, path: Path) -> None:
    """Move a file or a folder to where others may put theirs at the same time; no file goes for a
    folder."""
    while True:
        try:
            if path.is_dir():
                discard(path)
            os.replace(partial, path)
            return
        except OSError as error:
            if error.errno not in (ENOTEMPTY, EEXIST, EISDIR):
                raise


def _name_draft(path: Path, ending: str) -> Path:
    """A name beside `path` that no other writer has, and that says who its writer is."""
    return path.with_name(f".{_HOST}-{os.getpid()}-{uuid4().hex[:8]}{ending}")


_SWEPT: set[Path] = set()
"""Folders that this process has swept: to list one for every file takes ever longer."""


def _sweep(folder: Path) -> None:
    """Take away what writers of this machine have left that run no more, once in a process."""
    if folder in _SWEPT:
        return
    _SWEPT.add(folder)
    for draft in folder.glob(f".{_HOST}-*"):
        found = _DRAFT.fullmatch(draft.name)
        if found is not None and not _runs(int(found[1])):
            shutil.rmtree(draft, ignore_errors=True)
            with suppress(OSError):
                draft.unlink()


def _runs(process: int) -> bool:
    if os.name == "nt":  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


NAME_BYTES = 120
"""Most bytes of a name made of words: with what is put before and behind, file systems take 255."""
# Names that Windows keeps for devices, whatever ending they have.
_RESERVED = {"con", "prn", "aux", "nul"} | {f"{d}{n}" for d in ("com", "lpt") for n in range(10)}


def name_file(words: str) -> str:
    """Returns a file name, without an ending, from a user's words: `a-red-apple`, `猫`.

    Letters and digits of every script stay, each run of anything else is one `-`, so the name has
    no dot and stays in its folder. Words that are cut end in a digest of the whole, so that long
    ones with the same beginning have different names.
    """
    text = unicodedata.normalize("NFC", words)
    # Marks belong to the letters before them: without them many scripts are other words.
    kept = "".join(c if unicodedata.category(c)[0] in "LNM" or c == "_" else "-" for c in text)
    name = re.sub("-+", "-", kept).strip("-") or "picture"
    if len(name.encode()) > NAME_BYTES:
        digest = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        short = name.encode()[: NAME_BYTES - len(digest) - 1].decode(errors="ignore")
        name = f"{short.rstrip('-')}-{digest}"
    return f"{name}-" if name.casefold() in _RESERVED else name


def name_files(words: Iterable[str]) -> list[str]:
    """Returns a name for each of several words, no two alike where case does not count."""
    taken: set[str] = set()
    names: list[str] = []
    for each in words:
        name = next(name for name in _list_names(name_file(each)) if _fold(name) not in taken)
        names.append(name)
        taken.add(_fold(name))
    return names


def stand_beside(path: str | Path, ending: str) -> Path:
    """Returns the path of a file that belongs to `path`: `plan.json` and `.html`, `plan.html`.

    Only an ending that says what kind of file it is goes: `v1.5` and `v1.6` stay apart.
    """
    path = Path(path)
    known = {".json", ".jsonl", ".yaml", ".yml", ".html", ".png", ".safetensors"}
    stem = path.stem if path.suffix.lower() in known else path.name
    return path.with_name(stem + ending)


def find_free(path: str | Path) -> Path:
    """Returns `path`, or where something lies there `NAME-2.END`, `NAME-3.END`, ...

    Names that differ in case or in how their letters are composed count as one, as they do on many
    disks.
    """
    path = Path(path)
    taken = {_fold(each) for each in os.listdir(path.parent)} if path.parent.is_dir() else set()
    return next(
        path.with_name(name)
        for name in _list_names(path.stem, path.suffix)
        if _fold(name) not in taken
    )


def number_files(paths: Sequence[Path]) -> dict[Path, Path]:
    """Returns the next free names of files that belong together: all of one number, or of none."""
    for number in count(1):
        free = {
            path: path.with_stem(f"{path.stem}-{number}" if number > 1 else path.stem)
            for path in paths
        }
        if all(find_free(path) == path for path in free.values()):
            return free
    raise AssertionError


def write_new(path: str | Path, content: str | bytes) -> Path:
    """Writes `content` to `path` or, rather than over what lies there, to the next free name.

    Returns where it lies. The same content is not written twice: a command that is given again and
    draws the same leaves one file.

    Raises:
        OutputError: it cannot be written.
    """
    path = check_file(path)
    data = content.encode() if isinstance(content, str) else content
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return path
    with _draft(path, data) as draft:
        while True:
            free = find_free(path)
            try:
                # Unlike a move, a link is never made over a file that another process just wrote.
                os.link(draft, free)
            except FileExistsError:
                continue
            except OSError:  # a file system without links
                os.replace(draft, free)
            return free


def _list_names(stem: str, suffix: str = "") -> Iterator[str]:
    yield stem + suffix
    for number in count(2):
        yield f"{stem}-{number}{suffix}"


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()

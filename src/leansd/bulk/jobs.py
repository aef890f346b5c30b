"""Jobs of many pictures: rows of prompts from a file, the folder they go to, and drawing them.

Work is cut into shards of neighbouring rows. A shard is whole or not there, so what is left to do
can be seen in the folder, whoever stopped when.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from leansd.cluster import RunTasks, TaskKind, finish_tasks
from leansd.drawing import (
    Request,
    check_strength,
    explain_fault,
    find_scale,
    open_picture,
    paint_together,
    place_init,
)
from leansd.errors import LeansdError
from leansd.files import name_files, write_file
from leansd.loading import as_image_to_image, load, load_unet, load_vae, set_vae
from leansd.plans.plan import Plan
from leansd.runtime.samplers import name_sampler, set_sampler
from leansd.shards import DrawnPicture, name_shard, pack_shard
from leansd.text import explain_validation
from leansd.version import __version__

# -- rows of prompts -------------------------------------------------------------------------------


def _read_id(given: object) -> object:
    """An id as text: tables from databases have numbers; it names files, so it is no path."""
    text = str(given) if type(given) is int else given
    if isinstance(text, str) and not (re.fullmatch(r"\w[\w.-]*", text) and len(text) <= 200):
        raise ValueError(
            "give at most 200 letters, digits, '_', '-' and '.', none of the last two first"
        )
    return text


Id = Annotated[str, BeforeValidator(_read_id)]

OTHER_NAMES = {
    "negative": "negative_prompt",
    "negativeprompt": "negative_prompt",
    "neg_prompt": "negative_prompt",
    "neg": "negative_prompt",
    "uncond": "negative_prompt",
    "text": "prompt",
    "caption": "prompt",
    "image": "init_image",
    "init": "init_image",
    "key": "id",
    "name": "id",
}
"""What other tools call the keys of a row."""


class PromptRow(BaseModel):
    """One picture to draw."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    number: int
    """The row's place in the file, from 0, malformed rows counted: its seed follows from it."""
    id: Id
    prompt: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    negative_prompt: str | None = None
    init_image: str | None = None
    """A picture to start from, by its path beside the file."""
    strength: Annotated[float, Field(gt=0, le=1)] | None = None


KEYS = tuple(name for name in PromptRow.model_fields if name != "number")


@dataclass(frozen=True)
class RowFlaw:
    """A line of the file with what is wrong with it."""

    line: int
    """From 1, as editors count."""
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


@dataclass(frozen=True)
class Sheet:
    """All rows of a file."""

    rows: tuple[PromptRow, ...]
    flaws: tuple[RowFlaw, ...]
    """Rows that cannot be drawn."""
    digest: str
    """Sixteen hex digits of the file."""
    home: Path
    """The folder that paths in it start from."""
    remarks: tuple[RowFlaw, ...] = ()
    """Rows that are drawn, but not all that they say is used."""


def read_sheet(path: str | Path) -> Sheet:
    """Reads a file of rows: `.jsonl`, `.csv`, `.parquet`, or `.txt` with a prompt a line.

    Raises:
        LeansdError: it cannot be read, or no row of it can be drawn.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise LeansdError(
            f"cannot read prompts from {path}: give a file that ends in {' or '.join(READERS)}"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LeansdError(f"cannot read prompts from {path}: {error.strerror or error}") from error
    rows: list[PromptRow] = []
    flaws: list[RowFlaw] = []
    remarks: list[RowFlaw] = []
    seen: dict[str, int] = {}
    told: set[str] = set()
    for number, (line, found) in enumerate(reader(path, content)):
        row = _check(number, line, found, path.parent)
        if isinstance(row, PromptRow) and row.id in seen:
            row = RowFlaw(line, f"id {row.id} is that of line {seen[row.id]}, too")
        if isinstance(row, RowFlaw):
            flaws.append(row)
            continue
        if row is None:
            continue
        seen[row.id] = line
        rows.append(row)
        unused = [key for key in found if key not in KEYS and key not in told]
        remarks += [RowFlaw(line, f"{key} is not used ({', '.join(KEYS)} are)") for key in unused]
        told.update(unused)
    if not rows:
        why = f"; {flaws[0]}" if flaws else ": it is empty"
        raise LeansdError(f"no row of {path} can be drawn{why}")
    digest = sha256(content).hexdigest()[:16]
    return Sheet(tuple(rows), tuple(flaws), digest, path.parent.resolve(), tuple(remarks))


def _check(number: int, line: int, found: Any, home: Path) -> PromptRow | RowFlaw | None:
    """A row, what is wrong with it, or nothing for a blank line."""
    if found is None:
        return None
    if not isinstance(found, Mapping):
        return RowFlaw(line, str(found))
    given = {key: value for key, value in found.items() if value is not None}
    for key in given:
        meant = _find_meant(str(key))
        if meant is not None and meant not in given:
            return RowFlaw(line, f"{key}: no such key; did you mean {meant}?")
    try:
        row = PromptRow.model_validate({**given, "number": number})
    except ValidationError as error:
        return RowFlaw(line, explain_validation(error))
    if row.init_image is not None and not (home / row.init_image).is_file():
        return RowFlaw(line, f"init_image: there is no {home / row.init_image}")
    if row.strength is not None and row.init_image is None:
        return RowFlaw(line, "strength: it means nothing without an init_image")
    return row


def _find_meant(key: str) -> str | None:
    """The key that a wrong one was meant to be; None for a key that means something else."""
    if key in KEYS:
        return None
    plain = key.strip().lower().replace("-", "_").replace(" ", "_")
    if plain in KEYS:
        return plain
    if plain in OTHER_NAMES:
        return OTHER_NAMES[plain]
    return next(iter(get_close_matches(plain, KEYS, n=1)), None)


# Readers give the number of every line and what stands there: a mapping, what is wrong, or None.
Lines = Iterator[tuple[int, Any]]


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise LeansdError(f"{path}, line {line} is not UTF-8 text: save it as UTF-8") from error


def _read_json(path: Path, content: bytes) -> Lines:
    # Not as one text: a line that is no text is that line's flaw.
    for line, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            yield line, None
            continue
        try:
            found = json.loads(raw)
        except (ValueError, UnicodeDecodeError) as error:
            yield line, f"no JSON: {error}"
            continue
        yield line, found if isinstance(found, dict) else "no JSON object"


def _read_csv(path: Path, content: bytes) -> Lines:
    reader = csv.DictReader(io.StringIO(_decode(path, content), newline=""))
    convert = {"seed": int, "strength": float}
    try:
        for found in reader:
            row: dict[str, Any] = {}
            wrong = "more cells than columns" if None in found else ""
            for key, cell in found.items():
                if not key or not cell:
                    continue
                try:
                    row[key] = convert.get(key, str)(cell)
                except ValueError:
                    wrong = f"{key}: {cell!r} is not a number"
            yield reader.line_num, wrong or row or None
    except csv.Error as error:
        yield reader.line_num, f"no CSV: {error}"


def _read_text(path: Path, content: bytes) -> Lines:
    lines = _decode(path, content).split("\n")
    width = len(str(len(lines)))
    for line, text in enumerate(lines, start=1):
        prompt = text.strip()
        is_row = bool(prompt) and not prompt.startswith("#")
        yield line, {"id": f"{line:0{width}}", "prompt": prompt} if is_row else None


def _read_parquet(path: Path, content: bytes) -> Lines:
    try:
        from pyarrow import ArrowInvalid, BufferReader, parquet
    except ImportError as error:
        raise LeansdError("Parquet needs pyarrow: install leansd[ray], or give .jsonl") from error
    try:
        table = parquet.read_table(BufferReader(content))
    except ArrowInvalid as error:
        raise LeansdError(f"{path} is no Parquet file: {error}") from error
    rows = (row for batch in table.to_batches() for row in batch.to_pylist())
    yield from enumerate(rows, start=1)


READERS = {".jsonl": _read_json, ".csv": _read_csv, ".parquet": _read_parquet, ".txt": _read_text}


# -- jobs ------------------------------------------------------------------------------------------

FILE = "job.json"
FAULTS = "faults.jsonl"
"""Rows whose picture shows nothing, a JSON object a line."""


@dataclass(frozen=True)
class BulkJob:
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
    """Picture `n` has seed `seed + n`, unless its row has one of its own."""
    count: int = 1
    """Pictures a row, each a seed further."""
    negative: str | None = None
    """The negative prompt of rows that have none."""
    init: str | None = None
    """A picture that rows start from that name none."""
    strength: float = 0.8
    """The strength of rows that start from a picture and give none."""
    vae: str | None = None
    """Folder of another autoencoder."""
    batch: int = 8
    shard: int = 256
    """Pictures of a shard."""
    threads: int = 0
    """Threads of torch on a CPU, on which its sums depend; 0 for as many as there are."""
    device: str | None = None
    dtype: str | None = None
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


class PictureTask(NamedTuple):
    """One picture of a job."""

    row: PromptRow
    seed: int
    name: str
    """The name of its files in the shard."""


@dataclass(frozen=True)
class ShardTask:
    """The pictures of one shard."""

    number: int
    items: tuple[PictureTask, ...]

    @property
    def name(self) -> str:
        return name_shard(self.number)


class DrawnShard(NamedTuple):
    """A drawn part: the bytes of its tar, and what is wrong with pictures that are not in it."""

    content: bytes
    faults: Mapping[str, str]


Work: TypeAlias = RunTasks[BulkJob, ShardTask, DrawnShard]
"""Draws parts, in any order."""


def cut_parts(rows: Sequence[PromptRow], job: BulkJob) -> list[ShardTask]:
    """All pictures of a job, neighbours in a shard.

    Files in shards have names without dots, and none alike where case does not count: readers of
    webdataset end a sample's name at its first dot.
    """
    many = job.count > 1
    chosen = [
        PictureTask(
            row.model_copy(update={"id": f"{row.id}-{turn}"}) if many else row,
            job.seed + row.number * job.count + turn if row.seed is None else row.seed + turn,
            "",
        )
        for row in rows
        for turn in range(job.count)
    ]
    names = name_files(item.row.id for item in chosen)
    items = [item._replace(name=name) for item, name in zip(chosen, names, strict=True)]
    return [
        ShardTask(number, tuple(items[begin : begin + job.shard]))
        for number, begin in enumerate(range(0, len(items), job.shard))
    ]


def list_missing(parts: Sequence[ShardTask], folder: Path) -> list[ShardTask]:
    """What is still to be drawn."""
    return [part for part in parts if not (folder / part.name).is_file()]


def claim_folder(folder: Path, job: BulkJob) -> None:
    """Makes a job's folder, or sees that it is this job's.

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


@dataclass(frozen=True)
class BulkOrder:
    """A job that is ready in its folder, and what of it is still to be drawn."""

    job: BulkJob
    sheet: Sheet
    parts: tuple[ShardTask, ...]
    missing: tuple[ShardTask, ...]

    @property
    def total(self) -> int:
        """Pictures of the job."""
        return sum(len(part.items) for part in self.parts)

    @property
    def left(self) -> int:
        """Pictures still to be drawn."""
        return sum(len(part.items) for part in self.missing)


def place_order(sheet: Sheet, folder: Path, job: BulkJob) -> BulkOrder:
    """Lays out a job in a folder, or finds what is left of it there.

    Raises:
        LeansdError: the folder holds something else, or an option does not go with a row.
    """
    job = replace(job, home=str(sheet.home), source=sheet.digest)
    parts = cut_parts(sheet.rows, job)
    for row in sheet.rows:
        if row.init_image is not None or job.init is not None:
            try:
                check_strength(job.strength if row.strength is None else row.strength, job.steps)
            except LeansdError as error:
                raise LeansdError(f"row {row.id}: {error}") from error
    claim_folder(folder, job)
    return BulkOrder(job, sheet, tuple(parts), tuple(list_missing(parts, folder)))


class Drawer:
    """Draws the shards of one job with a pipeline that is opened once."""

    def __init__(self, job: BulkJob) -> None:
        self.job = job
        if job.threads:
            torch.set_num_threads(job.threads)
        dtype = getattr(torch, job.dtype) if job.dtype is not None else None
        self.pipe: Any = load(job.model, device=job.device, dtype=dtype)
        self.pipe.set_progress_bar_config(disable=True)
        if job.sampler is not None:
            set_sampler(self.pipe, job.sampler)
        if job.vae is not None:
            set_vae(self.pipe, load_vae(job.vae))
        self.plan = None if job.plan is None else Plan.from_dict(job.plan)
        self.nets = {
            name: load_unet(folder, beside=self.pipe.unet) for name, folder in job.nets.items()
        }

    def __call__(self, part: ShardTask) -> DrawnShard:
        """A whole shard. Who shares a batch follows from the places of the rows in it."""
        asked = [(item, self._make_request(item)) for item in part.items]
        faults: dict[str, str] = {}
        drawn: list[DrawnPicture] = []
        for _, group in groupby(asked, key=lambda each: each[1].kind):
            alike, count = list(group), self.job.batch
            for begin in range(0, len(alike), count):
                drawn += self._draw_batch(alike[begin : begin + count], faults)
        return DrawnShard(pack_shard(drawn), faults)

    def _make_request(self, item: PictureTask) -> Request:
        job, row = self.job, item.row
        path = row.init_image or job.init
        negative = job.negative if row.negative_prompt is None else row.negative_prompt
        try:
            init = open_picture(Path(job.home) / path) if path is not None else None
            request = Request(
                prompt=row.prompt,
                negative=negative,
                seed=item.seed,
                steps=job.steps,
                guidance=job.guidance,
                size=job.size,
                init=init,
                strength=job.strength if row.strength is None else row.strength,
            )
        except LeansdError as error:
            raise LeansdError(f"row {row.id}: {error}") from error
        return place_init(self.pipe, request)

    def _draw_batch(
        self, asked: Sequence[tuple[PictureTask, Request]], faults: dict[str, str]
    ) -> Iterator[DrawnPicture]:
        requests = [request for _, request in asked]
        pipe = self.pipe if requests[0].init is None else self._image_to_image
        plan = self.plan or Plan.full(self.job.steps)
        shared = {
            "model": self.job.model,
            "plan": plan.name,
            "plan_fingerprint": plan.fingerprint,
            "steps": self.job.steps,
            "sampler": name_sampler(pipe),
        }
        drawn = paint_together(pipe, requests, self.plan, nets=self.nets)
        guidance = {"guidance": find_scale(pipe, self.job.guidance)}
        for (item, request), painting in zip(asked, drawn, strict=True):
            if painting.fault:
                faults[item.row.id] = explain_fault(pipe, request, painting, self.plan)
                continue
            own = item.row.model_dump(exclude_none=True) | {"seed": item.seed}
            if request.negative is not None:
                own["negative_prompt"] = request.negative
            yield DrawnPicture(item.row.id, painting.image, own | shared | guidance, item.name)

    @cached_property
    def _image_to_image(self) -> Any:
        other: Any = as_image_to_image(self.pipe)
        other.set_progress_bar_config(disable=True)
        return other


DRAWING = TaskKind[BulkJob, ShardTask, DrawnShard](Drawer)
"""Drawing shards, here or on Ray."""


def run_job(
    job: BulkJob,
    parts: Sequence[ShardTask],
    folder: Path,
    *,
    work: Work = DRAWING.run_here,
    on_part: Callable[[ShardTask], None] = lambda part: None,
) -> None:
    """Draws the parts that are given, and writes each shard in one go as it comes.

    Raises:
        LeansdError: a shard cannot be drawn or written; those that are there are whole.
    """

    def keep(part: ShardTask, shard: DrawnShard) -> None:
        if shard.faults:
            known = {**read_faults(folder), **shard.faults}
            rows = ({"id": at, "fault": why} for at, why in known.items())
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_file(folder / FAULTS, "".join(lines))
        write_file(folder / part.name, shard.content)

    finish_tasks(work, job, parts, keep, on_part, "the shards")


def read_faults(folder: Path) -> dict[str, str]:
    """Why rows of a job have no picture, by their ids."""
    path = folder / FAULTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {found["id"]: found["fault"] for found in map(json.loads, lines)}

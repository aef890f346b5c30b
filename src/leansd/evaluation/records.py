"""Records: one measured number with its circumstances, one flat JSON line each.

Every measuring command writes these and every table, plot and report is made from them.
"""

import platform
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from leansd.errors import LeansdError
from leansd.files import write_file
from leansd.text import explain_validation
from leansd.version import __version__

Scalar = str | int | float | bool | None


class Record(BaseModel):
    """One measured number.

    The named fields are on every record. A case adds flat fields of its own by keyword, such as
    `steps=30`, `sampler="ddim"`, `guidance=5.0`, `prompts=6`, `low=1.4`, `at="up2.up"`.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, Scalar]  # pyright: ignore[reportIncompatibleVariableOverride]

    subject: str  # the model that was measured
    plan: str  # a plan's name, or what stood in its place ("no plan", "fewer steps")
    fingerprint: str = ""  # of the plan
    metric: str
    value: float
    unit: str
    seed: int | None = None
    device: str
    leansd: str
    torch: str
    diffusers: str
    python: str
    at: str | None = None  # the address, where one unit or block was measured
    time: str

    @field_validator("subject", "metric")
    @classmethod
    def _not_blank(cls, text: str) -> str:
        if not text:
            raise ValueError("must not be empty")
        return text

    def line(self) -> str:
        """This record as one line of JSON."""
        return self.model_dump_json(exclude_none=True)


def stamp(device: Any = "cpu") -> dict[str, str]:
    """The circumstances that records of one run share: `Record(**stamp(device), metric=...)`."""
    return {
        "device": name_device(str(device)),
        "leansd": __version__,
        "torch": _version("torch"),
        "diffusers": _version("diffusers"),
        "python": platform.python_version(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def name_device(device: str) -> str:
    """A device in words: `cuda: NVIDIA H100 80GB HBM3`, `cpu: 2 threads of Intel Xeon`."""
    if device.startswith("cuda"):
        import torch

        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.startswith("cpu") and "torch" in sys.modules:
        return f"cpu: {sys.modules['torch'].get_num_threads()} threads of {_processor()}"
    return f"{device}: {_processor()}"


def put_records(
    path: str | Path, records: Sequence[Record], place: Callable[[Record], Hashable]
) -> Path:
    """Add records to a file, in the place of those there that have the same `place`."""
    path = Path(path)
    kept = load_records(path) if path.exists() else []
    places = {place(record) for record in records}
    return write_records(path, [*(each for each in kept if place(each) not in places), *records])


def write_records(path: str | Path, records: Iterable[Record]) -> Path:
    """Write records as a new file."""
    return write_file(path, "".join(f"{record.line()}\n" for record in records))


def load_records(path: str | Path) -> list[Record]:
    """Read a file of records; blank lines are passed over."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LeansdError(f"no records at {path}: the file does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LeansdError(f"cannot read records from {path}: {error}") from error
    records: list[Record] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            records.append(Record.model_validate_json(line))
        except ValidationError as error:
            what = explain_validation(error)
            raise LeansdError(f"{path} line {number} is not a record: {what}") from error
    return records


def get_field(record: Record, name: str) -> Any:
    """A field that not every record has."""
    return (record.__pydantic_extra__ or {}).get(name)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

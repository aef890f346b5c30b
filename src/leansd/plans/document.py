"""Plans as JSON files: the schema, reading with checks, writing in one piece."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from leansd.errors import LeansdError
from leansd.plans.drift import Drift, Measure
from leansd.plans.gate import Attend
from leansd.plans.methods import METHODS, NO_CORRECTION, Correction
from leansd.plans.plan import Plan, Tuned
from leansd.plans.row import OWN, Guidance, Row
from leansd.text import suggest_name

VERSION = 1


def _check_method(how: str) -> str:
    if how not in METHODS:
        raise ValueError(f"no way to inherit is called {how!r}{suggest_name(how, METHODS)}")
    return how


class RowDocument(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inherit: dict[str, Annotated[str, AfterValidator(_check_method)]] = Field(default_factory=dict)
    guidance: Guidance = "compute"
    correct: tuple[FiniteFloat, FiniteFloat] = NO_CORRECTION
    attend: dict[str, Attend] = Field(default_factory=dict)
    net: str = OWN


class DriftDocument(BaseModel):
    model_config = ConfigDict(extra="forbid")
    probe: str
    threshold: float = Field(ge=0)
    measure: Measure = "change"


class PlanDocument(BaseModel):
    """The file format. A change that an older reader would misunderstand raises `version`."""

    model_config = ConfigDict(extra="forbid")
    format: Literal["leansd-plan"] = "leansd-plan"
    version: int = VERSION
    name: str = "plan"
    steps: int = Field(ge=1)
    drift: DriftDocument | None = None
    tuned: Tuned | None = None
    rows: list[RowDocument]


def encode_plan(plan: Plan) -> str:
    """The text of a plan's file."""
    document = make_document(plan)
    lines = [json.dumps(row.model_dump(exclude_defaults=True)) for row in document.rows]
    head = json.dumps(document.model_dump(exclude={"rows"}, exclude_none=True))[1:-1]
    return "{" + head + ', "rows": [\n  ' + ",\n  ".join(lines) + "\n]}\n"


def write_plan(plan: Plan, path: Path) -> None:
    """Write `plan` to `path`; the file is either the old one or the whole new one."""
    text = encode_plan(plan)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise LeansdError(f"cannot write the plan to {path}: {error.strerror}") from error


def read_plan(path: Path) -> Plan:
    """Read and check a plan file.

    Raises:
        LeansdError: it is missing, not JSON, not a plan, or from a newer version.
    """
    try:
        document = PlanDocument.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LeansdError(f"cannot read the plan {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise LeansdError(f"{path} is not a plan file: it is not text") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "file"
        raise LeansdError(f"{path} is not a valid plan file: {place}: {first['msg']}") from None
    if document.version > VERSION:
        raise LeansdError(
            f"{path} has plan format {document.version}, this leansd reads up to {VERSION}; "
            "upgrade leansd"
        )
    if len(document.rows) != document.steps:
        raise LeansdError(f"{path} says {document.steps} steps and has {len(document.rows)} rows")
    return make_plan(document)


def make_document(plan: Plan) -> PlanDocument:
    """A plan as what its file holds."""
    rows = [
        RowDocument(
            inherit=dict(row.inherit),
            guidance=row.guidance,
            correct=row.correct,
            attend=dict(row.attend),
            net=row.net,
        )
        for row in plan.rows
    ]
    drift = None if plan.drift is None else DriftDocument(**asdict(plan.drift))
    return PlanDocument(name=plan.name, steps=plan.steps, drift=drift, tuned=plan.tuned, rows=rows)


def make_plan(document: PlanDocument) -> Plan:
    """The plan that a file holds."""
    drift = None if document.drift is None else Drift(**document.drift.model_dump())
    rows = tuple(
        Row(row.inherit, row.guidance, Correction(*row.correct), row.attend, row.net)
        for row in document.rows
    )
    return Plan(rows, document.name, drift, document.tuned)

"""A surgery as data: ordered edits by address, in code or in a YAML file.

A surgery names addresses, not modules, so one surgery serves every UNet that has them. All
addresses are those of the net that is operated on, from the first edit to the last; only the
finished net is numbered anew.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
)

from leansd.errors import LeansdError
from leansd.files import write_file
from leansd.text import explain_validation

STORED = {"skip": "nothing"}
"""What checkpoints and fingerprints call a replacement whose name has changed since the first."""
_RENAMED = {old: new for new, old in STORED.items()}


def read_name(by: str) -> str:
    """The present name of a replacement, from any that it has had."""
    return _RENAMED.get(by, by)


def write_name(by: str) -> str:
    """What a checkpoint calls a replacement: the name that every version reads."""
    return STORED.get(by, by)


def _rename(by: Any) -> Any:
    if by in _RENAMED:
        note = f"the replacement {by!r} is called {read_name(by)!r} now; the old name is still read"
        warnings.warn(note, FutureWarning, stacklevel=2)
        return read_name(by)
    return by


Texts = Annotated[
    tuple[str, ...], BeforeValidator(lambda each: [each] if isinstance(each, str) else each)
]
"""Some texts; a file may hold a single one without brackets."""
Addresses = Annotated[Texts, Field(min_length=1)]
"""Addresses or globs."""


def read_yaml(path: str | Path, kind: str) -> dict[str, Any]:
    """The keys of a YAML or JSON file.

    Args:
        kind: what it should be, for messages.

    Raises:
        LeansdError: it is missing, or holds no keys.
    """
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LeansdError(f"cannot read the {kind} {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise LeansdError(f"{path} is no {kind}: it is not YAML") from error
    if not isinstance(document, dict):
        raise LeansdError(f"{path} is no {kind}: it holds no keys")
    return document


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Drop(_Frozen):
    """Take out layers, samplers, blocks, attentions or transformer blocks."""

    drop: Addresses

    def __str__(self) -> str:
        return f"drop {' '.join(self.drop)}"


class Take(_Frozen):
    """Put what another net has at these addresses in the place of what is there."""

    take: Addresses
    source: str
    """Name of the other net, as it is given to `operate`."""
    places: dict[str, str] = Field(default_factory=dict, alias="as")
    """What an address of the other net is called in this one, where that differs."""

    def __str__(self) -> str:
        places = "".join(f", {there} as {here}" for there, here in self.places.items())
        return f"take {' '.join(self.take)} of {self.source}{places}"


class Replace(_Frozen):
    """Put something else in the place of units, or parts of them: `by` names what."""

    replace: Addresses
    by: Annotated[str, BeforeValidator(_rename)]
    options: dict[str, JsonValue] = Field(default_factory=dict)

    def __str__(self) -> str:
        options = "".join(f", {name} {value}" for name, value in self.options.items())
        return f"replace {' '.join(self.replace)} by {self.by}{options}"


def _find_kind(value: Any) -> str | None:
    """Which edit it is: the one whose name is among its keys."""
    keys = value if isinstance(value, Mapping) else type(value).model_fields
    return next((kind for kind in ("drop", "take", "replace") if kind in keys), None)


Edit: TypeAlias = Annotated[
    Annotated[Drop, Tag("drop")]
    | Annotated[Take, Tag("take")]
    | Annotated[Replace, Tag("replace")],
    Discriminator(
        _find_kind,
        custom_error_type="edit",
        custom_error_message="an edit is a drop, a take or a replace",
    ),
]


class Surgery(_Frozen):
    """Ordered edits under a name. Every method gives a new surgery and leaves this one as it is."""

    name: str = "surgery"
    edits: tuple[Edit, ...] = ()

    def __init__(self, name: str = "surgery", edits: Any = (), **unknown: Any) -> None:
        fields: dict[str, Any] = {"name": name, "edits": edits, **unknown}
        super().__init__(**fields)

    def drop(self, *addresses: str) -> Surgery:
        """Take out what lies under `addresses` (or globs)."""
        return self._add({"drop": addresses})

    def take(
        self, *addresses: str, source: str, places: Mapping[str, str] | None = None
    ) -> Surgery:
        """Take what the net `source` has under `addresses`.

        Args:
            places: `{"up2": "up3"}` puts the other net's `up2` in the place of `up3`.
        """
        return self._add({"take": addresses, "source": source, "as": dict(places or {})})

    def replace(self, *addresses: str, by: str, **options: Any) -> Surgery:
        """Put something else, `gri` for one, in the place of what lies under `addresses`."""
        return self._add({"replace": addresses, "by": by, "options": options})

    def _add(self, edit: Mapping[str, Any]) -> Surgery:
        try:
            return Surgery(self.name, (*self.edits, edit))
        except ValidationError as error:
            raise LeansdError(f"surgery {self.name}: {explain_validation(error)}") from None

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits of the edits; the name has no part in it."""
        edits = self.to_document()["edits"]
        stored = [each | ({"by": write_name(each["by"])} if "by" in each else {}) for each in edits]
        text = json.dumps(stored, sort_keys=True)
        return sha256(text.encode()).hexdigest()[:12]

    def to_document(self) -> dict[str, Any]:
        """Name and edits as plain JSON values, what is empty left out."""
        options: Any = {"mode": "json", "by_alias": True, "exclude_defaults": True}
        return {"name": self.name, "edits": [edit.model_dump(**options) for edit in self.edits]}

    def write(self) -> str:
        """Name and edits as YAML."""
        document = self.to_document()
        return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=100)

    def save(self, path: str | Path) -> None:
        """Write a YAML file, or a JSON file where the name ends in `.json`."""
        path = Path(path)
        is_json = path.suffix == ".json"
        text = json.dumps(self.to_document(), indent=2) + "\n" if is_json else self.write()
        write_file(path, text)

    @classmethod
    def load(cls, path: str | Path) -> Surgery:
        """Read and check a YAML or JSON file.

        Raises:
            LeansdError: it is missing or no surgery; the message names the place.
        """
        document = {"name": Path(path).stem} | read_yaml(path, "surgery")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise LeansdError(
                f"{path} is not a valid surgery file: {explain_validation(error)}"
            ) from None

    def __str__(self) -> str:
        lines = [f"surgery {self.name}: {len(self.edits)} edits, fingerprint {self.fingerprint}"]
        return "\n".join([*lines, *(f"  {n}. {edit}" for n, edit in enumerate(self.edits, 1))])

"""A recipe: what is trained from what, in which stages. Plain data, read from YAML.

A recipe may name a `base`, another file that it is a small difference to. Unknown keys are errors
that name their place.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from leansd.errors import LeansdError
from leansd.incubation.losses import check_loss
from leansd.surgery.apply import BASE
from leansd.surgery.edits import Surgery, Texts, read_yaml, write_name
from leansd.surgery.presets import find_surgery
from leansd.text import explain_validation

TEACHER = "teacher"
"""What the original net is called among the nets of a stage."""
MOST_BASES = 16
BUNDLED = Path(__file__).parent / "recipes"
"""The recipes that come with the package."""
ScheduleName = Literal["constant", "rise", "fall", "cosine"]
SCHEDULES: Mapping[ScheduleName, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "rise": lambda progress: progress,
    "fall": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress),
}
"""A factor of a learning rate or a loss's weight, by the share of a stage that is done, [0, 1)."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LossSettings(_Frozen):
    """How much a loss counts, and its own options."""

    weight: float = Field(default=1.0, ge=0)
    schedule: ScheduleName = "constant"
    options: dict[str, JsonValue] = {}


class Stage(_Frozen):
    """One distillation."""

    name: str = Field(pattern=r"^[\w-]+$")
    surgery: Annotated[
        Surgery, BeforeValidator(lambda each: find_surgery(each) if isinstance(each, str) else each)
    ] = Surgery("same")
    """What makes the student: a preset's name, a file or written out; without edits it is a copy
    of the net operated on."""
    nets: dict[str, str] = {BASE: TEACHER}
    """What the surgery's nets are: the teacher, or what an earlier stage made. The first is
    operated on."""
    mode: Literal["end-to-end", "decoupled"] = "end-to-end"
    """Decoupled, only the blocks that train are computed, on the teacher's features."""
    train: Texts | None = None
    """Addresses or globs; by default all but what came frozen from the teacher."""
    steps: int = Field(gt=0)
    cached: int | None = Field(default=None, gt=0)
    """Steps whose teacher's tensors are kept on disk; later steps learn from those again."""
    learning_rate: float = Field(default=5e-5, gt=0)
    decay: ScheduleName = "constant"
    warmup: int = Field(default=0, ge=0)
    losses: dict[str, LossSettings] = Field(
        default={"denoising": LossSettings(), "output": LossSettings(), "features": LossSettings()}
    )

    @model_validator(mode="after")
    def _check(self) -> Stage:
        for name, loss in self.losses.items():
            check_loss(name, loss.options)
        if not any(each.weight for each in self.losses.values()):
            raise ValueError("a stage needs a loss with a weight above 0")
        if not self.nets:
            raise ValueError("a stage needs a net to operate on")
        return self


class TrainerSettings(_Frozen):
    """How steps are taken."""

    batch: int = Field(default=8, gt=0)
    """Samples of one process in one go."""
    accumulate: int = Field(default=1, gt=0)
    precision: Literal["no", "bf16"] = "no"
    ema: float | None = Field(default=0.999, gt=0, lt=1)
    checkpoint_every: int = Field(default=500, gt=0)
    keep: int = Field(default=2, gt=0)
    """Checkpoints kept of each stage."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(default=1.0, gt=0)
    """The largest norm of a step's gradient."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Whether transformer blocks are compiled."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()


class ValidationSettings(_Frozen):
    """Pictures of teacher and student from the same seeds."""

    prompts: Texts = ()
    every: int = Field(default=1000, gt=0)
    steps: int = Field(default=20, gt=0)
    guidance: float = 5.0
    seed: int = 0


class DataConfig(BaseModel):
    """Where samples come from; what else it holds is the kind's own."""

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: str
    paired: bool = False
    """Whether every sample comes twice, with its prompt and without, from the same noise."""

    @property
    def options(self) -> dict[str, Any]:
        """What is the kind's own."""
        return dict(self.__pydantic_extra__ or {})


class Recipe(_Frozen):
    """Everything that decides what comes out, but the machine."""

    name: str
    model: str = "emoji"
    """The teacher: what `leansd.load` opens."""
    seed: int = 0
    data: DataConfig
    nets: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], str] = {}
    """Further nets that stages may start from, by name: folders that earlier runs left."""
    trainer: TrainerSettings = TrainerSettings()
    validation: ValidationSettings = ValidationSettings()
    projection: str | None = None
    """A file that maps latents to RGB, for losses of pictures; by default it is fitted."""
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if TEACHER in self.nets:
            raise ValueError(f"a net cannot be called {TEACHER}: that is the original")
        known = {TEACHER: "", **self.nets}
        for stage in self.stages:
            if "guided" in stage.losses and not self.data.paired:
                raise ValueError(
                    f"stage {stage.name}: loss guided compares samples with their prompts and "
                    "without; set data.paired=true"
                )
            if stage.name in known:
                raise ValueError(f"two stages or nets are called {stage.name}")
            for name in stage.nets.values():
                if name not in known:
                    raise ValueError(
                        f"stage {stage.name} wants net {name!r}; there are {', '.join(known)}"
                    )
            known[stage.name] = ""
        return self

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits of all that decides what comes out."""
        document = self.to_document()
        for name in ("checkpoint_every", "keep", "trackers"):
            document["trainer"].pop(name)
        del document["name"], document["validation"]
        for stage in document["stages"]:
            for edit in stage["surgery"]["edits"]:
                if "by" in edit:
                    edit["by"] = write_name(edit["by"])
        return sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]

    def to_document(self) -> dict[str, Any]:
        """Plain JSON values."""
        document = self.model_dump(mode="json")
        for stage, each in zip(document["stages"], self.stages, strict=True):
            stage["surgery"] = each.surgery.to_document()
        return document

    def write(self) -> str:
        """The whole recipe as YAML, without a base."""
        return yaml.safe_dump(self.to_document(), sort_keys=False, width=100)


def load_recipe(path: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe with its bases and apply `key=value` changes by dotted path.

    Args:
        path: its file, or the name of one that comes with the package.

    Raises:
        LeansdError: a file is missing, or a key or value is none; the message names the place.
    """
    path = find_recipe(path)
    document = {"name": path.stem} | _read_document(path, MOST_BASES)
    for change in changes:
        _change(document, change)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise LeansdError(f"{path} is no valid recipe: {explain_validation(error)}") from None


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe: the one at this path, else the bundled one of this name.

    Raises:
        LeansdError: there is neither.
    """
    path = Path(source)
    if path.is_file():
        return path
    bundled = {each.stem: each for each in sorted(BUNDLED.glob("*.yaml"))}
    # `recipes/smoke.yaml` is meant by that name, too, where there is no checkout to find it in.
    if path.stem in bundled and str(path) in (path.stem, path.name, f"recipes/{path.name}"):
        return bundled[path.stem]
    if path.suffix:
        raise LeansdError(f"cannot read the recipe {path}: there is no such file")
    names = ", ".join(name for name in bundled if not name.endswith("base"))
    raise LeansdError(f"no recipe {str(source)!r}: give a YAML file, or one of {names}")


def _read_document(path: Path, deep: int) -> dict[str, Any]:
    document = read_yaml(path, "recipe")
    _find_surgery_files(document.get("stages"), path.parent)
    base = document.pop("base", None)
    if base is None:
        return document
    if not isinstance(base, str):
        raise LeansdError(f"{path}: base is the name of a file, not {base!r}")
    if not deep:
        raise LeansdError(f"{path}: its base leads back to itself")
    return merge(_read_document(path.parent / base, deep - 1), document)


def _find_surgery_files(stages: Any, folder: Path) -> None:
    """A surgery's file lies beside the recipe that names it."""
    listed = stages.values() if isinstance(stages, dict) else stages
    for stage in listed if isinstance(listed, Iterable) else ():
        named = stage.get("surgery") if isinstance(stage, dict) else None
        if isinstance(named, str) and os.path.isfile(folder / named):
            stage["surgery"] = str(folder / named)


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the differences of `change`: mappings by key, a list's entries by their names
    where a mapping is to change it, all else as a whole."""
    merged = dict(base)
    for key, value in change.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(before, value)
        elif isinstance(before, list) and isinstance(value, Mapping):
            merged[key] = list(before)
            places = _name_places(before)
            for name, entry in value.items():
                if name not in places:
                    known = ", ".join(map(str, places)) or "none by name"
                    said = f"the base has no {name} to change; it has {known}"
                    raise LeansdError(f"{key}: {said}")
                merged[key][places[name]] = merge(before[places[name]], entry)
        else:
            merged[key] = value
    return merged


def _change(document: dict[str, Any], change: str) -> None:
    """Set one value: `trainer.batch=4`, `stages.0.steps=10`, `stages.light.steps=10`.

    Raises:
        LeansdError: it is not of this form, there is no such place, or the value is no YAML.
    """
    key, sign, text = change.partition("=")
    if not (sign and key):
        raise LeansdError(f"{change!r} changes nothing: give key=value, trainer.batch=4")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise LeansdError(f"{change!r} changes nothing: {text!r} is no YAML value") from None
    *path, last = key.split(".")
    holder: Any = document
    for part in path:
        if isinstance(holder, dict):
            holder = holder.setdefault(part, {})
        else:
            holder = holder[_find_place(holder, part, key)]
    holder[last if isinstance(holder, dict) else _find_place(holder, last, key)] = value


def _find_place(listed: Any, part: str, key: str) -> int:
    """Where an entry of a list is that is given by its number or its name."""
    if not isinstance(listed, list):
        raise LeansdError(f"{key} is no place in the recipe: what holds {part} is {listed!r}")
    places = _name_places(listed)
    for number in range(len(listed)):
        places.setdefault(str(number), number)
    if part not in places:
        known = ", ".join(map(str, places))
        raise LeansdError(f"{key} is no place in the recipe: there is no {part}, but {known}")
    return places[part]


def _name_places(listed: list[Any]) -> dict[Any, int]:
    """The places of the entries that have names, by them."""
    named = (each.get("name") if isinstance(each, dict) else None for each in listed)
    return {name: place for place, name in enumerate(named) if name is not None}

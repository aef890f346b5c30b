"""The folders that the page may touch, and names in them: nothing outside is read or written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from leansd.errors import LeansdError
from leansd.files import check_folder
from leansd.loading import EMBEDDED
from leansd.plans.plan import Plan

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._-]{0,62}[A-Za-z0-9_-])?")


@dataclass(frozen=True)
class Folders:
    """Where plans and history are kept, and where models may be opened from."""

    home: Path
    models: Path | None = None
    model: str = EMBEDDED
    """A model that was named when the page was started, wherever it lies."""

    @classmethod
    def open(
        cls, home: str | Path, models: str | Path | None = None, model: str = EMBEDDED
    ) -> Folders:
        """Check the folders before anything is loaded.

        Raises:
            LeansdError: one cannot be written into, or there is none.
        """
        check_folder(home)
        own = Path(home).expanduser().resolve()
        if models is not None and not Path(models).expanduser().is_dir():
            raise LeansdError(f"no folder {models}: --models takes a folder that holds models")
        shelf = Path(models).expanduser().resolve() if models is not None else None
        return cls(own, shelf, model)

    @property
    def plans(self) -> Path:
        return self.home / "plans"

    @property
    def history(self) -> Path:
        return self.home / "history"

    @property
    def journals(self) -> Path:
        """What resumes a stopped tuning."""
        return self.home / "tuning"

    # -- models --------------------------------------------------------------------------------

    def list_models(self) -> list[str]:
        """Names of the models that can be opened, the one the page was started with first."""
        names = dict.fromkeys((self.model, EMBEDDED))
        if self.models is not None:
            for path in sorted(self.models.iterdir()):
                if _is_model(path) and _lies_in(path, self.models):
                    names[path.name] = None
        return list(names)

    def find_model(self, name: str) -> str:
        """What `leansd.load` is to open for a name of `list_models`.

        Raises:
            LeansdError: there is no such model in the folder given.
        """
        if name in (self.model, EMBEDDED):
            return name
        if self.models is None:
            raise LeansdError(f"no model {name!r}: start the page with --models DIR to open others")
        path = find_inside(self.models, name)
        if not _is_model(path):
            raise LeansdError(
                f"no model {name!r} in the models' folder: it takes folders in the diffusers "
                "layout and .safetensors files"
            )
        return str(path)

    # -- plans ---------------------------------------------------------------------------------

    def list_plans(self) -> list[str]:
        """Names of the saved plans."""
        if not self.plans.is_dir():
            return []
        paths = sorted(self.plans.glob("*.json"))
        return [path.stem for path in paths if _lies_in(path, self.plans)]

    def save_plan(self, plan: Plan, name: str) -> Path:
        """Write a plan under a name, in the place of one that has it already.

        Raises:
            LeansdError: it is no name for a file.
        """
        if not _NAME.fullmatch(name.strip()):
            raise LeansdError(
                f"{name!r} is no name for a plan: use up to 64 letters, digits, blanks and . _ -"
            )
        check_folder(self.plans)
        self.plans.mkdir(parents=True, exist_ok=True)
        path = find_inside(self.plans, f"{name.strip()}.json")
        plan.rename(name.strip()).save(path)
        return path

    def load_plan(self, name: str) -> Plan:
        """A saved plan by its name.

        Raises:
            LeansdError: there is none in the plans' folder, or it is not a plan.
        """
        path = find_inside(self.plans, f"{name}.json")
        if not path.is_file():
            raise LeansdError(f"no plan {name!r} is saved here; there are: {self._name_plans()}")
        return Plan.load(path)

    def _name_plans(self) -> str:
        return ", ".join(self.list_plans()) or "none"


def find_inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`, links followed.

    Raises:
        LeansdError: it would lie elsewhere.
    """
    if "\0" in name or not _lies_in(path := folder / name, folder):
        raise LeansdError(f"{name!r} lies outside the folders that this page was given")
    return path.resolve()


def _lies_in(path: Path, folder: Path) -> bool:
    home = folder.resolve()
    return path.resolve() != home and path.resolve().is_relative_to(home)


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return (path / "model_index.json").is_file()
    return path.is_file() and path.suffix == ".safetensors"

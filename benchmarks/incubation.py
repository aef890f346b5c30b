"""Incubation on the embedded model: every stage, and every ingredient left out in turn.

    python benchmarks/incubation.py --data emoji [--seed 0 --seed 1] [--arm full]

Nets lie in `runs/incubation/ARM-SEED`; what is trained is not trained again, and what was stopped
goes on. Stages that arms share are trained once for each seed. Arms that are trained end to end
get as many steps as make their multiply-accumulates equal to those of `full` with all its stages.
`benchmarks/incubated.py` measures them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeGuard

import typer

from leansd.cli.terminal import hush_libraries
from leansd.incubation.estimate import Estimate, estimate
from leansd.incubation.recipe import TEACHER, Recipe, Stage, load_recipe
from leansd.incubation.training_log import NET
from leansd.loading import load_outline
from leansd.report.incubating import incubate_into
from leansd.surgery.edits import Edit, Replace, Surgery, Take
from leansd.surgery.presets import find_surgery

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "incubation"
SEEDS = [0, 1, 2]
LIGHT, ASSEMBLED, EQUIPPED, WHOLE = "light", "assembled", "equipped", "whole"
FULL = "full"

Change = Callable[[Stage], Stage]


def keep(stage: Stage) -> Stage:
    return stage


def without_loss(name: str) -> Change:
    """The stage without one of its losses."""

    def change(stage: Stage) -> Stage:
        losses = {key: value for key, value in stage.losses.items() if key != name}
        return stage.model_copy(update={"losses": losses})

    return change


def puts(edit: Edit, kind: str) -> TypeGuard[Replace]:
    """Whether an edit puts one kind of part in place."""
    return isinstance(edit, Replace) and edit.by == kind


def without_part(kind: str) -> Change:
    """The stage without the edits that put one kind of part in place."""

    def change(stage: Stage) -> Stage:
        edits = [each for each in stage.surgery.edits if not puts(each, kind)]
        return stage.model_copy(update={"surgery": Surgery(stage.surgery.name, edits)})

    return change


def with_raw_experts(stage: Stage) -> Stage:
    """The stage with experts whose channels stay in the order that their layers have them."""
    edits = [
        each.model_copy(update={"options": {**each.options, "align": False}})
        if puts(each, "condconv")
        else each
        for each in stage.surgery.edits
    ]
    return stage.model_copy(update={"surgery": Surgery(stage.surgery.name, edits)})


def quicken(stages: Mapping[str, Stage], blocks: Sequence[str], *kinds: str) -> Stage:
    """The second stage with these blocks of the light net, and these kinds of parts at once."""
    edits: list[Edit] = [Take(take=tuple(blocks), source=LIGHT)]
    edits += [
        each for each in stages[EQUIPPED].surgery.edits if any(puts(each, kind) for kind in kinds)
    ]
    steps = stages[ASSEMBLED].steps + stages[EQUIPPED].steps
    changes = {"surgery": Surgery("faster", edits), "steps": steps}
    return stages[ASSEMBLED].model_copy(update=changes)


ABLATIONS: Mapping[str, Change] = {
    FULL: keep,
    "no CLME": without_part("condconv"),
    "raw experts": with_raw_experts,
    "no GRI": without_part("gri"),
    "no mid": without_loss("mid"),
    "no VGG": without_loss("vgg"),
}
"""What becomes of the third stage."""
ENDED = "ended"
DIRECT = "direct"
"""The assembled and equipped net, distilled end to end from the teacher."""
BK = "bk"
LEAN, LEANER, LEANEST = "lean", "leaner", "leanest"
RECIPES: Mapping[str, str] = {
    BK: "emoji-bk.yaml",
    LEAN: "emoji-lean.yaml",
    LEANER: "emoji-leaner.yaml",
    LEANEST: "emoji-leanest.yaml",
}
"""BK-SDM's net and ours, by recipes of a single stage, end to end."""
TWO_LEVELS = ("dn0", "dn1", "up2", "up3")
THREE_LEVELS = ("dn0", "dn1", "dn2", "up1", "up2", "up3")
FASTER: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "1122 GRI": (TWO_LEVELS, ("gri",)),
    "1112 GRI": (THREE_LEVELS, ("gri",)),
    "1112": (THREE_LEVELS, ()),
}
"""Nets that take more blocks from the light one, and the parts that are put into the shallowest: a
third, two fifths and a third less time at Stable Diffusion 1.5's size. Trained as long as
`assembled` and `full` together."""
EVERY = [LIGHT, ASSEMBLED, *ABLATIONS, *FASTER, ENDED, DIRECT, *RECIPES]


@dataclass(frozen=True)
class Study:
    """All arms of one seed."""

    seed: int
    home: Path
    data: Path

    def get_folder(self, arm: str) -> Path:
        """Where an arm's run lies."""
        return self.home / f"{arm.replace(' ', '-')}-{self.seed}"

    def get_net(self, arm: str) -> str:
        """The finished net of an arm."""
        return str(self.get_folder(arm) / NET)

    def write_recipe(self, arm: str) -> Recipe:
        """What an arm trains, from nets that other arms have left."""
        recipe, stages = self._read("emoji-asdm.yaml")
        if arm in ABLATIONS:
            nets = {ASSEMBLED: self.get_net(ASSEMBLED)}
            return self._keep(recipe, [ABLATIONS[arm](stages[EQUIPPED])], nets)
        if arm in FASTER:
            nets = {LIGHT: self.get_net(LIGHT)}
            blocks, kinds = FASTER[arm]
            return self._keep(recipe, [quicken(stages, blocks, *kinds)], nets)
        if arm in RECIPES:
            own, student = self._read(RECIPES[arm])
            return self._spend(own, *student.values())
        return MAKERS[arm](self, recipe, stages)

    def make_light(self, recipe: Recipe, stages: Mapping[str, Stage]) -> Recipe:
        return self._keep(recipe, [stages[LIGHT]])

    def make_assembled(self, recipe: Recipe, stages: Mapping[str, Stage]) -> Recipe:
        return self._keep(recipe, [stages[ASSEMBLED]], {LIGHT: self.get_net(LIGHT)})

    def make_ended(self, recipe: Recipe, stages: Mapping[str, Stage]) -> Recipe:
        return self._keep(recipe, [stages[WHOLE]], {EQUIPPED: self.get_net(FULL)})

    def make_direct(self, recipe: Recipe, stages: Mapping[str, Stage]) -> Recipe:
        last = stages[EQUIPPED]
        edits = [*find_surgery("asdm-1222").edits, *last.surgery.edits]
        changes: dict[str, Any] = {
            "surgery": Surgery(DIRECT, edits),
            "nets": {"original": TEACHER, "teacher": TEACHER},
            "train": ("*",),
        }
        return self._spend(recipe, last.model_copy(update=changes))

    def _spend(self, recipe: Recipe, stage: Stage) -> Recipe:
        """A stage with the compute of all stages up to `full`."""
        whole, stages = self._read("emoji-asdm.yaml")
        first = [stages[name] for name in (LIGHT, ASSEMBLED, EQUIPPED)]
        spent = sum(each.macs * each.samples for each in _count(self._keep(whole, first)).stages)
        (own,) = _count(self._keep(recipe, [stage])).stages
        steps = round(spent / own.macs * stage.steps / own.samples)
        return self._keep(recipe, [stage.model_copy(update={"steps": steps})])

    def _read(self, name: str) -> tuple[Recipe, dict[str, Stage]]:
        changes = (f"seed={self.seed}", f"data.path={self.data / 'train'}",
                   f"data.cache={self.home / 'cache'}")  # fmt: skip
        recipe = load_recipe(name, changes)
        return recipe, {stage.name: stage for stage in recipe.stages}

    def _keep(
        self, recipe: Recipe, stages: list[Stage], nets: Mapping[str, str] | None = None
    ) -> Recipe:
        document = recipe.model_copy(update={"stages": tuple(stages), "nets": dict(nets or {})})
        return Recipe.model_validate(document.to_document())


MAKERS: Mapping[str, Callable[[Study, Recipe, Mapping[str, Stage]], Recipe]] = {
    LIGHT: Study.make_light,
    ASSEMBLED: Study.make_assembled,
    ENDED: Study.make_ended,
    DIRECT: Study.make_direct,
}


def _count(recipe: Recipe) -> Estimate:
    return estimate(recipe, load_outline(recipe.model), macs_per_second=1.0, device="")


Data = Annotated[Path, typer.Option(help="What `python -m models.emoji pictures --out` wrote.")]


def main(
    data: Data = Path("emoji"),
    seed: Annotated[list[int], typer.Option()] = SEEDS,
    arm: Annotated[list[str], typer.Option()] = EVERY,
    out: Path = RUNS,
) -> None:
    """Train arms, seed by seed."""
    hush_libraries()
    for number in seed:
        study = Study(number, out.resolve(), data.resolve())
        for name in arm:
            folder = study.get_folder(name)
            if (folder / NET).exists():
                continue
            print(f"-- {name}, seed {number}", flush=True)
            recipe = study.write_recipe(name)
            incubate_into(folder, recipe, resume=folder.exists(), note=tell)


def tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    typer.run(main)

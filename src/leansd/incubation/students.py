"""The student of a stage: made by surgery, with what trains, what is frozen and what is compared.

Frozen is what came unchanged from the teacher and was never trained. What an earlier stage left
frozen stays so when a later one takes it over.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from leansd.anatomy import read_anatomy
from leansd.errors import LeansdError
from leansd.incubation.losses import list_boundary
from leansd.incubation.recipe import TEACHER, Stage
from leansd.loading import load_outline, load_unet
from leansd.plans.address import get_block
from leansd.plans.anatomy import Anatomy
from leansd.surgery.apply import operate
from leansd.surgery.lineage import Lineage, Pair

FILE = "incubation.json"


@dataclass(frozen=True)
class StageNet:
    """A UNet that a stage may start from."""

    unet: UNet2DConditionModel
    lineage: Lineage | None = None
    """Back to the teacher; none of the teacher itself."""
    frozen: frozenset[str] = frozenset()
    """Units that are still the teacher's."""


@dataclass(frozen=True)
class Student:
    """What a stage trains."""

    unet: UNet2DConditionModel
    lineage: Lineage
    """Back to the teacher."""
    anatomy: Anatomy
    trained: tuple[str, ...]
    """Units, in running order."""
    frozen: frozenset[str]
    """Units that are the teacher's, and stay so."""

    def list_pairs(self, mode: str) -> tuple[Pair, ...]:
        """What to distil: the end of every block, or all that leaves the blocks that train.

        Where blocks are trained apart, the skips that they hand over have no other teacher.
        """
        if mode == "end-to-end":
            return self.lineage.pairs()
        blocks = dict.fromkeys(get_block(at) for at in self.trained)
        leaving = [at for block in blocks for at in list_boundary(self.anatomy, block)]
        return tuple(Pair(at, self.lineage.stands_for(at)) for at in leaving)


def make_student(stage: Stage, nets: Mapping[str, StageNet]) -> Student:
    """Operate as a stage says, and freeze all but what it trains.

    Args:
        nets: the teacher, and what earlier stages made, by name.

    Raises:
        LeansdError: the surgery cannot be done, or nothing would train.
    """
    own = {name: nets[net] for name, net in stage.nets.items()}
    unet, made = operate({name: net.unet for name, net in own.items()}, stage.surgery)
    # Nets may be in half precision, what trains may not. `to` is that of `nn.Module`: diffusers'
    # own warns where it has nothing to warn of.
    nn.Module.to(unet, torch.float32)
    teachers = {name for name, net in stage.nets.items() if net == TEACHER}
    earlier = {name: net.lineage for name, net in own.items() if net.lineage is not None}
    lineage = rename_teacher(made, teachers).trace(earlier)
    anatomy = read_anatomy(unet)
    # The teacher's still, bit for bit.
    untouched = {
        at
        for at, (net, origin) in ((at, made.origins[at]) for at in made.units)
        if at not in made.changed and (net in teachers or origin in own[net].frozen)
    }
    if stage.train is None:
        picked = set(anatomy.addresses) - untouched
    else:
        picked = {unit.at for each in stage.train for unit in anatomy.select(each)}
    if not picked:
        raise LeansdError(
            f"stage {stage.name} trains nothing, since all of its student is the teacher's "
            "unchanged; say what trains, train: ['*'] for all of it"
        )
    # What lies in no unit, such as the time embedding, trains where all of it does.
    unet.requires_grad_(stage.train is not None and "*" in stage.train)
    for at in picked:
        unet.get_submodule(anatomy[at].path).requires_grad_(True)
    trained = tuple(at for at in anatomy.addresses if at in picked)
    return Student(unet, lineage, anatomy, trained, frozenset(untouched - picked))


def rename_teacher(lineage: Lineage, names: Collection[str]) -> Lineage:
    """A lineage that calls the teacher so, whatever a surgery called it."""
    origins = {
        at: origin._replace(net=TEACHER) if origin.net in names else origin
        for at, origin in lineage.origins.items()
    }
    nets = {TEACHER if name in names else name: units for name, units in lineage.nets.items()}
    base = TEACHER if lineage.base in names else lineage.base
    return lineage.model_copy(update={"origins": origins, "nets": nets, "base": base})


def save_net(student: Student, folder: Path, about: Mapping[str, Any]) -> None:
    """Write a UNet in diffusers' layout, with its lineage and what of it is still the teacher's."""
    student.unet.save_pretrained(folder)
    student.lineage.save(folder / "lineage.json")
    text = json.dumps({**about, "frozen": sorted(student.frozen)}, indent=1)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def open_net(folder: Path) -> StageNet:
    """A net as `save_net` wrote it, on the CPU in float32.

    Raises:
        LeansdError: there is none, or none that incubation left.
    """
    return StageNet(load_unet(folder, device="cpu", dtype=torch.float32), *_read_origin(folder))


def outline_net(folder: Path) -> StageNet:
    """The same on the meta device, for counting."""
    return StageNet(load_outline(folder), *_read_origin(folder))


def _read_origin(folder: Path) -> tuple[Lineage, frozenset[str]]:
    try:
        about = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return Lineage.load(folder), frozenset(about["frozen"])
    except (OSError, ValueError, KeyError) as error:
        raise LeansdError(
            f"{folder} holds no net that incubation left: give the folder of a stage's or a run's "
            f"net, which has a {FILE}"
        ) from error

"""Whose tensors an operated net gets: the two anatomies and the lineage say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy import read_anatomy
from leansd.errors import LeansdError
from leansd.plans.anatomy import Anatomy
from leansd.surgery.lineage import Lineage

_BLOCKS = "transformer_blocks"


class Donor(NamedTuple):
    """A tensor of one of the nets."""

    net: str
    name: str


def map_tensors(
    student: UNet2DConditionModel,
    lineage: Lineage,
    nets: Mapping[str, UNet2DConditionModel],
    *,
    skip: Sequence[str] = (),
) -> dict[str, Donor]:
    """For every tensor of the student, the tensor that it is a copy of.

    Args:
        skip: module paths of the student to leave out.

    Raises:
        LeansdError: there is none of that name and shape: the config of the net does not describe
            what it is made of. The message names the address.
    """
    anatomies = {name: read_anatomy(net) for name, net in nets.items()}
    theirs = {name: net.state_dict() for name, net in nets.items()}
    prefixes = _map_prefixes(read_anatomy(student), lineage, anatomies)
    found: dict[str, Donor] = {}
    for name, tensor in student.state_dict().items():
        if name.startswith(tuple(f"{path}." for path in skip)):
            continue
        prefix = _find_prefix(name, prefixes)
        at, (net, path) = prefixes[prefix] if prefix else ("", (lineage.base, ""))
        donor = Donor(net, path + name.removeprefix(prefix))
        other = theirs[net].get(donor.name)
        if other is None or other.shape != tensor.shape:
            raise LeansdError(_explain(at or name, donor, other, tensor))
        found[name] = donor
    return found


def _map_prefixes(
    anatomy: Anatomy, lineage: Lineage, anatomies: Mapping[str, Anatomy]
) -> dict[str, tuple[str, Donor]]:
    """By module path of the student: address, and where in which net it comes from."""
    prefixes: dict[str, tuple[str, Donor]] = {}
    for at, origin in lineage.origins.items():
        unit, _, block = at.partition(".attn.t")
        if not block:
            donor = Donor(origin.net, anatomies[origin.net].by_address[origin.at].path)
            prefixes[anatomy.by_address[at].path] = (at, donor)
            continue
        whole, _, number = origin.at.partition(".attn.t")
        path = anatomies[origin.net].by_address[whole + ".attn"].path
        donor = Donor(origin.net, f"{path}.{_BLOCKS}.{number}")
        inner = anatomy.by_address[unit + ".attn"].path
        prefixes[f"{inner}.{_BLOCKS}.{block}"] = (at, donor)
    return prefixes


def _find_prefix(name: str, prefixes: Mapping[str, object]) -> str:
    """The longest of the paths that a tensor lies under; empty for one outside all units."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        path = ".".join(parts[:depth])
        if path in prefixes:
            return path
    return ""


def _explain(at: str, donor: Donor, found: torch.Tensor | None, wanted: torch.Tensor) -> str:
    if found is None:
        has = f"no tensor {donor.name}"
    else:
        has = f"{donor.name} of shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    return (
        f"{at}: net {donor.net} has {has}, so its config does not describe it; unload its LoRA if "
        "it has one, or open it with the config that it was saved with"
    )

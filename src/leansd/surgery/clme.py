"""`condconv`: CLME-CondConv, a ResNet whose experts are the kernels of other layers.

CLME is A-SDM's cross-layer multi-expert: what is left of a thinned block mixes the kernels of all
layers that the block had (arXiv 2406.00210).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusers import UNet2DConditionModel

from leansd.anatomy import read_anatomy
from leansd.errors import LeansdError
from leansd.plans.anatomy import Unit
from leansd.surgery.alignment import align_resnet
from leansd.surgery.condconv import CondConvResnet, check_resnet
from leansd.surgery.experts import Inputs, fill_experts, list_donors, read_inputs
from leansd.surgery.lineage import Origin
from leansd.surgery.replacements import Options, Replacement
from leansd.surgery.routing import ROUTERS, build_router

if TYPE_CHECKING:
    from leansd.surgery.blueprint import Source

OPTIONS = ("donors", "source", "routing", "align")
"""`donors` (addresses or globs, the block that it lies in if none is given) of the net `source`
(its own if none is given); `routing` by `time` or `image`; whether to `align` them first."""


def accept(unit: Unit, options: Options) -> None:
    """Refuse what is no ResNet, and options that are none."""
    if unit.kind != "resnet":
        raise LeansdError(f"{unit.at} is no ResNet; condconv is for the likes of *.res")
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise LeansdError(f"condconv has no option {unknown[0]!r}; there are {', '.join(OPTIONS)}")
    routing = options.get("routing", "time")
    if routing not in ROUTERS:
        raise LeansdError(f"condconv has no routing {routing!r}; there are {', '.join(ROUTERS)}")
    if not isinstance(options.get("align", False), bool):
        raise LeansdError("condconv's align is true or false")


def settle(origin: Origin, options: Options, sources: Mapping[str, Source]) -> Options:
    """All options of one place: its donors by their full addresses, without what it comes from."""
    net = options.get("source", origin.net)
    if net not in sources:
        raise LeansdError(f"no net {net!r} to take experts from: there are {', '.join(sources)}")
    donors = options.get("donors", origin.at.split(".")[0])
    own = origin.at if net == origin.net else None
    anatomy = sources[net].anatomy
    found = list_donors(anatomy, [donors] if isinstance(donors, str) else donors, own)
    width = sources[origin.net].anatomy[origin.at].channels[1]
    for at in found:
        if anatomy[at].channels[1] != width:
            raise LeansdError(
                f"{at} gives {anatomy[at].channels[1]} channels and {origin.at} {width}; donors "
                "must give as many"
            )
    return {
        "donors": list(found),
        "source": net,
        "routing": options.get("routing", "time"),
        "align": options.get("align", False),
    }


def build(unet: UNet2DConditionModel, at: str, options: Options) -> None:
    """Give a ResNet experts, copies of its own kernels, and a router."""
    path = read_anatomy(unet)[at].path
    resnet: Any = unet.get_submodule(path)
    try:
        check_resnet(resnet)
        experts = len(options["donors"])
        router = build_router(options["routing"], resnet, experts)
        conditional = CondConvResnet(resnet, router, experts)
    except LeansdError as error:
        raise LeansdError(f"{at}: {error}") from None
    parent, _, name = path.rpartition(".")
    setattr(unet.get_submodule(parent), name, conditional)


def inherit(
    student: UNet2DConditionModel,
    at: str,
    nets: Mapping[str, UNet2DConditionModel],
    origin: Origin,
    options: Options,
) -> None:
    """Make the donors' kernels its experts."""
    anatomy, source = read_anatomy(student), nets[options["source"]]
    theirs = read_anatomy(source)
    resnet: Any = student.get_submodule(anatomy[at].path)
    mine = read_inputs(anatomy, at)
    donors: list[tuple[Any, Inputs]] = [
        (source.get_submodule(theirs[donor].path), read_inputs(theirs, donor))
        for donor in options["donors"]
    ]
    if options["align"]:
        donors = [(align_resnet(donor, resnet, read, mine), read) for donor, read in donors]
    fill_experts(resnet, mine, donors)


REPLACEMENT = Replacement(accept, build, inherit, settle)

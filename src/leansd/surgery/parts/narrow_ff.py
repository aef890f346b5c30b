"""`narrow-ff`: a transformer's feed-forward with a share of its hidden units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import nn

from leansd.errors import LeansdError
from leansd.plans.anatomy import Unit
from leansd.surgery.lineage import Origin
from leansd.surgery.parts import AddressedUNet, Options, Replacement
from leansd.text import refuse_unknown


def validate(unit: Unit, options: Options) -> None:
    """Refuse what is no feed-forward, and a share that leaves nothing or adds."""
    if unit.kind != "feed-forward":
        raise LeansdError(f"{unit.at} is no feed-forward; narrow-ff is for the likes of *.ff")
    refuse_unknown("narrow-ff", options, ("share",))
    share = options.get("share")
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise LeansdError(
            f"{unit.at}: narrow-ff keeps a share in (0, 1], not {share!r}; give share=0.5"
        )


def build(net: AddressedUNet, at: str, options: Options) -> None:
    """Put a narrower GEGLU and its projection in place."""
    layers: Any = net.find(at).net  # GEGLU, dropout, projection
    gate, project = layers[0], layers[2]
    if not isinstance(gate, GEGLU):
        raise LeansdError(f"{at} is no GEGLU feed-forward, which narrow-ff is for")
    width = count_kept(project.in_features, options["share"])
    narrow = GEGLU(gate.proj.in_features, width, bias=gate.proj.bias is not None)
    layers[0] = narrow.to(gate.proj.weight)
    narrow_project = nn.Linear(width, project.out_features, bias=project.bias is not None)
    layers[2] = narrow_project.to(project.weight)


@torch.no_grad()
def inherit(
    student: AddressedUNet,
    at: str,
    nets: Mapping[str, AddressedUNet],
    origin: Origin,
    options: Options,
) -> None:
    """Take over the hidden units with the largest norms, in their old order.

    A unit's norm is that of its three weight vectors together: value, gate, and the column that
    writes it out.
    """
    net: Any = student.find(at).net
    whole: Any = nets[origin.net].find(origin.at).net
    weight, out = whole[0].proj.weight, whole[2].weight  # [2 * hidden, C], [C, hidden]
    hidden = out.shape[1]
    norms = weight.float().square().sum(1).view(2, hidden).sum(0) + out.float().square().sum(0)
    kept = norms.topk(net[2].in_features).indices.sort().values
    both = torch.cat([kept, kept + hidden])
    net[0].proj.weight.copy_(weight[both])
    if whole[0].proj.bias is not None:
        net[0].proj.bias.copy_(whole[0].proj.bias[both])
    net[2].weight.copy_(out[:, kept])
    if whole[2].bias is not None:
        net[2].bias.copy_(whole[2].bias)


def count_kept(hidden: int, share: float) -> int:
    """How many of `hidden` units a share is, at least one."""
    return max(1, round(hidden * share))


REPLACEMENT = Replacement(validate, build, inherit)

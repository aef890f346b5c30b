"""Feature inheritance for a pipeline or a UNet: in a `with` block, or until released."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from diffusers import UNet2DConditionModel

from leansd.errors import LeansdError
from leansd.plans.plan import Plan
from leansd.plans.resolve import find_source
from leansd.runtime.attachment import Attachment
from leansd.runtime.engines import list_attachments
from leansd.runtime.graphs import read_options
from leansd.runtime.nets import keep_company

NO_NETS: Mapping[str, UNet2DConditionModel] = MappingProxyType({})


def inherit(
    target: Any,
    plan: Plan | str,
    *,
    nets: Mapping[str, UNet2DConditionModel] = NO_NETS,
    compile: bool | Mapping[str, Any] = False,
) -> Attachment:
    """Let a pipeline, or a bare UNet, follow a plan inside a `with` block.

    Feature inheritance is that of A-SDM (arXiv 2406.00210), for any unit, step and way. Latents
    [B, C, H, W] may be of any size; where a batch or size changes midway, the step is computed in
    full.

    Args:
        target: a diffusers pipeline with a `unet`, or a `UNet2DConditionModel`.
        plan: a `Plan`, the name of a preset (which fits itself to every run's step count) or the
            path of a plan file.
        nets: UNets by the names that the plan calls them by (`Plan.switch`). They run in the place
            of the pipeline's own at some steps; nothing of the pipeline is changed.
        compile: True, or options of `torch.compile` such as `{"mode": "reduce-overhead"}`: compile
            the UNet, one whole graph for each pattern of the plan. Graphs stay with the UNet for
            the next time. What cannot be compiled runs eagerly, with one warning.

    Raises:
        LeansdError: the plan does not suit the UNet, an option is not one of `torch.compile`, or
            the target is attached already. A run with another step count than the plan's is refused
            before its first step.
    """
    return _make_attachment(target, plan, nets, compile)


def inherit_(
    target: Any,
    plan: Plan | str,
    *,
    nets: Mapping[str, UNet2DConditionModel] = NO_NETS,
    compile: bool | Mapping[str, Any] = False,
) -> Attachment:
    """The same without a `with`: until `release_(target)`, in every thread.

    Raises:
        LeansdError: what `inherit` would raise.
    """
    return _make_attachment(target, plan, nets, compile).attach()


def release_(target: Any) -> None:
    """Undo `inherit_`. Releasing what is not attached does nothing."""
    pipe, unet = _split_target(target)
    for attachment in list_attachments(unet):
        if attachment.pipe is pipe:
            attachment.release()


def _make_attachment(
    target: Any,
    plan: Plan | str,
    nets: Mapping[str, UNet2DConditionModel],
    compile: bool | Mapping[str, Any],
) -> Attachment:
    pipe, unet = _split_target(target)
    return Attachment(
        unet, pipe, find_source(plan), read_options(compile), keep_company(unet, nets)
    )


def _split_target(target: Any) -> tuple[Any | None, UNet2DConditionModel]:
    """(pipeline or None, UNet)."""
    if isinstance(target, UNet2DConditionModel):
        return None, target
    unet = getattr(target, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        raise LeansdError(
            f"cannot attach to a {type(target).__name__}: it needs a pipeline with a "
            "UNet2DConditionModel as its `unet`, or such a UNet"
        )
    return target, unet

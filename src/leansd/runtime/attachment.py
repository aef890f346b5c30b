"""Feature inheritance for a pipeline or a UNet: in a `with` block, or until released."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from leansd.anatomy.reading import unwrap_module
from leansd.errors import LeansdError
from leansd.plans.plan import Plan
from leansd.plans.resolve import find_source
from leansd.runtime.compiled import read_options
from leansd.runtime.context import find_transformer
from leansd.runtime.engine import attach, detach, find_followers
from leansd.runtime.nets import match_nets
from leansd.runtime.report import Report
from leansd.runtime.run import Follower
from leansd.runtime.whole_steps import WholeStepFollower, find_whole_follower

NO_NETS: Mapping[str, UNet2DConditionModel] = MappingProxyType({})


class Attachment:
    """A pipeline, or a bare UNet, that follows a plan: `with leansd.inherit(pipe, plan) as run`."""

    def __init__(
        self,
        follower: Follower | WholeStepFollower,
        hook: Callable[[Any], None] = attach,
        unhook: Callable[[Any], None] = detach,
    ) -> None:
        self._follower, self._hook, self._unhook = follower, hook, unhook

    def __enter__(self) -> Attachment:
        self._follower.thread = threading.get_ident()
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def attach(self) -> Attachment:
        """Follow the plan from now on."""
        self._hook(self._follower)
        return self

    def release(self) -> None:
        """Stop following the plan; the UNet is as it was, nothing is kept."""
        self._unhook(self._follower)

    def report(self) -> Report:
        """What the last run did, kept and gained.

        Raises:
            LeansdError: nothing has run yet.
        """
        follower = self._follower
        if isinstance(follower, Follower) and _has_other_unet(follower):
            follower.warn_once(
                "the pipeline has another UNet than when it was attached, which follows no plan: "
                "leave, and attach it again; the report is of the one before"
            )
        return follower.report()


def inherit(
    target: Any,
    plan: Plan | str | Path | Sequence[Plan | str | Path],
    *,
    nets: Mapping[str, UNet2DConditionModel] = NO_NETS,
    compile: bool | Mapping[str, Any] = False,
) -> Attachment:
    """Let a pipeline, or a bare UNet, follow a plan inside a `with` block.

    Feature inheritance is that of A-SDM (arXiv 2406.00210), for any unit, step and way. Latents
    [B, C, H, W] may be of any size; where a batch or size changes midway, the step is computed in
    full. So is what others look into or differentiate, and whatever follows a change of the text,
    another condition, weights or adapters. An attachment of a pipeline is for that pipeline's
    calls, one of a bare UNet for all of its calls.

    Args:
        target: a diffusers pipeline with a `unet`, or a `UNet2DConditionModel`; or a pipeline with
            a `transformer` (SD3, FLUX, Qwen-Image, Z-Image), for plans of whole steps.
        plan: a `Plan`, the name of a preset (which fits itself to every run's step count) or the
            path of a plan file; or several that were tuned at other guidance scales or strengths,
            of which every run follows the nearest.
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
    transformer = find_transformer(target)
    if transformer is not None:
        _refuse_insides(target, nets, compile)
        whole = WholeStepFollower(target, transformer, find_source(plan))
        return Attachment(whole, WholeStepFollower.attach, WholeStepFollower.release)
    pipe, unet, wrapper = _split_target(target)
    follower = Follower(
        unet,
        pipe,
        find_source(plan),
        nets=match_nets(unet, nets),
        compile_options=read_options(compile),
        wrapper=wrapper,
    )
    if follower.compile_options is None and (wrapper is not None or is_compiled(unet)):
        follower.warn_once(
            "the UNet was compiled without the plan, so it runs eagerly while it follows it: "
            "give compile=True to compile it with the plan"
        )
    return Attachment(follower)


def inherit_(
    target: Any,
    plan: Plan | str | Path | Sequence[Plan | str | Path],
    *,
    nets: Mapping[str, UNet2DConditionModel] = NO_NETS,
    compile: bool | Mapping[str, Any] = False,
) -> Attachment:
    """The same without a `with`: until `release_(target)`, in every thread.

    Raises:
        LeansdError: what `inherit` would raise.
    """
    return inherit(target, plan, nets=nets, compile=compile).attach()


def release_(target: Any) -> None:
    """Undo `inherit_`, also where the pipeline has got another UNet since.

    Releasing what is not attached does nothing.
    """
    whole = find_whole_follower(target)
    if whole is not None:
        whole.release()
    is_module = isinstance(target, nn.Module)
    unet, _ = unwrap_module(target) if is_module else (None, None)
    for follower in find_followers(None if is_module else target, unet):
        detach(follower)


def _refuse_insides(
    pipe: Any, nets: Mapping[str, UNet2DConditionModel], compile: bool | Mapping[str, Any]
) -> None:
    kind = f"a {type(pipe).__name__}, of whose transformer only whole steps are inherited,"
    if nets:
        raise LeansdError(f"{kind} cannot switch to other nets")
    if compile:
        raise LeansdError(
            f"{kind} needs no graph of the plan's: compile it by itself, as in "
            "pipe.transformer.compile()"
        )


def is_compiled(unet: nn.Module) -> bool:
    """Whether a UNet, or a part of it, was compiled by its own `compile()`."""
    return any(vars(each).get("_compiled_call_impl") is not None for each in unet.modules())


def _has_other_unet(follower: Follower) -> bool:
    """Whether a pipeline that is attached has got another UNet since."""
    pipe = follower.pipe
    if pipe is None or follower not in find_followers(pipe, follower.unet):
        return False
    return unwrap_module(pipe.unet)[0] is not follower.unet


def _split_target(target: Any) -> tuple[Any | None, UNet2DConditionModel, nn.Module | None]:
    """(pipeline or None, UNet, the wrapper that `torch.compile` put around it or None)."""
    is_module = isinstance(target, nn.Module)
    given = target if is_module else getattr(target, "unet", None)
    unet, wrapper = unwrap_module(given)
    if not isinstance(unet, UNet2DConditionModel):
        kinds = type(target).__name__
        kinds += "" if is_module or unet is None else f" with a {type(unet).__name__} as its `unet`"
        raise LeansdError(
            f"cannot attach to a {kinds}: it needs a pipeline with a UNet2DConditionModel as its "
            "`unet`, or with a `transformer` that denoises, or such a UNet"
        )
    return None if is_module else target, unet, wrapper

"""What the engine is held against, written without it: predictions, brute force, stores watched."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from conformance.cases import STEPS, Call
from conformance.samplers import Sampler
from leansd.plans import Anatomy, Plan
from leansd.plans.liveness import Call as UNetCall
from leansd.plans.liveness import compile_plan
from leansd.runtime.engine import list_attachments
from leansd.runtime.store import Store

PLANS: Mapping[str, Callable[[int], Plan]] = {
    "full": lambda blocks: Plan.full(STEPS),
    "reuse": lambda blocks: Plan.every(2, cut=f"up{blocks - 1}.l1", steps=STEPS),
    "deep": lambda blocks: Plan.every(3, cut="up0.l0", steps=STEPS).inherit("dn*", at=[2, 4]),
    "residual": lambda blocks: Plan.every(2, cut="*.attn", steps=STEPS, how="residual"),
    "forecast": lambda blocks: Plan.between(
        [0, 1, 3], cut=f"up{blocks - 2}", steps=STEPS, how="forecast"
    ),
}
"""Plans by name, for so many up blocks."""


def draw(pipe: Any, call: Call, steps: int = STEPS, seed: int = 3) -> torch.Tensor:
    """The latents of one pipeline call."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        num_inference_steps=steps, generator=generator, output_type="latent", **call.arguments
    ).images


def predict(
    plan: Plan, anatomy: Anatomy, sampler: Sampler, call: Call, moments: Sequence[float]
) -> list[UNetCall]:
    """The UNet calls of a pipeline call: its start and restarts compute everything."""
    rows = sampler.rows(plan.steps)
    skipped = plan.steps - int(plan.steps * call.strength)
    begins = [skipped * sampler.order, *call.restarts]
    ends = [*call.restarts, len(rows)]
    calls: list[UNetCall] = []
    for begin, end in zip(begins, ends, strict=True):
        program = compile_plan(plan, anatomy, start=begin, rows=rows, moments=moments)
        calls += program.calls[: end - begin]
    return calls


def count_predicted(calls: Sequence[UNetCall]) -> Counter[str]:
    return Counter(at for call in calls for at in call.pattern.computed)


class Output(NamedTuple):
    """What a unit gave at a UNet call, and what it added to its input."""

    call: int
    tensor: torch.Tensor
    change: torch.Tensor | None


@contextmanager
def overwrite(pipe: Any, anatomy: Anatomy, calls: Sequence[UNetCall]) -> Iterator[None]:
    """Brute force: every unit is computed at every call, then inherited outputs are put over it."""
    history: dict[str, list[Output]] = {}
    control: tuple[str, Any] | None = None
    batch: torch.Size | None = None
    number = -1

    def on_unet(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal batch, number
        number += 1
        shape = (args[0] if args else kwargs["sample"]).shape
        if shape != batch:
            history.clear()
        batch = shape

    def hook(at: str, module: Any, args: Any, output: Any) -> Any:
        call = calls[number]
        tensor = output[0] if isinstance(output, tuple) else output
        if at in call.pattern.computed:
            change = tensor - args[0] if tensor.shape == args[0].shape else None
            history.setdefault(at, []).append(Output(call.index, tensor.clone(), change))
        elif at in call.pattern.inherited:
            how = call.pattern.inherited[at]
            tensor = recall(history[at], how, call.index, args[0], pipe.scheduler)
        return (tensor,) if isinstance(output, tuple) else tensor

    def on_control(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """A ControlNet gives again what it gave when the whole encoder was last computed."""
        nonlocal control
        scale = repr(kwargs["conditioning_scale"])
        if control is None or runs_control(calls[number + 1]) or control[0] != scale:
            down, mid = output
            control = scale, ([each.clone() for each in down], mid.clone())
            return output
        down, mid = control[1]
        return [each.clone() for each in down], mid.clone()

    handles = [pipe.unet.register_forward_pre_hook(on_unet, with_kwargs=True)]
    if hasattr(pipe, "controlnet"):
        handles.append(pipe.controlnet.register_forward_hook(on_control, with_kwargs=True))
    for unit in anatomy:
        module = pipe.unet.get_submodule(unit.path)
        handles.append(module.register_forward_hook(partial(hook, unit.at)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def recall(
    outputs: Sequence[Output], how: str, index: int, given: torch.Tensor, scheduler: Any
) -> torch.Tensor:
    """What a unit gives at call `index` that inherits from its computed outputs."""
    latest = outputs[-1]
    if how == "residual":
        assert latest.change is not None
        return given + latest.change
    moments = scheduler.timesteps.double().numpy()
    earlier = [each for each in outputs if moments[each.call] != moments[latest.call]]
    if how == "reuse" or not earlier:
        return latest.tensor.clone()
    alphas = scheduler.alphas_cumprod.double().numpy()
    log_snr = np.interp(moments, np.arange(len(alphas)), np.log(alphas / (1 - alphas)))
    before = earlier[-1]
    weight = (log_snr[index] - log_snr[before.call]) / (log_snr[latest.call] - log_snr[before.call])
    return torch.lerp(before.tensor, latest.tensor, float(weight))


def runs_control(call: UNetCall) -> bool:
    """Whether the whole encoder is computed."""
    skipped = {*call.pattern.inherited, *call.pattern.idle}
    return not any(at.startswith("dn") for at in skipped)


@contextmanager
def count_control(pipe: Any) -> Iterator[list[None]]:
    """An entry for every time that a ControlNet's own work is done; of several, the first's."""
    runs: list[None] = []
    controlnet = getattr(pipe, "controlnet", None)
    if controlnet is None:
        yield runs
        return
    net = controlnet.nets[0] if hasattr(controlnet, "nets") else controlnet
    handle = net.mid_block.register_forward_pre_hook(lambda *_: runs.append(None))
    try:
        yield runs
    finally:
        handle.remove()


@contextmanager
def watch_stores() -> Iterator[list[Store]]:
    """The stores that anything was kept in meanwhile."""
    stores: list[Store] = []
    keep = Store.keep

    def note(store: Store, *args: Any) -> None:
        if all(store is not other for other in stores):
            stores.append(store)
        keep(store, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "keep", note)
        yield stores


def is_empty(store: Store) -> bool:
    return store.bytes == 0 and not list_tensors(store)


def list_tensors(store: Store) -> list[torch.Tensor]:
    return list(store._tensors.values())


def is_plain(unet: UNet2DConditionModel) -> bool:
    """Whether nothing is woven around any module."""
    return not list_attachments(unet) and not any("forward" in vars(m) for m in unet.modules())

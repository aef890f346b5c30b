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
from torch.utils._pytree import tree_map_only

from conformance.cases import STEPS, Call
from conformance.samplers import Sampler
from leansd.core.outputs import FeatureCache
from leansd.plans import Anatomy, Plan, preset
from leansd.plans.anatomy import HEAD
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import Call as UNetCall
from leansd.runtime.engine import list_followers
from leansd.runtime.run import Follower

PLANS: Mapping[str, Callable[[int], Plan]] = {
    "full": lambda blocks: Plan.full(STEPS),
    "reuse": lambda blocks: Plan.every(2, cut=f"up{blocks - 1}.l1", steps=STEPS),
    "deep": lambda blocks: Plan.every(3, cut="up0.l0", steps=STEPS).inherit("dn*", at=[2, 4]),
    "residual": lambda blocks: Plan.every(2, cut="*.attn", steps=STEPS, how="residual"),
    "forecast": lambda blocks: Plan.between(
        [0, 1, 3], cut=f"up{blocks - 2}", steps=STEPS, how="forecast"
    ),
    "parts": lambda blocks: (
        Plan.full(STEPS).inherit("*.ca", at=[1, 3, 4]).inherit("up*.attn.t0.sa", "dn0", at=[2, 3])
    ),
    "guidance": lambda blocks: (
        Plan.every(2, cut=f"up{blocks - 1}.l1", steps=STEPS)
        .guide("inherit", at=[1, 2])
        .guide("drop", at=4)
    ),
    "guidance-forecast": lambda blocks: Plan.every(
        2, cut="*.attn", steps=STEPS, how="residual"
    ).guide("forecast", at=[2, 4]),
    "guidance-head": lambda blocks: Plan.between(
        [0, 1, 3], cut=HEAD, steps=STEPS, how="forecast"
    ).guide("forecast", at=3),
    "denoised": lambda blocks: Plan.between([0, 1, 3], cut=HEAD, steps=STEPS, how="denoised"),
    "denoised-guidance": lambda blocks: Plan.between(
        [0, 1, 3], cut=HEAD, steps=STEPS, how="denoised"
    ).guide("inherit", at=3),
    "gate": lambda blocks: preset("tgate", steps=STEPS, blocks=blocks, gate=2),
}
"""Plans by name, for so many up blocks."""
FORECASTS = ("forecast", "guidance-forecast", "guidance-head", "denoised", "denoised-guidance")


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
    for begin, end, guided in zip(begins, ends, call.guided, strict=True):
        program = compile_plan(
            plan, anatomy, start=begin, rows=rows, moments=moments, guided=guided
        )
        calls += program.calls[: end - begin]
    return calls


def count_predicted(calls: Sequence[UNetCall]) -> Counter[str]:
    return Counter(at for call in calls for at in call.pattern.active)


class Output(NamedTuple):
    """What a unit gave at a UNet call for its input, and what it added to that."""

    call: int
    tensor: torch.Tensor
    change: torch.Tensor | None
    given: torch.Tensor | None = None


@contextmanager
def overwrite(pipe: Any, anatomy: Anatomy, calls: Sequence[UNetCall]) -> Iterator[None]:
    """Brute force: every unit is computed at every call, then inherited outputs are put over it.

    A call without its unconditional half takes the second half of every input and gets the first
    half of its output made up.
    """
    history: dict[tuple[str, str], list[Output]] = {}
    control: tuple[str, Any] | None = None
    batch: torch.Size | None = None
    sample = torch.empty(0)
    number = -1

    def before_unet(module: Any, args: Any, kwargs: Any) -> Any:
        nonlocal batch, number, sample
        number += 1
        given = args[0] if args else kwargs["sample"]
        shape = given.shape
        # The latents of a lane, which both of a picture have in common.
        sample = given[-shape[0] // len(calls[number].lanes) :, : pipe.unet.config.out_channels]
        if shape != batch:
            history.clear()
        batch = shape
        if calls[number].guidance == "compute":
            return None
        half = partial(take_second_half, rows=shape[0])
        return tree_map_only(torch.Tensor, half, (args, kwargs))

    def after_unet(module: Any, args: Any, output: Any) -> Any:
        call, noise = calls[number], output[0]
        differences = history.setdefault(("guidance", "cond"), [])
        if call.guidance == "compute":
            if call.lanes != ("all",):
                rest, cond = noise.chunk(2)
                differences.append(Output(call.index, cond - rest, None))
            return None
        difference = torch.zeros_like(noise)
        if call.guidance != "drop":
            how = "reuse" if call.guidance == "inherit" else "forecast"
            difference = recall(differences, how, call.index, noise, pipe.scheduler)
        rest = noise - difference
        if HEAD in call.pattern.active:
            # What is made up of the UNet's output is given, and so inherited, like the rest.
            made = Output(call.index, rest, None, sample)
            history.setdefault((HEAD, "rest"), []).append(made)
        return (torch.cat([rest, noise]),)

    def after_unit(at: str, module: Any, args: Any, output: Any) -> Any:
        call = calls[number]
        tensor = output[0] if isinstance(output, tuple) else output
        how = call.pattern.inherited.get(at) or call.pattern.parts.get(at)
        if how is None and at not in call.pattern.active:
            return None
        lanes = []
        count = len(call.lanes)
        for lane, given, new in zip(
            call.lanes, args[0].chunk(count), tensor.chunk(count), strict=True
        ):
            past = history.setdefault((at, lane), [])
            if how is not None:
                given = sample if at == HEAD else given
                new = recall(past, how, call.index, given, pipe.scheduler)
            else:
                change = new - given if new.shape == given.shape else None
                past.append(Output(call.index, new.clone(), change, sample.clone()))
            lanes.append(new)
        tensor = torch.cat(lanes)
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

    handles = [
        pipe.unet.register_forward_pre_hook(before_unet, with_kwargs=True),
        pipe.unet.register_forward_hook(after_unet),
    ]
    if hasattr(pipe, "controlnet"):
        handles.append(pipe.controlnet.register_forward_hook(on_control, with_kwargs=True))
    for unit in (*anatomy.units, *anatomy.parts):
        module = pipe.unet.get_submodule(unit.path)
        handles.append(module.register_forward_hook(partial(after_unit, unit.at)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def take_second_half(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The conditional half of an input that has a row for every row of the sample."""
    return tensor[rows // 2 :] if tensor.dim() and len(tensor) == rows else tensor


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
    if how == "denoised":
        assert latest.given is not None
        share = 1 / (1 + np.exp(-log_snr))
        kind = scheduler.config.prediction_type
        picture = denoise(latest.tensor, latest.given, share[latest.call], kind)
        picture = picture.to(latest.tensor.dtype).double()  # as precise as what is kept
        signal, noise = np.sqrt(share[index]), np.sqrt(1 - share[index])
        now = given.double()
        made = (now - signal * picture) if kind == "epsilon" else (signal * now - picture)
        return (made / noise).to(latest.tensor.dtype)
    before = earlier[-1]
    weight = (log_snr[index] - log_snr[before.call]) / (log_snr[latest.call] - log_snr[before.call])
    return torch.lerp(before.tensor, latest.tensor, float(weight))


def denoise(output: torch.Tensor, given: torch.Tensor, share: float, kind: str) -> torch.Tensor:
    """The picture that an input shows, of which a share is signal, in double precision."""
    signal, noise = np.sqrt(share), np.sqrt(1 - share)
    if kind == "epsilon":
        return (given.double() - noise * output.double()) / signal
    return signal * given.double() - noise * output.double()


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
def watch_stores() -> Iterator[list[FeatureCache]]:
    """The stores that anything was kept in meanwhile."""
    stores: list[FeatureCache] = []
    put = FeatureCache.put

    def note(store: FeatureCache, *args: Any) -> None:
        if all(store is not other for other in stores):
            stores.append(store)
        put(store, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureCache, "put", note)
        yield stores


@contextmanager
def watch_ends() -> Iterator[list[int]]:
    """For every pipeline call that ends meanwhile, the bytes that its end has to drop."""
    left: list[int] = []
    abort = Follower.abort

    def note(follower: Follower) -> None:
        run = follower.run
        if run is not None:
            control = (each.tensors.values() for each in run.residuals.branches.values())
            left.append(run.bytes + sum(kept.nbytes for some in control for kept in some))
        abort(follower)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Follower, "abort", note)
        yield left


def is_empty(store: FeatureCache) -> bool:
    return store.bytes == 0 and not list_tensors(store)


def list_tensors(store: FeatureCache) -> list[torch.Tensor]:
    return list(store._tensors.values())


def is_plain(unet: UNet2DConditionModel) -> bool:
    """Whether no module is hooked."""
    own = {"forward", "_reset_stateful_cache"}
    return not list_followers(unet) and not any(own & vars(m).keys() for m in unet.modules())

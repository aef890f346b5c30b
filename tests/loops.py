"""Sampling loops and counters for tests, written without anything of this package's engine."""

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy.inputs import make_inputs
from leansd.plans import Anatomy
from tiny import LATENT, TOKENS, tiny_scheduler
from watching import watch_before

OnStep = Callable[[int], None]


def sample(
    unet: UNet2DConditionModel,
    steps: int = 6,
    *,
    scheduler: Any = None,
    seed: int = 0,
    batch: int = 2,
    size: tuple[int, int] = (LATENT, LATENT),
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Latents [B, 4, H, W] after a plain sampling loop; every seed is another run."""
    scheduler = scheduler or tiny_scheduler()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(unet, size=size, tokens=TOKENS, batch=batch, generator=generator)
    latents = inputs.pop("sample") * scheduler.init_noise_sigma
    inputs.pop("timestep")
    with torch.no_grad():
        for index, t in enumerate(scheduler.timesteps):
            if on_step is not None:
                on_step(index)
            scaled = scheduler.scale_model_input(latents, t)
            noise = unet(scaled, t, **inputs, return_dict=False)[0]
            latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


def load_script(path: Path) -> Any:
    """A script as a module, without a process of its own, which would import torch again."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # as dataclasses want
    sys.path.insert(0, str(path.parent))  # as Python does for a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@contextmanager
def count_calls(unet: UNet2DConditionModel, anatomy: Anatomy) -> Iterator[Counter[str]]:
    """How often each unit's and part's own work was done, seen from inside it."""
    counts: Counter[str] = Counter()

    def make_hook(at: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[at] += 1

        return hook

    undo = []
    for unit in (*anatomy.units, *anatomy.parts):
        module = unet.get_submodule(unit.path)
        inner = next((m for m in module.modules() if m is not module), None)
        if inner is not None:
            leaf = next(m for m in inner.modules() if not list(m.children()))
            undo.append(watch_before(leaf, make_hook(unit.at)).remove)
        else:
            # The ends are convolutions, with nothing inside to hook but this method.
            undo.append(_count_convolution(module, make_hook(unit.at)))
    try:
        yield counts
    finally:
        for each in undo:
            each()


def _count_convolution(module: Any, hook: Callable[..., None]) -> Callable[[], None]:
    original = module._conv_forward

    def convolve(*args: Any) -> torch.Tensor:
        hook()
        return original(*args)

    module._conv_forward = convolve
    return lambda: delattr(module, "_conv_forward")

"""UNets by name: their anatomies, for which no weight is read, or themselves, to run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy.builtin import BUILTIN, open_builtin
from leansd.anatomy.counting import dissect
from leansd.anatomy.inputs import TOKENS
from leansd.errors import LeansdError
from leansd.loading import (
    EMBEDDED,
    FORMS,
    NETS,
    find_device,
    find_dtype,
    is_unet_folder,
    load,
    load_outline,
    load_unet,
    read_sampler,
)
from leansd.plans.anatomy import Anatomy
from leansd.plans.compile import compile_plan, predict_speedup
from leansd.plans.liveness import Net
from leansd.plans.plan import NO_NETS, Plan
from leansd.plans.resolve import PlanContext


def open_anatomy(model: str | Path, *, latent: int | None = None, tokens: int = TOKENS) -> Anatomy:
    """The anatomy of a built-in configuration or of any model that `leansd.load` opens."""
    return dissect(open_outline(model), latent=latent, tokens=tokens, name=str(model))


def open_outline(model: str | Path) -> UNet2DConditionModel:
    """The UNet, on the meta device, of a built-in configuration, a model or a UNet's folder."""
    name = str(model)
    if name in BUILTIN:
        return open_builtin(name)
    if name in (EMBEDDED, *NETS) or "/" in name or Path(name).exists():
        return load_outline(model)
    forms = FORMS.removeprefix("give ")
    raise LeansdError(f"no model {name!r}: give {', '.join(BUILTIN)}, or {forms}")


def open_unet(
    model: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None
) -> UNet2DConditionModel:
    """The UNet of a model, to run; a built-in configuration has random weights."""
    if is_unet_folder(model):
        return load_unet(model, device=device, dtype=dtype)
    if str(model) not in BUILTIN:
        pipe: Any = load(model, device=device, dtype=dtype)
        return pipe.unet
    where = find_device(device)
    unet: Any = UNet2DConditionModel(**BUILTIN[str(model)]).eval()
    return unet.to(where, dtype or find_dtype(where))


def outline_runs(
    model: str | Path,
    anatomy: Anatomy,
    steps: int | None,
    *,
    sampler: str | None = None,
    nets: Mapping[str, Anatomy] = NO_NETS,
) -> PlanContext:
    """What is known of a model's runs before a weight is read, to find a wrong plan early."""
    return PlanContext(steps, sampler or read_sampler(model), anatomy=anatomy, nets=nets)


def predict_gain(plan: Plan, anatomy: Anatomy, nets: Mapping[str, Anatomy] = NO_NETS) -> float:
    """How many times fewer multiply-accumulates the UNet does over a run of `plan`."""
    others = {name: Net(each) for name, each in nets.items()}
    calls = compile_plan(plan, anatomy, nets=others).calls
    return predict_speedup(calls, anatomy, others)

"""Optimizers by the name that a recipe gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from leansd.errors import LeansdError
from leansd.incubation.recipe import TrainerSettings


def _build_adamw(parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **options)


def _build_adamw8bit(parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
    except ImportError as error:
        raise LeansdError(
            "optimizer adamw8bit needs bitsandbytes and a CUDA device: install it, or take adamw"
        ) from error
    return AdamW8bit(parameters, **options)


OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _build_adamw,
    "adamw8bit": _build_adamw8bit,
}


def build_optimizer(
    settings: TrainerSettings, parameters: Iterable[nn.Parameter], rate: float
) -> torch.optim.Optimizer:
    """The optimizer of a stage."""
    return OPTIMIZERS[settings.optimizer](
        list(parameters), lr=rate, betas=settings.betas, weight_decay=settings.weight_decay
    )

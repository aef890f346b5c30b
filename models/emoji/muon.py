"""Muon: the optimizer of matrices, here for convolutions as well, with AdamW for all the rest.

A small net that is shown few samples learns from them much sooner with it: the momentum's singular
values are all made 1, so that rare directions are learnt as fast as common ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def orthogonalize(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Bring the singular values of (count, rows, columns) near 1, by Newton-Schulz.

    All rounds but the ends are done on the shorter side's Gram matrix, several times cheaper for
    the long matrices that convolutions have.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    turned = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if turned else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    gram, whole = x @ x.mT, one.expand(len(x), -1, -1)
    for turn in range(rounds):
        factor = a * one + b * gram + c * (gram @ gram)
        whole = factor @ whole if turn else factor
        if turn < rounds - 1:
            gram = factor @ gram @ factor
    x = whole @ x
    return x.mT if turned else x


class Muon(torch.optim.Optimizer):
    """Muon for the weights of hidden layers, AdamW for biases, norms, tables and the two ends.

    Its rate is AdamW's, times `others_scale` for the others: an update of Muon has the size that
    AdamW's would have. Weight decay is for the hidden ones alone.
    """

    def __init__(
        self,
        hidden: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        lr: float,
        others_scale: float = 1.0,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        groups = [
            {"params": list(hidden), "muon": True, "weight_decay": weight_decay},
            {"params": list(others), "muon": False, "scale": others_scale},
        ]
        defaults = {"lr": lr, "momentum": momentum, "betas": betas}
        super().__init__([g for g in groups if g["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            own = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._step_muon(group, own)
            else:
                self._step_adam(group, own)

    def _step_muon(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in parameters:
            shapes.setdefault((len(p), p.numel() // len(p)), []).append(p)
        for (rows, columns), own in shapes.items():
            moved = []
            for p in own:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                # Nesterov's look ahead.
                moved.append(p.grad.lerp(state["momentum"], group["momentum"]))
            stacked = torch.stack([m.reshape(rows, columns) for m in moved])
            scale = 0.2 * math.sqrt(max(rows, columns))
            for p, update in zip(own, orthogonalize(stacked), strict=True):
                p.mul_(1 - group["lr"] * group.get("weight_decay", 0.0))
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)

    def _step_adam(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        first, second = group["betas"]
        rate = group["lr"] * group.get("scale", 1.0)
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
            count = float(state["step"])
            state["mean"].lerp_(p.grad, 1 - first)
            state["square"].lerp_(p.grad.square(), 1 - second)
            spread = (state["square"] / (1 - second**count)).sqrt().add_(1e-8)
            p.addcdiv_(state["mean"], spread, value=-rate / (1 - first**count))


def make_optimizer(
    module: nn.Module, rate: float, ends: Iterable[str] = (), **settings: float
) -> Muon:
    """Return Muon for the module's trainable parameters; `ends` names parts left to AdamW."""
    hidden, others = [], []
    ends = tuple(ends)
    for name, p in module.named_parameters():
        if p.requires_grad:
            inner = p.ndim >= 2 and not any(end in name for end in ends)
            (hidden if inner else others).append(p)
    return Muon(hidden, others, lr=rate, **settings)

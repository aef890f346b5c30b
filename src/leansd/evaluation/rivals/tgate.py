"""T-GATE (Liu et al., arXiv 2404.02747): its package, and its schedule as a plan of this one."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from leansd.evaluation.contest import Contestant, Enter, Grounds, keep_forwards, send_plan
from leansd.evaluation.rivals.rival import Rival
from leansd.plans.presets import preset

GATES = (0.33, 0.5)
"""Shares of the run after which cross-attention is kept and guidance left out."""
LOADERS = {
    "StableDiffusionPipeline": "TgateSDLoader",
    "StableDiffusionXLPipeline": "TgateSDXLLoader",
}
"""The package has a pipeline call of its own for each of these classes, and for no others."""


def list_gates(grounds: Grounds) -> list[int]:
    """The steps from which on the gate is shut."""
    return sorted({max(1, round(share * grounds.contest.steps)) for share in GATES})


def send_package(grounds: Grounds) -> list[Contestant]:
    """The package with its defaults, where it has a call for the pipeline."""
    if not grounds.contest.is_long or type(grounds.pipe).__name__ not in LOADERS:
        return []
    steps = grounds.contest.steps
    return [
        Contestant(f"tgate {gate}", "tgate", steps, (steps + gate) / (2 * steps), gate_at(gate))
        for gate in list_gates(grounds)
    ]


def send_plans(grounds: Grounds) -> list[Contestant]:
    """Its schedule as plans: without the package's caching of self-attention before the gate."""
    if not grounds.contest.is_long:
        return []
    steps, blocks = grounds.contest.steps, grounds.anatomy.up_blocks
    return [
        send_plan(
            grounds,
            preset("tgate", steps, blocks=blocks, gate=gate),
            f"tgate {gate}, as a plan",
            "tgate-plan",
        )
        for gate in list_gates(grounds)
    ]


class Gated:
    """A pipeline whose call is the package's."""

    def __init__(self, pipe: Any, gate: int) -> None:
        self.__dict__["pipe"] = pipe
        self.__dict__["gate"] = gate

    def __call__(self, **arguments: Any) -> Any:
        return self.pipe.tgate(**arguments, gate_step=self.gate)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.pipe, name, value)


def gate_at(gate: int) -> Enter:
    """The package's call; what it leaves in the attention layers is removed."""

    @contextmanager
    def enter(pipe: Any) -> Generator[Any]:
        load = getattr(importlib.import_module("tgate"), LOADERS[type(pipe).__name__])
        with keep_forwards(pipe.unet):
            load(pipe)
            try:
                yield Gated(pipe, gate)
            finally:
                del pipe.tgate
                for part in pipe.unet.modules():
                    vars(part).pop("cache", None)

    return enter


TGATE = Rival("tgate", "the T-GATE package", send_package, package="tgate", module="tgate")
TGATE_PLAN = Rival("tgate-plan", "T-GATE's schedule as a plan", send_plans, preset="tgate")

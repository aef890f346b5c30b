"""Cases: ways to run the same calls, drawn in sets of given seeds, kept where a folder is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from leansd.errors import LeansdError
from leansd.evaluation.keeping import (
    Drawn,
    fingerprint_call,
    fingerprint_case,
    fingerprint_pipe,
    read_drawn,
    write_drawn,
)
from leansd.evaluation.trajectories import PipelineCall, expand_calls, run_calls, split_calls
from leansd.plans.plan import Plan

OnWork = Callable[[float, float], None]
"""Told how much is done and how much there is to do, in steps of single pictures."""


@dataclass(frozen=True)
class Case:
    """One way to run the calls. Without a plan the pipeline runs as it is."""

    name: str
    steps: int
    plan: Plan | None = None
    scheduler: Any | None = None
    """In place of the pipeline's own."""
    sampler: str = ""
    """What records call the sampler; the scheduler's class where it is empty."""


@dataclass(frozen=True)
class Conditions:
    """What all cases of an evaluation share. Call `i` of set `k` has seed `seed + k * calls + i`.

    Attributes:
        settings: pipeline arguments of every call, such as `guidance_scale`.
        keep: a folder for what was drawn; a later evaluation goes on from there.
    """

    pipe: DiffusionPipeline
    calls: Sequence[PipelineCall]
    subject: str
    seed: int = 1000
    batch: int = 8
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    keep: Path | None = None

    def __post_init__(self) -> None:
        if len(expand_calls(self.calls, self.settings)) < 2:
            raise LeansdError("1 call makes no set: give at least 2, by prompts or by --count")


@dataclass(frozen=True)
class Drawings:
    """What a case drew: latents [n, C, h, w] and pictures [n, 3, H, W] in 8 bits."""

    latents: Tensor
    pictures: Tensor


class Drawer:
    """Draws cases, or reads what an earlier evaluation kept of them."""

    def __init__(self, conditions: Conditions) -> None:
        self.conditions = conditions
        self.arguments = expand_calls(conditions.calls)
        self.parts = split_calls(conditions.calls, conditions.batch)
        self.weights = fingerprint_pipe(conditions.pipe) if conditions.keep is not None else ""
        self.done = self.total = 0.0
        self.on_work: OnWork | None = None

    def follow(self, total: float, on_work: OnWork | None) -> None:
        self.total, self.on_work = total, on_work

    def count_steps(self, case: Case, number: int) -> float:
        """The steps of single pictures that are still to be run."""
        files = self._name_files(case, number)
        return sum(
            len(part) * case.steps
            for part in self.parts
            if not all(files and files[place].is_file() for place in part)
        )

    def draw(self, case: Case, number: int) -> Drawings:
        """Set `number` of a case, in whole batches: a resumed one is the same to the bit."""
        files = self._name_files(case, number)
        drawn: list[Drawn] = []
        for part in self.parts:
            kept = [read_drawn(files[place]) for place in part] if files else []
            if not kept or any(each is None for each in kept):
                kept = self._run(case, number, part)
                for path, each in zip(files[part.start : part.stop], kept, strict=False):
                    write_drawn(path, each)
            drawn += [each for each in kept if each is not None]
        return Drawings(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))

    def _run(self, case: Case, number: int, part: range) -> list[Drawn]:
        conditions = self.conditions

        def on_step(step: int, steps: int, pictures: int) -> None:
            self.done += pictures * case.steps / steps
            if self.on_work is not None:
                self.on_work(self.done, self.total)

        finals = run_calls(
            conditions.pipe,
            [conditions.calls[place] for place in part],
            case.steps,
            case.plan,
            seed=self._seed(number) + part.start,
            batch=conditions.batch,
            scheduler=case.scheduler,
            settings=conditions.settings,
            on_step=on_step,
        )
        # 8 bits, as a picture file has them: what is compared is what is seen.
        return list(zip(finals.latents, finals.pictures.mul(255).round().byte(), strict=True))

    def _seed(self, number: int) -> int:
        return self.conditions.seed + number * len(self.conditions.calls)

    def _name_files(self, case: Case, number: int) -> list[Path]:
        """A file a call; none where nothing is kept."""
        if self.conditions.keep is None:
            return []
        scheduler = case.scheduler or self.conditions.pipe.scheduler
        facts = {
            "weights": self.weights,
            "plan": case.plan.fingerprint if case.plan is not None else "",
            "steps": case.steps,
            "scheduler": type(scheduler).__name__,
            "options": dict(scheduler.config),
            "settings": dict(self.conditions.settings),
        }
        folder = self.conditions.keep / fingerprint_case(facts)
        first = self._seed(number)
        return [
            folder / f"{first + place}-{fingerprint_call(each, first + place)}.safetensors"
            for place, each in enumerate(self.arguments)
        ]

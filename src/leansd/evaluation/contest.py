"""Contests: one task, sampler, step count and guidance, and all who run it side by side.

A contestant is a way to make a pipeline draw: a plan, another package, fewer steps. Whatever it
does to the pipeline it undoes, so that all of them can take turns in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from leansd.plans.anatomy import Anatomy
from leansd.plans.compile import compile_plan
from leansd.plans.macs import predict_speedup
from leansd.plans.plan import Plan
from leansd.runtime import inherit

FULL = "full"
OURS = "ours"

Task = Literal["text-to-image", "image-to-image"]
STRENGTH = 0.6
"""Of image-to-image."""

Enter: TypeAlias = Callable[[Any], AbstractContextManager[Any]]
"""Given a pipeline, a context in which what it yields is called in the pipeline's place."""


@dataclass(frozen=True)
class Contest:
    """What all contestants are asked to draw.

    Attributes:
        sampler: what records call it.
        is_long: whether every variant of every rival takes part, or those near the front only.
    """

    task: Task
    sampler: str
    steps: int
    guidance: float
    is_long: bool = False

    def __str__(self) -> str:
        return f"{self.task}, {self.sampler}, {self.steps} steps, guidance {self.guidance:g}"


@contextmanager
def run_plain(pipe: Any) -> Generator[Any]:
    """The pipeline as it is."""
    yield pipe


@dataclass(frozen=True)
class Contestant:
    """One way to draw.

    Attributes:
        family: contestants whose measured points make one front; `full`, `ours` or a rival's.
        steps: of the sampler.
        cost: the expected share of the full run's time, for estimates.
        fingerprint: of its plan, where it has one.
        sampler: in place of the contest's own, by its name in `Grounds.schedulers`.
    """

    name: str
    family: str
    steps: int
    cost: float
    enter: Enter = run_plain
    fingerprint: str = ""
    sampler: str = ""


@dataclass(frozen=True)
class Grounds:
    """What a rival has to know to send its contestants.

    Attributes:
        pipe: of the contest's task.
        anatomy: of its UNet, with its cost.
        others: samplers besides the contest's own.
        own: the plans that are `ours`.
    """

    contest: Contest
    pipe: Any
    anatomy: Anatomy
    others: tuple[str, ...] = ()
    own: tuple[Plan, ...] = ()


def follow(plan: Plan) -> Enter:
    """A pipeline that follows a plan of this package."""

    @contextmanager
    def enter(pipe: Any) -> Generator[Any]:
        with inherit(pipe, plan):
            yield pipe

    return enter


def send_full(contest: Contest) -> Contestant:
    """The full run, which everything is measured against."""
    return Contestant(FULL, FULL, contest.steps, 1.0)


def send_plan(grounds: Grounds, plan: Plan, name: str, family: str) -> Contestant:
    """A plan as a contestant."""
    plan.resolve(grounds.anatomy)
    calls = compile_plan(plan, grounds.anatomy).calls
    cost = 1 / predict_speedup(calls, grounds.anatomy)
    return Contestant(name, family, plan.steps, cost, follow(plan), plan.fingerprint)


@contextmanager
def keep_forwards(module: Any) -> Generator[None]:
    """On leaving, every part's `forward` is what it was: packages leave their own behind."""
    parts = list(module.modules())
    before: list[Any] = [vars(part).get("forward") for part in parts]
    try:
        yield
    finally:
        for part, forward in zip(parts, before, strict=True):
            vars(part).pop("forward", None)
            if forward is not None:
                part.forward = forward

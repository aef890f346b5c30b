"""One resumable training loop for every part of the model."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from leansd.errors import LeansdError


class Learner(Protocol):
    """Something that can take a training step and be saved.

    All its randomness comes from `draw_generator(seed, step)`, so the step is the whole RNG state.
    """

    def learn(self, step: int, progress: float) -> dict[str, float]:
        """Take one step; `progress` in [0, 1) is the share of the budget that is spent."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Budget:
    """How long a stage trains: a number of steps, or minutes of training time."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise LeansdError("a training budget is either steps or minutes, exactly one of them")
        if (self.steps if self.steps is not None else self.minutes or 0) <= 0:
            raise LeansdError("a training budget must be above 0")

    def spent(self, step: int, seconds: float) -> float:
        """Return the share that is spent."""
        if self.steps is not None:
            return step / self.steps
        return seconds / 60 / (self.minutes or 1)


def draw_generator(seed: int, step: int) -> torch.Generator:
    """Return the random numbers of one step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def warm_stable_decay(progress: float, *, warm: float = 0.01, decay_from: float = 0.7) -> float:
    """Return the factor of the learning rate: up, constant, then linearly down."""
    if progress < warm:
        return max(progress / warm, 0.02)
    return min(1.0, max(0.02, (1 - progress) / (1 - decay_from)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a kill leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    os.replace(part, path)


def save_json(content: object, path: Path) -> None:
    """Write JSON, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def load_state(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are accepted."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or ["empty"])[0]
        raise LeansdError(f"cannot read checkpoint {path}: {reason}") from error


def train_stage(
    learner: Learner,
    folder: Path,
    budget: Budget,
    *,
    save_seconds: float = 120.0,
    log_every: int = 20,
    on_log: Callable[[dict[str, float]], None] | None = None,
    stop_after: int | None = None,
) -> dict[str, float]:
    """Train until the budget is spent, resuming from `folder/state.pt` if it is there.

    Losses go to `folder/losses.jsonl`. `stop_after` ends this call early, as a kill would.
    Return the step and the seconds of training so far.
    """
    path = folder / "state.pt"
    step, seconds = 0, 0.0
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        state = load_state(path)
        learner.load_state_dict(state["learner"])
        step, seconds = int(state["step"]), float(state["seconds"])
    _cut_log(folder / "losses.jsonl", step)
    tick = saved = time.monotonic()
    sums: dict[str, float] = {}
    while (progress := budget.spent(step, seconds)) < 1:
        for name, value in learner.learn(step, progress).items():
            sums[name] = sums.get(name, 0.0) + value / log_every
        step += 1
        now = time.monotonic()
        seconds, tick = seconds + now - tick, now
        if step % log_every == 0:
            row = {"step": step, "seconds": round(seconds, 1), "progress": progress, **sums}
            with (folder / "losses.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            sums = {}
            if on_log:
                on_log(row)
        stopping = stop_after is not None and step >= stop_after
        if stopping or now - saved > save_seconds or budget.spent(step, seconds) >= 1:
            state = {"learner": learner.state_dict(), "step": step, "seconds": seconds}
            save_state(state, path)
            saved = time.monotonic()
        if stopping:
            break
    return {"step": step, "seconds": seconds}


def _cut_log(path: Path, step: int) -> None:
    # After a kill the log may be ahead of the checkpoint: those steps are trained again.
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _read_step(line) <= step]
    if len(kept) < len(lines):
        part = path.with_name(path.name + ".part")
        part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(part, path)


def _read_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")  # cut off by the kill

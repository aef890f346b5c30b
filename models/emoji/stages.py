"""One resumable training loop for every part of the model."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from leansd.core.devices import seed_generator
from leansd.errors import LeansdError, OutputError
from leansd.files import write_file, writing

Report = Callable[[str, dict[str, float]], None]


class Learner(Protocol):
    """Something that can take a training step and be saved.

    All its randomness comes from `draw_generator(seed, step)`, so the step is the whole RNG state.
    """

    def learn(self, step: int) -> dict[str, float]:
        """Take step number `step`, the first is 0, and return what to log."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stopped(Exception):
    """The process was asked to end; the checkpoint is written."""


def draw_generator(seed: int, step: int) -> torch.Generator:
    """Return the random numbers of one step."""
    return seed_generator(seed * 1_000_003 + step)


def warm_then_decay(step: int, steps: int, *, warm: int = 200, decay_from: float = 0.6) -> float:
    """Return the factor of the learning rate: up, constant, then linearly down to almost 0."""
    if step < warm:
        return (step + 1) / warm
    return min(1.0, max(0.01, (1 - step / steps) / (1 - decay_from)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a kill leaves either the old file or the new one."""
    try:
        with writing(path) as part:
            torch.save(state, part)
    except (OutputError, RuntimeError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise LeansdError(f"cannot write {path} (the old one is whole): {reason}") from error


def load_state(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are accepted."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or ["empty"])[0]
        raise LeansdError(f"cannot read checkpoint {path}: {reason}") from error


def save_json(content: object, path: Path) -> None:
    """Write JSON, whole or not at all."""
    write_file(path, json.dumps(content, indent=2) + "\n")


def train_stage(
    learner: Learner,
    folder: Path,
    steps: int | None,
    *,
    save_seconds: float = 60.0,
    log_every: int = 50,
    report: Report | None = None,
    keep_every: int | None = None,
    stop_after: int | None = None,
) -> int:
    """Train up to `steps`, or without an end, resuming from `folder/state.pt` if it is there.

    Losses go to `folder/losses.jsonl`. SIGTERM and SIGINT end the step in hand, write the
    checkpoint and raise `Stopped`; `stop_after` returns early, as they would. Return the step.
    """
    path = folder / "state.pt"
    step, seconds = 0, 0.0
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        state = load_state(path)
        try:
            learner.load_state_dict(state["learner"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise LeansdError(f"{path} is the checkpoint of another recipe: {reason}") from error
        step, seconds = int(state["step"]), float(state["seconds"])
    _cut_log(folder / "losses.jsonl", step)

    def save() -> None:
        save_state({"learner": learner.state_dict(), "step": step, "seconds": seconds}, path)

    tick = saved = time.monotonic()
    sums: dict[str, float] = {}
    counted = 0
    with _catch_signals() as caught:
        while steps is None or step < steps:
            for name, value in learner.learn(step).items():
                sums[name] = sums.get(name, 0.0) + value
            step, counted = step + 1, counted + 1
            now = time.monotonic()
            seconds, tick = seconds + now - tick, now
            if step % log_every == 0:
                means = {name: total / counted for name, total in sums.items()}
                row = {"step": step, "seconds": round(seconds, 1), **means}
                with (folder / "losses.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(row) + "\n")
                sums, counted = {}, 0
                if report:
                    report(folder.name, row)
            stopping = bool(caught) or (stop_after is not None and step >= stop_after)
            if stopping or now - saved > save_seconds or step == steps:
                save()
                saved = time.monotonic()
            if keep_every and step % keep_every == 0:
                save()
                with writing(folder / f"state-{step}.pt") as part:
                    shutil.copyfile(path, part)
            if caught:
                raise Stopped
            if stopping:
                break
    return step


@contextmanager
def _catch_signals() -> Iterator[list[int]]:
    caught: list[int] = []
    kept = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            kept[number] = signal.signal(number, lambda n, _: caught.append(n))
    except ValueError:
        pass  # not the main thread: nobody sends it signals
    try:
        yield caught
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _cut_log(path: Path, step: int) -> None:
    # After a kill the log may be ahead of the checkpoint: those steps are trained again.
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _read_step(line) <= step]
    if len(kept) < len(lines):
        write_file(path, "".join(line + "\n" for line in kept))


def _read_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")  # cut off by the kill

"""Loss curves of a run, from its logs to a PNG."""

from __future__ import annotations

import json
import os
from pathlib import Path

STAGES = {"vae": ("loss", "mse"), "clip": ("loss", "top1"), "unet": ("loss", "error")}


def read_losses(path: Path) -> list[dict[str, float]]:
    """Read a stage's log; no log is no rows."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def smooth_values(values: list[float], share: float = 0.02) -> list[float]:
    """Return a moving average over about `share` of the values, no longer than they are."""
    width = max(1, int(len(values) * share))
    sums, total = [], 0.0
    for place, value in enumerate(values):
        total += value - (values[place - width] if place >= width else 0.0)
        sums.append(total / min(place + 1, width))
    return sums


def plot_curves(run: Path, target: Path | None = None) -> Path:
    """Plot every stage's losses over its steps into `run/curves.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    target = target or run / "curves.png"
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for place, (stage, names) in enumerate(STAGES.items(), start=1):
        axes = figure.add_subplot(1, len(STAGES), place)
        rows = read_losses(run / stage / "losses.jsonl")
        for name in names:
            values = [row[name] for row in rows]
            axes.plot([row["step"] for row in rows], smooth_values(values), label=name)
        axes.set(title=stage, xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
        if rows:
            axes.legend()
    part = target.with_name(target.name + ".part")
    FigureCanvasAgg(figure).print_png(part)
    os.replace(part, target)
    return target

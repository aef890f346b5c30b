"""What a tuning found, in tables and sentences."""

from __future__ import annotations

from leansd.text import Table
from leansd.tuning.front import Front, Point


def tabulate_front(front: Front, chosen: Point | None = None) -> Table:
    """Every point, and beside it what the other kind, tuned or plain, reaches at its speed."""
    rows: list[tuple[str, ...]] = []
    for point in front.points:
        rival = front.find_rival(point)
        rows.append(
            (
                f"{point.speedup:.2f}x",
                f"{point.milliseconds:.0f}",
                f"{point.psnr:.1f}",
                f"{rival.psnr:.1f}" if rival is not None else "–",
                str(point.plan.steps),
                str(len(point.plan.keys)),
                point.plan.name + (" <" if point is chosen else ""),
            )
        )
    columns = ("speed-up", "ms", "PSNR, dB", "or", "steps", "in full", "plan")
    return Table(columns, tuple(rows))


def describe_choice(front: Front, chosen: Point) -> str:
    """What was chosen, and whether fewer steps alone do better."""
    rival = front.find_rival(chosen)
    what = f"{chosen.speedup:.2f}x, {chosen.milliseconds:.0f} ms, {chosen.psnr:.1f} dB"
    if chosen.is_plain:
        best = "no tuned plan is as fast"
        if rival is not None:
            best = f"the best tuned plan reaches {rival.psnr:.1f} dB"
        return (
            f"fewer steps alone win: {chosen.plan.steps} steps without a plan give {what}; {best}"
        )
    if rival is None:
        return f"{chosen.plan.name}: {what}"
    return (
        f"{chosen.plan.name}: {what}; {rival.plan.steps} steps without a plan, {rival.psnr:.1f} dB"
    )

"""The front: for every speed the plan that loses least, from one tuning."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from leansd.errors import LeansdError
from leansd.evaluation.pareto import find_front
from leansd.files import write_file
from leansd.plans.plan import Plan
from leansd.plans.row import Row
from leansd.text import Table

SLACK = 0.02
"""What a point may miss a goal of time by: no measured time is truer than that."""


@dataclass(frozen=True)
class Point:
    """A plan, or a plain run of fewer steps, and what it gives."""

    plan: Plan
    speedup: float
    """The speed-up of the whole pipeline call, predicted from this machine's profile."""
    milliseconds: float
    """Milliseconds of the whole call, predicted."""
    psnr: float
    """In dB against the full run, on calls that had no part in the tuning."""

    @property
    def is_plain(self) -> bool:
        """Whether it only takes fewer steps."""
        return all(row == Row() for row in self.plan.rows)

    def to_dict(self) -> dict[str, Any]:
        """What files say of it."""
        return {
            "speedup": round(self.speedup, 3),
            "milliseconds": round(self.milliseconds, 2),
            "psnr": round(self.psnr, 2),
            "plan": self.plan.to_dict(),
        }


@dataclass(frozen=True)
class Front:
    """The points that no other point beats, fastest last."""

    subject: str
    """What was tuned: the UNet, by its `fingerprint_module`."""
    sampler: str
    steps: int
    """Steps of the full run that all is compared with."""
    points: tuple[Point, ...]
    """Slowest first."""
    dominated: tuple[Point, ...] = ()
    """What was measured as well, and is slower than a point and no closer."""

    @classmethod
    def of(cls, subject: str, sampler: str, steps: int, points: Sequence[Point]) -> Front:
        """The front of these points; of points with the same plan, one."""
        known = {point.plan.fingerprint: point for point in points}
        kept = find_front(known.values(), _rate)
        on_front = {point.plan.fingerprint for point in kept}
        others = [point for name, point in known.items() if name not in on_front]
        dominated = sorted(others, key=_rate, reverse=True)[::-1]
        return cls(subject, sampler, steps, tuple(kept), tuple(dominated))

    @property
    def beaten(self) -> tuple[Point, ...]:
        """The old name of `dominated`."""
        warnings.warn("Front.beaten is called dominated", DeprecationWarning, stacklevel=2)
        return self.dominated

    def at(
        self,
        *,
        speedup: float | None = None,
        psnr: float | None = None,
        ms: float | None = None,
    ) -> Plan:
        """The plan that meets one goal and loses, or takes, least.

        Args:
            speedup: at least so many times faster than the full run, within 2 %.
            psnr: at least so many dB.
            ms: at most so many milliseconds for the whole call, within 2 %.

        Raises:
            LeansdError: no plan meets it; the message says the best that can be had.
        """
        return self.find(speedup=speedup, psnr=psnr, ms=ms).plan

    def find(
        self,
        *,
        speedup: float | None = None,
        psnr: float | None = None,
        ms: float | None = None,
    ) -> Point:
        """The point of the plan that `at` gives."""
        goals = [goal for goal in (speedup, psnr, ms) if goal is not None]
        if len(goals) != 1:
            raise LeansdError("give one goal: speedup, psnr or ms")
        if not self.points:
            raise LeansdError("this front has no plan at all; tune for lower speeds")
        if psnr is not None:
            good = [point for point in self.points if point.psnr >= psnr]
            if not good:
                best = self.points[0]
                raise LeansdError(
                    f"no tuned plan reaches {psnr:g} dB; the best is {best.psnr:.1f} dB at "
                    f"{best.speedup:.2f}x"
                )
            return good[-1]
        if speedup is not None:
            good = [point for point in self.points if point.speedup * (1 + SLACK) >= speedup]
        else:
            good = [point for point in self.points if point.milliseconds <= (ms or 0) * (1 + SLACK)]
        if not good:
            best = self.points[-1]
            raise LeansdError(
                f"no tuned plan is that fast; the fastest is {best.speedup:.2f}x, "
                f"{best.milliseconds:.0f} ms, at {best.psnr:.1f} dB"
            )
        return good[0]

    def find_rival(self, chosen: Point) -> Point | None:
        """The closest point of the other kind, plain or tuned, that is as fast; None without one.

        Says what a plan gains over only taking fewer steps, or that it gains nothing.
        """
        others = [
            point
            for point in (*self.points, *self.dominated)
            if point.is_plain != chosen.is_plain and point.speedup * (1 + SLACK) >= chosen.speedup
        ]
        return max(others, key=lambda each: each.psnr, default=None)

    def tabulate(self) -> Table:
        return Table(
            columns=("speed-up", "ms", "PSNR [dB]", "steps", "in full", "plan"),
            rows=tuple(
                (
                    f"{point.speedup:.2f}x",
                    f"{point.milliseconds:.0f}",
                    f"{point.psnr:.1f}",
                    str(point.plan.steps),
                    str(len(point.plan.keys)),
                    point.plan.name,
                )
                for point in self.points
            ),
        )

    def save(self, path: str | Path) -> None:
        """Write the whole front as JSON, a plan a point."""
        head = {
            "format": "leansd-front",
            "version": 1,
            "subject": self.subject,
            "sampler": self.sampler,
            "steps": self.steps,
        }
        fields = [json.dumps(head)[1:-1]]
        for name, points in (("points", self.points), ("dominated", self.dominated)):
            lines = ",\n".join(json.dumps(point.to_dict()) for point in points)
            fields.append(f'"{name}": [\n{lines}\n]')
        write_file(path, "{" + ", ".join(fields) + "}\n")

    @classmethod
    def load(cls, path: str | Path) -> Front:
        """Read a front that `save` wrote.

        Raises:
            LeansdError: there is no such file, or it is not a front.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            document = FrontDocument.model_validate_json(text)
            points, dominated = (
                tuple(
                    Point(Plan.from_dict(each.plan), each.speedup, each.milliseconds, each.psnr)
                    for each in group
                )
                for group in (document.points, document.dominated)
            )
        except OSError as error:
            raise LeansdError(f"cannot read the front {path}: {error.strerror}") from error
        except (UnicodeDecodeError, ValidationError, LeansdError):
            raise LeansdError(f"{path} is not a front that leansd tune wrote") from None
        return cls(document.subject, document.sampler, document.steps, points, dominated)


def read_plans(path: str | Path) -> list[Plan]:
    """The plans of a front, by names of their own; plain runs of fewer steps are left out."""
    return [
        point.plan.rename(f"{point.plan.name} of {point.plan.steps} steps")
        for point in Front.load(path).points
        if not point.is_plain
    ]


class PointDocument(BaseModel):
    model_config = ConfigDict(extra="forbid")
    speedup: float
    milliseconds: float
    psnr: float
    plan: dict[str, Any]


class FrontDocument(BaseModel):
    """The file format."""

    model_config = ConfigDict(extra="forbid")
    format: Literal["leansd-front"] = "leansd-front"
    version: int = 1
    subject: str
    sampler: str
    steps: int
    points: list[PointDocument]
    # Files of earlier versions say `beaten`.
    dominated: list[PointDocument] = Field(
        default=[], validation_alias=AliasChoices("dominated", "beaten")
    )


def _rate(point: Point) -> tuple[float, float]:
    return point.speedup, point.psnr

"""`features`: what leaves the student's blocks is to be what leaves the teacher's.

A sum of plain squared errors over blocks, as BK-SDM distils (arXiv 2305.15798).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from leansd.errors import LeansdError
from leansd.incubation.losses.outcome import Comparison, Outcome, Setting
from leansd.plans.address import get_block, select

MID = "mid"


@dataclass(frozen=True)
class Features:
    """The sum over blocks of the squared errors of their outputs."""

    compares: tuple[Comparison, ...]

    def __call__(self, outcome: Outcome) -> Tensor:
        return torch.stack(
            [
                F.mse_loss(
                    outcome.student_features[each.student].float(),
                    outcome.teacher_features[each.teacher].float(),
                )
                for each in self.compares
            ]
        ).sum()


def build(setting: Setting, at: str | Sequence[str] | None = None) -> Features:
    """
    Args:
        at: addresses or globs of the student; all comparisons but the middle block's, if none.
    """
    return Features(pick_comparisons(setting, at))


def pick_comparisons(setting: Setting, at: str | Sequence[str] | None) -> tuple[Comparison, ...]:
    """Those of a setting under addresses or globs of the student.

    Raises:
        LeansdError: nothing is compared there.
    """
    there = {each.student: each for each in setting.comparisons}
    if at is None:
        picked = tuple(each for each in there.values() if get_block(each.student) != MID)
        if not picked:
            raise LeansdError("no block's output is compared; leave the features' loss out")
        return picked
    patterns = [at] if isinstance(at, str) else at
    names = dict.fromkeys(name for each in patterns for name in select(each, tuple(there)))
    return tuple(there[name] for name in names)

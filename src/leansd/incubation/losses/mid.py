"""`mid`: the output of the middle block, where a UNet's features mean most.

Half of A-SDM's semantic-aware supervision (arXiv 2406.00210); `vgg` is the other.
"""

from __future__ import annotations

from leansd.errors import LeansdError
from leansd.incubation.losses.features import MID, Features
from leansd.incubation.losses.outcome import Comparison, Setting
from leansd.plans.address import get_block


def build(setting: Setting) -> Features:
    """
    Raises:
        LeansdError: the student has no middle block.
    """
    units = [at for at in setting.lineage.units if get_block(at) == MID]
    if not units:
        raise LeansdError(
            "loss mid: the student has no middle block; compare the block before it with features"
        )
    teacher = setting.lineage.stands_for(units[-1]).at
    return Features((Comparison(units[-1], teacher),))

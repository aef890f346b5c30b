"""Whether a plan is used where it was tuned for."""

from __future__ import annotations

from typing import Any

from leansd.errors import LeansdError
from leansd.evaluation.fingerprints import fingerprint_module
from leansd.plans.plan import Plan
from leansd.runtime.samplers import name_sampler


def check_tuned(plan: Plan, pipe: Any, *, guidance: float, force: bool = False) -> list[str]:
    """What a plan was tuned for and the pipeline is not, as warnings; none for untuned plans.

    Raises:
        LeansdError: it was tuned for another sampler or UNet, and `force` is not set.
    """
    tuned = plan.tuned
    if tuned is None:
        return []
    elsewhere: list[str] = []
    names = name_sampler(pipe), type(pipe.scheduler).__name__
    if tuned.sampler not in names:
        elsewhere.append(f"plan {plan.name} was tuned for sampler {tuned.sampler}, not {names[0]}")
    if tuned.unet != fingerprint_module(pipe.unet):
        elsewhere.append(f"plan {plan.name} was tuned for a UNet with other weights")
    if elsewhere and not force:
        raise LeansdError(
            f"{' and '.join(elsewhere)}: tune one by leansd tune, or use it by --force all the same"
        )
    if tuned.guidance is not None and tuned.guidance != guidance:
        elsewhere.append(
            f"plan {plan.name} was tuned at guidance {tuned.guidance:g}, not {guidance:g}"
        )
    return elsewhere

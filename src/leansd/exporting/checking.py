"""Whether ONNX Runtime gives what PyTorch gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from leansd.errors import LeansdError
from leansd.exporting.sessions import Session
from leansd.exporting.tracing import Section

TOLERANCE = 1e-3
"""The largest difference that is let through, in units of the tensor's largest value if above 1."""


def compare(section: Section, session: Session, inputs: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between the two on these inputs.

    Raises:
        LeansdError: it is above `TOLERANCE`; the message names the output.
    """
    wanted = section(*(inputs[name] for name in section.inputs))
    found = session.run(inputs, section.outputs)
    worst = 0.0
    for name, ours, theirs in zip(section.outputs, wanted, found, strict=True):
        if ours.shape != theirs.shape:
            raise LeansdError(
                f"ONNX Runtime gives {name} the shape {tuple(theirs.shape)}, PyTorch "
                f"{tuple(ours.shape)}, at latents {tuple(inputs['sample'].shape)}"
            )
        difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1))
        if not difference <= TOLERANCE:
            raise LeansdError(
                f"ONNX Runtime and PyTorch differ by {difference:.1e} in {name}, at latents "
                f"{tuple(inputs['sample'].shape)}; at most {TOLERANCE:g} is let through"
            )
        worst = max(worst, difference)
    return worst

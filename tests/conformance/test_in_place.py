"""Kept tensors stay as they were, whatever the code between the units writes in place."""

from collections.abc import Callable
from hashlib import sha256
from itertools import product
from typing import Any

import pytest
import torch

import leansd
from conformance.cases import STEPS, Call, build_adapter, build_freeu, build_sd, text
from conformance.models import draw_picture
from conformance.reference import draw, list_tensors, watch_stores
from conformance.samplers import SAMPLERS
from leansd.plans import Plan

Build = Callable[[Any], Any]
PIPELINES: dict[str, tuple[Build, Call]] = {
    "plain": (build_sd, text()),
    "freeu": (build_freeu, text()),
    "t2i-adapter": (build_adapter, text(image=draw_picture(1))),
}
# In running order: what FreeU multiplies, what an adapter adds to, what both leave alone.
CUTS = ("dn0.l0.attn", "dn0.down", "dn1.l0.res", "mid", "up0.l0", "up0.up", "up1.l1")


def digest(tensor: torch.Tensor) -> str:
    return sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


WRITTEN = ("freeu", "t2i-adapter")
CELLS = [
    *product(["plain"], CUTS[::3], ["reuse"]),
    *product(WRITTEN, CUTS, ["reuse"]),
    # What is kept twice is written to no more often than what is kept once.
    *product(WRITTEN, CUTS[::2], ["forecast"]),
]


@pytest.mark.parametrize(("name", "cut", "how"), CELLS, ids=["-".join(each) for each in CELLS])
def test_kept_tensors_never_change(name: str, cut: str, how: str) -> None:
    """Hashed before and after every block and every call, from the call that kept them on."""
    build, call = PIPELINES[name]
    pipe = build(SAMPLERS["ddim"].make())
    plan = Plan.full(STEPS).inherit(cut, at=[2, 3, 4], how=how)  # type: ignore[arg-type]
    hashes: dict[int, tuple[torch.Tensor, str]] = {}
    checks = 0
    with leansd.inherit(pipe, plan), watch_stores() as stores:

        def check(*_: Any) -> None:
            nonlocal checks
            for tensor in (tensor for store in stores for tensor in list_tensors(store)):
                # The tensor itself is held too, so that no other gets its id.
                _, before = hashes.setdefault(id(tensor), (tensor, digest(tensor)))
                assert digest(tensor) == before
                checks += 1

        pipe.unet.register_forward_pre_hook(check)
        for block in (*pipe.unet.down_blocks, pipe.unet.mid_block, *pipe.unet.up_blocks):
            block.register_forward_hook(check)
        draw(pipe, call)
    assert checks > len(hashes) >= (2 if how == "forecast" else 1)

"""What a run keeps is the liveness bound, at the sizes of the real models."""

import pytest
import torch

import leansd
from conformance.reference import is_empty, list_tensors, watch_stores
from leansd.anatomy import read_anatomy
from leansd.anatomy.builtin import open_builtin
from leansd.anatomy.inputs import make_inputs
from leansd.plans import Plan
from leansd.plans.compile import compile_plan
from tiny import LATENT, tiny_unet

MIB = 2**20


@pytest.mark.parametrize(
    ("name", "side", "expected"), [("sd15", 64, 5.0), ("sd21-base", 64, 5.0), ("sdxl", 128, 20.0)]
)
def test_deepcache_branch_0_keeps_one_tensor(name: str, side: int, expected: float) -> None:
    """Guided, in half precision: the package that brought this plan keeps 107.8 and 322.5 MiB."""
    unet = open_builtin(name).half()
    anatomy = read_anatomy(unet)
    inputs = make_inputs(unet, size=(side, side), batch=2, device="meta", dtype=torch.float16)
    inputs.pop("timestep")
    plan = leansd.preset("deepcache", steps=3, blocks=anatomy.up_blocks, interval=2)
    bound = max(len(alive) for alive in compile_plan(plan, anatomy).alive)
    with torch.no_grad(), leansd.inherit(unet, plan), watch_stores() as stores:
        kept = []
        for moment in (981, 500, 20):
            noise = unet(timestep=moment, **inputs).sample
            assert noise.shape == (2, 4, side, side)
            kept.append(sum(store.bytes for store in stores) / MIB)
            assert [len(list_tensors(store)) for store in stores] == [bound if kept[-1] else 0]
    assert (bound, kept) == (1, [expected, 0.0, 0.0])


@pytest.mark.parametrize("how", ["reuse", "residual", "forecast"])
def test_bytes_follow_the_bound_through_a_run(how: str) -> None:
    """After every call, what is kept is what the plan's liveness says, to the byte."""
    unet = tiny_unet()
    anatomy = read_anatomy(unet)
    steps = 7
    plan = Plan.between([0, 1, 4], cut="mid", steps=steps, how=how)  # type: ignore[arg-type]
    plan = plan.inherit("up3.l1.attn", at=[5, 6])
    inputs = make_inputs(unet, size=(LATENT, LATENT), batch=2)
    inputs.pop("timestep")
    program = compile_plan(plan, anatomy)
    with torch.no_grad(), leansd.inherit(unet, plan), watch_stores() as stores:
        for call, moment in enumerate(range(900, 900 - steps * 100, -100)):
            unet(timestep=moment, **inputs)
            bound = 0
            for kept in program.alive[call]:
                unit = anatomy[kept.unit]
                bound += 2 * unit.channels[1] * (LATENT // unit.scale) ** 2 * 4
            assert sum(store.bytes for store in stores) == bound, call
            tensors = [tensor for store in stores for tensor in list_tensors(store)]
            assert sum(tensor.nbytes for tensor in tensors) == bound, call
    assert stores
    assert all(map(is_empty, stores))

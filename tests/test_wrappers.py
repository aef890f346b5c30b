"""UNets in wrappers and with other layers: distributed, sharded, quantised."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import leansd
from leansd.errors import LeansdError
from leansd.plans import Plan
from test_conditions import quantise
from tiny import TOKENS, WIDTH, shallow_unet

STEPS = 4
LEAN = Plan.every(2, cut="up0.l0", steps=STEPS)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder, 'store')}"
        distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        yield
        distributed.destroy_process_group()


@torch.no_grad()
def run(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, TOKENS, WIDTH, generator=generator)
    for moment in (900, 700, 500, 300):
        sample = sample - 0.1 * unet(sample, moment, text).sample
    return sample


def shard(*, by_block: bool) -> nn.Module:
    unet, mesh = shallow_unet(), init_device_mesh("cpu", (1,))
    if by_block:
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            fully_shard(block, mesh=mesh)
    fully_shard(unet, mesh=mesh)
    return unet


def store_small() -> nn.Module:
    unet = shallow_unet()
    unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return unet


SAME: dict[str, Callable[[], nn.Module]] = {
    "distributed": lambda: nn.parallel.DistributedDataParallel(shallow_unet()),
    "sharded": lambda: shard(by_block=False),
    "sharded by block": lambda: shard(by_block=True),
}
"""What computes as the plain UNet does."""
OTHER: dict[str, Callable[[], nn.Module]] = {
    "packed in eight bits": lambda: quantise(shallow_unet(), "int8"),
    "quantised by torch": lambda: quantise(shallow_unet(), "torch"),
    "layerwise casting": store_small,
}


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_it_follows_a_plan_as_a_plain_one_does(name: str) -> None:
    unet = (SAME | OTHER)[name]()
    plain = run(unet)
    with leansd.inherit(unet, Plan.full(STEPS)):
        assert torch.equal(run(unet), plain)
    with leansd.inherit(unet, LEAN) as attached:
        lean = run(unet)
        assert torch.equal(run(unet), lean)
    report = attached.report()
    assert (report.calls, report.full_calls, dict(report.forced)) == (STEPS, 2, {})
    assert not torch.equal(lean, plain)
    assert torch.equal(run(unet), plain)
    if name in SAME:
        with leansd.inherit(shallow_unet(), LEAN) as own:
            assert torch.equal(run(own._follower.unet), lean)


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda unet: FullyShardedDataParallel(unet, device_id=torch.device("cpu"))],
)
@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_wrappers_that_copy_or_flatten_a_unet_are_refused_by_name(wrap: Any) -> None:
    with pytest.raises(LeansdError, match=r"cannot attach to a (DataParallel|FullyShardedData)"):
        leansd.inherit(wrap(shallow_unet()), LEAN)


@pytest.mark.parametrize("kind", ["int8", "torch"])
def test_what_takes_weights_apart_wants_them_whole(kind: str, tmp_path: Path) -> None:
    unet = quantise(shallow_unet(), kind)
    with pytest.raises(LeansdError, match="before it is quantised"):
        leansd.operate(unet, leansd.Surgery("light").drop("mid.l0.attn"))
    with pytest.raises(LeansdError, match="before it was quantised"):
        leansd.export(unet, tmp_path / "plain", to="diffusers")
    assert not (tmp_path / "plain").exists()

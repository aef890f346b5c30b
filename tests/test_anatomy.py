"""Anatomies against published figures and against the modules they name."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import leansd
from leansd.anatomy import count_macs, read_anatomy
from leansd.anatomy.builtin import open_builtin
from leansd.anatomy.counting import copy_skeleton
from leansd.anatomy.inputs import make_inputs
from leansd.errors import LeansdError
from tiny import tiny_unet, tiny_xl_unet

TINY_BLOCKS = {
    "mid_block_type": None,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}
KOALA: dict[str, Any] = {"layers_per_block": 1, "transformer_layers_per_block": (1, 2, 6)}

# Parameters in millions and multiply-accumulates in billions, attention's products included, of
# published UNets: (built-in, changes to its configuration) and the two figures.
PUBLISHED = {
    "SD 1.5": ("sd15", {}, 859.52, 401.6),
    "BK-SDM-Base": ("sd15", {"layers_per_block": 1}, 579.38, 261.5),
    "BK-SDM-Small": ("sd15", {"layers_per_block": 1, "mid_block_type": None}, 482.35, 255.4),
    "BK-SDM-Tiny": ("sd15", {"layers_per_block": 1, **TINY_BLOCKS}, 323.38, 242.7),
    "SD 2.1-base": ("sd21-base", {}, 865.91, 402.1),
    "BK-SDM-v2-Base": ("sd21-base", {"layers_per_block": 1}, 583.5, 261.8),
    "SDXL": ("sdxl", {}, 2567.5, 3380.6),
    "KOALA-1B": ("sdxl", KOALA, 1161.2, 1715.9),
    "A-SDM (1,2,2,2)": ("sd15", {"layers_per_block": (1, 2, 2, 2)}, 848.8, 343.2),
    "A-SDM (1,1,2,2)": ("sd15", {"layers_per_block": (1, 1, 2, 2)}, 809.5, 303.7),
    "A-SDM (1,1,1,2)": ("sd15", {"layers_per_block": (1, 1, 1, 2)}, 659.7, 266.4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters_and_macs(name: str) -> None:
    model, changes, params, macs = PUBLISHED[name]
    anatomy = leansd.dissect(open_builtin(model, **changes))
    assert anatomy.params / 1e6 == pytest.approx(params, abs=0.06)
    assert anatomy.macs / 1e9 == pytest.approx(macs, abs=0.06)


def test_cost_by_block_of_sd15() -> None:
    anatomy = leansd.dissect(open_builtin("sd15"))
    expected = {
        "dn0": (10.5, 54.8), "dn1": (36.8, 34.2), "dn2": (140.0, 31.9), "dn3": (62.3, 3.8),
        "mid": (97.0, 6.1), "up0": (162.2, 12.9), "up1": (258.3, 75.8), "up2": (71.4, 83.4),
        "up3": (18.8, 98.8),
    }  # fmt: skip
    for block, (params, macs) in expected.items():
        selection = anatomy.select(block)
        assert selection.params / 1e6 == pytest.approx(params, abs=0.06)
        assert selection.macs / 1e9 == pytest.approx(macs, abs=0.06)
    assert anatomy["dn0.l0.attn"].macs / 1e9 == pytest.approx(19.37, abs=0.005)
    assert sum(unit.params for unit in anatomy) / anatomy.params == pytest.approx(0.998, abs=5e-4)


@pytest.mark.parametrize(("name", "units"), [("sd15", 44), ("sd21-base", 44), ("sdxl", 32)])
def test_units_and_ends(name: str, units: int) -> None:
    anatomy = read_anatomy(open_builtin(name))
    assert len(anatomy) == units + 2
    assert (anatomy.addresses[0], anatomy.addresses[-1]) == ("stem", "head")


def test_reads_are_what_the_forward_hands_over() -> None:
    """The graph, checked on a running UNet: every unit gets the outputs that `reads` names."""
    unet = tiny_unet()
    anatomy = read_anatomy(unet)
    outputs: dict[str, torch.Tensor] = {}

    def make_hook(at: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            outputs[at] = output[0] if isinstance(output, tuple) else output
            reads = [outputs[name] for name in anatomy[at].reads]
            if at not in ("stem", "head"):
                assert torch.equal(args[0], torch.cat(reads, dim=1)), at
            if at != "stem":
                assert anatomy[at].channels == (args[0].shape[1], outputs[at].shape[1])

        return hook

    for unit in anatomy:
        unet.get_submodule(unit.path).register_forward_hook(make_hook(unit.at))
    with torch.no_grad():
        unet(**make_inputs(unet, size=(8, 8)))
    assert list(outputs) == list(anatomy.addresses)


@pytest.mark.parametrize(
    "changes",
    [
        {"mid_block_type": None},
        {"mid_block_type": "UNetMidBlock2D"},
        {"layers_per_block": (1, 2, 2, 1)},
        {"layers_per_block": 1, "mid_block_type": None},
        {"use_linear_projection": True, "only_cross_attention": True},
    ],
)
def test_pruned_topologies(changes: dict[str, Any]) -> None:
    unet = tiny_unet(**changes)
    anatomy = leansd.dissect(unet, latent=8)
    assert sum(unit.macs for unit in anatomy) <= anatomy.macs
    assert all(unit.macs > 0 for unit in anatomy)
    assert {read for unit in anatomy for read in unit.reads} == set(anatomy.addresses) - {"head"}


def test_counting_touches_nothing() -> None:
    unet = tiny_xl_unet()
    inputs = make_inputs(unet, size=(8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = unet(**inputs).sample
        ledger = count_macs(unet, latent=(8, 12), tokens=5)
        assert torch.equal(unet(**inputs).sample, expected)
    assert ledger.size == (8, 12)
    skeleton = copy_skeleton(unet)
    assert all(parameter.device.type == "meta" for parameter in skeleton.parameters())
    assert isinstance(skeleton, UNet2DConditionModel)


def test_macs_of_one_convolution() -> None:
    unet = tiny_unet()
    stem = leansd.dissect(unet, latent=8)["stem"]
    assert stem.macs == 8 * 8 * 4 * 32 * 9


def test_tree_names_everything() -> None:
    anatomy = leansd.dissect(open_builtin("sd15"), name="sd15")
    text = str(anatomy)
    assert "sd15: 44 units and 2 ends, 859.52 M parameters" in text
    assert "401.637 GMAC at 64x64 latents, 77 tokens" in text
    assert all(at in text for at in anatomy.addresses)
    assert max(len(line) for line in text.splitlines()) <= 80


def test_what_is_no_unet_is_refused() -> None:
    with pytest.raises(LeansdError, match="Linear is no UNet2DConditionModel"):
        leansd.dissect(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(LeansdError, match="no built-in UNet 'sd3'"):
        open_builtin("sd3")


def test_fingerprint_is_the_shape_of_the_graph() -> None:
    one, other = read_anatomy(tiny_unet(seed=0)), read_anatomy(tiny_unet(seed=1))
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != read_anatomy(tiny_unet(layers_per_block=1)).fingerprint

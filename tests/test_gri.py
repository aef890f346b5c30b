"""GRI attention: against plain loops, against full attention where they are equal, its cost."""

import copy
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel

from leansd.anatomy import count_macs
from leansd.anatomy.builtin import open_builtin
from leansd.surgery.parts.gri import (
    MODES,
    GlobalGRIAttnProcessor,
    GRIAttnProcessor,
    average_cells,
    call_at_size,
    find_size,
    join_regions,
    split_regions,
)
from tiny import tiny_unet

SIZES = [(4, 4), (6, 4), (4, 6), (5, 4), (4, 7), (5, 7), (1, 3), (1, 1)]


def make_attention(heads: int = 2, width: int = 4, seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    return Attention(heads * width, heads=heads, dim_head=width).eval()


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(
    attention: Attention, tokens: torch.Tensor, size: tuple[int, int], mode: str = "regional"
) -> torch.Tensor:
    attention.set_processor(MODES[mode]())
    with torch.no_grad():
        return call_at_size(size, attention, tokens)


def list_members(row: int, column: int, size: tuple[int, int]) -> list[tuple[int, int]]:
    """The places of a cell in order of their region, those beyond the edge moved onto it."""
    height, width = size
    return [
        (min(2 * row + down, height - 1), min(2 * column + right, width - 1))
        for down, right in itertools.product((0, 1), (0, 1))
    ]


def attend_in_loops(attention: Attention, tokens: torch.Tensor, size: tuple[int, int]) -> Any:
    """GRI attention of one sample [N, C], one query, key and head at a time."""
    height, width = size
    heads, channels = attention.heads, tokens.shape[1]
    each = channels // heads
    cells = [
        list_members(row, column, size)
        for row in range(math.ceil(height / 2))
        for column in range(math.ceil(width / 2))
    ]
    feature = tokens.reshape(height, width, channels)
    mixed = torch.zeros(height, width, channels)
    for cell in cells:
        # The mean of the tokens that are there, each of them once.
        there = list(dict.fromkeys(cell))
        query = attention.to_q(torch.stack([feature[place] for place in there]).mean(0))
        for region, place in enumerate(cell):
            if place in cell[:region]:
                continue
            keys = torch.stack([attention.to_k(feature[other[region]]) for other in cells])
            values = torch.stack([attention.to_v(feature[other[region]]) for other in cells])
            for head in range(heads):
                part = slice(head * each, (head + 1) * each)
                scores = (keys[:, part] @ query[part] / math.sqrt(each)).softmax(0)
                mixed[place][part] = scores @ values[:, part]
    return attention.to_out[0](mixed.reshape(-1, channels))


@pytest.mark.parametrize("size", SIZES)
def test_it_is_what_plain_loops_compute(size: tuple[int, int]) -> None:
    attention = make_attention()
    tokens = draw(2, size[0] * size[1], 8)
    with torch.no_grad():
        expected = torch.stack([attend_in_loops(attention, each, size) for each in tokens])
    torch.testing.assert_close(run(attention, tokens, size), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_regions_join_to_what_was_split(size: tuple[int, int]) -> None:
    tokens = draw(2, size[0] * size[1], 3)
    regions = split_regions(tokens, size)
    assert regions.shape == (2, 4, math.ceil(size[0] / 2) * math.ceil(size[1] / 2), 3)
    assert torch.equal(join_regions(regions, size), tokens)
    torch.testing.assert_close(average_cells(tokens, size), regions.mean(1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [40, 64])
@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_constant_cells_give_full_attention(mode: str, width: int, size: tuple[int, int]) -> None:
    attention = make_attention(heads=3, width=width)
    cells = draw(2, 3 * width, size[0] // 2, size[1] // 2)
    feature = cells.repeat_interleave(2, 2).repeat_interleave(2, 3)
    tokens = feature.flatten(2).transpose(1, 2)
    found = run(attention, tokens, size, mode)
    attention.set_processor(AttnProcessor2_0())
    with torch.no_grad():
        torch.testing.assert_close(found, attention(tokens), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_it_is_not_full_attention_elsewhere(mode: str) -> None:
    attention = make_attention()
    tokens = draw(1, 16, 8)
    found = run(attention, tokens, (4, 4), mode)
    attention.set_processor(AttnProcessor2_0())
    assert not torch.allclose(found, attention(tokens), atol=1e-2)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_every_kernel_gives_the_same(backend: SDPBackend) -> None:
    attention = make_attention(width=40)
    tokens = draw(2, 24, 80)
    expected = run(attention, tokens, (6, 4))
    with sdpa_kernel(backend):
        torch.testing.assert_close(run(attention, tokens, (6, 4)), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width", [40, 64])
@pytest.mark.parametrize(
    "backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
)
def test_every_kernel_of_a_gpu_gives_the_same(backend: SDPBackend, width: int) -> None:
    attention = make_attention(width=width).to("cuda", torch.float16)
    tokens = draw(2, 24 * 16, 2 * width).to("cuda", torch.float16)
    expected = run(attention.float(), tokens.float(), (24, 16))
    with sdpa_kernel(backend):
        found = run(attention.half(), tokens, (24, 16))
    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=1e-2)


def test_masks_and_conditions_run_in_full() -> None:
    attention = make_attention()
    tokens, text = draw(1, 16, 8), draw(1, 5, 8, seed=2)
    mask = torch.zeros(1, 1, 16)
    mask[..., 3:] = -10000.0
    found = {}
    for name, processor in {"gri": GRIAttnProcessor(), "full": AttnProcessor2_0()}.items():
        attention.set_processor(processor)
        found[name] = attention(tokens, text), attention(tokens, attention_mask=mask)
    assert all(map(torch.equal, found["gri"], found["full"]))


def test_maps_of_an_unknown_size_run_in_full() -> None:
    attention = make_attention()
    tokens = draw(1, 24, 8)
    attention.set_processor(AttnProcessor2_0())
    expected = attention(tokens)
    attention.set_processor(GRIAttnProcessor())
    assert torch.equal(attention(tokens), expected)
    assert torch.equal(call_at_size((9, 9), attention, tokens), expected)
    assert not torch.equal(call_at_size((8, 12), attention, tokens), expected)


def test_the_size_is_a_level_of_the_latent() -> None:
    assert find_size(24) is None
    assert find_size(16) == (4, 4)
    assert call_at_size((64, 96), find_size, 64 * 96) == (64, 96)
    assert call_at_size((64, 96), find_size, 8 * 12) == (8, 12)
    assert call_at_size((2, 8), find_size, 16) == (2, 8)
    assert call_at_size((11, 13), find_size, 6 * 7) == (6, 7)
    assert call_at_size((11, 13), find_size, 3 * 4) == (3, 4)
    assert call_at_size((11, 13), find_size, 49) is None
    assert find_size(16) == (4, 4)


@pytest.mark.parametrize("mode", MODES)
def test_sizes_known_are_those_of_the_running_thread(mode: str) -> None:
    """The same call in another thread, where nothing is known of a size."""
    attention = make_attention()
    attention.set_processor(MODES[mode]())
    tokens = draw(1, 16, 8)
    square = run(attention, tokens, (4, 4), mode)
    with ThreadPoolExecutor(1) as pool:
        found = call_at_size((2, 8), lambda: pool.submit(attention, tokens).result())
    assert torch.equal(found, square)
    assert not torch.equal(run(attention, tokens, (2, 8), mode), square)


def test_the_cost_of_a_shallow_self_attention_falls_to_a_third() -> None:
    shallow = {"block_out_channels": (320,), "layers_per_block": 1, "mid_block_type": None}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    unet = open_builtin("sd15", **shallow, **blocks)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert count_macs(unet, latent=64)[path] / 1e9 == pytest.approx(12.415, abs=1e-3)
    unet.get_submodule(path).set_processor(GRIAttnProcessor())
    assert count_macs(unet, latent=64)[path] / 1e9 == pytest.approx(4.048, abs=1e-3)


def test_loras_are_part_of_it() -> None:
    """An attention with LoRAs on its projections is the one that they are merged into."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    unet = tiny_unet()
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    attention = copy.deepcopy(unet.get_submodule(path))
    tokens = draw(1, 16, 32)
    plain = run(attention, tokens, (4, 4))
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    inject_adapter_in_model(config, attention)
    found = run(attention, tokens, (4, 4))
    assert not torch.allclose(found, plain, atol=1e-3)
    for module in attention.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    torch.testing.assert_close(run(attention, tokens, (4, 4)), found)


@pytest.mark.parametrize("processor", [GRIAttnProcessor(), GlobalGRIAttnProcessor()])
def test_it_trains(processor: GRIAttnProcessor) -> None:
    attention = make_attention()
    attention.set_processor(processor)
    call_at_size((4, 6), attention, draw(1, 24, 8)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in attention.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("outside", [True, False], ids=["size outside", "size inside"])
def test_one_graph_holds_it(outside: bool) -> None:
    attention = make_attention()
    attention.set_processor(GRIAttnProcessor())

    def call(tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return call_at_size(size, attention, tokens)

    torch._dynamo.reset()
    if outside:
        graph = torch.compile(attention, fullgraph=True, backend="eager")
        compiled = lambda tokens, size: call_at_size(size, graph, tokens)  # noqa: E731
    else:
        compiled = torch.compile(call, fullgraph=True, backend="eager")
    tokens = draw(1, 24, 8)
    with torch.no_grad():
        for size in ((4, 6), (6, 4)):
            torch.testing.assert_close(compiled(tokens, size), call(tokens, size))
    assert find_size(24) is None

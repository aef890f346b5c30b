"""Conditional convolution: exact where it starts, three ways that agree, experts that fit."""

import copy
import itertools

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from leansd.anatomy import read_anatomy
from leansd.anatomy.builtin import open_builtin
from leansd.errors import LeansdError
from leansd.surgery.parts.condconv import (
    ROUTERS,
    CondConv2d,
    CondConvResnet,
    Inputs,
    Kernels,
    build_router,
    convolve_grouped,
    convolve_merged,
    convolve_stacked,
    fill_experts,
    fit_kernel,
    list_donors,
    merge_kernels,
    pick_convolution,
    read_inputs,
)
from leansd.surgery.parts.experts import (
    align_resnet,
    compare_channels,
    match_channels,
    permute_inner,
)
from tiny import tiny_unet

GEOMETRY = {"padding": 1}


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_resnet(inputs: int = 24, outputs: int = 16, seed: int = 0, **changes) -> ResnetBlock2D:
    torch.manual_seed(seed)
    options = {"in_channels": inputs, "out_channels": outputs, "temb_channels": 12, "groups": 4}
    resnet = ResnetBlock2D(**(options | changes)).eval()
    for norm in (resnet.norm1, resnet.norm2):  # as if trained
        nn.init.normal_(norm.weight, 1.0, 0.5)
        nn.init.normal_(norm.bias)
    return resnet


def make_conditional(resnet: ResnetBlock2D, routing: str, experts: int = 2) -> CondConvResnet:
    """`resnet` with random experts; its router is as new."""
    resnet = copy.deepcopy(resnet)
    conditional = CondConvResnet(resnet, build_router(routing, resnet, experts), experts)
    for conv in (conditional.conv1, conditional.conv2):
        nn.init.normal_(conv.experts, std=0.1)
    return conditional


def wake(conditional: CondConvResnet, seed: int = 3) -> CondConvResnet:
    """The router as if trained."""
    torch.manual_seed(seed)
    nn.init.normal_(conditional.router.output.weight)
    nn.init.normal_(conditional.router.output.bias)
    return conditional


@pytest.mark.parametrize("rows", [1, 3])
def test_three_ways_agree(rows: int) -> None:
    inputs, own, experts = draw(3, 5, 7, 6), draw(4, 5, 3, 3), draw(2, 4, 5, 3, 3)
    routing, bias = draw(rows, 2), draw(4)
    every = routing.expand(3, -1)
    kernels = Kernels(own, experts, bias, GEOMETRY)
    stacked = convolve_stacked(inputs, kernels, routing)
    grouped = convolve_grouped(inputs, kernels, every)
    torch.testing.assert_close(stacked, grouped, atol=1e-5, rtol=1e-5)
    one_by_one = [convolve_merged(inputs[i : i + 1], kernels, every[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat(one_by_one), grouped, atol=1e-5, rtol=1e-5)


def test_merging_is_what_its_formula_says() -> None:
    own, experts, routing = draw(2, 3, 3, 3), draw(2, 2, 3, 3, 3), torch.tensor([[0.25, -0.5]])
    expected = own + 0.25 * (experts[0] - own) - 0.5 * (experts[1] - own)
    torch.testing.assert_close(merge_kernels(own, experts, routing)[0], expected)
    assert torch.equal(merge_kernels(own, experts, torch.zeros(1, 2))[0], own)


def test_each_way_has_its_place() -> None:
    assert pick_convolution(torch.zeros(1, 2)) is convolve_merged
    assert pick_convolution(torch.zeros(4, 2)) is convolve_stacked
    with torch.no_grad():
        assert pick_convolution(torch.zeros(1, 2)) is convolve_merged
        assert pick_convolution(torch.zeros(4, 2)) is convolve_grouped


def test_unrouted_convolutions_are_plain() -> None:
    conv = nn.Conv2d(5, 4, 3, padding=1)
    inputs = draw(3, 5, 7, 6)
    conditional = CondConv2d.take_over(conv, experts=2)
    nn.init.normal_(conditional.experts)
    for rows in (1, 3):
        assert torch.equal(conditional(inputs, torch.zeros(rows, 2)), conv(inputs))
    with torch.no_grad():
        found = conditional(inputs, torch.zeros(3, 2))
    torch.testing.assert_close(found, conv(inputs), atol=1e-6, rtol=1e-6)


SHAPES = [{}, {"outputs": 24}, {"output_scale_factor": 2.0}, {"skip_time_act": True}]


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("routing", ROUTERS)
@pytest.mark.parametrize("rows", [1, 2])
def test_resnets_start_as_they_were(changes: dict, routing: str, rows: int) -> None:
    resnet = make_resnet(**changes)
    conditional = make_conditional(resnet, routing)
    features, temb = draw(2, 24, 6, 5), draw(rows, 12, seed=2)
    assert torch.equal(conditional(features, temb), resnet(features, temb))
    assert not torch.equal(wake(conditional)(features, temb), resnet(features, temb))


def test_one_time_for_all_is_merged_once() -> None:
    """One row of the time embedding gives what as many rows as samples give."""
    conditional = wake(make_conditional(make_resnet(), "time"))
    features, temb = draw(3, 24, 6, 5), draw(1, 12, seed=2)
    with torch.no_grad():
        merged, grouped = conditional(features, temb), conditional(features, temb.expand(3, -1))
    torch.testing.assert_close(merged, grouped, atol=1e-5, rtol=1e-5)
    stacked = conditional(features, temb.expand(3, -1))
    torch.testing.assert_close(merged, stacked.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("routing", ROUTERS)
@pytest.mark.parametrize("rows", [1, 2])
def test_routers_learn_from_the_first_step(routing: str, rows: int) -> None:
    conditional = make_conditional(make_resnet(), routing)
    optimizer = torch.optim.SGD(conditional.parameters(), lr=0.1)
    grown = []
    for _ in range(2):
        optimizer.zero_grad()
        conditional(draw(2, 24, 6, 5), draw(rows, 12, seed=2)).square().mean().backward()
        optimizer.step()
        grown.append({name: p.grad.abs().sum() > 0 for name, p in conditional.named_parameters()})
    asleep = [name for name, grows in grown[0].items() if not grows]
    # At zero routing the experts have no say; all that is behind the router's last layer follows.
    assert set(asleep) <= {
        "conv1.experts", "conv2.experts", "router.hidden.weight", "router.hidden.bias"
    }  # fmt: skip
    assert all(grown[1].values())


def test_names_of_plain_weights_stay() -> None:
    resnet = make_resnet()
    names = make_conditional(resnet, "time").state_dict()
    assert resnet.state_dict().keys() <= names.keys()
    assert all(torch.equal(names[name], value) for name, value in resnet.state_dict().items())
    added = {name.split(".")[-1] for name in names.keys() - resnet.state_dict().keys()}
    assert added == {"experts", "weight", "bias"}


@pytest.mark.parametrize("routing", ROUTERS)
def test_half_precision_and_the_meta_device(routing: str) -> None:
    half = make_conditional(make_resnet().half(), routing)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    with torch.device("meta"):
        resnet = make_resnet()
    meta = CondConvResnet(resnet, build_router(routing, resnet, 3), 3)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert meta(draw(2, 24, 6, 5).to("meta"), draw(1, 12).to("meta")).shape == (2, 16, 6, 5)


def test_loras_on_its_convolutions_get_the_routing() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    conditional = wake(make_conditional(make_resnet(), "time"))
    features, temb = draw(2, 24, 6, 5), draw(1, 12, seed=2)
    before = conditional(features, temb)
    config = LoraConfig(r=2, target_modules=["conv1", "conv2"])
    inject_adapter_in_model(config, conditional)
    assert torch.equal(conditional(features, temb), before)


def test_one_graph_holds_it() -> None:
    torch._dynamo.reset()
    conditional = wake(make_conditional(make_resnet(), "time"))
    compiled = torch.compile(conditional, fullgraph=True, backend="eager")
    for rows in (1, 2):
        given = draw(2, 24, 6, 5), draw(rows, 12)
        torch.testing.assert_close(compiled(*given), conditional(*given))


def test_unfit_resnets_are_refused() -> None:
    for changes, words in (
        ({"up": True}, "changes the size"),
        ({"time_embedding_norm": "scale_shift"}, "scale_shift"),
    ):
        resnet = make_resnet(**changes)
        with pytest.raises(LeansdError, match=words):
            CondConvResnet(resnet, build_router("image", resnet, 1), 1)
    with pytest.raises(LeansdError, match="cannot be routed by time"):
        build_router("time", make_resnet(temb_channels=None), 1)
    with pytest.raises(LeansdError, match="there are time, image"):
        build_router("text", make_resnet(), 1)


# What fits where in Stable Diffusion 1.5: own and donor of the first convolution, and the parts.
SKIP_OF_FIRST = ((slice(640, 960), slice(320, 640)),)
FITS = {
    ("up3.l0.res", "up3.l1.res"): SKIP_OF_FIRST,
    ("up3.l0.res", "up3.l2.res"): SKIP_OF_FIRST,
    ("up3.l2.res", "up3.l1.res"): "whole",
    ("up3.l2.res", "up3.l0.res"): ((slice(320, 640), slice(640, 960)),),
    ("dn0.l0.res", "dn0.l1.res"): "whole",
    # Another block's layers: the hidden states are equally wide, the skips are not.
    ("up2.l1.res", "up2.l2.res"): ((slice(0, 640), slice(0, 640)),),
    ("up2.l2.res", "up2.l0.res"): (),
}


@pytest.mark.parametrize(("own", "donor"), FITS)
def test_first_convolutions_of_stable_diffusion(own: str, donor: str) -> None:
    anatomy = read_anatomy(open_builtin("sd15"))
    mine, theirs = read_inputs(anatomy, own), read_inputs(anatomy, donor)
    found, expected = mine.match(theirs), FITS[own, donor]
    if expected == "whole":
        assert [here for here, _ in found] == [there for _, there in found]
        assert sum(here.stop - here.start for here, _ in found) == anatomy[own].channels[0]
    else:
        assert found == expected


def test_donors_are_the_other_resnets() -> None:
    anatomy = read_anatomy(tiny_unet())
    assert list_donors(anatomy, ["up3"], "up3.l2.res") == ("up3.l0.res", "up3.l1.res")
    assert list_donors(anatomy, ["dn0", "up3.l0"], None) == (
        "dn0.l0.res", "dn0.l1.res", "up3.l0.res"
    )  # fmt: skip
    with pytest.raises(LeansdError, match=r"besides dn0\.l0\.res"):
        list_donors(anatomy, ["dn0.l0"], "dn0.l0.res")


def test_experts_are_the_donors_where_they_fit() -> None:
    unet = tiny_unet(block_out_channels=(16, 32, 64, 64), norm_num_groups=8)
    anatomy = read_anatomy(unet)
    resnets = {at: unet.get_submodule(anatomy[at].path) for at in list_donors(anatomy, ["up3"], "")}
    own = resnets["up3.l0.res"]
    assert (own.conv1.in_channels, read_inputs(anatomy, "up3.l0.res")) == (48, Inputs(32, 16))
    conditional = make_conditional(own, "time")
    donors = [(resnets[at], read_inputs(anatomy, at)) for at in ("up3.l1.res", "up3.l2.res")]
    fill_experts(conditional, Inputs(32, 16), donors)
    for index, (donor, _) in enumerate(donors):
        first, second = conditional.conv1.experts[index], conditional.conv2.experts[index]
        assert torch.equal(second, donor.conv2.weight)
        assert torch.equal(first[:, :32], own.conv1.weight[:, :32])
        assert torch.equal(first[:, 32:], donor.conv1.weight[:, 16:])
    with pytest.raises(LeansdError, match="1 donors for 2 experts"):
        fill_experts(conditional, Inputs(32, 16), donors[:1])


def test_kernels_that_cannot_fit_are_refused() -> None:
    with pytest.raises(LeansdError, match="output channels"):
        fit_kernel(draw(4, 6, 3, 3), draw(5, 6, 3, 3), Inputs(6), Inputs(6))


def test_alignment_leaves_the_function_unchanged() -> None:
    donor, own = make_resnet(seed=4), make_resnet(seed=5)
    aligned = align_resnet(donor, own, Inputs(24), Inputs(24))
    features, temb = draw(2, 24, 6, 5), draw(2, 12, seed=2)
    assert not torch.equal(aligned.conv1.weight, donor.conv1.weight)
    torch.testing.assert_close(aligned(features, temb), donor(features, temb), atol=1e-6, rtol=1e-6)
    before = compare_channels(own, donor, Inputs(24), Inputs(24)).trace()
    assert compare_channels(own, aligned, Inputs(24), Inputs(24)).trace() > before


def test_alignment_finds_a_hidden_order() -> None:
    """A ResNet whose groups, and the channels in them, were shuffled is put back as it was."""
    own = make_resnet()
    generator = torch.Generator().manual_seed(0)
    groups = torch.randperm(4, generator=generator)
    order = torch.cat([4 * group + torch.randperm(4, generator=generator) for group in groups])
    shuffled = permute_inner(own, order)
    assert not torch.equal(shuffled.conv1.weight, own.conv1.weight)
    found = align_resnet(shuffled, own, Inputs(24), Inputs(24)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in own.state_dict().items())


def test_matching_is_the_best_that_keeps_groups_together() -> None:
    similarity, groups = draw(6, 6), 3
    found = match_channels(similarity, groups)
    places = torch.arange(6)
    best = max(
        float(similarity[places, torch.tensor(order)].sum())
        for order in itertools.permutations(range(6))
        if all(order[i] // 2 == order[i + 1] // 2 for i in (0, 2, 4))
    )
    assert float(similarity[places, found].sum()) == pytest.approx(best)
    assert sorted(found.tolist()) == list(range(6))


def test_alignment_needs_the_same_inner_channels() -> None:
    with pytest.raises(LeansdError, match="inner channels"):
        align_resnet(make_resnet(), make_resnet(outputs=32), Inputs(24), Inputs(24))

"""GRI and CLME-CondConv as edits of a surgery: built, inherited, saved, folded and hooked."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

import leansd
from leansd.anatomy import read_anatomy
from leansd.anatomy.inputs import make_inputs
from leansd.errors import LeansdError
from leansd.surgery.fold import embed_times, fold, fold_segments
from leansd.surgery.parts.condconv import CondConvResnet
from leansd.surgery.parts.gri import GlobalGRIAttnProcessor, GRIAttnProcessor
from tiny import tiny_pipeline, tiny_unet, tiny_xl_unet

LIGHT = leansd.Surgery("light").drop("dn0.l1", "up3.l1")
GRI = LIGHT.replace("dn0.*.attn", "up3.*.attn", by="gri")
CONDITIONAL = LIGHT.replace("up3.*.res", by="condconv", donors="up3")
BOTH = GRI.replace("dn0.*.res", "up3.*.res", by="condconv")


def teach(**changes: Any) -> UNet2DConditionModel:
    """A tiny teacher whose shallow levels differ in width, as those of Stable Diffusion do."""
    return tiny_unet(block_out_channels=(16, 32, 64, 64), **changes)


def list_conditionals(unet: nn.Module) -> list[CondConvResnet]:
    return [module for module in unet.modules() if isinstance(module, CondConvResnet)]


def wake(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """All routers as if trained."""
    torch.manual_seed(3)
    for resnet in list_conditionals(unet):
        nn.init.normal_(resnet.router.output.weight)
        nn.init.normal_(resnet.router.output.bias)
    return unet


@torch.no_grad()
def run(unet: nn.Module, batch: int = 1, t: Any = 500, size: tuple[int, int] = (8, 8)) -> Any:
    generator = torch.Generator().manual_seed(0)
    inputs = make_inputs(unet, size=size, batch=batch, generator=generator, tokens=7)
    return unet(**{**inputs, "timestep": t}).sample


@pytest.mark.parametrize("surgery", [CONDITIONAL, LIGHT.replace("up3.*.res", by="condconv")])
def test_conditional_nets_start_as_the_nets_that_they_replace(surgery: leansd.Surgery) -> None:
    teacher = teach()
    plain, _ = leansd.operate(teacher, LIGHT)
    student, _ = leansd.operate(teacher, surgery)
    assert len(list_conditionals(student)) == 2
    assert torch.equal(run(student), run(plain))
    torch.testing.assert_close(run(student, batch=3), run(plain, batch=3))
    assert not torch.allclose(run(wake(student)), run(plain), atol=1e-4)


def test_images_route_too() -> None:
    teacher = teach()
    plain, _ = leansd.operate(teacher, LIGHT)
    routed = LIGHT.replace("up3.*.res", by="condconv", routing="image")
    student, _ = leansd.operate(teacher, routed)
    assert torch.equal(run(student), run(plain))
    torch.testing.assert_close(run(student, batch=2), run(plain, batch=2))
    with pytest.raises(LeansdError, match=r"routed by the image"):
        fold(student, [500])


# What A-SDM's light net gets: student, what it comes from, its donors in order.
EXPERTS = {
    "up3.l0.res": ("up3.l0.res", ["up3.l1.res", "up3.l2.res"]),
    "up3.l1.res": ("up3.l2.res", ["up3.l0.res", "up3.l1.res"]),
    "dn0.l0.res": ("dn0.l0.res", ["dn0.l1.res"]),
}


@pytest.mark.parametrize("at", EXPERTS)
def test_experts_are_the_kernels_of_the_layers_there_were(at: str) -> None:
    teacher = teach()
    student, _ = leansd.operate(teacher, BOTH)
    theirs, own = read_anatomy(teacher), read_anatomy(student)
    origin, donors = EXPERTS[at]
    resnet: Any = student.get_submodule(own[at].path)
    before: Any = teacher.get_submodule(theirs[origin].path)
    assert torch.equal(resnet.conv1.weight, before.conv1.weight)
    for index, name in enumerate(donors):
        donor: Any = teacher.get_submodule(theirs[name].path)
        first, second = resnet.conv1.experts[index], resnet.conv2.experts[index]
        assert torch.equal(second, donor.conv2.weight)
        # The 16 skip channels come last; what is before them is as wide in some donors only.
        if first.shape == donor.conv1.weight.shape:
            assert torch.equal(first, donor.conv1.weight)
            continue
        assert torch.equal(first[:, -16:], donor.conv1.weight[:, -16:])
        assert torch.equal(first[:, :-16], before.conv1.weight[:, :-16])
    assert len(donors) == len(resnet.conv1.experts) == len(resnet.conv2.experts)


def test_experts_can_come_aligned_and_from_another_net() -> None:
    teacher, other = teach(), teach(seed=1)
    options = {"by": "condconv", "donors": "up3.l1", "source": "other"}
    nets = {"original": teacher, "other": other}
    raw, _ = leansd.operate(nets, LIGHT.replace("up3.l2.res", **options))
    aligned, _ = leansd.operate(nets, LIGHT.replace("up3.l2.res", **options, align=True))
    found, straight = (list_conditionals(net)[0].conv2.experts[0] for net in (aligned, raw))
    donor = other.up_blocks[3].resnets[1].conv2.weight
    assert torch.equal(straight, donor)
    assert not torch.equal(found, donor)
    assert torch.equal(found.sort(dim=1).values, donor.sort(dim=1).values)


@pytest.mark.parametrize("surgery", [GRI, CONDITIONAL, BOTH], ids=["gri", "condconv", "both"])
def test_saved_nets_come_back(surgery: leansd.Surgery, tmp_path: Path) -> None:
    student, _ = leansd.operate(teach(), surgery)
    expected = run(wake(student), size=(8, 12))
    student.save_pretrained(tmp_path)
    loaded, before = leansd.load_unet(tmp_path), student.state_dict()
    assert all(torch.equal(before[name], each) for name, each in loaded.state_dict().items())
    # Where tensors lie in memory, what loads them decides, and that decides how sums are rounded.
    torch.testing.assert_close(run(loaded, size=(8, 12)), expected)


def test_pipelines_draw_with_them(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    student, _ = leansd.operate(pipe.unet, BOTH)
    pipe.unet = wake(student)
    call: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "prompt": "a"}
    expected = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    found = again(**call, generator=torch.Generator().manual_seed(0)).images
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_they_inherit_features() -> None:
    pipe = tiny_pipeline()
    pipe.unet = wake(leansd.operate(pipe.unet, BOTH)[0])
    call: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "prompt": "a"}

    def draw() -> torch.Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    expected = draw()
    with leansd.inherit(pipe, leansd.Plan.full(4)):
        assert torch.equal(draw(), expected)
    with leansd.inherit(pipe, leansd.preset("deepcache", 4, interval=2)):
        assert not torch.equal(draw(), expected)


@pytest.mark.slow
def test_one_graph_holds_a_whole_unet() -> None:
    """The size of the latents is told inside the trace, where context variables cannot be set."""
    shallow = tiny_unet(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
    )
    surgery = leansd.Surgery("shallow").drop("dn*.l1", "up*.l1")
    surgery = surgery.replace("dn0.l0.attn", by="gri").replace("dn0.l0.res", by="condconv")
    student = wake(leansd.operate(shallow, surgery)[0])
    expected = run(student, size=(4, 8), batch=2, t=torch.tensor(500))
    torch._dynamo.reset()
    compiled = torch.compile(student, fullgraph=True, backend="eager")
    found = run(compiled, size=(4, 8), batch=2, t=torch.tensor(500))
    torch.testing.assert_close(found, expected)


def test_plain_checkpoints_run_full_attention() -> None:
    """GRI adds no weight: stock diffusers opens the same tensors."""
    teacher = teach()
    plain, _ = leansd.operate(teacher, LIGHT)
    student, _ = leansd.operate(teacher, GRI)
    plain.load_state_dict(student.state_dict())
    student.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(run(student), run(plain))


def test_what_is_replaced_is_what_the_edit_says() -> None:
    surgery = leansd.Surgery("g").replace("dn0.l0.attn", by="gri", mode="global")
    student, _ = leansd.operate(teach(), surgery.replace("up3.l2.attn.t0.sa", by="gri"))
    kinds = {name: type(each) for name, each in student.attn_processors.items()}
    down, up = (f"{name}.transformer_blocks.0.attn1.processor" for name in (
        "down_blocks.0.attentions.0", "up_blocks.3.attentions.2"
    ))  # fmt: skip
    assert (kinds.pop(down), kinds.pop(up)) == (GlobalGRIAttnProcessor, GRIAttnProcessor)
    assert not any(issubclass(kind, GRIAttnProcessor) for kind in kinds.values())


def test_cells_of_pictures_that_are_not_square_are_their_own() -> None:
    """The UNet says how large its latents are: 32 tokens are 4 by 8 here, and 8 by 4 there."""
    student, _ = leansd.operate(teach(), GRI)
    seen: list[Any] = []

    class Spy(GRIAttnProcessor):
        def attend(self, attn: Any, tokens: torch.Tensor, size: Any) -> torch.Tensor:
            seen.append(size)
            return super().attend(attn, tokens, size)

    for block in (student.down_blocks[0], student.up_blocks[3]):
        block.attentions[0].transformer_blocks[0].attn1.set_processor(Spy())
    run(student, size=(8, 16))
    run(student, size=(16, 8))
    assert seen == [(8, 16), (8, 16), (16, 8), (16, 8)]


def test_folding_is_exact_for_one_time_step(tmp_path: Path) -> None:
    student = wake(leansd.operate(teach(), CONDITIONAL)[0])
    before = copy.deepcopy(student.state_dict())
    plain = fold(student, [500])
    assert type(plain) is UNet2DConditionModel
    torch.testing.assert_close(run(plain, batch=2), run(student, batch=2))
    assert not torch.allclose(run(plain, t=20), run(student, t=20), atol=1e-4)
    assert all(torch.equal(before[name], each) for name, each in student.state_dict().items())
    plain.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(run(again), run(plain))


def test_folding_leaves_the_rest_of_a_surgery() -> None:
    student = wake(leansd.operate(teach(), BOTH)[0])
    folded = fold(student, torch.tensor([500]))
    assert not list_conditionals(folded)
    torch.testing.assert_close(run(folded, size=(8, 12)), run(student, size=(8, 12)))
    assert {each["by"] for each in folded.config.structure["replace"]} == {"gri"}


def test_stretches_share_what_is_not_merged() -> None:
    student = wake(leansd.operate(teach(), CONDITIONAL)[0])
    times = torch.tensor([900, 700, 500, 300, 100])
    nets = fold_segments(student, times, 2)
    assert len(nets) == 2
    states = [net.state_dict() for net in nets]
    other = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    convolutions = itertools.product((0, 1), ("conv1", "conv2"))
    assert other == {f"up_blocks.3.resnets.{layer}.{conv}.weight" for layer, conv in convolutions}
    shared = set(states[0]) - other
    assert all(states[0][name].data_ptr() == states[1][name].data_ptr() for name in shared)
    # Merging is linear in the routing: the mean kernel is that of the mean routing.
    resnet = list_conditionals(student)[0]
    with torch.no_grad():
        routing = resnet.router(None, embed_times(student, times[:3])).mean(0)
    own, experts = resnet.conv2.weight, resnet.conv2.experts
    expected = own + sum(a * (expert - own) for a, expert in zip(routing, experts, strict=True))
    torch.testing.assert_close(states[0]["up_blocks.3.resnets.0.conv2.weight"], expected)


def test_what_cannot_be_folded_is_said() -> None:
    student, _ = leansd.operate(teach(), CONDITIONAL)
    with pytest.raises(LeansdError, match="no time steps"):
        fold(student, [])
    with pytest.raises(LeansdError, match="2 time steps cannot be 3 stretches"):
        fold_segments(student, [900, 100], 3)
    surgery = leansd.Surgery("xl").replace("up2.*.res", by="condconv")
    student, _ = leansd.operate(tiny_xl_unet(), surgery)
    with pytest.raises(LeansdError, match="addition_embed_type text_time"):
        fold(student, [500])


def test_times_of_their_own_give_samples_kernels_of_their_own() -> None:
    student = wake(leansd.operate(teach(), CONDITIONAL)[0])
    both = run(student, batch=2, t=torch.tensor([900, 100]))
    torch.testing.assert_close(both[:1], run(student, batch=2, t=900)[:1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[1:], run(student, batch=2, t=100)[1:], atol=1e-5, rtol=1e-5)


WRONG = [
    (("dn0.l0.res",), {"by": "gri"}, "is no self-attention"),
    (("dn0.l0.attn",), {"by": "gri", "mode": "local"}, "no mode 'local'; there are regional"),
    (("dn0.l0.attn",), {"by": "gri", "heads": 2}, "no option 'heads'"),
    (("dn0.l0.attn",), {"by": "condconv"}, "is no ResNet"),
    (("dn0.l0.res",), {"by": "condconv", "routing": "text"}, "there are time, image"),
    (("dn0.l0.res",), {"by": "condconv", "expert": 2}, "no option 'expert'"),
    (("dn0.l0.res",), {"by": "condconv", "donors": "dn7"}, "matches nothing"),
    (("dn0.l0.res",), {"by": "condconv", "donors": "dn0.l0"}, "no ResNet to take experts from"),
    (("dn0.l0.res",), {"by": "condconv", "donors": "up0"}, "donors must give as many"),
    (("dn0.l0.res",), {"by": "condconv", "source": "light"}, "there are original"),
]


@pytest.mark.parametrize(("addresses", "options", "words"), WRONG)
def test_wrong_edits_are_refused(addresses: Any, options: Any, words: str) -> None:
    with pytest.raises(LeansdError, match=words):
        leansd.operate(teach(), leansd.Surgery("wrong").replace(*addresses, **options))

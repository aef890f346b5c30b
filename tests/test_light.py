"""Operated UNets in use: pipelines, LoRA, inheritance, replacements."""

import copy
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file

import leansd
from leansd.anatomy import read_anatomy
from leansd.anatomy.counting import count_macs
from leansd.anatomy.inputs import make_inputs
from leansd.errors import LeansdError
from leansd.loading import load_outline
from leansd.surgery.checkpoints import open_delta, save_delta, share_weights
from leansd.surgery.parts.narrow_ff import count_kept
from tiny import tiny_pipeline, tiny_unet

ODD = (
    leansd.Surgery("odd")
    .drop("up3.l1.attn", "dn2.down", "up0.up", "up0.l1")
    .replace("dn0.*.ff", by="narrow-ff", share=0.5)
)


@cache
def operate_once() -> leansd.LightUNet2DConditionModel:
    student, _ = leansd.operate(tiny_unet(), ODD)
    assert isinstance(student, leansd.LightUNet2DConditionModel)
    return student


def make_light() -> leansd.LightUNet2DConditionModel:
    return copy.deepcopy(operate_once())


def draw(pipe: Any) -> torch.Tensor:
    return pipe(
        "a cat", num_inference_steps=3, generator=torch.manual_seed(0), output_type="latent"
    ).images


def run(unet: torch.nn.Module) -> torch.Tensor:
    inputs = make_inputs(unet, size=(8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(**inputs).sample


def test_what_is_not_there_does_nothing() -> None:
    """A dropped attention is the network with that transformer's change taken away."""
    unet = tiny_unet()
    student, _ = leansd.operate(unet, leansd.Surgery().drop("up3.l1.attn", "mid.l0.attn"))
    for block in (unet.up_blocks[3].attentions[1], unet.mid_block.attentions[0]):
        block.forward = lambda hidden_states, **_: (hidden_states,)
    assert torch.equal(run(student), run(unet))
    missing = set(read_anatomy(unet).addresses) - set(read_anatomy(student).addresses)
    assert missing == {"up3.l1.attn", "mid.l0.attn"}
    assert student.config.structure["drop"] == ["mid.l0.attn", "up3.l1.attn"]


@pytest.mark.slow
def test_a_pipeline_with_it_is_saved_and_opened(tmp_path: Path) -> None:
    pipe = tiny_pipeline(unet=make_light())
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    code = (
        "import sys, leansd; assert 'leansd.surgery.light_unet' not in sys.modules; "
        "from diffusers import StableDiffusionPipeline as P; import torch; "
        f"pipe = P.from_pretrained({str(tmp_path)!r}); "
        "assert type(pipe.unet) is leansd.LightUNet2DConditionModel; "
        f"torch.save(pipe.unet.conv_out.weight, {str(tmp_path / 'w.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    weight = torch.load(tmp_path / "w.pt", weights_only=True)
    assert torch.equal(weight, pipe.unet.conv_out.weight)
    for opened in (
        StableDiffusionPipeline.from_pretrained(tmp_path, unet=pipe.unet),
        leansd.load(tmp_path, device="cpu"),
    ):
        opened.set_progress_bar_config(disable=True)
        # Rounding follows where tensors lie in memory, in stock diffusers too.
        torch.testing.assert_close(draw(opened), expected, atol=1e-4, rtol=1e-4)
    loaded, before = leansd.load_unet(tmp_path, device="cpu"), pipe.unet.state_dict()
    assert all(torch.equal(before[name], each) for name, each in loaded.state_dict().items())
    torch.testing.assert_close(run(loaded), run(pipe.unet))


def test_copies_are_whole() -> None:
    unet = operate_once()
    expected = run(unet)
    assert torch.equal(run(copy.deepcopy(unet)), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(unet))), expected)
    again = leansd.LightUNet2DConditionModel.from_config(unet.config)
    assert read_anatomy(again).fingerprint == read_anatomy(unet).fingerprint


def test_lora_is_put_on_and_off() -> None:
    unet = make_light()
    expected = run(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    assert not torch.equal(run(unet), expected)
    with pytest.raises(LeansdError, match="unload its LoRA"):
        leansd.operate(unet, "asdm-1222")
    unet.delete_adapters("default")
    assert torch.equal(run(unet), expected)


def test_it_trains() -> None:
    unet = make_light().train()
    unet.enable_gradient_checkpointing()
    unet(**make_inputs(unet, size=(8, 8))).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


def test_operations_go_on_from_it() -> None:
    unet = make_light()
    again, lineage = leansd.operate({"light": unet}, leansd.Surgery("none"))
    assert again.config.structure == unet.config.structure
    assert torch.equal(run(again), run(unet))
    assert lineage.frozen("light") == read_anatomy(unet).addresses
    less, _ = leansd.operate({"light": unet}, leansd.Surgery().drop("dn0.l0", "up3.l1"))
    assert less.config.structure["replace"] == [
        {"at": "dn0.l0.attn.t0.ff", "by": "narrow-ff", "options": {"share": 0.5}}
    ]
    assembled, lineage = leansd.operate(
        {"original": tiny_unet(seed=1), "light": unet}, leansd.Surgery().take("dn0", source="light")
    )
    path = "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.2.weight"
    assert torch.equal(assembled.get_parameter(path), unet.get_parameter(path))
    assert assembled.config.structure["drop"] == []


# -- narrow feed-forwards ----------------------------------------------------------------------


def test_a_whole_share_is_the_feed_forward_itself() -> None:
    unet = tiny_unet()
    student, lineage = leansd.operate(
        unet, leansd.Surgery().replace("*.ff", by="narrow-ff", share=1.0)
    )
    assert torch.equal(run(student), run(unet))
    assert "dn0.l0.attn" in lineage.changed


def test_the_largest_hidden_units_are_kept() -> None:
    unet = tiny_unet()
    net = unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.ff").net
    hidden = net[2].in_features
    silent = torch.randperm(hidden, generator=torch.Generator().manual_seed(0))[: hidden // 2]
    with torch.no_grad():
        net[0].proj.weight[silent] = 0
        net[0].proj.weight[silent + hidden] = 0
        net[0].proj.bias[silent] = 0
        net[2].weight[:, silent] = 0
    surgery = leansd.Surgery().replace("dn0.l0.attn.t0.ff", by="narrow-ff", share=0.5)
    student, lineage = leansd.operate(unet, surgery)
    narrow = student.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.ff").net
    assert narrow[2].in_features == hidden // 2 == count_kept(hidden, 0.5)
    assert torch.allclose(run(student), run(unet), atol=1e-5)
    assert lineage.changed == ("dn0.l0.attn",)
    assert "dn0.l0.attn" not in lineage.frozen("original")


# -- skip --------------------------------------------------------------------------------------


def test_skip_takes_a_part_out_of_a_transformer_block(tmp_path: Path) -> None:
    unet = tiny_unet()
    surgery = leansd.Surgery().replace("dn0.*.sa", "up2.l0.*.ff", "mid.*.ca", by="skip")
    student, lineage = leansd.operate(unet, surgery)
    parts = [unet.down_blocks[0].attentions[n].transformer_blocks[0].attn1 for n in (0, 1)]
    parts.append(unet.up_blocks[2].attentions[0].transformer_blocks[0].ff)
    parts.append(unet.mid_block.attentions[0].transformer_blocks[0].attn2)
    for part in parts:
        part.forward = lambda hidden_states, *_, **__: torch.zeros_like(hidden_states)
    assert torch.equal(run(student), run(unet))
    assert set(lineage.changed) == {"dn0.l0.attn", "dn0.l1.attn", "up2.l0.attn", "mid.l0.attn"}
    assert not [
        name for name in student.state_dict() if "down_blocks.0" in name and "attn1" in name
    ]

    student.save_pretrained(tmp_path)
    again = leansd.load_unet(tmp_path, device="cpu")
    assert torch.equal(run(again), run(student))
    student.train()(**make_inputs(student, size=(8, 8))).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_old_name_of_skip_is_read_with_a_note(tmp_path: Path) -> None:
    """Files, fingerprints and checkpoints from before the name changed stay what they were."""
    new = leansd.Surgery("quiet").replace("dn0.*.sa", by="skip")
    file = tmp_path / "quiet.yaml"
    file.write_text(new.write().replace("by: skip", "by: nothing"))
    with pytest.warns(FutureWarning, match="'nothing' is called 'skip' now"):
        old = leansd.Surgery.load(file)
    assert old == new
    assert new.fingerprint == "d6fd474c850a"
    student, _ = leansd.operate(tiny_unet(), new)
    assert student.config.structure["replace"][0]["by"] == "nothing"


def test_skip_can_be_put_where_a_part_is_skipped() -> None:
    surgery = leansd.Surgery().replace("dn0.*.sa", by="skip")
    student, _ = leansd.operate(tiny_unet(), surgery)
    less, _ = leansd.operate(student, leansd.Surgery().drop("dn0.l1", "up3.l1"))
    assert less.config.structure["replace"] == [
        {"at": "dn0.l0.attn.t0.sa", "by": "nothing", "options": {}}
    ]
    plan = leansd.Plan.full(3)
    pipe = tiny_pipeline(unet=student)
    expected = draw(pipe)
    with leansd.inherit(pipe, plan):
        assert torch.equal(draw(pipe), expected)


def test_a_net_is_kept_as_what_it_has_of_its_own(tmp_path) -> None:
    teacher = tiny_unet()
    student, _ = leansd.operate(teacher, leansd.Surgery("thin").drop("dn*.l1", "up*.l1"))
    with torch.no_grad():
        student.conv_in.weight += 1
    save_delta(student, teacher, tmp_path)
    own = load_file(tmp_path / "own.safetensors")
    assert sum(each.numel() for each in own.values()) < sum(
        each.numel() for each in student.parameters()
    )
    again = open_delta(tmp_path, teacher)
    assert all(
        torch.equal(tensor, again.state_dict()[name])
        for name, tensor in student.state_dict().items()
    )
    other, _ = leansd.operate(teacher, leansd.Surgery("thinner").drop("dn1.l0.attn"))
    with pytest.raises(LeansdError, match="beside the UNet that it was saved beside"):
        open_delta(tmp_path, other)


def test_the_embedded_lean_net_is_what_its_recipe_says() -> None:
    own, lean = (leansd.load_unet(name, device="cpu") for name in ("emoji", "emoji-lean"))
    outline, _ = leansd.operate(load_outline("emoji"), "lean")
    assert lean.config.structure == outline.config.structure
    assert count_macs(lean).total < 0.71 * count_macs(own).total
    # Whether it was trained for this model at all: untrained, the share is 1. It is 0.22 to 0.26
    # after the training that it had; how near its pictures come is measured in the card.
    bare, _ = leansd.operate(own, "lean")
    inputs = make_inputs(own, size=(16, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right, near, far = (net(**inputs).sample for net in (own, lean, bare))
    assert (near - right).square().mean() < 0.3 * (far - right).square().mean()


def test_the_embedded_light_net_shares_the_deep_part_of_the_model() -> None:
    own, light = (leansd.load_unet(name, device="cpu") for name in ("emoji", "emoji-light"))
    assert count_macs(light).total < count_macs(own).total
    assert torch.equal(
        light.mid_block.resnets[0].conv1.weight, own.mid_block.resnets[0].conv1.weight
    )
    assert share_weights(light, own) > 0.5 * sum(each.nbytes for each in own.parameters())

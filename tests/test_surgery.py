"""Surgeries: edits as data, what they make, whose weights it has, and what is refused."""

import itertools
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import leansd
from leansd.anatomy import read_anatomy
from leansd.anatomy.builtin import open_builtin
from leansd.anatomy.inputs import make_inputs
from leansd.errors import LeansdError
from leansd.surgery.apply import plan_operation
from leansd.surgery.presets import PRESETS, find_surgery
from tiny import tiny_unet, tiny_xl_unet

ODD = leansd.Surgery("odd").drop("up3.l1.attn", "dn2.down", "up0.up", "up0.l1")
"""Says what no config can: an attention less, and blocks of two and two layers at one size."""


NESTED = leansd.Surgery("nested").drop("dn2.l0.attn.t1", "up1.l1.attn.t0", "mid.l0.attn", "mid.l1")
"""Gives the layers of one block unequal transformers, as in SSD-1B."""

open_shape = lru_cache(open_builtin)


def run(unet: torch.nn.Module) -> torch.Tensor:
    inputs = make_inputs(unet, size=(8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(**inputs).sample


def count(unet: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in unet.parameters()) / 1e6


def shapes(unet: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in unet.state_dict().items()}


# -- surgeries as data -------------------------------------------------------------------------


def test_a_surgery_is_what_its_file_says(tmp_path: Path) -> None:
    surgery = (
        leansd.Surgery("light")
        .drop("dn0.l1", "up3.l1")
        .take("up2", source="other", places={"up2": "up3"})
        .replace("dn0.*.ff", by="narrow-ff", share=0.5)
    )
    for name in ("light.yaml", "light.json"):
        surgery.save(tmp_path / name)
        assert leansd.Surgery.load(tmp_path / name) == surgery
    assert surgery.fingerprint == leansd.Surgery("named otherwise", surgery.edits).fingerprint
    assert surgery.fingerprint != surgery.drop("mid").fingerprint
    assert len(leansd.Surgery("light").edits) == 0
    assert "2. take up2 of other, up2 as up3" in str(surgery)


def test_a_file_may_be_short(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("edits: [{drop: mid}]")
    surgery = find_surgery(tmp_path / "mine.yaml")
    assert (surgery.name, surgery.edits) == ("mine", leansd.Surgery().drop("mid").edits)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("edits: [{drop: mid}, {take: dn0, sorce: a}]", "edits.1.take.source: Field required"),
        ("edits: [{drop: mid, by: gri}]", "edits.0.drop.by: Extra inputs"),
        ("edits: [{tkae: dn0}]", "edits.0: an edit is a drop, a take or a replace"),
        ("edits: [{drop: []}]", "edits.0.drop.drop: Value should have at least 1"),
        ("edits: 3", "edits: Input should be a valid"),
        ("name: a\nedit: []", "edit: Extra inputs"),
        ("[1, 2]", "holds no keys"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_file_names_the_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(LeansdError) as error:
        leansd.Surgery.load(tmp_path / "wrong.yaml")
    assert said in str(error.value)


def test_surgeries_go_by_name() -> None:
    assert find_surgery("bk-tiny") is PRESETS["bk-tiny"].surgery
    with pytest.raises(LeansdError, match="did you mean bk-tiny"):
        find_surgery("bk-tyny")
    assert len(PRESETS["bk-base"].surgery.edits) == 1
    assert len(PRESETS["bk-tiny"].surgery.edits) == 3


# -- what is made ------------------------------------------------------------------------------


def test_without_edits_it_is_a_copy(any_unet: UNet2DConditionModel) -> None:
    before = {name: tensor.clone() for name, tensor in any_unet.state_dict().items()}
    copy, lineage = leansd.operate(any_unet, leansd.Surgery("none"))
    assert type(copy) is UNet2DConditionModel
    ours, theirs = (
        {name: value for name, value in unet.config.items() if not name.startswith("_")}
        for unet in (copy, any_unet)
    )
    assert ours == theirs
    given = any_unet.state_dict()
    for name, tensor in copy.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.data_ptr() != given[name].data_ptr()
    assert torch.equal(run(copy), run(any_unet))
    assert lineage.frozen("original") == read_anatomy(any_unet).addresses


@pytest.mark.parametrize("surgery", ["bk-base", "bk-small", "bk-tiny", ODD], ids=str)
def test_the_teacher_is_never_touched(surgery: Any) -> None:
    unet = tiny_unet()
    config, before = dict(unet.config), {n: t.clone() for n, t in unet.state_dict().items()}
    student, _ = leansd.operate(unet, surgery)
    assert dict(unet.config) == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    ours = {tensor.untyped_storage().data_ptr() for tensor in student.state_dict().values()}
    theirs = {tensor.untyped_storage().data_ptr() for tensor in unet.state_dict().values()}
    assert not ours & theirs
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def list_bk_sources(name: str) -> list[tuple[str, str]]:
    """Prefixes of BK-SDM's weight copy, student and teacher; what is not here has the same name."""
    if name != "bk-tiny":
        return [
            (f"up_blocks.{block}.{kind}.1.", f"up_blocks.{block}.{kind}.2.")
            for block in range(4)
            for kind in ("resnets", "attentions")
        ]
    layers = [
        (f"up_blocks.{block}.{kind}.{own}.", f"up_blocks.{block + 1}.{kind}.{other}.")
        for block in range(3)
        for kind in ("resnets", "attentions")
        for own, other in ((0, 0), (1, 2))
    ]
    return [*layers, *((f"up_blocks.{b}.", f"up_blocks.{b + 1}.") for b in range(3))]


@pytest.mark.parametrize("changes", [{}, {"attention_head_dim": (2, 2, 4, 4)}], ids=["v1", "v2"])
@pytest.mark.parametrize("name", ["bk-base", "bk-small", "bk-tiny"])
def test_weights_come_from_where_bk_sdm_has_them(name: str, changes: dict[str, Any]) -> None:
    unet = tiny_unet(**changes)
    student, _ = leansd.operate(unet, name)
    teacher = unet.state_dict()
    for key, tensor in student.state_dict().items():
        source = key
        for ours, theirs in list_bk_sources(name):
            if key.startswith(ours):
                source = theirs + key.removeprefix(ours)
                break
        assert torch.equal(tensor, teacher[source]), key


TINY: dict[str, Any] = {
    "mid_block_type": None,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}
SSD: dict[str, Any] = {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
# Surgery, built-in shape, published changes to its config, millions of parameters.
PUBLISHED: list[tuple[str, str, dict[str, Any], float]] = [
    ("bk-base", "sd15", {"layers_per_block": 1}, 579.38),
    ("bk-small", "sd15", {"layers_per_block": 1, "mid_block_type": None}, 482.35),
    ("bk-tiny", "sd15", {"layers_per_block": 1, **TINY}, 323.38),
    ("bk-base", "sd21-base", {"layers_per_block": 1}, 583.48),
    ("bk-small", "sd21-base", {"layers_per_block": 1, "mid_block_type": None}, 485.79),
    ("bk-tiny", "sd21-base",
     {"layers_per_block": 1, **TINY, "attention_head_dim": (5, 10, 20)}, 326.83),
    ("asdm-1222", "sd15", {"layers_per_block": (1, 2, 2, 2)}, 848.79),
    ("asdm-1122", "sd15", {"layers_per_block": (1, 1, 2, 2)}, 809.51),
    ("asdm-1112", "sd15", {"layers_per_block": (1, 1, 1, 2)}, 659.69),
    ("asdm-1111", "sd15", {"layers_per_block": 1}, 579.38),
    ("ssd-1b", "sdxl", SSD, 1331.33),
    ("koala-1b", "sdxl",
     {"layers_per_block": 1, "transformer_layers_per_block": (1, 2, 6)}, 1161.18),
    ("koala-700m", "sdxl",
     {"layers_per_block": 1, "transformer_layers_per_block": (1, 2, 5), "mid_block_type": None},
     782.8),
]  # fmt: skip


@pytest.mark.parametrize(("name", "model", "changes", "params"), PUBLISHED)
def test_presets_are_the_published_nets(
    name: str, model: str, changes: dict[str, Any], params: float
) -> None:
    student = plan_operation(open_shape(model), name).outline
    published = open_builtin(model, **changes)
    assert type(student) is UNet2DConditionModel
    assert shapes(student) == shapes(published)
    assert count(student) == pytest.approx(params, abs=0.05)
    for key in set(changes) - {"transformer_layers_per_block"}:
        ours, theirs = (json.dumps(each.config[key]) for each in (student, published))
        assert ours == theirs, key
    assert student.config.attention_head_dim == published.config.attention_head_dim


def test_short_edits_are_enough_for_bk_sdm() -> None:
    base = leansd.Surgery("base").drop("dn*.l1", "up*.l1")
    small = base.drop("mid")
    tiny = small.drop("dn2.down", "dn3", "up0")
    for surgery, name in ((base, "bk-base"), (small, "bk-small"), (tiny, "bk-tiny")):
        assert surgery.fingerprint == PRESETS[name].surgery.fingerprint


@pytest.mark.parametrize("name", ["bk-tiny", NESTED, ODD], ids=str)
def test_saved_and_opened_it_is_the_same(name: Any, tmp_path: Path) -> None:
    unet = tiny_xl_unet() if name is NESTED else tiny_unet()
    student, lineage = leansd.operate(unet, name)
    student.save_pretrained(tmp_path)
    lineage.save(tmp_path)
    opened = leansd.load_unet(tmp_path, device="cpu")
    assert type(opened) is type(student)
    assert shapes(opened) == shapes(student)
    assert all(map(torch.equal, opened.state_dict().values(), student.state_dict().values()))
    assert torch.equal(run(opened), run(student))
    assert leansd.Lineage.load(tmp_path) == lineage


def test_dtype_and_mode_are_the_teachers() -> None:
    student, _ = leansd.operate(tiny_unet().half().train(), ODD)
    assert student.dtype == torch.float16
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_order_of_edits_and_chained_surgeries_agree() -> None:
    unet = tiny_unet()
    whole, lineage = leansd.operate(unet, "bk-tiny")
    base, first = leansd.operate(unet, "bk-base")
    small, second = leansd.operate({"base": base}, leansd.Surgery("small").drop("mid"))
    tiny, third = leansd.operate(
        {"small": small}, leansd.Surgery("tiny").drop("dn3", "up0", "dn2.down")
    )
    assert all(map(torch.equal, whole.state_dict().values(), tiny.state_dict().values()))
    traced = third.trace({"small": second.trace({"base": first})})
    assert traced.origins == lineage.origins
    assert traced.pairs() == lineage.pairs()
    assert traced.base == "original"


# -- assembly ----------------------------------------------------------------------------------


def test_an_assembled_net_has_each_part_from_its_net() -> None:
    unet, other = tiny_unet(seed=0), tiny_unet(seed=1)
    light, earlier = leansd.operate(other, "bk-base")
    nets = {"original": unet, "light": light}
    surgery = leansd.Surgery("assembled").take("dn0", "up3", source="light")
    student, lineage = leansd.operate(nets, surgery)
    assert list(student.config.layers_per_block) == [1, 2, 2, 2]
    for key, tensor in student.state_dict().items():
        donor = light if key.startswith(("down_blocks.0.", "up_blocks.3.")) else unet
        assert torch.equal(tensor, donor.state_dict()[key]), key
    taken = {"dn0", "up3"}
    assert {at.split(".")[0] for at in lineage.frozen("light")} == taken
    assert not {at.split(".")[0] for at in lineage.frozen("original")} & taken
    ends = dict(lineage.pairs())
    assert str(ends["up3.l1.attn"]) == "light:up3.l1.attn"
    traced = dict(lineage.trace({"light": earlier}).pairs())
    assert str(traced["up3.l1.attn"]) == "original:up3.l2.attn"
    assert str(traced["dn0.down"]) == "original:dn0.down"


def test_take_where_addresses_differ() -> None:
    unet = tiny_unet(seed=0)
    tiny, _ = leansd.operate(tiny_unet(seed=1), "bk-tiny")
    surgery = leansd.Surgery("mixed").take("dn0", source="tiny")
    surgery = surgery.take("up2", source="tiny", places={"up2": "up3"})
    student, lineage = leansd.operate({"original": unet, "tiny": tiny}, surgery)
    assert str(lineage.origins["up3.l1.attn"]) == "tiny:up2.l1.attn"
    assert str(lineage.origins["up2.l1.attn"]) == "original:up2.l1.attn"
    state = student.state_dict()
    key = "resnets.1.conv1.weight"
    assert torch.equal(state[f"up_blocks.3.{key}"], tiny.state_dict()[f"up_blocks.2.{key}"])


def test_pairs_absorb_what_was_dropped_after_them() -> None:
    def pairs(surgery: Any) -> dict[str, str]:
        _, lineage = leansd.operate(tiny_unet(), surgery)
        return {pair.student: pair.teacher.at for pair in lineage.pairs()}

    assert pairs("bk-tiny") == {
        "dn0.down": "dn0.down",
        "dn1.down": "dn1.down",
        "dn2.l0.attn": "dn2.l1.attn",
        "up0.up": "up1.up",
        "up1.up": "up2.up",
        "up2.l1.attn": "up3.l2.attn",
    }
    base = pairs("bk-base")
    assert (base["dn3.l0.res"], base["mid.l1.res"]) == ("dn3.l1.res", "mid.l1.res")
    assert len(base) == 9
    single = pairs(leansd.Surgery().drop("mid.l0.attn", "mid.l1", "up3.l2.attn"))
    assert (single["mid.l0.res"], single["up3.l2.res"]) == ("mid.l1.res", "up3.l2.attn")


# -- what is refused ---------------------------------------------------------------------------

REFUSED = {
    "skips": (("dn0.l1",), "unbalanced skips", "up3.l2.res", "1 more on the way up"),
    "skips up": (("up3.l1",), "unbalanced skips", "dn0.l1.attn", "1 more on the way down"),
    "channels": (("dn1.l0", "up2.l1"), "dn1.l1.res takes 640 channels and would get 320 from"),
    "skip channels": (("dn1.l1", "up2.l2"), "up2.l1.res takes 640 channels by its skip", "320"),
    "address": (("dn0.l5",), "matches nothing", "did you mean dn0.l1"),
    "twice": (("mid", "mid"), "'mid' matches nothing"),
    "stem": (("stem",), "stem cannot be dropped"),
    "head": (("*",), "stem cannot be dropped"),
    "resnet": (("dn0.l1.res",), "dn0.l1.res cannot be dropped without", "drop dn0.l1, the whole"),
    "sampler": (("dn0.down",), "unbalanced samplers"),
    "samplers": (("up0.up",), "unbalanced samplers", "1/2"),
    "blocks": (("dn3", "dn2.down", "up0.up", "up0.l[01]"), "3 blocks are left on the way down"),
    "hollow": (("dn1.l*",), "dn1 has only dn1.down left"),
    "mid": (("mid.l1",), "mid.l0.attn has no ResNet after it"),
    "part": (("dn0.l0.attn.t0.sa",), "dn0.l0.attn.t0.sa cannot be dropped alone"),
    "last block": (("dn0.l0.attn.t0",), "no transformer block left; drop dn0.l0.attn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_address(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was copied")

    monkeypatch.setattr("leansd.surgery.apply._copy", touch)
    drop, *said = REFUSED[case]
    with pytest.raises(LeansdError) as error:
        leansd.operate(open_shape("sd15"), leansd.Surgery("mine").drop(*drop))
    assert str(error.value).startswith("surgery mine")
    assert all(words in str(error.value) for words in said), str(error.value)


def test_take_and_replace_are_refused_with_the_address() -> None:
    nets = {
        "original": tiny_unet(),
        "xl": tiny_xl_unet(),
        "wide": tiny_unet(block_out_channels=(64, 32, 64, 64)),
        "heads": tiny_unet(attention_head_dim=2),
        "other": tiny_unet(seed=1),
    }
    make = leansd.Surgery("mine")
    narrow = make.replace("dn0.*.ff", by="narrow-ff", share=0.5)
    for surgery, said in (
        (make.take("dn0", source="light"), "no net 'light' is given"),
        (make.take("dn7", source="xl"), "net xl: address 'dn7' matches nothing"),
        (make.take("dn0", source="xl"), "net xl is built with addition_"),
        (make.take("dn0", source="wide"), "dn0.l0.res takes 64 channels and would get 32"),
        (make.take("dn0", source="heads"), "attention_head_dim"),
        (make.take("dn0", source="other", places={"dn1": "dn0"}), "dn1 is said to be called dn0"),
        (make.take("dn0", source="other", places={"dn0": "up3"}), "dn0 cannot come to up3"),
        (make.take("dn0", "dn1", source="other", places={"dn0": "dn1"}), "the same place"),
        (make.replace("dn0", by="narow-ff"), "did you mean narrow-ff"),
        (make.replace("dn0.l0.attn", by="narrow-ff", share=0.5), "dn0.l0.attn is no feed-forward"),
        (make.replace("dn0.*.ff", by="narrow-ff", share=2), "dn0.l0.attn.t0.ff"),
        (make.replace("dn0.*.ff", by="narrow-ff", sahre=1), "no option 'sahre'"),
        (narrow.replace("dn0.l0.attn.t0.ff", by="narrow-ff", share=0.5), "replaced already"),
        (
            make.replace("dn0.l0.attn", by="skip"),
            "dn0.l0.attn is no part of a transformer block",
        ),
        (make.replace("dn0.*.sa", by="skip", share=1), "skip has no option 'share'; it has none"),
    ):
        with pytest.raises(LeansdError) as error:
            leansd.operate(nets, surgery)
        assert said in str(error.value), str(error.value)


def test_a_surgery_for_another_topology_is_refused() -> None:
    with pytest.raises(LeansdError, match=r"surgery bk-tiny, edit 3 .*did you mean dn1.down"):
        leansd.operate(tiny_xl_unet(), "bk-tiny")


def test_a_net_whose_config_does_not_describe_it_is_refused() -> None:
    unet = tiny_unet()
    del unet.down_blocks[1].attentions[1].transformer_blocks[0].attn2.to_q
    with pytest.raises(LeansdError, match=r"dn1.l1.attn.t0: net original has no tensor"):
        leansd.operate(unet, "asdm-1222")


def test_weights_that_are_not_the_configs_are_refused(tmp_path: Path) -> None:
    unet, _ = leansd.operate(tiny_unet(), "bk-base")
    unet.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for change, at in (
        ({"layers_per_block": 2}, "dn0.l1"),
        ({"mid_block_type": None}, "mid"),
        ({"norm_num_groups": 8, "cross_attention_dim": 16}, "dn0.l0.attn"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(LeansdError, match=f"^{at}.*put the config.json there"):
            leansd.load_unet(tmp_path)
    file.write_text(json.dumps({"_class_name": "UNet3D"}))
    with pytest.raises(LeansdError, match="is a UNet3D"):
        leansd.load_unet(tmp_path)
    with pytest.raises(LeansdError, match="no UNet in"):
        leansd.load_unet(tmp_path / "none")


# -- previews ----------------------------------------------------------------------------------


def test_a_preview_says_what_is_left() -> None:
    unet = tiny_unet()
    seen = leansd.preview(unet, "bk-tiny", latent=8)
    student, _ = leansd.operate(unet, "bk-tiny")
    made = leansd.dissect(student, latent=8)
    assert (seen.after.params, seen.after.macs) == (made.params, made.macs)
    assert seen.gone[-1] == "up3.l1"
    assert {"mid", "dn3", "up0", "dn2.down"} < set(seen.gone)
    assert seen.moved["up3.l2"] == "up2.l1"
    assert [skip for _, skip in seen.skips].count("stem") == 1
    assert len({skip for _, skip in seen.skips}) == len(seen.skips) == 6
    assert "44 units become 22" in str(seen)
    assert seen.kind == "UNet2DConditionModel"


def test_a_preview_tells_the_time_that_is_left() -> None:
    unet = tiny_unet()
    anatomy = read_anatomy(unet)
    seconds = {unit.at: 1.0 for unit in anatomy}
    surgery = leansd.Surgery().drop("dn0.l1", "up3.l1")
    seen = leansd.preview(unet, surgery, cost=seconds, latent=8)
    assert seen.seconds == (46.0, 42.0)

    class Cost:
        units = {at: {"whole": each} for at, each in seconds.items()}  # noqa: RUF012

    assert leansd.preview(unet, surgery, cost=Cost(), latent=8).seconds == (46.0, 42.0)
    assert "time" in str(seen)
    narrow = leansd.Surgery().replace("*.ff", by="narrow-ff", share=0.5)
    before, after = leansd.preview(unet, narrow, cost=seconds, latent=8).seconds or (0, 0)
    assert 30 < after < before == 46
    del seconds["dn0.down"]
    with pytest.raises(LeansdError, match=r"no time of dn0.down"):
        leansd.preview(unet, surgery, cost=seconds)


def test_random_surgeries_either_work_or_are_refused() -> None:
    """Whatever is dropped: a net that runs, with the parameters of its pieces, or a LeansdError."""
    unet = tiny_unet()
    anatomy = read_anatomy(unet)
    layers = [
        "dn0.l1",
        "dn1.l0",
        "dn3",
        "up0",
        "dn2.down",
        "mid",
        "up3.l1",
        "up2.l0",
        "up1.l2.attn",
    ]
    done = 0
    for drop in itertools.chain.from_iterable(itertools.combinations(layers, n) for n in (1, 2)):
        try:
            student, lineage = leansd.operate(unet, leansd.Surgery().drop(*drop))
        except LeansdError:
            continue
        done += 1
        assert run(student).isfinite().all(), drop
        lost = set(anatomy.addresses) - {origin.at for origin in lineage.origins.values()}
        params = sum(anatomy.by_address[at].params for at in lost)
        assert read_anatomy(student).params == anatomy.params - params, drop
    assert done >= 3

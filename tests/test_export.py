"""Exported nets: ONNX Runtime gives what PyTorch gives, with any plan; diffusers opens them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
)

import leansd
from conformance.models import make_pipeline
from leansd.anatomy.reading import read_anatomy
from leansd.cli import main
from leansd.errors import LeansdError
from leansd.exporting import graphs
from leansd.exporting import onnx as checking
from leansd.exporting.graphs import TABLE, WEIGHTS, list_graphs
from leansd.plans import Plan
from leansd.plans.methods import METHODS, Method
from leansd.surgery.fold import fold
from loops import sample
from pages import read_page
from tiny import WIDTH, tiny_pipeline, tiny_scheduler, tiny_unet, tiny_xl_unet

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

STEPS = 8
TOLERANCE = 1e-3
SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
EVERYTHING = (
    Plan.between((0, 1, 2, 4, 7), cut="up1.l0", steps=STEPS, how="forecast")
    .inherit("head", at=[3, 6], how="forecast")
    .inherit("mid", at=[4], how="residual")
    .inherit("dn0.l0.attn.t0.sa", "up0.l1", at=[4])
    .guide("inherit", at=[5])
    .correct({7: 0.3})
)
"""Forecasts, residuals, parts, half batches, calls without the UNet, and a correction."""


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return tiny_unet(**SMALL)


@pytest.fixture(scope="module")
def folder(unet: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small UNet with the plan above, exported."""
    path = tmp_path_factory.mktemp("exports") / "onnx"
    leansd.export(unet, path, to="onnx", plan=EVERYTHING)
    return path


def draw(pipe: Any, steps: int = STEPS, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": steps, "output_type": "latent"} | options
    return pipe("a cat", generator=generator, **options).images


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def test_a_run_with_a_plan_is_that_of_torch(unet: UNet2DConditionModel, folder: Path) -> None:
    pipe = tiny_pipeline(unet=unet)
    full = draw(pipe)
    with leansd.inherit(pipe, EVERYTHING) as run:
        wanted = draw(pipe)
    pipe.unet = leansd.load_onnx(folder, pipe)
    found = draw(pipe)
    assert differ(found, wanted) < TOLERANCE < differ(full, wanted) / 10
    ours, theirs = pipe.unet.report(), run.report()
    for count in ("calls", "full_calls", "computed", "inherited", "idle", "bytes_kept"):
        assert getattr(ours, count) == getattr(theirs, count)
    assert torch.equal(draw(pipe), found)


def test_a_new_way_to_inherit_a_change_is_one_entry(
    unet: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Method(
        "half of what it last added",
        1, lambda now, then, calls: (0.5,), "h", "half", "#000", "#fff",
        of="change", is_exact=False,
    )  # fmt: skip
    monkeypatch.setitem(METHODS, "toy", toy)
    plan = Plan.full(STEPS).inherit("mid", at=range(1, STEPS, 2), how="toy")
    pipe = tiny_pipeline(unet=unet)
    full = draw(pipe)
    with leansd.inherit(pipe, plan):
        wanted = draw(pipe)
    leansd.export(unet, tmp_path / "onnx", to="onnx", plan=plan)
    pipe.unet = leansd.load_onnx(tmp_path / "onnx", pipe)
    assert differ(draw(pipe), wanted) < TOLERANCE < differ(full, wanted) / 10


@pytest.mark.parametrize(
    "asked",
    [
        {"height": 48, "width": 56, "num_images_per_prompt": 3},  # sides of 12 and 14 latents
        {"guidance_scale": 1.0},
    ],
)
def test_other_sizes_and_batches_need_no_other_export(
    unet: UNet2DConditionModel, folder: Path, asked: dict[str, Any]
) -> None:
    pipe = tiny_pipeline(unet=unet)
    with leansd.inherit(pipe, EVERYTHING):
        wanted = draw(pipe, **asked)
    pipe.unet = leansd.load_onnx(folder, pipe)
    assert differ(draw(pipe, **asked), wanted) < TOLERANCE


def test_runs_that_start_late_find_what_they_inherit(
    unet: UNet2DConditionModel, folder: Path
) -> None:
    parts = tiny_pipeline(unet=unet).components
    pipe = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    options = {"image": torch.zeros(1, 3, 32, 32), "strength": 0.6}
    with leansd.inherit(pipe, EVERYTHING):
        wanted = draw(pipe, **options)
    pipe.unet = leansd.load_onnx(folder, pipe)
    assert differ(draw(pipe, **options), wanted) < TOLERANCE


def test_samplers_with_two_calls_a_step(unet: UNet2DConditionModel, folder: Path) -> None:
    scheduler = HeunDiscreteScheduler.from_config(tiny_scheduler().config)
    pipe = tiny_pipeline(unet=unet, scheduler=scheduler)
    with leansd.inherit(pipe, EVERYTHING):
        wanted = draw(pipe)
    pipe.unet = leansd.load_onnx(folder, pipe)
    assert differ(draw(pipe), wanted) < TOLERANCE


def test_calls_that_inherit_the_head_run_no_graph(
    unet: UNet2DConditionModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline(unet=unet)
    pipe.unet = leansd.load_onnx(folder, pipe)
    runs: list[int] = []
    run = graphs.Session.run

    def count(self: Any, inputs: Any, outputs: Any) -> Any:
        runs.append(inputs["sample"].shape[0])
        return run(self, inputs, outputs)

    monkeypatch.setattr(graphs.Session, "run", count)
    draw(pipe)
    assert runs == [2, 2, 2, 2, 1, 2]


def test_sdxl_with_its_added_conditions(tmp_path: Path) -> None:
    unet = tiny_xl_unet(
        cross_attention_dim=2 * WIDTH,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        layers_per_block=1,
    )
    pipe = make_pipeline("StableDiffusionXLPipeline", unet, tiny_scheduler())
    plan = Plan.every(2, cut="up1.l0", steps=4)
    leansd.export(pipe, tmp_path / "xl", to="onnx", plan=plan)
    with leansd.inherit(pipe, plan):
        wanted = draw(pipe, steps=4)
    pipe.unet = leansd.load_onnx(tmp_path / "xl", pipe)
    assert differ(draw(pipe, steps=4), wanted) < TOLERANCE


def test_without_a_plan_a_bare_call_is_that_of_torch(
    unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    written = leansd.export(unet, tmp_path / "onnx", to="onnx")
    assert written.difference is not None
    assert written.difference < TOLERANCE
    exported = leansd.load_onnx(tmp_path / "onnx")
    for batch, height, width in ((1, 8, 8), (5, 32, 16), (2, 7, 9)):
        inputs = (torch.randn(batch, 4, height, width), 31, torch.randn(batch, 5, WIDTH))
        with torch.no_grad():
            wanted = unet(*inputs).sample
        assert differ(exported(*inputs).sample, wanted) < TOLERANCE
        assert differ(exported(*inputs, return_dict=False)[0], wanted) < TOLERANCE
    with pytest.raises(LeansdError, match="without a plan"):
        exported.report()


def test_a_loop_without_a_pipeline(unet: UNet2DConditionModel, folder: Path) -> None:
    plan = Plan.load(folder / "plan.json")
    with leansd.inherit(unet, plan):
        wanted = sample(unet, STEPS)
    exported: Any = leansd.load_onnx(folder)
    assert differ(sample(exported, STEPS), wanted) < TOLERANCE


def test_graphs_share_one_file_of_weights(unet: UNet2DConditionModel, folder: Path) -> None:
    import onnx

    params = 4 * sum(each.numel() for each in unet.parameters())
    assert params <= (folder / WEIGHTS).stat().st_size < 1.1 * params
    table = json.loads((folder / TABLE).read_text())
    assert len(table["graphs"]) == 3
    for entry in table["graphs"]:
        model = onnx.load(str(folder / entry["file"]), load_external_data=False)
        assert all(each.external_data for each in model.graph.initializer)
        inputs = {each.name for each in model.graph.input}
        assert inputs == {"sample", "timestep", "encoder_hidden_states", *entry["given"]}
        assert [each.name for each in model.graph.output] == ["noise", *entry["kept"]]


def test_forecasts_and_guidance_share_graphs(unet: UNet2DConditionModel) -> None:
    anatomy = read_anatomy(unet)
    plain = Plan.every(3, cut="up1.l0", steps=9)
    other = Plan.every(2, cut="up1.l0", steps=20, how="forecast2").guide("drop", at=range(1, 20))
    assert list_graphs(anatomy, plain) == list_graphs(anatomy, other)
    assert len(list_graphs(anatomy, plain)) == 2
    assert len(list_graphs(anatomy, Plan.every(2, cut="head", steps=9))) == 1


def test_the_unet_is_left_as_it_was(unet: UNet2DConditionModel, folder: Path) -> None:
    assert not any("forward" in vars(module) for module in unet.modules())
    assert not unet.training


def test_stock_diffusers_opens_a_plain_net(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    tiny_pipeline(unet=unet).save_pretrained(tmp_path / "model")
    for net in (tmp_path / "model", tmp_path / "model" / "unet"):
        out = tmp_path / f"plain of {net.name}"
        leansd.export(net, out, to="diffusers")
        opened = UNet2DConditionModel.from_pretrained(out)
        assert all(map(torch.equal, unet.state_dict().values(), opened.state_dict().values()))


# -- operated nets -------------------------------------------------------------------------------


def operate(unet: UNet2DConditionModel, surgery: leansd.Surgery) -> UNet2DConditionModel:
    """An operated net, of which no part gives what it gave before."""
    net, _ = leansd.operate(unet, surgery)
    generator = torch.Generator().manual_seed(2)
    for name, each in net.state_dict().items():
        if ".router." in name or name.endswith(".experts"):
            each.add_(0.1 * torch.randn(each.shape, generator=generator))
    return net


def test_operated_nets_follow_plans_in_onnx(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    surgery = (
        leansd.Surgery("all")
        .drop("up1.l1.attn")
        .replace("dn0.*.attn", by="gri")
        .replace("up1.l0.attn", by="gri", mode="global")
        .replace("up1.l0.res", by="condconv", donors="up1", routing="time")
        .replace("up1.l1.res", by="condconv", donors="up1", routing="image")
    )
    pipe = tiny_pipeline(unet=operate(unet, surgery))
    plan = Plan.every(2, cut="up1.l0.res", steps=4)
    asked = {"height": 40, "width": 56, "steps": 4}
    leansd.export(pipe.unet, tmp_path / "onnx", to="onnx", plan=plan)
    with leansd.inherit(pipe, plan):
        wanted = draw(pipe, **asked)
    pipe.unet = leansd.load_onnx(tmp_path / "onnx", pipe)
    assert differ(draw(pipe, **asked), wanted) < TOLERANCE


def test_operated_nets_in_stock_diffusers(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    surgery = leansd.Surgery("plain").replace("dn0.*.attn", by="gri")
    surgery = surgery.replace("up1.l0.res", by="condconv", donors="up1", routing="time")
    net = operate(unet, surgery)
    before = {name: each.clone() for name, each in net.state_dict().items()}
    written = leansd.export(net, tmp_path / "out", to="diffusers")
    assert [loss.partition(":")[0] for loss in written.losses] == ["up1.l0.res", "dn0.l0.attn"]
    opened = UNet2DConditionModel.from_pretrained(tmp_path / "out")
    merged = dict(fold(net, range(1000)).state_dict())
    assert all(torch.equal(merged[name], each) for name, each in opened.state_dict().items())
    assert len(merged) == len(opened.state_dict())
    assert all(torch.equal(before[name], each) for name, each in net.state_dict().items())


@pytest.mark.parametrize(
    ("surgery", "message"),
    [
        (leansd.Surgery("a").drop("up1.l1.attn"), "without up1.l1.attn"),
        (
            leansd.Surgery("b").replace("up1.l0.res", by="condconv", donors="up1", routing="image"),
            "routed by the image at up1.l0.res",
        ),
        (
            leansd.Surgery("c").replace("up1.l0.attn.t0.ff", by="narrow-ff", share=0.5),
            "narrow-ff at up1.l0.attn.t0.ff",
        ),
        (
            leansd.Surgery("d").replace("up1.l0.attn.t0.sa", by="skip"),
            "cannot hold skip at up1.l0.attn.t0.sa",
        ),
    ],
)
def test_what_stock_diffusers_cannot_hold(
    unet: UNet2DConditionModel, tmp_path: Path, surgery: leansd.Surgery, message: str
) -> None:
    with pytest.raises(LeansdError, match=message):
        leansd.export(operate(unet, surgery), tmp_path / "out", to="diffusers")
    assert not list(tmp_path.iterdir())


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "coreml"}, "cannot export to 'coreml': there are diffusers, onnx"),
        ({"to": "diffusers", "plan": "fast"}, "follows no plan"),
        ({"plan": Plan.every(2, cut="up7", steps=4)}, "step 1: address 'up7' matches nothing"),
        ({"plan": Plan.every(2, cut="mid", steps=4), "steps": 6}, "is for 4 steps"),
        ({"plan": "nonsense"}, "no preset 'nonsense'"),
        (
            {"plan": Plan.every(2, cut="head", steps=4).guard("sample", threshold=0.1)},
            "decides as it runs.*probe sample",
        ),
    ],
)
def test_what_cannot_be_exported(
    unet: UNet2DConditionModel, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(LeansdError, match=message):
        leansd.export(unet, tmp_path / "out", **({"to": "onnx"} | options))
    assert not list(tmp_path.iterdir())


def test_a_net_that_is_none(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    for net in (tmp_path, tmp_path / "nothing", tiny_pipeline().vae):
        with pytest.raises(LeansdError, match="no UNet in"):
            leansd.export(net, tmp_path / "out", to="onnx")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(LeansdError, match="is a AutoencoderKL, not a UNet2DConditionModel"):
        leansd.export(tmp_path, tmp_path / "out", to="onnx")
    with pytest.raises(LeansdError, match="float16: export it in float32"):
        leansd.export(tiny_unet(**SMALL).half(), tmp_path / "out", to="onnx")
    with leansd.inherit(unet, EVERYTHING), pytest.raises(LeansdError, match="follows plan"):
        leansd.export(unet, tmp_path / "out", to="onnx")


@pytest.mark.parametrize("to", ["onnx", "diffusers"])
def test_a_folder_that_holds_something_else(
    unet: UNet2DConditionModel, tmp_path: Path, to: Any
) -> None:
    (tmp_path / "thesis.txt").write_text("chapter one")
    with pytest.raises(LeansdError, match=r"already holds thesis.txt"):
        leansd.export(unet, tmp_path, to=to)
    assert (tmp_path / "thesis.txt").read_text() == "chapter one"


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package(
    unet: UNet2DConditionModel,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
) -> None:
    monkeypatch.setattr(graphs, "find_spec", lambda name: None if name == package else True)
    with pytest.raises(LeansdError, match=rf"{package}: pip install 'leansd\[onnx\]'"):
        leansd.export(unet, tmp_path / "out", to="onnx")
    with pytest.raises(LeansdError, match=r"pip install 'leansd\[onnx\]'"):
        leansd.load_onnx(folder)


def test_a_difference_is_an_error_and_leaves_the_earlier_export(
    unet: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / TABLE).write_text("the earlier one")
    monkeypatch.setattr(checking, "TOLERANCE", 0.0)
    with pytest.raises(LeansdError, match=r"differ by .* in noise"):
        leansd.export(unet, out, to="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / TABLE).read_text() == "the earlier one"


def test_damaged_exports(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LeansdError, match="no ONNX export in"):
        leansd.load_onnx(tmp_path)
    (tmp_path / TABLE).write_text("{}")
    with pytest.raises(LeansdError, match="is damaged"):
        leansd.load_onnx(tmp_path)
    (tmp_path / TABLE).write_text((folder / TABLE).read_text())
    with pytest.raises(LeansdError, match=f"has no {WEIGHTS}"):
        leansd.load_onnx(tmp_path)
    with pytest.raises(LeansdError, match="ONNX Runtime has no MyProvider here"):
        leansd.load_onnx(folder, providers=["MyProvider"])


def test_calls_that_no_graph_answers(unet: UNet2DConditionModel, folder: Path) -> None:
    pipe = tiny_pipeline(unet=unet)
    pipe.unet = leansd.load_onnx(folder, pipe)
    with pytest.raises(LeansdError, match="is for 8 steps, this run has 5"):
        draw(pipe, steps=5)
    residuals = {"mid_block_additional_residual": torch.zeros(1)}
    with pytest.raises(LeansdError, match="takes no mid_block_additional_residual"):
        pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 5, WIDTH), **residuals)


def test_the_command_line(
    unet: UNet2DConditionModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, out = str(tmp_path / "net"), str(tmp_path / "out")
    unet.save_pretrained(net)
    EVERYTHING.save(tmp_path / "plan.json")
    plan = str(tmp_path / "plan.json")
    page = tmp_path / "page.html"
    command = ["export", net, "--to", "onnx", "--plan", plan, "--out", out, "--json"]
    assert main([*command, "--report", str(page)]) == 0
    assert "run there it differs by" in read_page(page)[1]
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["steps"] == STEPS
    assert told["difference"] < TOLERANCE
    assert set(told["files"]) == {path.name for path in Path(out).iterdir()}
    mistakes = {
        ("--steps", "9"): "stretch it, by --fit",
        ("--out", net): "already holds config.json",
        ("--to", "diffusers"): "follows no plan",
        ("--sampler", "best"): "no sampler 'best'",
    }
    for options, message in mistakes.items():
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_embedded_model_with_a_tuned_preset(tmp_path: Path) -> None:
    pipe = leansd.load("emoji", device="cpu")
    written = leansd.export(pipe, tmp_path / "emoji", to="onnx", plan="fast", steps=12)
    with leansd.inherit(pipe, written.plan):
        wanted = draw(pipe, steps=12)
    pipe.unet = leansd.load_onnx(tmp_path / "emoji", pipe)
    assert differ(draw(pipe, steps=12), wanted) < TOLERANCE

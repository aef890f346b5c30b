"""Several UNets in one run: who runs when, and what of one the other inherits."""

import copy
import math
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import leansd
from leansd.errors import LeansdError
from leansd.plans import Plan
from leansd.plans.compile import compile_plan
from leansd.plans.liveness import Net
from leansd.runtime.nets import match_nets
from loops import count_calls, sample
from tiny import shallow_unet, tiny_pipeline, tiny_unet
from watching import watch

STEPS = 6
LIGHT = leansd.Surgery("light").drop("dn0.l1", "up3.l1")


def sample_by_hand(nets: dict[str, UNet2DConditionModel], turns: list[str]) -> torch.Tensor:
    """Each step by the net whose turn it is, in one plain loop."""

    class Chosen(torch.nn.Module):
        config = nets[""].config
        device, dtype = nets[""].device, nets[""].dtype
        now = ""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return nets[self.now](*args, **kwargs)

        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            return nets[""].named_parameters(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(nets[""], name)

        def parameters(self, *args: Any, **kwargs: Any) -> Any:
            return nets[""].parameters(*args, **kwargs)

    chosen = Chosen()

    def turn(step: int) -> None:
        Chosen.now = turns[step]

    return sample(chosen, STEPS, on_step=turn)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def own() -> UNet2DConditionModel:
    return tiny_unet()


@pytest.fixture(scope="module")
def light(own: UNet2DConditionModel) -> UNet2DConditionModel:
    """Thinned at the shallowest level, whose blocks have weights of their own."""
    student, _ = leansd.operate(own, LIGHT)
    with torch.no_grad():
        for block in (student.down_blocks[0], student.up_blocks[3]):
            for parameter in block.parameters():
                parameter.mul_(1.01)
    return student


@pytest.fixture(scope="module")
def plain(own: UNet2DConditionModel) -> torch.Tensor:
    return sample_by_hand({"": own}, [""] * STEPS)


# -- who runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(0, 1, 2), (3, 4, 5), (1, 3), (0, 1, 2, 3, 4, 5)])
def test_the_net_of_a_row_runs_its_step(
    own: UNet2DConditionModel,
    light: UNet2DConditionModel,
    plain: torch.Tensor,
    steps: tuple[int, ...],
) -> None:
    turns = ["light" if step in steps else "" for step in range(STEPS)]
    aim = sample_by_hand({"": own, "light": light}, turns)
    plan = Plan.full(STEPS).switch("light", at=steps)
    with leansd.inherit(own, plan, nets={"light": light}) as run:
        assert torch.equal(sample(own, STEPS), aim)
    report = run.report()
    assert report.computed == sum(40 + 2 if turn else 44 + 2 for turn in turns)
    assert torch.equal(sample(own, STEPS), plain)


def test_three_nets(own: UNet2DConditionModel, light: UNet2DConditionModel) -> None:
    other = tiny_unet(seed=1)
    turns = ["", "other", "light", "light", "other", ""]
    plan = Plan.full(STEPS).switch("light", at=[2, 3]).switch("other", at=[1, 4])
    assert plan.nets == ("other", "light")
    aim = sample_by_hand({"": own, "light": light, "other": other}, turns)
    with leansd.inherit(own, plan, nets={"light": light, "other": other}):
        assert torch.equal(sample(own, STEPS), aim)


# -- what is the same --------------------------------------------------------------------------


def test_a_copy_is_the_same_net(own: UNet2DConditionModel) -> None:
    plan = Plan.every(3, cut="up2", steps=STEPS, how="forecast").inherit("mid", at=4)
    plan = plan.correct({3: (0.2, 0.1)})
    with leansd.inherit(own, plan) as alone:
        aim = sample(own, STEPS)
    switched = plan.switch("twin", at=[1, 2, 4])
    with leansd.inherit(own, switched, nets={"twin": copy.deepcopy(own)}) as run:
        assert torch.equal(sample(own, STEPS), aim)
    assert run.report().computed == alone.report().computed
    assert run.report().bytes_kept == alone.report().bytes_kept


def test_a_student_inherits_what_its_teacher_computed(
    own: UNet2DConditionModel, light: UNet2DConditionModel
) -> None:
    plan = Plan.every(2, cut="up2.up", steps=STEPS).switch("light", at=[1, 3, 5])
    company = match_nets(own, {"light": light})
    names = company.nets["light"].names
    assert names["up2.up"] == "up2.up"
    assert names["up3.l0.res"] == "light:up3.l0.res"
    assert names["mid.l0.attn.t0.sa"] == "mid.l0.attn.t0.sa"
    with (
        count_calls(light, company.nets["light"].anatomy) as counts,
        leansd.inherit(own, plan, nets={"light": light}) as run,
    ):
        drawn = sample(own, STEPS)
    assert counts["up3.l0.res"] == 3
    assert counts["up2.up"] == counts["mid.l0.attn"] == 0
    assert run.report().predicted_speedup > 1.2
    assert torch.equal(drawn, sample_with_taken(own, light, "up_blocks.2.upsamplers.0"))


def sample_with_taken(
    own: UNet2DConditionModel, light: UNet2DConditionModel, path: str
) -> torch.Tensor:
    """The light net at odd steps with one module's output from the own net's step before."""
    kept: list[torch.Tensor] = []
    hooks = [
        watch(own.get_submodule(path), lambda module, given, output: kept.append(output.clone())),
        watch(light.get_submodule(path), lambda module, given, output: kept[-1].clone()),
    ]
    try:
        return sample_by_hand({"": own, "light": light}, ["", "light"] * 3)
    finally:
        for hook in hooks:
            hook.remove()


def test_what_another_net_computed_is_dropped_at_the_switch(own: UNet2DConditionModel) -> None:
    other = tiny_unet(seed=1)
    plan = Plan.every(3, cut="up3.l1", steps=STEPS, how="forecast").switch("other", at=[4, 5])
    with leansd.inherit(own, plan, nets={"other": other}) as run:
        drawn = sample(own, STEPS)
    # The first call after the switch has nothing to inherit from.
    assert run.report().full_calls == 3
    assert plan.switch("other", at=range(STEPS)).switch("", at=range(4)) == plan
    nets = match_nets(own, {"other": other}).nets
    program = compile_plan(plan, leansd.dissect(own), nets=nets)
    assert [call.is_full for call in program.calls] == [True, False, False, True, True, False]
    assert drawn.isfinite().all()


@pytest.mark.parametrize("where", ["time_embedding", "up_blocks.2.resnets.0", "conv_norm_out"])
def test_weights_decide_what_is_the_same(own: UNet2DConditionModel, where: str) -> None:
    twin = copy.deepcopy(own)
    with torch.no_grad():
        next(twin.get_submodule(where).parameters()).add_(0.1)
    names = match_nets(own, {"twin": twin}).nets["twin"].names
    same = {at for at, name in names.items() if at == name}
    assert ("dn0.l0.res" in same) == (where != "time_embedding")
    assert ("up2.l0.res" in same) == (where == "conv_norm_out")
    assert ("guidance" in same) == ("head" in same) == (where == "up_blocks.2.resnets.0")


def test_attentions_that_attend_otherwise_are_not_the_same(own: UNet2DConditionModel) -> None:
    cheap, _ = leansd.operate(own, leansd.Surgery("gri").replace("dn0.*.attn", by="gri"))
    names = match_nets(own, {"cheap": cheap}).nets["cheap"].names
    assert names["dn0.l0.attn"] == "cheap:dn0.l0.attn"
    assert names["dn1.l0.attn"] == "dn1.l0.attn"


# -- with everything else ----------------------------------------------------------------------


def draw(pipe: Any, plan: Plan | None = None, **options: Any) -> torch.Tensor:
    call = {"prompt": "a", "num_inference_steps": STEPS, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    if plan is None:
        return pipe(**call, generator=generator).images
    with leansd.inherit(pipe, plan, **options):
        return pipe(**call, generator=generator).images


def test_guidance_is_inherited_across_a_switch(own: UNet2DConditionModel) -> None:
    pipe = tiny_pipeline(unet=own)
    plan = Plan.every(2, cut="up3.l1", steps=STEPS).guide("inherit", at=[1, 2, 4])
    aim = draw(pipe, plan)
    twin = {"twin": copy.deepcopy(own)}
    assert torch.equal(draw(pipe, plan.switch("twin", at=[2, 3]), nets=twin), aim)
    other = {"twin": tiny_unet(seed=1)}
    assert draw(pipe, plan.switch("twin", at=[2, 3]), nets=other).isfinite().all()


def test_threads_share_the_nets(own: UNet2DConditionModel, light: UNet2DConditionModel) -> None:
    plan = Plan.every(2, cut="up2.up", steps=STEPS).switch("light", at=[1, 4])
    plans = [plan, Plan.full(STEPS).switch("light", at=[3])]
    aims = []
    for each in plans:
        with leansd.inherit(own, each, nets={"light": light}):
            aims.append(sample(own, STEPS))
    results: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        with leansd.inherit(own, plans[number % 2], nets={"light": light}):
            results[number] = sample(own, STEPS)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[number], aims[number % 2]) for number in range(4))


def test_image_to_image_begins_with_the_net_of_its_row(
    own: UNet2DConditionModel, light: UNet2DConditionModel
) -> None:
    from leansd.loading import as_image_to_image

    pipe: Any = as_image_to_image(tiny_pipeline(unet=own))
    plan = Plan.every(2, cut="up2.up", steps=STEPS).switch("light", at=[3, 4, 5])
    with leansd.inherit(pipe, plan, nets={"light": light}) as run:
        pipe(
            "a", image=torch.rand(1, 3, 32, 32), strength=0.5, num_inference_steps=STEPS,
            output_type="latent",
        )  # fmt: skip
    report = run.report()
    assert (report.calls, report.full_calls) == (3, 2)


@pytest.mark.slow
def test_compiled_nets_switch_too() -> None:
    own = shallow_unet(layers_per_block=2)
    twin = copy.deepcopy(own)
    plan = Plan.every(2, cut="up0.l1", steps=STEPS).switch("twin", at=[3, 4])
    with leansd.inherit(own, plan, nets={"twin": twin}):
        aim = sample(own, STEPS)
    with leansd.inherit(own, plan, nets={"twin": twin}, compile={"backend": "eager"}):
        assert torch.equal(sample(own, STEPS), aim)


# -- presets, memory and the command line ------------------------------------------------------


def list_turns(name: str, steps: int, **options: Any) -> str:
    """First letters of the nets; the pipeline's own is a dot."""
    return "".join((row.net or ".")[0] for row in leansd.preset(name, steps, **options).rows)


def test_presets_say_who_draws_when() -> None:
    assert list_turns("light-early", 6) == "lll..."
    assert list_turns("light-late", 6, share=0.34) == "....ll"
    assert list_turns("stitch", 10) == "llll......"
    three = list_turns("stitch", 10, nets=["tiny", "light"], shares=[0.2, 0.3])
    assert three == "ttlll....."
    # T-Stitch's code runs one step too many: 6 of 50 where the share is a tenth.
    assert list_turns("tstitch-exact", 50, share=0.1).count("l") == 6
    assert list_turns("stitch", 50, shares=[0.1]).count("l") == 5
    assert list_turns("turns", 4, names=["a", "", "b", "b"]) == "a.bb"
    assert list_turns("turns", 8, names=["a", "", "b", "b"]) == "aa..bbbb"
    for options, said in (
        ({"shares": [0.5, 0.2]}, "1 nets and 2 shares"),
        ({"nets": ["a", "b"], "shares": [0.6, 0.6]}, "1.2 in all"),
        ({"shares": [-0.1]}, "between 0 and 1"),
    ):
        with pytest.raises(LeansdError, match=said):
            leansd.preset("stitch", 10, **options)


def test_a_net_beside_its_teacher_costs_its_own_weights(
    own: UNet2DConditionModel, light: UNet2DConditionModel, tmp_path: Path
) -> None:
    light.save_pretrained(tmp_path)
    alone = leansd.load_unet(tmp_path, device="cpu")
    beside = leansd.load_unet(tmp_path, beside=own)
    mine = {parameter.data_ptr() for parameter in own.parameters()}
    extra = sum(each.nbytes for each in beside.parameters() if each.data_ptr() not in mine)
    blocks = [light.down_blocks[0], light.up_blocks[3]]
    # Biases of zeros are the same everywhere.
    assert extra == sum(
        each.nbytes for block in blocks for each in block.parameters() if each.any()
    )
    for one, other in zip(alone.parameters(), beside.parameters(), strict=True):
        assert torch.equal(one, other)
    plan = Plan.full(STEPS).switch("light", at=[0, 1])
    with leansd.inherit(own, plan, nets={"light": alone}):
        aim = sample(own, STEPS)
    with leansd.inherit(own, plan, nets={"light": beside}):
        assert torch.equal(sample(own, STEPS), aim)


def test_the_command_line_switches(
    light: UNet2DConditionModel, tmp_path: Path, capsys: Any
) -> None:
    from leansd.cli import main

    model = tmp_path / "model"
    tiny_pipeline().save_pretrained(model)
    light.save_pretrained(tmp_path / "light")
    common = ["--model", str(model), "--steps", "4"]
    net = ["--net", f"light={tmp_path / 'light'}"]
    assert main(["plan", "light-early", "--force", *common, *net]) == 0
    assert "net light   ##.." in capsys.readouterr().out
    out = ["--out", str(tmp_path / "pictures")]
    assert main(["generate", "a", "--plan", "light-early", "--force", *common, *net, *out]) == 0
    capsys.readouterr()
    for given, said in (
        (["--net", "light"], "give NAME=FOLDER"),
        ([*net, *net], "light is given twice"),
        ([], "step 0 runs net 'light'"),
    ):
        assert main(["generate", "a", "--plan", "light-early", *common, *given, *out]) == 2
        assert said in capsys.readouterr().err


# -- what is refused ---------------------------------------------------------------------------


def test_what_cannot_be_is_said(own: UNet2DConditionModel, light: UNet2DConditionModel) -> None:
    plan = Plan.full(STEPS).switch("light", at=[2])
    for nets, said in (
        ({}, r"step 2 runs net 'light', and the nets given are: none.*--net light=FOLDER"),
        ({"heavy": light}, r"the nets given are: heavy"),
        ({"light": own}, r"is the pipeline's own UNet"),
        ({"light": tiny_unet(cross_attention_dim=16)}, r"its cross_attention_dim is 16, not 32"),
        ({"light": copy.deepcopy(light).double()}, r"torch.float64.*move it with"),
        ({"light": torch.nn.Linear(1, 1)}, r"is a Linear"),
    ):
        with pytest.raises(LeansdError, match=said):
            leansd.inherit(own, plan, nets=nets)  # type: ignore[arg-type]
    with pytest.raises(LeansdError, match=r"step 1: .*dn0\.l1"):
        leansd.inherit(
            own, Plan.full(2).switch("light", at=1).inherit("dn0.l1", at=1), nets={"light": light}
        )
    with pytest.raises(LeansdError, match="runs one UNet"):
        Plan.every(2, cut="head", steps=4).guard("sample", threshold=0.1).switch("light", at=1)


def test_plans_with_nets_are_saved_drawn_and_stretched(tmp_path: Path) -> None:
    plan = Plan.full(6).switch("light", at=[0, 1, 2])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.fingerprint != Plan.full(6).fingerprint
    assert [row.net for row in plan.fit(12).rows] == ["light"] * 6 + [""] * 6
    assert "net light ###..." in str(plan)
    assert "up3.up" not in plan.draw(leansd.dissect(shallow_unet()))
    assert "mid.l0.res  :::###" in plan.draw(leansd.dissect(tiny_unet()))


def test_nothing_is_left_behind(own: UNet2DConditionModel, light: UNet2DConditionModel) -> None:
    before = [vars(module).get("forward") for net in (own, light) for module in net.modules()]
    plan = Plan.full(STEPS).switch("light", at=[2])
    with leansd.inherit(own, plan, nets={"light": light}):
        with leansd.inherit(light, Plan.full(STEPS)):
            sample(light, STEPS)
        sample(own, STEPS)
    after = [vars(module).get("forward") for net in (own, light) for module in net.modules()]
    assert before == after
    assert Net(leansd.dissect(own)).name("mid") == "mid"


@pytest.mark.parametrize("count", [4, STEPS])
def test_calls_of_a_light_net_are_no_full_ones(
    own: UNet2DConditionModel,
    light: UNet2DConditionModel,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The light net takes half the time; a run without the whole one says nothing of its speed."""
    seconds = [0.5] * count + [1.0] * (STEPS - count)
    monkeypatch.setattr(
        "leansd.runtime.engine.start_stopwatch", lambda device: lambda: partial(seconds.pop, 0)
    )
    plan = Plan.full(STEPS).switch("light", at=range(count))
    with leansd.inherit(own, plan, nets={"light": light}) as run:
        sample(own, STEPS)
    report = run.report()
    assert (report.full_calls, report.switched) == (STEPS, count)
    if count == STEPS:
        assert math.isnan(report.measured_speedup)
        assert "not measured, because" in str(report)
    else:
        assert report.measured_speedup == pytest.approx(STEPS / (count * 0.5 + STEPS - count))

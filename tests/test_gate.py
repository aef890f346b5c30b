"""Gates: self-attentions by GRI or in full from step to step, against processors set by hand."""

import json
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig

import leansd
from leansd.anatomy import count_macs, read_anatomy
from leansd.anatomy.builtin import open_builtin
from leansd.errors import LeansdError
from leansd.evaluation.cost import name_gated
from leansd.exporting.graphs import list_graphs
from leansd.plans import Plan
from leansd.plans.compile import compile_plan, count_attention, list_structures, predict_speedup
from leansd.surgery.parts.gri import MODES, GRIAttnProcessor, call_at_size
from loops import sample
from test_control import draw as draw_controlled
from test_control import make_controlnet
from test_control import make_pipeline as make_control_pipeline
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet, tiny_xl_unet

STEPS = 6
SHALLOW = ("dn0.*.attn", "up3.*.attn")
LATE = Plan.full(STEPS).attend(*SHALLOW, by="gri", at=range(3, STEPS))
MIXED = (
    Plan.full(STEPS)
    .attend("dn*.attn", by="gri", at=[0, 2, 4])
    .attend("dn0.l1.attn.t0.sa", by="full", at=[2, 4])
    .attend("mid.*.sa", by="gri", at=5)
)
SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
"""A few seconds to trace."""


def list_attentions(unet: UNet2DConditionModel) -> dict[str, Any]:
    parts = [part for part in read_anatomy(unet).parts if part.at.endswith(".sa")]
    return {part.at: unet.get_submodule(part.path) for part in parts}


@contextmanager
def gate_by_hand(unet: UNet2DConditionModel, plan: Plan) -> Iterator[Callable[[int], None]]:
    """A function that sets processors as the plan's row for a step says; as they were after it."""
    attentions = list_attentions(unet)
    own = {at: attention.processor for at, attention in attentions.items()}
    gates = plan.resolve_gates(read_anatomy(unet))
    makers = {"gri": GRIAttnProcessor, "full": AttnProcessor2_0}

    def set_row(step: int) -> None:
        for at, attention in attentions.items():
            by = gates[step].get(at)
            attention.set_processor(makers[by]() if by else own[at])

    set_row(0)
    try:
        yield set_row
    finally:
        for at, attention in attentions.items():
            attention.set_processor(own[at])


def sample_by_hand(unet: UNet2DConditionModel, plan: Plan, **options: Any) -> torch.Tensor:
    with gate_by_hand(unet, plan) as set_row:
        return sample(unet, plan.steps, on_step=set_row, **options)


def strip(plan: Plan) -> Plan:
    """The plan without its gates."""
    rows = tuple(type(row)(row.inherit, row.guidance, row.correct) for row in plan.rows)
    return Plan(rows, plan.name, plan.drift)


def follow(unet: UNet2DConditionModel, plan: Plan, **options: Any) -> torch.Tensor:
    with leansd.inherit(unet, plan):
        return sample(unet, plan.steps, **options)


# -- what is computed ----------------------------------------------------------------------------


make_small = partial(tiny_unet, **(SMALL | {"layers_per_block": 2}))
SMALL_LATE = Plan.full(STEPS).attend("dn0.*.attn", "up1.*.attn", by="gri", at=range(3, STEPS))
DEEP = Plan.full(STEPS).attend("dn1", "up1.*.t1", by="gri", at=range(3, STEPS))


@pytest.mark.parametrize(
    ("make", "plan"),
    [(make_small, SMALL_LATE), (make_small, MIXED), (tiny_xl_unet, DEEP)],
    ids=["late", "mixed", "xl"],
)
def test_a_gate_is_the_processor_set_by_hand(make: Any, plan: Plan) -> None:
    unet = make()
    expected = sample_by_hand(unet, plan)
    found = follow(unet, plan)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, sample(unet, STEPS), atol=1e-3)


def test_gated_in_full_a_plain_net_is_bit_equal_to_no_plan() -> None:
    unet = make_small()
    plan = Plan.full(STEPS).attend("*", by="full", at=range(STEPS))
    assert torch.equal(follow(unet, plan), sample(unet, STEPS))


@pytest.mark.parametrize("mode", MODES)
def test_gated_in_full_a_gri_net_is_the_plain_one(mode: str) -> None:
    plain, shallow = tiny_unet(**SMALL), ("dn0.*.attn", "up1.*.attn")
    net, _ = leansd.operate(plain, leansd.Surgery("gri").replace(*shallow, by="gri", mode=mode))
    everywhere = Plan.full(STEPS).attend("*", by="full", at=range(STEPS))
    assert torch.equal(follow(net, everywhere), sample(plain, STEPS))
    by_gri = Plan.full(STEPS).attend(*shallow, by="gri", at=range(STEPS))
    assert torch.equal(follow(net, by_gri), sample(net, STEPS))
    assert not torch.allclose(sample(net, STEPS), sample(plain, STEPS), atol=1e-3)


@pytest.mark.parametrize("size", [(8, 12), (10, 6), (9, 7)])
def test_maps_need_not_be_square(size: tuple[int, int]) -> None:
    unet = make_small()
    expected = call_at_size(size, lambda: sample_by_hand(unet, SMALL_LATE, size=size))
    assert torch.equal(follow(unet, SMALL_LATE, size=size), expected)
    assert not torch.equal(expected, sample(unet, STEPS, size=size))


@pytest.mark.parametrize(
    "plan",
    [
        MIXED.inherit("up1.l1", at=[1, 3, 4], how="forecast"),
        MIXED.inherit("dn0.*.sa", "mid.*.sa", at=[1, 2, 5]),
        MIXED.inherit("dn0.l0.attn", at=[2, 4], how="residual"),
        SMALL_LATE.inherit("head", at=[2, 4], how="forecast").correct({3: (0.3, 0.1)}),
        MIXED.inherit("up1.l1", at=[2, 3, 4]).guard("stem", threshold=0.08),
    ],
    ids=["cut", "parts", "residual", "whole steps", "adaptive"],
)
def test_only_what_is_computed_is_concerned(plan: Plan) -> None:
    unet = make_small()
    with leansd.inherit(unet, strip(plan)):
        expected = sample_by_hand(unet, plan)
    found = follow(unet, plan)
    assert torch.equal(found, expected)
    assert not torch.equal(found, follow(unet, strip(plan)))


def draw(pipe: Any, plan: Plan | None = None, **options: Any) -> torch.Tensor:
    """Latents of a guided run, with the gates of `plan` set by hand."""
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }
    if plan is None:
        return pipe(**(arguments | options)).images
    with gate_by_hand(pipe.unet, plan) as set_row:

        def on_step(pipe: Any, step: int, time: Any, inputs: Mapping[str, Any]) -> Any:
            set_row(min(step + 1, STEPS - 1))
            return inputs

        return pipe(**(arguments | options), callback_on_step_end=on_step).images


def test_half_batches() -> None:
    pipe = tiny_pipeline(unet=make_small())
    plan = SMALL_LATE.guide("inherit", at=[2, 4]).guide("forecast", at=5).inherit("mid", at=3)
    with leansd.inherit(pipe, strip(plan)):
        expected = draw(pipe, plan)
    with leansd.inherit(pipe, plan):
        assert torch.equal(draw(pipe), expected)
        wide = draw(pipe, height=32, width=48)
    assert wide.shape[-2:] == (8, 12)
    assert wide.isfinite().all()


def test_control_nets_keep_their_own_attention() -> None:
    pipe = make_control_pipeline(make_controlnet(make_unet=make_small), make_small)
    own = {at: each.processor for at, each in list_attentions(pipe.unet).items()}
    everywhere = Plan.full(STEPS).attend("*", by="gri", at=range(STEPS))
    for attention in list_attentions(pipe.unet).values():
        attention.set_processor(GRIAttnProcessor())
    expected = draw_controlled(pipe)
    for at, attention in list_attentions(pipe.unet).items():
        attention.set_processor(own[at])
    with leansd.inherit(pipe, everywhere):
        assert torch.equal(draw_controlled(pipe), expected)


def test_attention_that_is_neither_stays_what_it_is() -> None:
    """Perturbed attention has processors of its own, which guidance relies on."""
    pipe = tiny_pipeline(unet=make_small())
    parts: dict[str, Any] = {**pipe.components, "scheduler": tiny_scheduler()}
    guided = StableDiffusionPAGPipeline(
        **parts, requires_safety_checker=False, pag_applied_layers=["mid"]
    )
    guided.set_progress_bar_config(disable=True)
    expected = draw(guided, pag_scale=3.0)
    with leansd.inherit(guided, Plan.full(STEPS).attend("mid", by="gri", at=range(STEPS))):
        assert torch.equal(draw(guided, pag_scale=3.0), expected)


def test_loras_are_gated_with_what_they_are_on() -> None:
    unet = make_small()
    plain = follow(unet, SMALL_LATE)
    with leansd.inherit(unet, SMALL_LATE):
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        unet.add_adapter(config)
        found = sample(unet, STEPS)
    assert torch.equal(found, sample_by_hand(unet, SMALL_LATE))
    assert not torch.allclose(found, plain, atol=1e-3)


def test_threads_that_share_a_net_have_gates_of_their_own() -> None:
    unet = make_small()
    plans = [SMALL_LATE, MIXED, strip(SMALL_LATE)]
    sizes = [(8, 12), (8, 8), (8, 12)]
    expected = [follow(unet, plan, size=size) for plan, size in zip(plans, sizes, strict=True)]
    barrier = threading.Barrier(len(plans))

    def wait(_: int) -> None:
        barrier.wait()

    def serve(plan: Plan, size: tuple[int, int]) -> torch.Tensor:
        with leansd.inherit(unet, plan):
            return sample(unet, STEPS, size=size, on_step=wait)

    with ThreadPoolExecutor(len(plans)) as pool:
        assert all(map(torch.equal, pool.map(serve, plans, sizes), expected))


def test_leaving_leaves_nothing_behind() -> None:
    unet = make_small()
    before = sample(unet, STEPS)
    own = [each.processor for each in list_attentions(unet).values()]
    follow(unet, MIXED)
    assert [each.processor for each in list_attentions(unet).values()] == own
    assert torch.equal(sample(unet, STEPS), before)
    assert not any("forward" in vars(module) for module in unet.modules())


@pytest.mark.slow
def test_compiled_calls_have_a_graph_for_each_gate() -> None:
    unet = tiny_unet(**SMALL)
    plan = Plan.full(4).attend("dn0", by="gri", at=[2, 3])
    structures = list_structures(compile_plan(plan, read_anatomy(unet)))
    assert len(set(structures)) == 2
    expected = follow(unet, plan, size=(8, 12))
    torch.compiler.reset()
    with leansd.inherit(unet, plan, compile={"backend": "eager"}), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sample(unet, 4, size=(8, 12)), expected)
    torch.compiler.reset()


# -- plans ---------------------------------------------------------------------------------------


def test_gates_survive_a_file_and_count_in_the_fingerprint(tmp_path: Path) -> None:
    MIXED.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == MIXED
    assert loaded.fingerprint == MIXED.fingerprint != LATE.fingerprint
    assert strip(MIXED).fingerprint == Plan.full(STEPS).fingerprint
    swapped = Plan.full(1).attend("mid", "dn0", by="gri", at=0)
    assert swapped.fingerprint == Plan.full(1).attend("dn0", "mid", by="gri", at=0).fingerprint
    Plan.full(STEPS).save(tmp_path / "full.json")
    assert "attend" not in (tmp_path / "full.json").read_text()


def test_the_fingerprint_of_plans_without_gates_is_what_it_was() -> None:
    assert Plan.full(4).fingerprint == "0fa3c1a2bfde"


def test_a_file_with_an_unknown_attention_says_where(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    LATE.save(path)
    document = json.loads(path.read_text())
    document["rows"][4]["attend"]["dn0.*.attn"] = "flash"
    path.write_text(json.dumps(document))
    with pytest.raises(LeansdError, match=r"step 4, dn0.*cannot attend by 'flash'"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("dn0.l0.res", r"step 2: 'dn0\.l0\.res' \(dn0\.l0\.res\) is no self-attention"),
        ("mid.*.ca", r"step 2: 'mid\.\*\.ca' \(mid.l0.attn.t0.ca\) is no self-attention"),
        ("up0", r"step 2: 'up0' \(up0\.l0\.res\) is no self-attention"),
        ("dn9.l0.attn", r"step 2: address 'dn9\.l0\.attn' matches nothing"),
    ],
)
def test_what_is_no_self_attention_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(LeansdError, match=message):
        leansd.inherit(tiny_unet(), Plan.full(3).attend(pattern, by="gri", at=2))


def test_senseless_gates_are_refused() -> None:
    with pytest.raises(LeansdError, match="step 1, mid: cannot attend by 'flash'; there are full"):
        Plan.full(3).attend("mid", by="flash", at=1)  # type: ignore[arg-type]
    with pytest.raises(LeansdError, match="step 3 lies outside"):
        Plan.full(3).attend("mid", by="gri", at=3)
    with pytest.raises(LeansdError, match=r"gates dn0\.l0\.attn\.t0\.sa from step to step"):
        list_graphs(read_anatomy(tiny_unet()), LATE)


def test_gates_keep_their_place_in_plans_of_other_lengths() -> None:
    gated = [bool(row.attend) for row in LATE.fit(10).rows]
    assert gated == [False] * 5 + [True] * 5
    plan = Plan.every(3, cut="mid", steps=30).attend("dn0", by="gri", at=range(10, 30))
    longer = plan.fit(60)
    assert [bool(row.attend) for row in longer.rows] == [step >= 20 for step in range(60)]
    assert longer.keys == strip(plan).fit(60).keys


def test_drawings_show_gates() -> None:
    anatomy = read_anatomy(tiny_unet())
    plan = LATE.attend("dn0.l0.attn", by="full", at=5).inherit("dn0.l1.attn.t0.sa", at=4)
    lines = {line.split()[0]: line.split()[-1] for line in plan.draw(anatomy).splitlines()[2:-1]}
    assert lines["dn0.l0.attn.t0.sa"] == "###ggf"
    assert lines["dn0.l1.attn.t0.sa"] == "###g=g"
    assert len(lines) == 46 + 5
    assert "attend up3.*.attn  ###ggg" in str(plan)


def test_pictures_show_gates(tmp_path: Path) -> None:
    LATE.draw(read_anatomy(tiny_unet()), picture=tmp_path / "plan.png")
    LATE.draw(picture=tmp_path / "rows.svg")
    assert len(list(tmp_path.iterdir())) == 2


# -- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (48, 72), (36, 44)])
def test_products_are_those_that_are_computed(size: tuple[int, int]) -> None:
    net = open_builtin("sd15", layers_per_block=1)
    parts = {part.at: part for part in read_anatomy(net).parts if part.at.endswith(".sa")}
    for by, processor in {"full": AttnProcessor2_0(), "gri": GRIAttnProcessor()}.items():
        for part in parts.values():
            attention: Any = net.get_submodule(part.path)
            attention.set_processor(processor)
        ledger = call_at_size(size, count_macs, net, latent=size)
        for part in parts.values():
            assert count_attention(part, by, size) == ledger[part.path]  # type: ignore[arg-type]


def test_predictions_count_what_gates_save() -> None:
    unet = tiny_unet()
    anatomy = leansd.dissect(unet)
    late = LATE.inherit("up3", at=5)
    calls = compile_plan(late, anatomy).calls
    saved = sum(
        anatomy.by_address[at].macs - count_attention(anatomy.by_address[at], "gri", (8, 8))
        for at in ("dn0.l0.attn.t0.sa", "dn0.l1.attn.t0.sa")
    )
    plain = compile_plan(strip(late), anatomy).calls[3:4]
    assert anatomy.macs / predict_speedup(calls[3:4], anatomy) < anatomy.macs - saved
    assert predict_speedup(plain, anatomy) == 1
    with leansd.inherit(unet, LATE) as run:
        sample(unet, STEPS)
    report = run.report()
    assert report.predicted_speedup == pytest.approx(
        predict_speedup(compile_plan(LATE, anatomy).calls, anatomy)
    )
    assert (report.gated, report.full_calls) == (3, STEPS)
    assert "self-attentions gated in 3 calls" in str(report)


def test_a_profile_knows_the_gates_that_it_was_asked_for() -> None:
    pipe = tiny_pipeline()
    cost = leansd.profile(pipe, repeats=1, subject="tiny", attend=["dn0.l0.attn"])
    at = "dn0.l0.attn.t0.sa"
    assert all(
        set(cost.units[name_gated(at, by)]) == {"whole", "half"}
        for by in ("gri", "full")  # type: ignore[arg-type]
    )
    anatomy = read_anatomy(pipe.unet)
    plan = Plan.full(2).attend(at, by="gri", at=1).guide("inherit", at=1)
    plain, gated = (compile_plan(each, anatomy).calls[1] for each in (strip(plan), plan))
    gain = cost.units[at]["half"] - cost.units[name_gated(at, "gri")]["half"]
    assert cost.predict_call(plain) - cost.predict_call(gated) == pytest.approx(gain)
    with pytest.raises(LeansdError, match="without this gate"):
        cost.predict_call(compile_plan(LATE, anatomy).calls[-1])

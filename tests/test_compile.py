"""Compiled runs: the bits of eager ones, a graph a pattern, nothing compiled twice."""

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, UNet2DConditionModel
from peft import LoraConfig
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import leansd
from conformance.models import tiny_controlnet
from conformance.test_modular import draw as draw_apart
from conformance.test_modular import make_modular
from leansd.anatomy import read_anatomy
from leansd.errors import LeansdError
from leansd.plans import Plan
from leansd.plans.anatomy import HEAD
from leansd.plans.compile import compile_plan, list_structures
from leansd.plans.methods import METHODS, Method
from leansd.runtime.compiled import read_options, uses_cuda_graphs
from test_control import draw as draw_controlled
from test_control import make_pipeline as make_control_pipeline
from test_inheritance import Loop
from tiny import SHALLOW, WIDTH, shallow_unet, tiny_pipeline, tiny_xl_unet
from watching import watch, watch_before

pytestmark = pytest.mark.slow

STEPS = 6
SAMPLERS: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "mid_block_type": None,
}
"""Changes of `shallow_unet` to two blocks a side, and so to a sampler each way."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    """A backend that runs graphs as they are and counts them; graph breaks would add to it."""
    return CompileCounterWithBackend("eager")


def bare_unet() -> UNet2DConditionModel:
    """For runs without guidance: there is no transformer in it, so that it answers no prompt."""
    return shallow_unet(mid_block_type=None)


def shallow_xl_unet(**changes: Any) -> UNet2DConditionModel:
    options = SHALLOW | {"transformer_layers_per_block": 1, "attention_head_dim": 4}
    return tiny_xl_unet(**(options | changes))


def count_structures(unet: UNet2DConditionModel, *plans: Plan, guided: bool = False) -> int:
    """Of the calls that enter the UNet."""
    anatomy = read_anatomy(unet)
    programs = [compile_plan(plan, anatomy, guided=guided) for plan in plans]
    structures = {each for program in programs for each in list_structures(program)}
    return sum(HEAD not in each.call.pattern.inherited for each in structures)


def draw(pipe: Any, steps: int = STEPS, **options: Any) -> torch.Tensor:
    """Latents of a guided run."""
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
        "height": 32,
        "width": 32,
    }
    return pipe(**(arguments | options)).images


PLANS = {
    "reuse": Plan.every(3, cut="up0.l0", steps=STEPS),
    "residual": Plan.every(2, cut="mid", steps=STEPS, how="residual"),
    "forecast": Plan.every(2, cut="up0.l0", steps=STEPS, how="forecast"),
    "parts": Plan.full(STEPS).inherit("*.sa", "*.ca", at=[1, 3], how="reuse"),
    "parabola": Plan.between([0, 1, 2, 4], cut="up0.l0", steps=STEPS, how="forecast2"),
    "parabola from the start": Plan.every(2, cut="up0.l0", steps=STEPS, how="forecast2"),
    "whole steps": Plan.every(2, cut="head", steps=STEPS),
    "changes of whole steps": Plan.every(2, cut="head", steps=STEPS, how="residual"),
    "corrections": Plan.every(2, cut="head", steps=STEPS, how="forecast").correct(
        {2: (0.4, 0.2), 4: -1}
    ),
}
WITH_MIDDLE = ("residual", "parts")
"""Plans that are about what a bare UNet has not."""
GRAPHS = {"whole steps": 1, "changes of whole steps": 1, "parabola from the start": 3}


@pytest.mark.parametrize("name", PLANS)
def test_compiled_runs_have_the_bits_of_eager_ones(
    name: str, counter: CompileCounterWithBackend
) -> None:
    loop, plan = Loop(shallow_unet() if name in WITH_MIDDLE else bare_unet()), PLANS[name]
    with leansd.inherit(loop, plan):
        expected = loop(STEPS)
    with leansd.inherit(loop, plan, compile={"backend": counter}) as run:
        for _ in range(2):
            assert torch.equal(loop(STEPS), expected)
    assert counter.frame_count == count_structures(loop.unet, plan) == GRAPHS.get(name, 2)
    assert not counters["graph_break"]
    assert run.report().full_calls == len(plan.keys)


TOYS = {
    "mean": Method(
        "the mean of its last three outputs",
        3, lambda now, then, calls: tuple(1 / len(then) for _ in then), "m", "mean", "#000", "#fff",
    ),
    "damped": Method(
        "a part of its last two outputs",
        2, lambda now, then, calls: (0.6, 0.3)[: len(then)], "d", "damped", "#000", "#fff",
        is_exact=False,
    ),
    "damped change": Method(
        "its present input and a part of what it last added",
        1, lambda now, then, calls: (0.5,), "c", "damped change", "#000", "#fff",
        of="change", is_exact=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOYS)
def test_a_new_way_to_inherit_is_one_entry(
    name: str, counter: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs as its weights say, and has the same bits compiled."""
    toy = TOYS[name]
    monkeypatch.setitem(METHODS, name, toy)
    loop = Loop(shallow_unet())
    plan = Plan.between([0, 1, 2, 4], cut="mid", steps=STEPS, how=name)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = watch(
        loop.unet.mid_block,
        lambda module, args, output: seen.append((args[0].clone(), output.clone())),
    )
    with leansd.inherit(loop, plan):
        expected = loop(STEPS)
    handle.remove()
    # `mid` is one unit here but for a change, which every unit of it would have one of.
    if not toy.takes_input:
        computed = [seen[key][1] for key in (2, 1, 0)][: toy.depth]
        weights = toy.weights(0.0, (0.0,) * len(computed), STEPS)
        made = sum(w * each for w, each in zip(weights, computed, strict=True))
        assert torch.allclose(seen[3][1], made, atol=1e-5)  # type: ignore[arg-type]
    with leansd.inherit(loop, plan, compile={"backend": counter}):
        assert torch.equal(loop(STEPS), expected)
    assert counter.frame_count == count_structures(loop.unet, plan)


def test_one_graph_a_pattern_whatever_the_step_count(counter: CompileCounterWithBackend) -> None:
    loop = Loop(bare_unet())
    plans = [Plan.every(3, cut="up0.l0", steps=steps, how="forecast") for steps in (6, 7, 11)]
    for plan in plans:
        with leansd.inherit(loop, plan):
            expected = loop(plan.steps)
        with leansd.inherit(loop, plan, compile={"backend": counter}):
            assert torch.equal(loop(plan.steps), expected)
    assert counter.frame_count == count_structures(loop.unet, *plans) == 2


@pytest.mark.parametrize("guidance", ["inherit", "forecast", "drop"])
def test_half_batches(guidance: Any, counter: CompileCounterWithBackend) -> None:
    pipe = tiny_pipeline(unet=shallow_unet())
    plan = Plan.every(3, cut="up0.l0", steps=STEPS, how="forecast").guide(guidance, at=[2, 3, 5])
    with leansd.inherit(pipe, plan):
        expected = draw(pipe)
    with leansd.inherit(pipe, plan, compile={"backend": counter}):
        assert torch.equal(draw(pipe), expected)
        assert torch.equal(draw(pipe), expected)
    assert counter.frame_count == count_structures(pipe.unet, plan, guided=True)


@pytest.mark.parametrize("how", ["forecast", "forecast2", "residual"])
def test_weights_of_corrections_are_no_part_of_a_graph(
    how: Any, counter: CompileCounterWithBackend
) -> None:
    pipe = tiny_pipeline(unet=shallow_unet())
    frame = Plan.between([0, 1, 2, 4, 5], cut="head", steps=STEPS, how=how).guide("drop", at=1)
    drawn: list[torch.Tensor] = []
    for weight in (0.5, -0.25):
        plan = frame.correct({4: weight})
        with leansd.inherit(pipe, plan):
            drawn.append(draw(pipe))
        with leansd.inherit(pipe, plan, compile={"backend": counter}):
            assert torch.equal(draw(pipe), drawn[-1])
    assert not torch.equal(*drawn)
    assert counter.frame_count == count_structures(pipe.unet, plan, guided=True) == 3


@pytest.mark.parametrize("name", ["easycache", "guarded"])
def test_adaptive_plans_run_eagerly(name: str, counter: CompileCounterWithBackend) -> None:
    loop = Loop(bare_unet())
    plan = {
        "easycache": leansd.preset("easycache", steps=STEPS, threshold=0.2),
        "guarded": Plan.every(3, cut="up0.l0", steps=STEPS).guard("stem", threshold=0.02),
    }[name]
    with leansd.inherit(loop, plan):
        expected = loop(STEPS)
    with leansd.inherit(loop, plan, compile={"backend": counter}):
        with pytest.warns(UserWarning, match="it runs eagerly"):
            assert torch.equal(loop(STEPS), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(loop(STEPS), expected)
    assert counter.frame_count == 0


@pytest.mark.parametrize("how", ["chebyshev", "chebyshev-line"])
def test_forecasts_through_all_outputs_run_eagerly(
    how: Any, counter: CompileCounterWithBackend
) -> None:
    """They draw on one output more after every key step: each call would be a graph."""
    loop = Loop(bare_unet())
    plan = Plan.between([0, 1, 2, 4], cut="up0.l0", steps=STEPS, how=how)
    with leansd.inherit(loop, plan):
        expected = loop(STEPS)
    with leansd.inherit(loop, plan, compile={"backend": counter}):
        assert torch.equal(loop(STEPS), expected)
    assert counter.frame_count == 1


def test_branches_that_share_what_they_keep_run_eagerly(
    counter: CompileCounterWithBackend,
) -> None:
    pipe = make_modular(ClassifierFreeGuidance(guidance_scale=4.0))
    pipe.update_components(unet=shallow_xl_unet(cross_attention_dim=2 * WIDTH))
    shared = Plan.every(2, cut="up0.l0", steps=5).guide("inherit", at=[1, 2])
    apart = Plan.every(4, cut="up0.l0", steps=5)
    for plan, graphs in ((shared, 0), (apart, 2)):
        with leansd.inherit(pipe, plan):
            expected = draw_apart(pipe)
        with leansd.inherit(pipe, plan, compile={"backend": counter}):
            assert torch.equal(draw_apart(pipe), expected)
        assert counter.frame_count == graphs


def test_dynamic_shapes_compile_nothing_for_another_size(
    counter: CompileCounterWithBackend,
) -> None:
    loop = Loop(shallow_unet(**SAMPLERS))
    plan = PLANS["forecast"]
    # PyTorch takes lengths that are equal at first for equal for good: a half of a side, say, and
    # the number of steps.
    sizes = [(10, 14), (14, 10), (16, 18)]
    with leansd.inherit(loop, plan):
        expected = [loop(STEPS, size=size) for size in sizes]
    with leansd.inherit(loop, plan, compile={"backend": counter, "dynamic": True}):
        found = [loop(STEPS, size=size) for size in sizes]
    assert all(map(torch.equal, found, expected))
    assert counter.frame_count == 2


def test_odd_sizes(counter: CompileCounterWithBackend) -> None:
    loop = Loop(shallow_unet(**SAMPLERS))
    plan = PLANS["reuse"]
    with leansd.inherit(loop, plan):
        expected = loop(STEPS, size=(7, 9))
    with leansd.inherit(loop, plan, compile={"backend": counter}):
        assert torch.equal(loop(STEPS, size=(7, 9)), expected)


def test_uneven_padding_runs_odd_sizes_eagerly(counter: CompileCounterWithBackend) -> None:
    loop = Loop(shallow_unet(**SAMPLERS, downsample_padding=0))
    with leansd.inherit(loop, PLANS["reuse"]):
        expected = loop(STEPS, size=(8, 8))
    with leansd.inherit(loop, PLANS["reuse"], compile={"backend": counter}):
        assert torch.equal(loop(STEPS, size=(8, 8)), expected)
        assert counter.frame_count == 2
        (graphs,) = loop.unet._leansd_engine.engine._compiled.values()
        assert not graphs._shapes.suit(torch.empty(2, 4, 7, 8))


def test_compiled_full_plan_is_the_plain_unet(counter: CompileCounterWithBackend) -> None:
    loop = Loop(bare_unet())
    expected = loop(3)
    with leansd.inherit(loop, Plan.full(3), compile={"backend": counter}):
        assert torch.equal(loop(3), expected)
    assert counter.frame_count == 1


def test_graphs_outlive_the_attachment_but_not_in_copies(
    counter: CompileCounterWithBackend,
) -> None:
    loop, plan = Loop(bare_unet()), PLANS["reuse"]
    forwards = [vars(module).get("forward") for module in loop.unet.modules()]
    for _ in range(10):
        with leansd.inherit(loop, plan, compile={"backend": counter}):
            expected = loop(STEPS)
    assert counter.frame_count == 2
    assert [vars(module).get("forward") for module in loop.unet.modules()] == forwards
    twin = copy.deepcopy(loop.unet)
    assert twin._leansd_engine.engine is None
    other = Loop(twin)
    with leansd.inherit(other, plan):
        assert torch.equal(other(STEPS), expected)


def test_what_is_released_without_references_is_freed(counter: CompileCounterWithBackend) -> None:
    loop = Loop(bare_unet())
    with leansd.inherit(loop, Plan.full(2), compile={"backend": counter}):
        loop(2)
    gone = weakref.ref(loop.unet)
    del loop
    torch.compiler.reset()
    gc.collect()
    assert gone() is None


def test_lora_is_never_stale(counter: CompileCounterWithBackend) -> None:
    plan = Plan.every(2, cut="mid.l0.res", steps=2)  # the transformer runs at both steps
    pipe = tiny_pipeline(unet=shallow_unet())

    def check() -> torch.Tensor:
        with leansd.inherit(reference, plan):
            expected = draw(reference, 2)
        found = draw(pipe, 2)
        assert torch.equal(found, expected)
        return found

    reference = tiny_pipeline(unet=copy.deepcopy(pipe.unet))
    with leansd.inherit(pipe, plan, compile={"backend": counter}):
        plain = check()
        for each in (pipe, reference):
            torch.manual_seed(5)
            config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
            each.unet.add_adapter(config, adapter_name="style")
        styled = check()
        assert not torch.equal(styled, plain)
        for each in (pipe, reference):
            each.set_adapters("style", 0.5)
        assert not torch.equal(check(), styled)
        for each in (pipe, reference):
            each.delete_adapters("style")
        assert torch.equal(check(), plain)


def test_freeu_switched_on_and_off(counter: CompileCounterWithBackend) -> None:
    pipe = tiny_pipeline(unet=shallow_unet())
    plan = Plan.every(2, cut="up0.l0", steps=2)

    def run(**options: Any) -> list[torch.Tensor]:
        with leansd.inherit(pipe, plan, **options):
            found = [draw(pipe, 2)]
            pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
            found.append(draw(pipe, 2))
            pipe.unet.disable_freeu()
            return [*found, draw(pipe, 2)]

    expected = run()
    assert not torch.equal(*expected[:2])
    assert all(map(torch.equal, run(compile={"backend": counter}), expected))


def test_sdxl(counter: CompileCounterWithBackend) -> None:
    loop = Loop(shallow_xl_unet())
    plan = Plan.every(2, cut="mid.l0.attn", steps=2)  # what comes in a tuple
    with leansd.inherit(loop, plan):
        expected = loop(2)
    with leansd.inherit(loop, plan, compile={"backend": counter}):
        assert torch.equal(loop(2), expected)
    assert counter.frame_count == 2


def test_controlnet(counter: CompileCounterWithBackend) -> None:
    unet = shallow_unet()
    pipe = make_control_pipeline(tiny_controlnet(unet))
    pipe.unet = unet
    plan = PLANS["reuse"]
    with leansd.inherit(pipe, plan):
        expected = draw_controlled(pipe)
    with leansd.inherit(pipe, plan, compile={"backend": counter}):
        assert torch.equal(draw_controlled(pipe), expected)
        assert torch.equal(draw_controlled(pipe), expected)
    assert counter.frame_count == 2


def test_integer_time_steps_are_no_part_of_a_graph(counter: CompileCounterWithBackend) -> None:
    unet = bare_unet()
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    with torch.no_grad():
        with leansd.inherit(unet, PLANS["reuse"]):
            expected = [unet(sample, 900 - t, text).sample for t in range(STEPS)]
        with leansd.inherit(unet, PLANS["reuse"], compile={"backend": counter}):
            found = [unet(sample, 900 - t, text).sample for t in range(STEPS)]
    assert all(map(torch.equal, found, expected))
    assert counter.frame_count == 2


def test_threads_share_a_unet(counter: CompileCounterWithBackend) -> None:
    unet = bare_unet()
    plans = [PLANS["reuse"], PLANS["forecast"], None]
    loops = [Loop(unet) for _ in plans]
    expected = []
    for seed, (loop, plan) in enumerate(zip(loops, plans, strict=True)):
        with leansd.inherit(loop, plan or Plan.full(STEPS)):
            expected.append(loop(STEPS, seed=seed))
    found: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}

    def serve(seed: int) -> None:
        loop, plan = loops[seed], plans[seed]
        options: Any = {"backend": counter} if plan is not None else False
        with leansd.inherit(loop, plan or Plan.full(STEPS), compile=options):
            found[seed] += [loop(STEPS, seed=seed) for _ in range(3)]

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, outputs in found.items():
        assert len(outputs) == 3
        assert all(torch.equal(output, expected[seed]) for output in outputs)


def test_outputs_in_memory_of_cuda_graphs_are_copied() -> None:
    """A backend that, as CUDA graphs do, gives its outputs in the same memory every time."""

    def backend(graph: torch.fx.GraphModule, inputs: Any, options: Any = None) -> Any:
        places: list[torch.Tensor] = []

        def replay(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            outputs = graph.forward(*arguments)
            places.extend(each.clone() for each in outputs[len(places) :])
            for place, output in zip(places, outputs, strict=True):
                place.copy_(output)
            return tuple(places)

        return replay

    loop = Loop(bare_unet())
    plan = Plan.between([0, 1, 3], cut="up0.l0", steps=STEPS, how="forecast")
    with leansd.inherit(loop, plan):
        expected = loop(STEPS)
    choice = {"backend": backend, "options": {"triton.cudagraphs": True}}
    with leansd.inherit(loop, plan, compile=choice):
        assert torch.equal(loop(STEPS), expected)
        first, second = loop(STEPS, seed=1), loop(STEPS, seed=2)
    assert not torch.equal(first, second)


def test_cuda_graphs_are_told_from_the_options() -> None:
    assert uses_cuda_graphs({"mode": "reduce-overhead"})
    assert uses_cuda_graphs({"mode": "max-autotune"})
    assert uses_cuda_graphs({"backend": "cudagraphs"})
    assert uses_cuda_graphs({"options": {"triton.cudagraphs": True}})
    assert not uses_cuda_graphs({"mode": "max-autotune-no-cudagraphs"})
    assert not uses_cuda_graphs({"dynamic": True})


def test_what_cannot_be_compiled_runs_eagerly_with_one_warning() -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no such device")

    loop, plan = Loop(bare_unet()), PLANS["forecast"]
    with leansd.inherit(loop, plan):
        expected = loop(STEPS)
    with leansd.inherit(loop, plan, compile={"backend": backend}):
        with pytest.warns(UserWarning, match="runs eagerly.*no such device"):
            assert torch.equal(loop(STEPS), expected)
        assert torch.equal(loop(STEPS), expected)


def test_failing_in_the_middle_of_a_run_goes_on_eagerly() -> None:
    """What earlier compiled calls have kept serves the eager ones."""
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        if graphs == 2:
            raise NotImplementedError("a second graph")
        return graph.forward

    loop, plan = Loop(bare_unet()), PLANS["reuse"]
    with leansd.inherit(loop, plan):
        expected = loop(STEPS)
    with (
        leansd.inherit(loop, plan, compile={"backend": backend}),
        pytest.warns(UserWarning, match="a second graph"),
    ):
        assert torch.equal(loop(STEPS), expected)


def test_errors_of_the_caller_stay_what_they_are(counter: CompileCounterWithBackend) -> None:
    unet = shallow_unet()
    narrow = torch.randn(1, 77, 31)
    with (
        leansd.inherit(unet, Plan.full(2), compile={"backend": counter}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            unet(torch.randn(1, 4, 8, 8), 900, narrow)


def test_errors_of_the_caller_do_not_turn_compiling_off(
    counter: CompileCounterWithBackend,
) -> None:
    unet = shallow_unet()
    loop, plan = Loop(unet), PLANS["reuse"]
    with leansd.inherit(loop, plan):
        expected = loop(STEPS)
    handle = watch_before(unet.mid_block, fail)
    with (
        leansd.inherit(loop, plan, compile={"backend": counter}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="out of luck"):
            loop(STEPS)
        handle.remove()
        assert torch.equal(loop(STEPS), expected)
    assert counter.frame_count == 2


def fail(*_: Any) -> None:
    raise RuntimeError("out of luck")


def test_what_can_be_compiled_is_though_another_pattern_cannot() -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append("tried")
        if len(graphs) == 1:
            raise NotImplementedError("a first graph")
        return graph.forward

    loop, plan = Loop(bare_unet()), PLANS["reuse"]
    with leansd.inherit(loop, plan):
        expected = loop(STEPS)
    with leansd.inherit(loop, plan, compile={"backend": backend}):
        with pytest.warns(UserWarning, match="a first graph"):
            assert torch.equal(loop(STEPS), expected)
        assert torch.equal(loop(STEPS), expected)
    assert len(graphs) == 2


def test_stance_of_eager_execution_is_obeyed(counter: CompileCounterWithBackend) -> None:
    loop, plan = Loop(bare_unet()), PLANS["forecast"]
    with leansd.inherit(loop, plan):
        expected = loop(STEPS)
    with (
        torch.compiler.set_stance("force_eager"),
        leansd.inherit(loop, plan, compile={"backend": counter}),
    ):
        assert torch.equal(loop(STEPS), expected)
    assert counter.frame_count == 0


def test_until_released(counter: CompileCounterWithBackend) -> None:
    loop = Loop(bare_unet())
    expected = loop(3)
    leansd.inherit_(loop, Plan.every(3, cut="up0.l0", steps=3), compile={"backend": counter})
    assert not torch.equal(loop(3), expected)
    assert counter.frame_count == 2
    leansd.release_(loop)
    assert torch.equal(loop(3), expected)


def test_options_are_checked() -> None:
    unet = shallow_unet()
    assert read_options(False) is None
    assert read_options(True) == {}
    with pytest.raises(LeansdError, match=r"unknown option 'fullgraph'.*backend, mode"):
        leansd.inherit(unet, Plan.full(2), compile={"fullgraph": False})
    with pytest.raises(LeansdError, match="either mode or options"):
        leansd.inherit(unet, Plan.full(2), compile={"mode": "default", "options": {"a": 1}})


def test_structures_forget_calls_and_step_counts() -> None:
    anatomy = read_anatomy(shallow_unet())
    plan = Plan.every(3, cut="up0.l0", steps=9, how="forecast").guide("inherit", at=[1, 2, 4])
    program = compile_plan(plan, anatomy)
    structures = list_structures(program)
    patterns = {(call.pattern.active, call.lanes, call.guidance) for call in program.calls}
    assert len(set(structures)) == len(patterns)
    longer = compile_plan(plan.fit(18), anatomy)
    assert set(structures) == set(list_structures(longer))
    for call, structure in zip(program.calls, structures, strict=True):
        kept = {each for keeps in call.keeps.values() for each in keeps}
        assert kept <= set(structure.list_keeps(call))
        read = {each for lanes in call.sources.values() for lane in lanes for each in lane}
        assert read == {each for lane in structure.list_sources(call) for each in lane}


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic: bool) -> None:
    """Code is generated for few units, since its compiler takes seconds for each of their kinds."""
    loop = Loop(bare_unet())
    plan = Plan.every(2, cut="up0.l0", steps=4, how="forecast")
    with leansd.inherit(loop, plan):
        expected = loop(4)
    with leansd.inherit(loop, plan, compile={"dynamic": dynamic}):
        first = loop(4)
        graphs = counters["stats"]["unique_graphs"]
        assert torch.equal(loop(4), first)
    assert graphs == counters["stats"]["unique_graphs"] == count_structures(loop.unet, plan) == 2
    assert torch.allclose(first, expected, atol=1e-4, rtol=1e-4)

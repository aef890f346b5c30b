"""The pack against a real checkout of ComfyUI: `python check.py --comfyui PATH`.

Every sampler and situation is drawn with the embedded model in ComfyUI's own UNet and samplers. CI
has no checkout, so there the same situations run against a double (`tests/comfyui`).
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NOT_RUN = "NOT RUN: there is no ComfyUI at {path} (comfy/samplers.py is missing)"
STEPS = 12
PROMPTS = ("a red apple, noto style", "a green frog, noto style")
PICTURES = 1
NEAR = 13.0
"""dB that no crossed or stale picture has; a plan of twelve steps for another schedule has."""


class Checkout:
    """ComfyUI and this pack, imported, with the embedded model loaded."""

    def __init__(self, path: Path) -> None:
        # ComfyUI reads its own arguments when it is imported.
        sys.argv = [sys.argv[0]]
        sys.path[:0] = [str(path), str(Path(__file__).parents[1])]
        import comfy.options

        comfy.options.enable_args_parsing(False)
        import comfy.cli_args
        import torch

        if not torch.cuda.is_available():
            comfy.cli_args.args.cpu = True
            comfy.cli_args.args.use_pytorch_cross_attention = True
        import comfy.model_management
        import comfy.samplers
        import comfy.utils

        comfy.utils.PROGRESS_BAR_ENABLED = False
        self.torch, self.samplers = torch, comfy.samplers
        self.management = comfy.model_management
        self.nodes = importlib.import_module("comfyui.nodes")
        self.playing = importlib.import_module("comfyui.playing")
        self.choosing = importlib.import_module("comfyui.choosing")
        self.sampling = importlib.import_module("comfyui.sampling")
        self.model, self.clip, self.vae = self.nodes.LeanEmbeddedModel.execute().args
        encode = lambda text: self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))  # noqa: E731
        self.positive, self.other, self.negative = map(encode, (*PROMPTS, ""))

    def lay_out(self, scheduler: str = "normal", steps: int = STEPS, denoise: float = 1.0) -> Any:
        made = self.samplers.KSampler(
            self.model, steps, self.model.load_device, "euler", scheduler, denoise
        )
        return made.sigmas

    def ask(self, sampler: Any = "euler", sigmas: Any = None, **changes: Any) -> Any:
        if isinstance(sampler, str):
            sampler = self.samplers.sampler_object(sampler)
        given: dict[str, Any] = {
            "positive": self.positive,
            "negative": self.negative,
            "sampler": sampler,
            "sigmas": self.lay_out() if sigmas is None else sigmas,
            "cfg": 4.0,
            "latent": {"samples": self.torch.zeros(PICTURES, 4, 16, 16)},
        }
        return self.sampling.Request(**{**given, **changes})

    def draw(self, request: Any, plan: Any = None, model: Any = None, seed: int = 5) -> Any:
        """(latents, report): of a run by a plan, or of one without."""
        model = self.model if model is None else model
        if plan is None:
            return self.sampling.draw(model, request, seed), None
        choice = self.choosing.PlanChoice(plan)
        model = self.playing.PlanOnModel(choice).attach(model)
        return self.sampling.draw(model, request, seed), self.nodes.find_report(model)

    def measure(self, latents: Any, full: Any) -> float:
        return self.sampling.measure_psnr(self.vae.decode(latents), self.vae.decode(full))

    @contextmanager
    def with_little_memory(self, is_little: Callable[[int], bool]) -> Iterator[None]:
        """Conditionings apart wherever `is_little` says so of the number of the question."""
        original, count = self.management.get_free_memory, itertools.count()

        def tell(*args: Any, **options: Any) -> Any:
            found = original(*args, **options)
            asks_twice = isinstance(found, tuple)
            return 1 if not asks_twice and is_little(next(count)) else found

        self.management.get_free_memory = tell
        try:
            yield
        finally:
            self.management.get_free_memory = original


Check = Callable[[Checkout], str]


def check_unet(here: Checkout) -> str:
    """ComfyUI's own UNet with the embedded weights is the UNet of diffusers."""
    from diffusers import UNet2DConditionModel

    from leansd.emoji.location import model_folder

    torch = here.torch
    theirs = UNet2DConditionModel.from_pretrained(model_folder() / "unet").float().eval()
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 24, theirs.config.cross_attention_dim)
    with torch.no_grad():
        expected = theirs(x, torch.tensor([500, 500]), context).sample
        given = here.model.model.diffusion_model(x, torch.tensor([500.0, 500.0]), context=context)
    far = float((given - expected).abs().max())
    assert far < 1e-4, f"they differ by {far}"
    return f"differs by {far:.1e} at most"


def check_samplers(here: Checkout) -> str:
    """All samplers: a full plan changes no bit, `balanced` spares calls or says why not."""
    lines: list[str] = []
    for name in here.samplers.SAMPLER_NAMES:
        request = here.ask(name)
        full, _ = here.draw(request)
        same, _ = here.draw(request, "full")
        assert here.torch.equal(full, same), f"{name}: a full plan changes the picture"
        drawn, report = here.draw(request, "balanced")
        assert here.torch.isfinite(drawn).all(), f"{name}: not finite"
        told = f"{report.computed:>3} of {report.calls:>3} calls, "
        told += f"{here.measure(drawn, full):5.1f} dB"
        if report.full:
            assert here.torch.equal(drawn, full), f"{name}: in full, and yet another picture"
            told += f"; in full: {report.full}"
        else:
            assert report.computed < 0.75 * report.calls, f"{name}: nothing spared"
        lines.append(f"    {name:<28}{told}")
    return f"{len(lines)} samplers\n" + "\n".join(lines)


def check_schedulers(here: Checkout) -> str:
    """All schedules of sigmas, from noise and from a picture."""
    count = 0
    for name in here.samplers.SCHEDULER_NAMES:
        for denoise in (1.0, 0.6):
            request = here.ask(sigmas=here.lay_out(name, denoise=denoise))
            full, _ = here.draw(request)
            drawn, report = here.draw(request, "balanced")
            assert not report.full, f"{name} {denoise}: {report.full}"
            assert report.computed < report.calls, f"{name} {denoise}: nothing spared"
            near = here.measure(drawn, full)
            assert near > NEAR, f"{name} {denoise}: {near:.1f} dB"
            count += 1
    return f"{count} schedules"


def check_memory(here: Checkout) -> str:
    """Conditionings together, apart, and as memory allows: the same pictures."""
    expected, report = here.draw(here.ask(), "balanced")
    for is_little in (lambda _: True, lambda number: number % 3 == 0):
        with here.with_little_memory(is_little):
            drawn, other = here.draw(here.ask(), "balanced")
        assert other.computed == report.computed
        far = float((drawn - expected).abs().max())
        assert far < 1e-3, f"they differ by {far}"
    return "the same calls, the same pictures"


def check_conditionings(here: Checkout) -> str:
    """Several, areas, time ranges: nothing crossed, and near to the full run."""
    area = [[here.other[0][0], {**here.other[0][1], "area": (8, 8, 0, 0), "strength": 1.0}]]
    early = [[here.positive[0][0], {**here.positive[0][1], "end_percent": 0.4}]]
    late = [[here.other[0][0], {**here.other[0][1], "start_percent": 0.4}]]
    told: list[str] = []
    for name, positive in (
        ("two", here.positive + here.other),
        ("area", here.positive + area),
        ("time ranges", early + late),
    ):
        request = here.ask(positive=positive)
        full, _ = here.draw(request)
        drawn, report = here.draw(request, "balanced")
        near = here.measure(drawn, full)
        assert near > NEAR, f"{name}: {near:.1f} dB"
        told.append(f"{name} {report.computed} of {report.calls} calls {near:.1f} dB")
    return ", ".join(told)


def check_interruption(here: Checkout) -> str:
    """A run that is interrupted leaves nothing, and the next is whole."""
    model = here.playing.PlanOnModel(here.choosing.PlanChoice("balanced")).attach(here.model)
    expected = here.sampling.draw(model, here.ask(), 5)
    calls = itertools.count()

    def interrupt(executor: Any, *args: Any, **options: Any) -> Any:
        if next(calls) == 6:
            raise here.management.InterruptProcessingException
        return executor(*args, **options)

    stopped = model.clone()
    stopped.add_wrapper_with_key("predict_noise", "interrupt", interrupt)
    try:
        here.sampling.draw(stopped, here.ask(), 5)
    except here.management.InterruptProcessingException:
        pass
    else:
        raise AssertionError("it was not interrupted")
    options = stopped.model_options["transformer_options"]
    assert here.playing.KEY not in options, "its state is left"
    assert here.torch.equal(here.sampling.draw(model, here.ask(), 5), expected)
    return "nothing is left"


def check_blocks(here: Checkout) -> str:
    """Inheritance inside the UNet: the numbers of the runtime for diffusers, and nothing left."""
    from diffusers import UNet2DConditionModel

    import leansd
    from leansd.emoji.location import model_folder
    from leansd.plans.plan import Plan

    theirs = UNet2DConditionModel.from_pretrained(model_folder() / "unet").float().eval()
    blocks = importlib.import_module("comfyui.blocks").read_blocks(here.model.model.diffusion_model)
    anatomy = leansd.dissect(theirs)
    assert blocks is not None
    assert blocks.anatomy.fingerprint == anatomy.fingerprint
    outer, told = f"up{anatomy.up_blocks - 2}.up", list[str]()
    plans = {
        "deepcache": leansd.preset("deepcache", steps=STEPS, blocks=anatomy.up_blocks),
        # Forecasts would differ a little: a loop's noise levels are known by its time steps alone.
        "both": Plan.every(3, cut=outer, steps=STEPS).inherit("head", at=[4, 8], how="reuse"),
    }
    full, _ = here.draw(here.ask())
    for name, plan in plans.items():
        seen: list[Any] = []

        def watch(executor: Any, x: Any, t: Any, context: Any, *rest: Any, to: Any = seen) -> Any:
            output = executor(x, t, context, *rest)
            to.append((x.clone(), t.clone(), context.clone(), output.clone()))
            return output

        model = here.model.clone()
        model.add_wrapper_with_key("diffusion_model", "watch", watch)
        before = here.draw(here.ask(), "full")[0]
        drawn, report = here.draw(here.ask(), plan, model)
        assert (report.full, report.forced) == ("", {})
        assert here.torch.equal(before, full), "a full plan changes the picture"
        with leansd.inherit(theirs, plan):
            given = [theirs(x, t[0], context).sample for x, t, context, _ in seen]
        expected, outputs = here.torch.stack(given), here.torch.stack([each[-1] for each in seen])
        far = float((outputs - expected).abs().max())
        most = float(expected.abs().max())
        assert far < 1e-3 * most, f"{name}: {far:.1e} of {most:.1f} from diffusers"
        with here.with_little_memory(lambda number: number % 3 == 0):
            apart, other = here.draw(here.ask(), plan)
        assert other.partial == report.partial
        assert float((apart - drawn).abs().max()) < 1e-3, "apart and together differ"
        told.append(
            f"{name} {report.partial} of {report.calls} in part, {report.measured:.2f}x, "
            f"{here.measure(drawn, full):.1f} dB, {far:.1e} of {most:.1f} from diffusers"
        )
    patched = [each for each in here.model.model.modules() if "forward" in vars(each)]
    assert not patched, "forwards are left"
    return "; ".join(told)


def check_tuning(here: Checkout) -> str:
    """Lean Tune finds a plan that is nearer than the preset of as many calls, and auto finds it."""
    nodes, request, told = here.nodes, here.ask("dpmpp_2m"), []
    with tempfile.TemporaryDirectory() as folder:
        library = nodes.PlanLibrary(Path(folder))
        original, nodes.open_library = nodes.open_library, lambda: library
        try:
            plan, picture, text = nodes.LeanTune.execute(
                here.model, here.positive, here.negative, request.sampler, request.sigmas,
                request.latent, request.cfg, 2.0, 0.0, 6, 0, 2, here.vae,
            ).args  # fmt: skip
            assert picture.ndim == 4, picture.shape
            model = nodes.LeanPlan.execute(here.model, "auto", "stretch").args[0]
        finally:
            nodes.open_library = original
        full, _ = here.draw(request, seed=77)
        tuned = here.sampling.draw(model, request, 77)
        report = nodes.find_report(model)
        assert not report.notes, report.notes
        few = here.sampling.draw(
            here.model, request, 77, here.sampling.thin_out(request.sigmas, report.computed)
        )
        for name, each in (("tuned", tuned), (f"{report.computed} steps", few)):
            told.append(f"{name} {here.measure(each, full):.1f} dB")
    return f"{plan.name}, {report.computed} of {report.calls} calls: {', '.join(told)}\n{text}"


def check_nodes(here: Checkout) -> str:
    """The nodes, as ComfyUI executes them."""
    nodes = here.nodes
    names = [each.GET_SCHEMA().node_id for each in _list_nodes(nodes)]
    model = nodes.LeanPlan.execute(here.model, "balanced", "stretch").args[0]
    request = here.ask("dpmpp_2m")
    latent = {"samples": here.sampling.draw(model, request, 5)}
    text = nodes.LeanReport.execute(model, latent).args[1]
    assert "forecast" in text, text
    compared = nodes.LeanCompare.execute(
        model, here.positive, here.negative, request.sampler, request.sigmas, request.latent,
        request.cfg, here.vae, 5,
    )  # fmt: skip
    pictures, beside, report = compared.args
    count, height, width, _ = pictures.shape
    assert count == 3 * PICTURES, pictures.shape
    assert beside.shape == (PICTURES, height, 3 * width, 3), beside.shape
    return f"{', '.join(names)}\n" + "\n".join(f"    {line}" for line in report.splitlines())


def _list_nodes(nodes: Any) -> list[Any]:
    import asyncio

    return asyncio.run(nodes.LeanExtension().get_node_list())


CHECKS: tuple[Check, ...] = (
    check_unet,
    check_blocks,
    check_memory,
    check_conditionings,
    check_interruption,
    check_nodes,
    check_tuning,
    check_schedulers,
    check_samplers,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of ComfyUI")
    parser.add_argument("--only", default="", help="run the checks with this in their name")
    options = parser.parse_args()
    path = options.comfyui.resolve()
    if not (path / "comfy" / "samplers.py").is_file():
        print(NOT_RUN.format(path=path))
        return 2
    here = Checkout(path)
    failed = 0
    for check in CHECKS:
        if options.only not in check.__name__:
            continue
        started = time.perf_counter()
        try:
            with here.torch.inference_mode():  # as ComfyUI executes nodes
                told = check(here)
            print(f"ok    {check.__name__} ({time.perf_counter() - started:.0f} s): {told}")
        except AssertionError as error:
            failed += 1
            print(f"FAIL  {check.__name__}: {error}")
    print(f"{failed} failed" if failed else "all ran, none failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

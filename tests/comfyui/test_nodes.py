"""The nodes' classes, against a double of ComfyUI's API."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfyui.api import ProgressBar, prepare_noise, put_modules
from comfyui.double import Denoiser, Guider, Patcher, cond, lay_out
from comfyui.test_hosting import TimedHost
from comfyui.test_playing import EULER, PLAN, STEPS
from comfyui.unet import UNetModel
from leansd.anatomy.reading import fingerprint_module
from leansd.errors import LeansdError
from leansd.plans import Plan
from tiny import tiny_unet

NAMES = ("nodes", "sampling")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Any]:
    """The module of the nodes, with an empty folder of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        put_modules(patch, tmp_path)
        for name in NAMES:
            sys.modules.pop(f"integrations.comfyui.{name}", None)
        yield importlib.import_module("integrations.comfyui.nodes")
    for name in NAMES:
        sys.modules.pop(f"integrations.comfyui.{name}", None)


def list_nodes(nodes: Any) -> list[Any]:
    return asyncio.run(nodes.LeanExtension().get_node_list())


def draw(model: Any, sigmas: Any = None, size: int = 4) -> torch.Tensor:
    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(1))
    guider = Guider(model, [cond(0.4)], [cond(-0.3)])
    return guider.sample(noise, EULER, lay_out(STEPS) if sigmas is None else sigmas)


def test_what_nodes_show_is_what_they_take(nodes: Any) -> None:
    seen: set[str] = set()
    for node in list_nodes(nodes):
        schema = node.GET_SCHEMA()
        assert schema.node_id == node.__name__
        assert schema.display_name not in seen
        seen.add(schema.display_name)
        assert schema.description
        assert schema.category.startswith(nodes.CATEGORY)
        taken = inspect.signature(node.execute).parameters
        assert [each.id for each in schema.inputs] == list(taken)
        for each in schema.inputs:
            told, parameter = each.options, taken[each.id]
            assert told.get("optional", False) == (parameter.default is not parameter.empty)
            if "options" in told and "default" in told:
                assert told["default"] in told["options"]
            if "min" in told:
                assert told["min"] <= told["default"] <= told["max"]


def test_a_users_plans_are_offered_kept_and_loaded(nodes: Any, tmp_path: Path) -> None:
    saved = nodes.SaveLeanPlan.execute(PLAN, "mine")
    assert (tmp_path / "default/leansd/mine.json").is_file()
    assert "mine.json" in saved.ui
    (offered,) = (
        each.options["options"] for each in nodes.LeanPlan.GET_SCHEMA().inputs if each.id == "plan"
    )
    assert offered[0] == "auto"
    assert {"full", "balanced", "mine.json"} <= set(offered)
    plan, text = nodes.LoadLeanPlan.execute("mine.json").args
    assert plan == PLAN.rename("mine")
    assert text == str(plan)
    before = nodes.LoadLeanPlan.fingerprint_inputs("mine.json")
    nodes.SaveLeanPlan.execute(Plan.full(STEPS), "mine")
    assert nodes.LoadLeanPlan.fingerprint_inputs("mine.json") != before
    model = nodes.LeanPlan.execute(Patcher(), "mine.json", "stretch").args[0]
    draw(model)
    assert nodes.find_report(model).plan == "mine"


@pytest.mark.parametrize("mismatch", ["stretch", "compute in full"])
def test_a_plan_of_another_step_count(nodes: Any, mismatch: str) -> None:
    model = nodes.LeanPlan.execute(Patcher(), "balanced", mismatch, PLAN).args[0]
    draw(model, lay_out(20))
    report = nodes.find_report(model)
    follows = mismatch == "stretch"
    assert (report.computed < 20) == follows
    assert ("is for 12 steps, this run has 20" in report.full) != follows


def test_auto_goes_by_the_digest_of_the_weights(nodes: Any) -> None:
    first, other = (Patcher(UNetModel(tiny_unet(seed))) for seed in (0, 1))
    digest = fingerprint_module(first.denoiser)
    purpose = nodes.Purpose(digest, "euler", tuple(lay_out(STEPS).tolist()), 4.0)
    nodes.open_library().save_tuned(purpose, PLAN.rename("tuned 2x"))
    told = []
    for patcher in (first, other):
        model = nodes.LeanPlan.execute(patcher, "auto", "stretch").args[0]
        draw(model, size=8)
        told.append(nodes.find_report(model).plan)
    assert told == ["tuned 2x", "balanced"]


def test_a_checkpoint_is_the_same_one_while_a_lora_is_in_its_weights(nodes: Any) -> None:
    unet = UNetModel(tiny_unet())
    patcher = Patcher(unet)
    digest = nodes.digest_checkpoint(patcher)
    assert digest == fingerprint_module(unet)
    weight = next(unet.parameters())
    for name, each in unet.state_dict().items():
        if each.data_ptr() == weight.data_ptr():
            kept = SimpleNamespace(weight=each.clone())
            patcher.backup[f"diffusion_model.{name}"] = kept
    with torch.no_grad():
        weight.mul_(-2)
    assert fingerprint_module(unet) != digest == nodes.digest_checkpoint(patcher.clone())
    # Compiled by another pack, while it is loaded.
    patcher.object_patches_backup["diffusion_model"], patcher.denoiser = unet, object()
    assert nodes.digest_checkpoint(patcher) == digest


class Weighed(torch.nn.Module):
    """A denoiser with weights."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.weight = Denoiser(), torch.nn.Parameter(torch.ones(3))

    def forward(self, *args: Any) -> torch.Tensor:
        return self.inner(*args)


class Stopped(Exception):
    pass


def test_lean_tune_goes_on_where_it_was_stopped_and_auto_finds_its_plan(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "SamplerHost", TimedHost)
    management, bar = sys.modules["comfy.model_management"], ProgressBar.shown
    patcher, sigmas = Patcher(Weighed()), lay_out(STEPS)
    latent = {"samples": torch.zeros(2, 4, 8, 8)}

    def tune(context: float = 0.4) -> tuple[Any, int]:
        """What the node gives, and how often it ran the model."""
        before = patcher.denoiser.inner.calls
        given = nodes.LeanTune.execute(
            patcher, [cond(context)], [cond(-0.3)], EULER, sigmas, latent, 4.0, 2.0, 0.0, 4, 0, 1
        )
        return given.args, patcher.denoiser.inner.calls - before

    def stop() -> None:
        if bar and bar[-1] > 400:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(management, "throw_exception_if_processing_interrupted", stop)
        with pytest.raises(Stopped):
            tune()
    bar.clear()
    (plan, picture, text), rest = tune()
    assert bar == sorted(bar)
    assert bar[-1] == 1000
    assert picture.shape[0] == 1
    assert picture.shape[-1] == 3
    assert "saved for auto" in text
    model = nodes.LeanPlan.execute(patcher, "auto", "stretch").args[0]
    draw(model)
    report = nodes.find_report(model)
    assert (report.plan, report.computed, report.notes) == (plan.name, len(plan.keys), ())
    # Of another prompt nothing is taken for known, and of the same nothing is tried again.
    _, anew = tune(1.2)
    assert anew > rest
    (path,) = (tmp_path / "default/leansd/tuned").glob("*.jsonl")
    cases = {json.loads(line)["case"] for line in path.read_text().splitlines()}
    assert len(cases) == 2


def test_lean_compare_says_how_near_each_is_and_shows_them(nodes: Any) -> None:
    latent = {"samples": torch.zeros(2, 4, 16, 16)}
    vae = SimpleNamespace(decode=lambda x: (x[:, :3].movedim(1, -1) / 4 + 0.5).clamp(0, 1))

    def compare(model: Any) -> Any:
        return nodes.LeanCompare.execute(
            model, [cond(0.4)], [cond(-0.3)], EULER, lay_out(STEPS), latent, 4.0, vae, 5
        ).args

    model = nodes.LeanPlan.execute(Patcher(), "auto", "stretch", PLAN).args[0]
    pictures, beside, text = compare(model)
    full, lean, few = pictures.chunk(3)
    assert torch.equal(beside, torch.cat([full, lean, few], dim=2))
    told = dict(re.findall(r"(this plan|plain 7 steps): (\d+\.\d) dB, SSIM 0\.\d{4}", text))
    for name, each in (("this plan", lean), ("plain 7 steps", few)):
        error = (each - full).square().flatten(1).mean(dim=1)
        assert float(told[name]) == pytest.approx(float(-10 * error.log10().mean()), abs=0.06)
    assert float(told["this plan"]) > float(told["plain 7 steps"])
    # The pictures are those that a sampler node draws.
    plain = draw_custom(Patcher(), latent["samples"])
    assert torch.equal(full, vae.decode(plain))
    with pytest.raises(LeansdError, match="put Lean Plan before the sampler"):
        compare(Patcher())


def draw_custom(model: Any, latent: torch.Tensor) -> torch.Tensor:
    guider = Guider(model, [cond(0.4)], [cond(-0.3)])
    return guider.sample(prepare_noise(latent, 5, None), EULER, lay_out(STEPS), latent, 5)


def test_deepcache_by_its_own_numbers(nodes: Any) -> None:
    unet = UNetModel(tiny_unet())
    model = nodes.LeanDeepCache.execute(Patcher(unet), 4, 0).args[0]
    draw(model, size=8)
    report = nodes.find_report(model)
    assert (report.plan, report.computed, report.partial) == ("deepcache", STEPS, STEPS - 3)
    # What Lean Compare holds such a plan against follows from the clock: no call was left out.
    timed = replace(report, seconds=STEPS / 2, whole_seconds=3.0)
    assert (timed.expected, timed.gain) == (1, 2)
    # Where the inside is not known, all is computed, and it is said why.
    model = nodes.LeanDeepCache.execute(Patcher(), 4, 0).args[0]
    draw(model)
    assert "is for UNets" in nodes.find_report(model).full


def test_the_report_comes_with_the_latents(nodes: Any) -> None:
    model = nodes.LeanPlan.execute(Patcher(), "auto", "stretch", PLAN).args[0]
    latent = {"samples": draw(model)}
    node = type("OnPage", (nodes.LeanReport,), {"hidden": SimpleNamespace(unique_id="7")})
    given, text = node.execute(model, latent).args
    assert given is latent
    assert sys.modules["server"].PromptServer.instance.shown == {"7": text}
    assert "the model ran 7 of 12 times, 5 forecast" in text


def test_bad_input_is_answered_by_one_sentence(nodes: Any) -> None:
    planned = nodes.LeanPlan.execute(Patcher(), "balanced", "stretch").args[0]
    for ask, why in (
        (lambda: nodes.LeanReport.execute(Patcher(), {}), "put Lean Plan before the sampler"),
        (lambda: nodes.LeanReport.execute(planned, {}), "nothing was drawn with this model yet"),
        (lambda: nodes.LeanPlan.execute(Patcher(), "gone.json", "stretch"), "gone.json"),
        (lambda: nodes.LeanPlan.execute(Patcher(), "../a.json", "stretch"), "no file name"),
        (lambda: nodes.LoadLeanPlan.execute("gone.json"), "gone.json"),
        (lambda: nodes.SaveLeanPlan.execute(PLAN, "a/b"), "no file name"),
    ):
        with pytest.raises(LeansdError, match=why):
            ask()


def test_pictures_become_latents_and_pictures_again(nodes: Any) -> None:
    embedded = importlib.import_module("integrations.comfyui.embedded")
    autoencoder = embedded.EmbeddedDecoder()
    pictures = torch.linspace(0, 1, 128).expand(2, 128, 128)[..., None].repeat(1, 1, 1, 3)
    latents = autoencoder.encode(pictures)
    assert latents.shape[:2] == (2, 4)
    back = autoencoder.decode(latents)
    assert back.shape == pictures.shape
    assert float((back - pictures).square().mean()) < 0.02
    sys.modules.pop("integrations.comfyui.embedded", None)

"""Incubation when something goes wrong, and in half precision: nothing of the user's is harmed."""

import copy
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from leansd.errors import LeansdError
from leansd.files import holding
from leansd.incubation import estimate, training_run, training_state
from leansd.incubation.recipe import Recipe, TrainerSettings
from leansd.incubation.trainer import prepare_teacher
from leansd.incubation.training_run import NET, TrainingRun, incubate, run_stages
from leansd.incubation.training_state import build_optimizer
from leansd.loading import load_unet
from test_incubation import (
    LIGHT,
    make_run,
    read_net,
    write_recipe,
)
from test_incubation_data import make_picture
from tiny import shallow_unet, tiny_pipeline

NO_ROOM = OSError(28, "No space left on device")
FORBIDDEN = PermissionError(13, "Permission denied")


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("as it happens")


def look_at(unet: Any) -> tuple[Any, ...]:
    """What a training could leave behind on a UNet."""
    modules = [(name, "forward" in vars(m), m.training) for name, m in unet.named_modules()]
    parameters = [(name, p.requires_grad, p.grad) for name, p in unet.named_parameters()]
    return modules, parameters, unet.device, unet.dtype


@pytest.mark.parametrize(
    ("where", "precision"),
    [
        ("trainer.build_optimizer", "no"),
        ("trainer.Ema", "no"),
        ("trainer.sum_losses", "no"),
        ("trainer.sum_losses", "bf16"),
        ("training_state.save_file", "bf16"),
        ("training_run.keep_net", "no"),
        (None, "no"),
        (None, "bf16"),
    ],
)
def test_the_teacher_is_left_as_it_was_whatever_happens(
    where: str | None, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, write_recipe({**LIGHT, "steps": 1}, precision=precision))
    unet = run.pipe.unet.train()
    unet.conv_in.requires_grad_(False)
    unet.mid_block.eval()
    before, weights = look_at(unet), copy.deepcopy(unet.state_dict())
    if where is None:
        run_stages(run)
    else:
        monkeypatch.setattr(f"leansd.incubation.{where}", fail)
        with pytest.raises((RuntimeError, LeansdError), match="as it happens"):
            run_stages(run)
    assert look_at(unet) == before
    assert all(torch.equal(each, weights[name]) for name, each in unet.state_dict().items())


def make_pictures(folder: Path) -> Path:
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(make_picture(20 * number))
        (folder / f"{number}.txt").write_text(f"thing {number}")
    return folder


@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_outlives_a_run(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision")
    data = {"kind": "folder", "path": str(make_pictures(tmp_path / "data")), "resolution": 32}
    losses = {"output": {}, "vgg": {"options": {"weights": "random", "stages": [0]}}}
    stage = {**LIGHT, "steps": 1, "losses": losses}
    recipe = Recipe.model_validate({**write_recipe(stage).to_document(), "data": data})
    pipe = tiny_pipeline(unet=shallow_unet(layers_per_block=2))
    before = set(threading.enumerate())
    if fails:
        monkeypatch.setattr("leansd.incubation.trainer.sum_losses", fail)
        with pytest.raises(RuntimeError, match="as it happens"):
            incubate(recipe, tmp_path / "run", pipe=pipe)
    else:
        assert incubate(recipe, tmp_path / "run", pipe=pipe) == tmp_path / "run" / NET
    assert set(threading.enumerate()) <= before


# -- a full disk ---------------------------------------------------------------------------------

KEPT = write_recipe({**LIGHT, "cached": 2}, checkpoint_every=1)


def fill_disk(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, error: Exception) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(target, name, refuse)


def fill_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log ends in half a line, as it does on a full disk."""
    write = Path.open

    def refuse(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "a" in mode:
            with write(path, "ab") as file:
                file.write(b'{"step": 3, "lo')
            raise NO_ROOM
        return write(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)


FULL: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "log": fill_log,
    "checkpoint": lambda patch: fill_disk(patch, Accelerator, "save_state", NO_ROOM),
    "tensors": lambda patch: fill_disk(
        patch,
        training_state,
        "save_file",
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ),
    "net": lambda patch: fill_disk(patch, training_run, "save_net", NO_ROOM),
    "folder": lambda patch: fill_disk(
        patch, os, "replace", PermissionError(13, "Permission denied")
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    run = make_run(tmp_path_factory.mktemp("runs") / "whole", KEPT)
    run_stages(run)
    return run


@pytest.mark.parametrize("what", FULL)
def test_a_full_or_closed_disk_is_a_sentence_and_the_run_goes_on(
    what: str, finished: TrainingRun, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        FULL[what](patch)
        with pytest.raises(
            LeansdError, match=r"cannot (write|keep).*(No space|Permission)"
        ) as told:
            run_stages(make_run(tmp_path, KEPT))
    assert "\n" not in str(told.value)
    assert not (tmp_path / NET).exists()
    run_stages(make_run(tmp_path, KEPT))
    assert read_net(tmp_path) == read_net(finished.folder)
    log = (tmp_path / "light/losses.jsonl").read_text()
    assert log.count("\n") == 1
    assert not list(tmp_path.rglob("*.partial"))


# -- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "mode"), [(torch.float16, "decoupled"), (torch.bfloat16, "end-to-end")]
)
def test_a_teacher_in_half_precision_teaches_a_student_in_single(
    dtype: torch.dtype, mode: str, tmp_path: Path
) -> None:
    stage = {**LIGHT, "mode": mode, "train": ["dn0", "up0"], "losses": {"normalised-features": {}}}
    run = make_run(tmp_path, write_recipe(stage))
    run.pipe.unet.to(dtype)
    rows: list[Any] = []
    net = load_unet(run_stages(run, on_log=lambda _, row: rows.append(row)), device="cpu")
    assert {each.dtype for each in net.parameters()} == {torch.float32}
    assert all(each.isfinite().all() for each in net.parameters())
    assert rows[-1]["skipped"] == 0
    assert run.pipe.unet.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pictures_of_a_pipeline_in_half_precision_are_encoded(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    pipe = tiny_pipeline(unet=shallow_unet(layers_per_block=2)).to(dtype)
    data = {"kind": "folder", "path": str(make_pictures(tmp_path / "data")), "resolution": 32}
    document = write_recipe({**LIGHT, "steps": 1}).to_document() | {"data": data}
    incubate(Recipe.model_validate(document), tmp_path / "run", pipe=pipe)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {dtype}


# -- what only a GPU does, with the calls doubled ------------------------------------------------


def test_the_teacher_is_copied_to_another_device_and_the_original_stays() -> None:
    unet = shallow_unet()
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        accelerator: Any = SimpleNamespace(device=torch.device("meta"), mixed_precision=precision)
        teacher = prepare_teacher(accelerator, unet)
        assert (teacher.device.type, teacher.dtype) == ("meta", dtype)
        assert (unet.device.type, unet.dtype) == ("cpu", torch.float32)


def test_the_rate_of_a_gpu_is_read_after_its_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    inputs = {"sample": None, "timestep": torch.zeros(1), "encoder_hidden_states": None}
    monkeypatch.setattr(estimate, "pick_size", lambda *_: None)
    monkeypatch.setattr(estimate, "make_inputs", lambda *_, **__: inputs)
    monkeypatch.setattr(estimate, "call_unet", lambda *_: order.append("call"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: order.append("wait"))
    unet: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)
    assert estimate.measure_rate(unet, 100, most=2) > 0
    assert order
    assert order == ["call", "wait"] * (len(order) // 2)


def test_an_optimizer_for_gpus_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    settings = TrainerSettings(optimizer="adamw8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(LeansdError, match="needs bitsandbytes"):
        build_optimizer(settings, [parameter], 0.1)
    double = SimpleNamespace(AdamW8bit=torch.optim.AdamW)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=double))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", double)
    assert build_optimizer(settings, [parameter], 0.1).param_groups[0]["lr"] == 0.1


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    """As when one is resumed that goes on elsewhere; once that is over, or killed, it can be."""
    run = make_run(tmp_path, KEPT)
    with holding(run.folder), pytest.raises(LeansdError, match="another run is at work in"):
        run_stages(run)
    assert not list(run.folder.rglob("checkpoints"))
    assert (run_stages(run) / "config.json").exists()

"""The trainer starts on UNets of the sizes that people have; random weights, small latents."""

from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from leansd.anatomy.builtin import open_builtin
from leansd.anatomy.inputs import make_inputs
from leansd.incubation.data.batches import Batch
from leansd.incubation.noise import DiffusionSchedule
from leansd.incubation.recipe import Recipe
from leansd.incubation.step import StageNet, make_student
from leansd.incubation.trainer import StageContext, prepare_teacher, train_stage
from tiny import LATENT, tiny_scheduler

GIB = 2**30
NEEDS = {"sd15": 9, "sdxl": 22}
"""GiB: a teacher, a student, and what of it trains."""


class OneSample:
    """The same sample again and again."""

    fingerprint = "one"

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def open(self, **_: object) -> "OneSample":
        return self

    def __iter__(self) -> "OneSample":
        return self

    def __next__(self) -> Batch:
        return self.batch

    def state(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        """There is nothing to shut."""


def build(name: str, device: torch.device) -> UNet2DConditionModel:
    unet: UNet2DConditionModel = open_builtin(name).to_empty(device=device)
    noise = 0.02 * torch.randn(2**20)  # again and again: hundreds of millions take long to draw
    with torch.no_grad():
        for parameter in unet.parameters():
            for part in parameter.flatten().split(len(noise)):
                part.copy_(noise[: len(part)])
    return unet


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_two_steps(name: str, tmp_path: Path) -> None:
    if psutil.virtual_memory().available < NEEDS[name] * GIB:
        pytest.skip(f"needs {NEEDS[name]} GiB of memory")
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    teacher = build(name, torch.device("cpu"))
    shallow = {"drop": ["dn0.l1", f"up{len(teacher.up_blocks) - 1}.l1"]}
    recipe = Recipe.model_validate(
        {
            "name": name,
            "data": {"kind": "random"},
            "trainer": {"checkpoint_every": 1000, "gradient_checkpointing": True},
            "stages": [
                {
                    "name": "shallow",
                    "mode": "decoupled",
                    "surgery": {"name": "shallow", "edits": [shallow]},
                    "train": ["dn0", f"up{len(teacher.up_blocks) - 1}"],
                    "steps": 2,
                    "losses": {"output": {}, "normalised-features": {}},
                }
            ],
        }
    )
    stage = recipe.stages[0]
    student = make_student(stage, {"teacher": StageNet(teacher)})
    inputs = make_inputs(teacher, size=(2 * LATENT, 2 * LATENT))
    added = inputs.get("added_cond_kwargs", {})
    source = OneSample(Batch(inputs["sample"], inputs["encoder_hidden_states"], added))
    schedule = DiffusionSchedule.read(tiny_scheduler())
    context = StageContext(stage, recipe.trainer, 0, source, schedule, tmp_path)
    seen: list[float] = []
    train_stage(
        accelerator,
        context,
        student,
        prepare_teacher(accelerator, teacher),
        on_log=lambda row: seen.append(row["skipped"]),
    )
    assert seen == [0]

"""Incubation end to end on tiny nets: what trains, what is frozen, what comes out."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from leansd.incubation.noise import Schedule
from leansd.incubation.random_latents import RandomLatents
from leansd.incubation.recipe import Recipe
from leansd.incubation.running import NET, Run, incubate
from leansd.incubation.students import Net, make_student
from leansd.incubation.trainer import Lesson, Training
from leansd.loading import load_unet
from leansd.surgery.lineage import Lineage
from tiny import LATENT, WIDTH, shallow_unet, tiny_scheduler

LIGHT = {
    "name": "light",
    "surgery": {"name": "light", "edits": [{"drop": ["dn0.l1", "up0.l1"]}]},
    "train": "*",
    "steps": 3,
    "learning_rate": 1e-3,
}
ASSEMBLED = {
    "name": "assembled",
    "surgery": {"name": "assembled", "edits": [{"take": ["dn0", "up0"], "source": "light"}]},
    "nets": {"original": "teacher", "light": "light"},
    "steps": 3,
    "learning_rate": 1e-3,
}


def write_recipe(*stages: dict[str, Any], **trainer: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "data": {"kind": "random"},
            "trainer": {"batch": 2, "checkpoint_every": 2, "ema": 0.5, **trainer},
            "stages": list(stages) or [LIGHT, ASSEMBLED],
        }
    )


@dataclasses.dataclass
class Parts:
    """What of a pipeline is asked for."""

    unet: Any
    scheduler: Any
    vae: Any = None


def make_parts() -> Parts:
    return Parts(shallow_unet(layers_per_block=2), tiny_scheduler())


def make_source() -> RandomLatents:
    torch.manual_seed(1)
    return RandomLatents((4, LATENT, LATENT), torch.randn(3, 5, WIDTH))


def make_run(folder: Path, recipe: Recipe | None = None) -> Run:
    return Run(recipe or write_recipe(), folder, make_parts(), make_source())


def make_training(folder: Path, recipe: Recipe, number: int = 0) -> Training:
    """A stage that starts from the teacher, before its first step."""
    run = make_run(folder, recipe)
    stage = recipe.stages[number]
    student = make_student(stage, {"teacher": Net(run.pipe.unet)})
    lesson = Lesson(
        stage,
        recipe.trainer,
        0,
        run.source,
        Schedule.read(run.pipe.scheduler),
        folder / stage.name,
    )
    return Training(Accelerator(cpu=True), lesson, student, run.pipe.unet)


def read_net(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("runs") / "whole")
    incubate(run)
    return run


def test_the_assembled_net_has_the_originals_deep_part_and_a_trained_shallow_one(
    finished: Run,
) -> None:
    teacher = finished.pipe.unet.state_dict()
    net = load_unet(finished.folder / NET, device="cpu", dtype=torch.float32).state_dict()
    deep = [name for name in net if name.startswith(("mid_block", "conv_", "time_embedding"))]
    assert deep
    assert all(torch.equal(net[name], teacher[name]) for name in deep)
    shallow = "up_blocks.0.resnets.0.conv1.weight"
    light = load_unet(finished.folder / "light" / NET, device="cpu", dtype=torch.float32)
    assert not torch.equal(net[shallow], teacher[shallow])
    assert not torch.equal(net[shallow], light.state_dict()[shallow])


def test_the_lineage_leads_back_to_the_teacher(finished: Run) -> None:
    lineage = Lineage.load(finished.folder / NET)
    assert set(lineage.nets) == {"teacher"}
    assert lineage.origins["up0.l1.res"] == ("teacher", "up0.l2.res")


def test_a_dry_run_counts_what_a_stage_computes() -> None:
    from leansd.anatomy import count_macs
    from leansd.incubation.dryrun import estimate

    parts = make_parts()
    decoupled = {**ASSEMBLED, "name": "apart", "mode": "decoupled"}
    recipe = write_recipe(LIGHT, ASSEMBLED, decoupled)
    seen = estimate(recipe, parts.unet, macs_per_second=1e9, device="cpu")
    whole, together, apart = seen.stages
    assert whole.teacher_macs == count_macs(parts.unet).total
    assert apart.student_macs < together.student_macs < whole.teacher_macs
    assert apart.activations < together.activations
    assert apart.backward_macs < together.backward_macs < whole.backward_macs
    assert "decoupled" in str(seen)

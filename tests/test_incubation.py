"""Incubation end to end on tiny nets: what trains, what is frozen, what comes out."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from leansd.anatomy.inputs import make_inputs
from leansd.errors import LeansdError
from leansd.incubation import training_run
from leansd.incubation.data.batches import Batch, Conditioning, RandomLatents
from leansd.incubation.noise import DiffusionSchedule, NoiseDraw
from leansd.incubation.recipe import Recipe
from leansd.incubation.step import (
    StageNet,
    StudentUNet,
    TeacherUNet,
    build_losses,
    make_student,
    run_student,
    run_teacher,
    sum_losses,
)
from leansd.incubation.trainer import (
    NonfiniteGuard,
    StageContext,
    StageTrainer,
    ValidationHook,
    prepare_teacher,
)
from leansd.incubation.training_log import LossLog
from leansd.incubation.training_run import NET, TrainingRun, claim_folder, open_nets, run_stages
from leansd.loading import load_unet
from leansd.surgery.lineage import Lineage
from processes import die, die_before_moving, run_until_dead
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
    return RandomLatents((4, LATENT, LATENT), Conditioning(torch.randn(3, 5, WIDTH)))


def make_run(folder: Path, recipe: Recipe | None = None) -> TrainingRun:
    return TrainingRun(recipe or write_recipe(), folder, make_parts(), make_source())


def make_training(folder: Path, recipe: Recipe, number: int = 0) -> StageTrainer:
    """A stage that starts from the teacher, before its first step."""
    run = make_run(folder, recipe)
    stage = recipe.stages[number]
    student = make_student(stage, {"teacher": StageNet(run.pipe.unet)})
    context = StageContext(
        stage,
        recipe.trainer,
        0,
        run.source,
        DiffusionSchedule.read(run.pipe.scheduler),
        folder / stage.name,
    )
    accelerator = Accelerator(cpu=True, mixed_precision=recipe.trainer.precision)
    return StageTrainer(accelerator, context, student, prepare_teacher(accelerator, run.pipe.unet))


def read_net(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / NET).iterdir())}


def read_curves(folder: Path) -> list[dict[str, float]]:
    rows = LossLog(folder / "losses.jsonl").load()
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    run = make_run(tmp_path_factory.mktemp("runs") / "whole")
    run_stages(run)
    return run


def test_the_assembled_net_has_the_originals_deep_part_and_a_trained_shallow_one(
    finished: TrainingRun,
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


def test_the_lineage_leads_back_to_the_teacher(finished: TrainingRun) -> None:
    lineage = Lineage.load(finished.folder / NET)
    assert set(lineage.nets) == {"teacher"}
    assert lineage.origins["up0.l1.res"] == ("teacher", "up0.l2.res")


def test_a_stage_starts_from_what_an_earlier_run_left(
    finished: TrainingRun, tmp_path: Path
) -> None:
    nets = {"mine": str(finished.folder / "light" / NET)}
    stage = {**ASSEMBLED, "nets": {"original": "teacher", "light": "mine"}}
    document = {**write_recipe().to_document(), "nets": nets, "stages": [stage]}
    run = make_run(tmp_path / "run", Recipe.model_validate(document))
    run_stages(run)
    assert Lineage.load(run.folder / NET).origins == Lineage.load(finished.folder / NET).origins
    (student,) = (make_student(each, open_nets(run, each)) for each in run.recipe.stages)
    first = make_student(finished.recipe.stages[1], open_nets(finished, finished.recipe.stages[1]))
    assert student.trained == first.trained
    for own, other in zip(student.unet.parameters(), first.unet.parameters(), strict=True):
        assert torch.equal(own, other)


def test_nets_that_no_run_left_are_refused(finished: TrainingRun, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    finished.pipe.unet.save_pretrained(plain)
    document = {
        **write_recipe().to_document(),
        "nets": {"mine": str(plain)},
        "stages": [{**LIGHT, "nets": {"original": "mine"}}],
    }
    with pytest.raises(LeansdError, match="holds no net that incubation left"):
        run_stages(make_run(tmp_path / "run", Recipe.model_validate(document)))
    with pytest.raises(ValueError, match="two stages or nets are called light"):
        Recipe.model_validate({**document, "nets": {"light": str(plain)}})


def test_a_dry_run_counts_what_a_stage_computes() -> None:
    from leansd.anatomy import count_macs
    from leansd.incubation.estimate import estimate

    parts = make_parts()
    decoupled = {**ASSEMBLED, "name": "apart", "mode": "decoupled"}
    cached = {**LIGHT, "name": "kept", "cached": 1}
    recipe = write_recipe(LIGHT, ASSEMBLED, decoupled, cached)
    seen = estimate(recipe, parts.unet, macs_per_second=1e9, device="cpu")
    whole, together, apart, kept = seen.stages
    assert whole.teacher_macs == count_macs(parts.unet).total
    assert apart.student_macs < together.student_macs < whole.teacher_macs
    assert apart.activations < together.activations
    assert apart.backward_macs < together.backward_macs < whole.backward_macs
    assert "decoupled" in str(seen)
    assert kept.disk > whole.disk
    assert whole.all_macs - kept.all_macs == 2 * 2 * whole.teacher_macs


# -- resuming ----------------------------------------------------------------------------------


def work_until_dead(folder: Path, recipe: Recipe, moves: int, looks: int) -> None:
    """Run until so many files are about to be moved, or so many steps are taken."""
    left = [looks]

    def look(step: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            die()

    die_before_moving(moves)
    training_run.make_validation = lambda *_: ValidationHook(1, look)  # this process is to die
    run_stages(make_run(folder, recipe))


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    finished: TrainingRun, tmp_path: Path
) -> None:
    for moves, looks in ((1, 0), (0, 3), (2, 0), (0, 2)):
        run_until_dead(work_until_dead, tmp_path, finished.recipe, moves, looks)
        assert not (tmp_path / NET).exists()
    run_stages(make_run(tmp_path))
    assert read_net(tmp_path) == read_net(finished.folder)
    for stage in ("light", "assembled"):
        assert read_curves(tmp_path / stage) == read_curves(finished.folder / stage)


def test_the_teacher_is_asked_once_where_its_tensors_are_kept(
    tmp_path: Path, monkeypatch: Any
) -> None:
    asked: list[Tensor] = []
    ask = TeacherUNet.__call__

    def count(self: TeacherUNet, noised: Tensor, *rest: Any) -> Any:
        asked.append(noised)
        return ask(self, noised, *rest)

    recipe = write_recipe({**LIGHT, "steps": 5, "cached": 2})
    monkeypatch.setattr(TeacherUNet, "__call__", count)
    run_stages(make_run(tmp_path / "whole", recipe))
    assert len(asked) == 2
    assert not (tmp_path / "whole/light/teacher").exists()
    killed = tmp_path / "killed"
    for looks in (1, 4):  # before and after the teacher is needed no more
        run_until_dead(work_until_dead, killed, recipe, 0, looks)
    run_stages(make_run(killed, recipe))
    assert read_net(killed) == read_net(tmp_path / "whole")


def test_only_as_many_checkpoints_stay_as_are_asked_for(finished: TrainingRun) -> None:
    names = [path.name for path in sorted((finished.folder / "light/checkpoints").iterdir())]
    assert names == ["step-00000002", "step-00000003"]


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe()
    claim_folder(tmp_path / "run", recipe, resume=False)
    claim_folder(tmp_path / "run", recipe, resume=True)
    with pytest.raises(LeansdError, match="--resume"):
        claim_folder(tmp_path / "run", recipe, resume=False)
    with pytest.raises(LeansdError, match="another recipe"):
        claim_folder(tmp_path / "run", write_recipe(LIGHT), resume=True)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    run = make_run(tmp_path, write_recipe(LIGHT, checkpoint_every=1))
    save, saved = Accelerator.save_state, []

    def fill_up(self: Accelerator, folder: str) -> None:
        if saved:
            raise OSError(28, "No space left on device")
        saved.append(folder)
        save(self, folder)

    monkeypatch.setattr(Accelerator, "save_state", fill_up)
    with pytest.raises(LeansdError, match=r"No space left.*step-00000001 is whole"):
        run_stages(run)
    assert (tmp_path / "light/checkpoints/step-00000001/position-0.json").exists()


# -- guards ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Broken:
    """Batches of which some are not numbers."""

    stream: Any
    bad: frozenset[int]
    count: int = 0

    def __next__(self) -> Batch:
        batch = next(self.stream)
        self.count += 1
        if self.count - 1 in self.bad:
            return dataclasses.replace(batch, latents=batch.latents * float("nan"))
        return batch


def test_a_step_that_is_no_number_is_skipped_and_its_batch_kept(tmp_path: Path) -> None:
    training = make_training(tmp_path, write_recipe(LIGHT))
    training.step = 1
    stream = Broken(make_source().open(batch=2, seed=0), frozenset({0}))
    before = [each.detach().clone() for each in training.student.unet.parameters()]
    training.take_step(stream)  # type: ignore[arg-type]
    assert all(
        torch.equal(a, b) for a, b in zip(before, training.student.unet.parameters(), strict=True)
    )
    assert (training.guard.skipped, training.guard.row) == (1, 1)
    assert len(list((tmp_path / "light/skipped").iterdir())) == 1
    training.take_step(stream)  # type: ignore[arg-type]
    assert (training.guard.skipped, training.guard.row) == (1, 0)
    training.release()


def test_a_run_that_goes_nowhere_is_stopped(tmp_path: Path) -> None:
    guard = NonfiniteGuard(tmp_path, most=2)
    guard.skip_step(7)
    with pytest.raises(LeansdError, match="2 steps in a row, up to 8"):
        guard.skip_step(8)


def test_what_no_loss_teaches_is_refused(tmp_path: Path) -> None:
    shallow = {**LIGHT, "mode": "decoupled", "train": ["dn0", "up0"], "losses": {"output": {}}}
    training = make_training(tmp_path, write_recipe(shallow))
    with pytest.raises(LeansdError, match=r"no loss teaches dn0\.l0\.res"):
        training.take_step(make_source().open(batch=2, seed=0))
    training.release()


def test_a_stage_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LeansdError, match="trains nothing"):
        make_training(tmp_path, write_recipe({"name": "same", "steps": 1}))


# -- blocks apart ------------------------------------------------------------------------------

ALL_LOSSES = {name: {} for name in ("denoising", "output", "features", "normalised-features")}
APART = {
    "name": "apart",
    "mode": "decoupled",
    "train": ["dn0", "up0"],
    "steps": 1,
    "losses": ALL_LOSSES,
}


def see(training: StageTrainer) -> Any:
    batch = next(make_source().open(batch=2, seed=0))
    return training.show_student(training.show_teacher(batch, training.draw(batch, 0)))


def test_blocks_apart_on_the_teachers_features_give_the_teachers(tmp_path: Path) -> None:
    training = make_training(tmp_path, write_recipe(APART))
    outcome = see(training)
    assert torch.equal(outcome.student, outcome.teacher)
    _, parts = sum_losses(training.losses, outcome, 0.0)
    assert [name for name, value in parts.items() if value != 0] == ["denoising"]
    training.release()


def test_blocks_apart_compute_nothing_else(tmp_path: Path) -> None:
    training = make_training(tmp_path, write_recipe(APART))
    with torch.no_grad():
        for parameter in training.student.unet.mid_block.parameters():
            parameter.fill_(float("nan"))
        for parameter in training.student.unet.down_blocks[0].parameters():
            parameter.mul_(1.5)
    outcome = see(training)
    # Neither the middle nor what `dn0` became reaches `up0`: it has the teacher's features.
    assert torch.equal(outcome.student, outcome.teacher)
    _, parts = sum_losses(training.losses, outcome, 0.0)
    assert parts["features"] > 0
    training.release()


@pytest.mark.parametrize("mode", ["end-to-end", "decoupled"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, mode: str) -> None:
    stage = {**LIGHT, "mode": mode, "train": ["dn0", "up0"]}
    gradients = []
    for checkpointing in (False, True):
        training = make_training(
            tmp_path, write_recipe(stage, gradient_checkpointing=checkpointing)
        )
        loss, _ = sum_losses(training.losses, see(training), 0.0)
        loss.backward()
        trained = [p for p in training.student.unet.parameters() if p.requires_grad]
        gradients.append([p.grad for p in trained])
        training.release()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_accumulated_steps_are_those_of_a_larger_batch(tmp_path: Path) -> None:
    nets = []
    for trainer in ({"batch": 4}, {"batch": 2, "accumulate": 2}):
        training = make_training(tmp_path, write_recipe({**LIGHT, "steps": 2}, **trainer))
        training.accelerator.gradient_accumulation_steps = trainer.get("accumulate", 1)
        stream = make_source().open(batch=trainer["batch"], seed=0)
        training.take_step(stream)
        nets.append([p.detach().clone() for p in training.student.unet.parameters()])
        training.release()
    for one, other in zip(*nets, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("mode", ["end-to-end", "decoupled"])
def test_losses_and_what_trains_are_float32_in_bf16(tmp_path: Path, mode: str) -> None:
    AcceleratorState._reset_state()
    losses = {**ALL_LOSSES, "mid": {}} if mode == "end-to-end" else ALL_LOSSES
    stage = {**LIGHT, "mode": mode, "train": ["dn0", "up0"], "losses": losses}
    training = make_training(tmp_path, write_recipe(stage, precision="bf16"))
    assert training.teacher.unet.dtype == torch.bfloat16
    _, parts = sum_losses(training.losses, see(training), 0.0)
    assert {part.dtype for part in parts.values()} == {torch.float32}
    before = [each.detach().clone() for each in training.student.unet.parameters()]
    training.take_step(make_source().open(batch=2, seed=0))
    after = list(training.student.unet.parameters())
    assert {each.dtype for each in after} == {torch.float32}
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert training.guard.skipped == 0
    training.release()
    AcceleratorState._reset_state()


def test_what_is_frozen_is_not_rounded_in_bf16(tmp_path: Path) -> None:
    AcceleratorState._reset_state()
    stage = {**LIGHT, "steps": 1, "train": ["dn0", "up0"]}
    run = make_run(tmp_path, write_recipe(stage, precision="bf16"))
    teacher = {name: each.clone() for name, each in run.pipe.unet.state_dict().items()}
    net = load_unet(run_stages(run), device="cpu", dtype=torch.float32).state_dict()
    frozen = [name for name in net if name.startswith("mid_block")]
    assert all(torch.equal(net[name], teacher[name]) for name in frozen)
    AcceleratorState._reset_state()


def test_any_topology_has_blocks_apart(any_unet: Any) -> None:
    teacher = copy.deepcopy(any_unet)
    last = f"up{len(teacher.up_blocks) - 1}"
    stage = write_recipe({**APART, "train": ["dn0", last]}).stages[0]
    student = make_student(stage, {"teacher": StageNet(teacher)})
    learner = StudentUNet(student, build_losses(stage, student, None, "cpu"), "decoupled")
    tutor = TeacherUNet(teacher, learner.needs)
    inputs = make_inputs(teacher, size=(LATENT, LATENT), batch=2)
    added = inputs.get("added_cond_kwargs", {})
    batch = Batch(inputs["sample"], inputs["encoder_hidden_states"], added)
    draw = NoiseDraw(torch.tensor([10, 900]), torch.randn_like(inputs["sample"]))
    schedule = DiffusionSchedule.read(tiny_scheduler())
    outcome = run_student(learner, run_teacher(tutor, batch, draw, schedule), schedule)
    assert torch.equal(outcome.student, outcome.teacher)
    blocks = {each.student.partition(".")[0] for each in student.list_pairs("decoupled")}
    assert blocks == {"dn0", last}
    tutor.release()
    learner.release()

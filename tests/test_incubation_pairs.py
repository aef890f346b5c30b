"""Pairs, with a prompt and without, and the loss that compares what guidance makes of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from leansd.errors import LeansdError
from leansd.incubation.data.batches import (
    Batch,
    Conditioning,
    PairedSource,
    RandomLatents,
    pair_up,
)
from leansd.incubation.estimate import estimate
from leansd.incubation.losses import LOSSES, build_loss
from leansd.incubation.noise import DiffusionSchedule
from leansd.incubation.recipe import Recipe, load_recipe
from leansd.incubation.step import TeacherBatch
from test_incubation import LIGHT, make_parts, make_training, write_recipe
from test_incubation_parts import make_outcome, make_setting
from tiny import WIDTH, tiny_scheduler


def make_source() -> PairedSource:
    torch.manual_seed(1)
    empty = Conditioning(torch.zeros(1, 5, WIDTH))
    return PairedSource(RandomLatents((4, 8, 8), Conditioning(torch.randn(3, 5, WIDTH)), empty))


def test_every_sample_comes_with_its_prompt_and_without() -> None:
    source = make_source()
    batch = next(source.open(batch=6, seed=0))
    plain = next(source.source.open(batch=3, seed=0))
    assert torch.equal(batch.latents[::2], plain.latents)
    assert torch.equal(batch.latents[1::2], plain.latents)
    assert torch.equal(batch.text[::2], plain.text)
    assert torch.equal(batch.text[1::2], torch.zeros_like(plain.text))
    assert batch.keys == ("0", "0", "1", "1", "2", "2")
    with pytest.raises(LeansdError, match="a batch of 3 is odd"):
        source.open(batch=3, seed=0)


def test_what_the_empty_prompt_does_not_say_is_the_pictures_own() -> None:
    added = {"text_embeds": torch.ones(2, 3), "time_ids": torch.arange(12.0).view(2, 6)}
    empty = Conditioning(torch.zeros(1, 5, 4), {"text_embeds": torch.zeros(1, 3)})
    batch = pair_up(Batch(torch.randn(2, 4, 8, 8), torch.ones(2, 5, 4), added), empty)
    assert batch.added["text_embeds"][:, 0].tolist() == [1, 0, 1, 0]
    assert torch.equal(batch.added["time_ids"][::2], batch.added["time_ids"][1::2])


def test_a_pair_has_the_same_noise_and_others_have_not(tmp_path: Path) -> None:
    training = make_training(tmp_path, write_recipe(LIGHT))
    stream = make_source().open(batch=4, seed=0)

    def show(step: int) -> TeacherBatch:
        training.step = step
        batch = next(stream)
        return training.show_teacher(batch, training.draw(batch, 0))

    first, second = show(0), show(1)
    for example in (first, second):
        assert torch.equal(example.noised[::2], example.noised[1::2])
        assert torch.equal(example.draw.timesteps[::2], example.draw.timesteps[1::2])
        # Strata are of pairs: one is from either half of the time steps.
        assert (example.draw.timesteps[::2] < 500).tolist() == [True, False]
    assert not torch.equal(first.draw.noise[:2], second.draw.noise[:2])
    training.release()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_guided_is_the_error_of_what_pipelines_step_with(prediction: str) -> None:
    schedule = DiffusionSchedule(DiffusionSchedule.read(tiny_scheduler()).alphas, prediction)
    signal, deviation = schedule._shares(torch.tensor([700]))
    clean, noise = torch.randn(2, 1, 4, 8, 8)
    off = torch.randn(2, 4, 8, 8)
    wanted = signal * noise - deviation * clean
    outputs = {"epsilon": noise, "v_prediction": wanted, "sample": clean}
    right = outputs[prediction].repeat(2, 1, 1, 1)
    outcome: dict[str, Any] = {
        "schedule": schedule,
        "timesteps": torch.tensor([700, 700]),
        "noised": (signal * clean + deviation * noise).repeat(2, 1, 1, 1),
        "teacher": right,
    }
    guided = build_loss("guided", {"scale": 3.0}, make_setting())
    velocity = schedule.predict_velocity(outcome["noised"], right, outcome["timesteps"])
    assert torch.allclose(velocity[:1], wanted, atol=1e-4)
    found = guided(make_outcome(student=right + off, **outcome))
    scale = {"epsilon": 1 / signal, "v_prediction": 1.0, "sample": 1 / deviation}[prediction]
    error = (scale * (3 * off[0] - 2 * off[1])).square().mean()
    assert torch.allclose(found, error, rtol=1e-3)
    # Errors that guidance takes away are none.
    cancelling = torch.cat([2 * off[:1], 3 * off[:1]])
    assert guided(make_outcome(student=right + cancelling, **outcome)) < 1e-6 * found


def test_guided_of_no_guidance_is_the_velocity_with_the_prompt() -> None:
    outcome = make_outcome(timesteps=torch.tensor([400, 400]))
    loss = build_loss("guided", {"scale": 1.0}, make_setting())
    one, other = (
        outcome.schedule.predict_velocity(outcome.noised, each, outcome.timesteps)[0]
        for each in (outcome.student, outcome.teacher)
    )
    assert torch.allclose(loss(outcome), F.mse_loss(one, other), rtol=1e-4)


def test_guided_without_pairs_is_refused_when_the_recipe_is_read() -> None:
    with pytest.raises(LeansdError, match=r"set data\.paired=true"):
        load_recipe("smoke.yaml", ["data.paired=false"])


def test_a_dry_run_counts_every_loss_and_pairs_by_the_sample() -> None:
    pytest.importorskip("torchvision")
    losses: dict[str, Any] = {name: {} for name in LOSSES} | {
        "vgg": {"options": {"weights": "random", "stages": [0, 1]}}
    }
    document = write_recipe(LIGHT).to_document()
    document["data"]["paired"] = True
    document["stages"][0]["losses"] = losses
    paired = Recipe.model_validate(document)
    (one,), (other,) = (
        estimate(each, make_parts().unet, macs_per_second=1e9, device="cpu").stages
        for each in (write_recipe(LIGHT), paired)
    )
    assert (other.teacher_macs, other.parameters) == (one.teacher_macs, one.parameters)
    # A VGG's work, forward and back, is all that the other losses add.
    assert other.student_macs > one.student_macs
    assert other.activations > one.activations

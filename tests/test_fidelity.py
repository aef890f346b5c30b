"""Fidelity and timing."""

import math

import pytest
import torch
from PIL import Image

from leansd.errors import LeansdError
from leansd.evaluation.fidelity import CEILING, as_batch, latent_error, psnr, ssim
from leansd.evaluation.timing import Timing, compare_timings, time_cases


@pytest.fixture
def batch():
    return torch.rand(3, 3, 24, 24, generator=torch.manual_seed(0))


def test_equal_pictures_are_at_the_ceiling(batch):
    assert psnr(batch, batch).tolist() == [CEILING] * 3
    assert ssim(batch, batch).tolist() == pytest.approx([1.0] * 3)


def test_psnr_is_a_number_a_picture_by_its_definition(batch):
    other = batch.clone()
    other[1] += 0.1
    scores = psnr(other, batch)
    assert scores.shape == (3,)
    assert scores[1].item() == pytest.approx(-10 * math.log10(0.01), abs=1e-3)
    assert scores[0] == CEILING


def test_ssim_falls_with_noise(batch):
    noise = torch.randn(batch.shape, generator=torch.manual_seed(1))
    near, far = ssim(batch + 0.02 * noise, batch), ssim(batch + 0.4 * noise, batch)
    assert near.shape == (3,)
    assert bool((near > far).all())
    assert ssim(batch[:1], batch[:1]).shape == (1,)


def test_pil_pictures_are_read_as_rgb():
    pictures = [Image.new("L", (16, 12), 128), Image.new("RGB", (16, 12), (255, 0, 0))]
    floats = as_batch(pictures)
    assert floats.shape == (2, 3, 12, 16)
    assert floats[1, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert psnr(pictures, pictures).tolist() == [CEILING] * 2


def test_what_cannot_be_compared_is_told(batch):
    with pytest.raises(LeansdError, match="cannot be compared"):
        psnr(batch, batch[:2])
    with pytest.raises(LeansdError, match="a batch is"):
        psnr(batch[0], batch[0])
    with pytest.raises(LeansdError, match="several sizes"):
        as_batch([Image.new("RGB", (8, 8)), Image.new("RGB", (16, 8))])
    with pytest.raises(LeansdError, match="at least one"):
        as_batch([])
    with pytest.raises(LeansdError, match="11 x 11"):
        ssim(batch[..., :8, :8], batch[..., :8, :8])


def test_latent_error_is_relative(batch):
    assert latent_error(batch, batch).tolist() == [0.0] * 3
    assert latent_error(2 * batch, batch).tolist() == pytest.approx([1.0] * 3)
    with pytest.raises(LeansdError, match="latents of shape"):
        latent_error(batch, batch[:1])


def test_cases_take_turns():
    order = []
    cases = {name: lambda turn, name=name: order.append((name, turn)) for name in "abc"}
    timings = time_cases(cases, rounds=2, warmup=1)
    assert order[:3] == [("a", 0), ("b", 0), ("c", 0)]
    assert order[3:] == [("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("a", 1)]
    assert all(len(timing.seconds) == 2 for timing in timings.values())
    assert list(timings) == ["a", "b", "c"]


def test_a_speed_up_is_the_median_of_paired_ratios():
    ratio = compare_timings(Timing((2.0, 4.0, 9.0)), Timing((1.0, 2.0, 3.0)))
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 3.0)
    assert str(ratio) == "2.00x (2.00-3.00)"
    assert Timing((2.0, 3.0, 4.0)).median == 3.0


def test_timing_needs_rounds_cases_and_pairs():
    with pytest.raises(LeansdError, match="rounds"):
        time_cases({"a": print}, rounds=0)
    with pytest.raises(LeansdError, match="at least one case"):
        time_cases({}, rounds=1)
    with pytest.raises(LeansdError, match="cannot be paired"):
        compare_timings(Timing((1.0,)), Timing((1.0, 2.0)))

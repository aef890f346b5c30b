"""The player of whole-step plans: the bits of the runtime for diffusers, and what may happen."""

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import leansd
from leansd.core import (
    CallSchedule,
    Player,
    lay_out_calls,
    lay_out_levels,
    list_log_snr,
    place_calls,
    probe_calls,
)
from leansd.core.schedule import assign_rows
from leansd.errors import LeansdError
from leansd.plans import Plan
from leansd.runtime.clock import LoopClock, read_schedule
from loops import sample
from test_imports import list_packages
from tiny import tiny_scheduler, tiny_unet

STEPS = 8
KEYS = (0, 1, 2, 4, 7)
WEIGHTS = {4: (0.3, 0.1), 7: (-0.2, 0.25)}
LINE = Plan.between(KEYS, cut="head", steps=STEPS, how="forecast").correct(WEIGHTS)
HOWS = ("reuse", "residual", "forecast", "forecast2", "chebyshev", "chebyshev-line")
SIGMAS = [14.6, 8.1, 5.0, 3.3, 2.1, 1.3, 0.7, 0.2, 0.0]


class Played:
    """A UNet of which a player answers, as a sampler sees it."""

    def __init__(self, unet: Any, player: Player) -> None:
        self.unet, self.player, self.config, self.calls = unet, player, unet.config, 0

    def __call__(self, latents: torch.Tensor, t: Any, **inputs: Any) -> Any:
        index, self.calls = self.calls, self.calls + 1
        compute = lambda: self.unet(latents, t, **inputs)[0]  # noqa: E731
        return (self.player.play(index, latents, compute, keys=("a", "b")),)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)


@pytest.mark.parametrize("how", HOWS)
def test_a_player_gives_the_bits_of_the_runtime(how: str) -> None:
    plan = Plan.between(KEYS, cut="head", steps=STEPS, how=how).correct(WEIGHTS)
    unet, scheduler = tiny_unet(), tiny_scheduler()
    with leansd.inherit(unet, plan):
        expected = sample(unet, STEPS, scheduler=scheduler)
    player = Player(plan, lay_out_loop(scheduler))
    drawn = sample(Played(unet, player), STEPS)  # pyright: ignore[reportArgumentType]
    assert torch.equal(drawn, expected)
    assert player.stats.computed == set(KEYS)


def lay_out_loop(scheduler: Any) -> CallSchedule:
    """The run as a loop without a scheduler has it: log-SNR at whole time steps."""
    clock = LoopClock(STEPS)
    scheduler.set_timesteps(STEPS)
    position = [clock.locate(t) for t in scheduler.timesteps][-1]
    assert position is not None
    return position.schedule


# -- a denoiser that counts, and is not linear in its latents --------------------------------------


def start() -> torch.Tensor:
    return torch.cat(
        [torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    )


class Denoiser:
    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        self.calls.append(step)
        return torch.sin(latents * (1 + step / 7)) + step / 5


def play(
    player: Player,
    *,
    split: Callable[[int], Sequence[Sequence[str]]] = lambda _: [("a", "b")],
    steps: Sequence[int] = range(STEPS),
) -> tuple[torch.Tensor, list[int]]:
    """A run of two conditionings; how they are split to batches is the host's choice, by step."""
    denoiser = Denoiser()
    latents = dict(zip("ab", start().chunk(2), strict=True))
    for step in steps:
        for keys in split(step):
            given = torch.cat([latents[key] for key in keys])
            output = player.play(
                step, given, lambda given=given, step=step: denoiser(given, step), keys
            )
            for key, rows in zip(keys, output.chunk(len(keys)), strict=True):
                latents[key] = latents[key] - 0.1 * rows
    return torch.cat([latents["a"], latents["b"]]), denoiser.calls


def make(plan: Plan = LINE) -> Player:
    return Player(plan, lay_out_calls(SIGMAS))


def test_a_full_plan_changes_no_bit() -> None:
    drawn, calls = play(make(Plan.full(STEPS)))
    denoiser, latents = Denoiser(), start()
    for step in range(STEPS):
        latents = latents - 0.1 * denoiser(latents, step)
    assert torch.equal(drawn, latents)
    assert calls == list(range(STEPS))


@pytest.mark.parametrize(
    "split",
    [
        lambda _: [("a",), ("b",)],
        lambda _: [("b", "a")],
        lambda step: [("a", "b")] if step % 2 else [("b",), ("a",)],
    ],
    ids=["apart", "turned", "as memory allows"],
)
def test_however_conditionings_are_split_the_pictures_are_the_same(split: Any) -> None:
    expected, _ = play(make())
    drawn, _ = play(make(), split=split)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 4, 3, 3, dtype=torch.double),
        torch.zeros(4, 4, 3, 3),
        torch.zeros(2, 4, 3, 5),
        torch.zeros(2, 4, 3, 3, requires_grad=True),
    ],
    ids=["precision", "batch", "size", "gradients"],
)
def test_what_changes_midway_is_computed(other: torch.Tensor) -> None:
    player = make()
    for step in range(STEPS):
        given = other if step == 5 else torch.zeros(2, 4, 3, 3)
        output = player.play(step, given, given.clone, ("a", "b"))
        assert output.shape == given.shape
        assert output.dtype == given.dtype
    assert player.stats.computed == {0, 1, 2, 4, 5, 6, 7}
    assert sum(player.stats.forced.values()) > 0


@pytest.mark.parametrize(
    ("split", "steps", "computed"),
    [
        # A conditioning that was not there before makes its batch a computed one.
        (lambda step: [("a",)] if step < 3 else [("a", "b")], range(8), {0, 1, 2, 3, 4, 7}),
        # Tiles: nobody knows which is which.
        (lambda _: [("a",), ("a",)], range(8), set(range(8))),
        (lambda _: [("a", "a")], range(8), set(range(8))),
        (lambda _: [("a", "b")], (0, 1, 2, 5, 6, 7), {0, 1, 2, 5, 7}),
        (lambda _: [("a", "b")], (3, 4, 5, 6, 7), {3, 4, 7}),
        (lambda _: [("a", "b")], (0, 1, 2, 3, 4, 5, 5, 6, 7), {0, 1, 2, 4, 5, 6, 7}),
    ],
    ids=["one more", "twice", "twice in a batch", "steps left out", "late start", "tried again"],
)
def test_what_is_unknown_is_computed(split: Any, steps: Any, computed: set[int]) -> None:
    player = make()
    play(player, split=split, steps=steps)
    assert player.stats.computed == computed


def test_a_call_that_fails_is_forgotten() -> None:
    player = make()
    play(player, steps=range(3))

    def fail() -> torch.Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        play_one(player, 4, fail)
    done: list[int] = []
    play_one(player, 4, lambda: done.append(4) or torch.zeros(2, 4, 3, 3))
    assert done == [4]


def play_one(player: Player, step: int, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    return player.play(step, torch.zeros(2, 4, 3, 3), compute, keys=("a",))


def test_kept_outputs_are_nobody_elses() -> None:
    """What the sampler or the denoiser writes in place reaches no later step."""
    expected, _ = play(make())
    player, denoiser, latents = make(), Denoiser(), start()
    for step in range(STEPS):
        output = player.play(step, latents, lambda: denoiser(latents, step), ("a", "b"))  # noqa: B023
        latents = latents - 0.1 * output
        output.fill_(torch.nan)
    assert torch.equal(latents, expected)


def test_nothing_is_kept_after_a_run() -> None:
    player = make()
    play(player)
    assert player.stats.bytes_kept == 2 * 2 * (2 * 4 * 3 * 3 * 4)
    player.clear()
    assert not player._tracks


def test_threads_play_with_identities_of_their_own() -> None:
    expected, _ = play(make())
    player = make()
    latents = dict(zip("ab", start().chunk(2), strict=True))
    barrier, failures = threading.Barrier(2), list[BaseException]()

    def run(key: str) -> None:
        try:
            for step in range(STEPS):
                barrier.wait(10)
                given = latents[key]
                output = player.play(step, given, lambda: Denoiser()(given, step), (key,))  # noqa: B023
                latents[key] = given - 0.1 * output
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(key,)) for key in "ab"]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failures
    assert torch.equal(torch.cat([latents["a"], latents["b"]]), expected)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (LINE.fit(9), "is for 9 steps, this run has 8"),
        (Plan.every(2, cut="up1", steps=STEPS), "inherits inside the UNet"),
        (LINE.guard("sample", threshold=0.1), "decides as it runs"),
        (LINE.switch("light", at=3), "runs other nets"),
        (LINE.attend("*.attn", by="gri", at=3), "gates self-attentions"),
    ],
)
def test_what_cannot_be_played_is_computed_in_full(plan: Plan, why: str) -> None:
    player = make(plan)
    _, calls = play(player)
    assert why in player.reason
    assert calls == list(range(STEPS))


def test_samplers_of_several_calls_a_step() -> None:
    """Both calls of a step follow its row, and log-SNR is each call's own."""
    sigmas = [4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0]
    rows = assign_rows(7, 4, order=2)
    plan = Plan.between([0, 1, 3], cut="head", steps=4, how="forecast")
    player = Player(plan, lay_out_calls(sigmas, rows=rows, steps=4))
    outputs = [
        play_one(player, call, lambda call=call: torch.full((2, 4, 3, 3), -sigmas[call]))
        for call in range(7)
    ]
    assert player.stats.computed == {0, 1, 2, 3, 6}
    over = [-s for s in list_log_snr(sigmas)]
    slope = (-2 - -3) / (over[3] - over[2])
    assert outputs[5].flatten()[0].item() == pytest.approx(-2 + slope * (over[5] - over[3]), 1e-5)
    assert assign_rows(10, 4, order=3) == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3)


# -- samplers as k-diffusion has them: what they call, found by running them ---------------------


def euler(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    for now, then in itertools.pairwise(sigmas):
        x = x + (x - denoise(x, now * x.new_ones(len(x)), seed=0)) / now * (then - now)
    return x


def heun(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    for now, then in itertools.pairwise(sigmas):
        slope = (x - denoise(x, now.view(1))) / now
        if then > 0:
            ahead = x + slope * (then - now)
            slope = (slope + (ahead - denoise(ahead, then.view(1))) / then) / 2
        x = x + slope * (then - now)
    return x


def thirds(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    for now, then in itertools.pairwise(sigmas):
        for share in (0, 1 / 3, 2 / 3) if then > 0 else (0,):
            x = x + 0.1 * denoise(x, (now + share * (then - now)).view(1)) + torch.randn(1)
    return x


def adaptive(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    sigma = sigmas[0]
    while sigma > 0.1:
        change = denoise(x, sigma.view(1)).abs().mean()
        sigma, x = sigma / (1.5 + change), x * 0.9
    return x


def backwards(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    for sigma in sigmas[:-1].flip(0):
        x = denoise(x, sigma.view(1))
    return x


@pytest.mark.parametrize(
    ("sampler", "rows"),
    [
        (euler, (0, 1, 2, 3)),
        (heun, (0, 0, 1, 1, 2, 2, 3)),
        (thirds, (0, 0, 0, 1, 1, 1, 2, 2, 2, 3)),
        (adaptive, None),
        (backwards, None),
    ],
)
def test_the_calls_of_a_sampler_are_found_by_running_it(sampler: Any, rows: Any) -> None:
    sigmas = [8.0, 4.0, 2.0, 1.0, 0.0]
    before = torch.get_rng_state()
    calls = probe_calls(sampler, sigmas)
    assert torch.equal(torch.get_rng_state(), before)
    assert bool(calls) == (sampler is not adaptive)
    schedule = place_calls(calls, sigmas)
    assert (schedule and schedule.rows) == rows
    if sampler is heun:
        assert calls == (8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0)
        # Part of a longer run that goes on afterwards: every step has two calls.
        part = probe_calls(heun, sigmas[:-1])
        later = place_calls(part, sigmas[:-1], first=2, steps=7)
        assert later is not None
        assert (later.rows, later.steps) == ((2, 2, 3, 3, 4, 4), 7)


def test_log_snr_of_sigmas() -> None:
    scheduler = tiny_scheduler()
    scheduler.set_timesteps(STEPS)
    alphas = scheduler.alphas_cumprod[scheduler.timesteps]
    sigmas = ((1 - alphas) / alphas).sqrt().tolist()
    expected = read_schedule(scheduler).log_snr
    assert list_log_snr(sigmas) == pytest.approx(list(expected), rel=1e-4)
    flow = [sigma / (1 + sigma) for sigma in sigmas]
    assert list_log_snr(flow, "flow") == pytest.approx(list(expected), rel=1e-4)
    with pytest.raises(LeansdError, match="no call"):
        lay_out_calls([])


def test_levels_lay_out_what_their_sigmas_do() -> None:
    drawn, calls = play(Player(LINE, lay_out_levels(list_log_snr(SIGMAS[:-1]))))
    expected, same = play(make())
    assert torch.equal(drawn, expected)
    assert calls == same
    with pytest.raises(LeansdError, match="no call"):
        lay_out_levels([])


PLAYED = """
import torch
from leansd.core import Player, lay_out_calls, list_log_snr
from leansd.plans.anatomy import WHOLE
from leansd.plans.resolve import PlanContext, resolve_plan
sigmas = [14.0 * 0.7**step for step in range(20)]
context = PlanContext(20, "euler", anatomy=WHOLE, log_snr=list_log_snr(sigmas))
player = Player(resolve_plan("balanced", context).plan, lay_out_calls(sigmas))
x = torch.ones(2, 4, 2, 2)
for step in range(20):
    x = x - 0.1 * player.play(step, x, lambda: torch.sin(x), ("cond", "uncond"))
assert len(player.stats.computed) < len(player.stats.calls) == 20
"""


def test_the_core_plays_a_preset_without_any_pipeline() -> None:
    packages = list_packages(PLAYED)
    assert "torch" in packages
    assert not packages & {"diffusers", "transformers", "accelerate", "safetensors", "comfy"}

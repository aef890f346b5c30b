"""The rivals' schedules as plans, each against the rival itself or an independent reference."""

import itertools
from typing import Any

import pytest
import torch
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.models.attention_processor import AttnProcessor2_0

import leansd
from leansd.errors import LeansdError
from leansd.plans import Plan
from leansd.plans.presets.published import list_complex_power_steps
from test_inheritance import UNETS, Loop
from tiny import tiny_unet

STEPS = 8


def test_deepcache_exact_is_the_published_list() -> None:
    """50 steps, 1:5, centre 15, power 1.4: an artefact of complex numbers, kept as it is."""
    published = (0, 5, 9, 13, 17, 21, 26, 31, 37, 43)
    assert list_complex_power_steps(50, 10, 15, 1.4) == published
    assert leansd.preset("deepcache-exact", steps=50).keys == published
    signed = leansd.preset("deepcache-power", steps=50, centre=15).keys
    assert signed != published
    assert len(signed) == len(published)
    gaps = [after - before for before, after in itertools.pairwise(signed)]
    assert min(gaps) == gaps[signed.index(min(signed, key=lambda key: abs(key - 15)))]


@pytest.mark.parametrize("kind", UNETS)
def test_encoder_propagation_equals_overwritten_blocks(kind: str) -> None:
    """At the other steps, whatever the encoder and the mid block give is overwritten."""
    loop = Loop(UNETS[kind]())
    keys = (0, 1, 4)
    step = 0
    kept: dict[torch.nn.Module, Any] = {}

    def on_step(index: int) -> None:
        nonlocal step
        step = index

    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        if step in keys:
            kept[module] = output
        return kept[module]

    unet = loop.unet
    modules = [unet.conv_in, *unet.down_blocks, unet.mid_block]
    handles = [module.register_forward_hook(hook) for module in modules]
    expected = loop(STEPS, on_step=on_step)
    for handle in handles:
        handle.remove()
    plan = leansd.preset("encoder", steps=STEPS, keys=keys)
    with leansd.inherit(loop, plan):
        assert torch.equal(loop(STEPS), expected)


def test_encoder_key_steps_fit_any_count() -> None:
    assert leansd.preset("encoder", steps=50).keys == (0, 1, 2, 3, 5, 10, 15, 25, 35, 40)
    assert leansd.preset("encoder", steps=25).keys == (0, 1, 2, 5, 8, 12, 18, 20)


@pytest.mark.parametrize("kind", UNETS)
def test_cross_attention_gate_equals_a_remembering_processor(kind: str) -> None:
    loop = Loop(UNETS[kind]())
    gate, step = 3, 0

    class Remember(AttnProcessor2_0):
        """Runs until the gate; from then on gives what it gave last."""

        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if step < gate:
                self.output = super().__call__(*args, **kwargs)
            return self.output

    def on_step(index: int) -> None:
        nonlocal step
        step = index

    unet, before = loop.unet, dict(loop.unet.attn_processors)
    unet.set_attn_processor(
        {name: Remember() if "attn2" in name else old for name, old in before.items()}
    )
    expected = loop(STEPS, on_step=on_step)
    unet.set_attn_processor(dict(before))
    plan = leansd.preset("tgate", gate=gate, drop_guidance=False, steps=STEPS)
    with leansd.inherit(loop, plan):
        assert torch.equal(loop(STEPS), expected)
    assert not torch.equal(loop(STEPS), expected)


def test_gate_and_guidance_are_separate_axes() -> None:
    both = leansd.preset("tgate", gate=3, steps=6)
    gate = leansd.preset("tgate", gate=3, steps=6, drop_guidance=False)
    assert [row.guidance for row in both.rows] == ["compute"] * 3 + ["drop"] * 3
    assert {row.guidance for row in gate.rows} == {"compute"}
    assert [dict(row.inherit) for row in both.rows] == [dict(row.inherit) for row in gate.rows]
    with pytest.raises(LeansdError, match="gate must be at step 1 or later"):
        leansd.preset("tgate", gate=0)


@pytest.mark.parametrize(("spatial", "cross"), [(2, 3), (3, 2), (4, 4)])
@pytest.mark.parametrize("kind", UNETS)
def test_attention_broadcast_equals_diffusers_hook(kind: str, spatial: int, cross: int) -> None:
    unet = UNETS[kind]()
    hooked, loop = Loop(UNETS[kind]()), Loop(unet)
    hooked.scheduler.set_timesteps(STEPS)
    moments = [int(t) for t in hooked.scheduler.timesteps]
    start, stop = 2, 6  # the hook's window is open at both ends
    window = (moments[stop], moments[start - 1])
    now = moments[0]

    def on_step(index: int) -> None:
        nonlocal now
        now = moments[index]

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=spatial,
        cross_attention_block_skip_range=cross,
        spatial_attention_timestep_skip_range=window,
        cross_attention_timestep_skip_range=window,
        spatial_attention_block_identifiers=("attn1",),
        cross_attention_block_identifiers=("attn2",),
        current_timestep_callback=lambda: now,
    )
    apply_pyramid_attention_broadcast(hooked.unet, config)
    expected = hooked(STEPS, on_step=on_step)
    plan = leansd.preset("pab", spatial=spatial, cross=cross, start=start, stop=stop, steps=STEPS)
    with leansd.inherit(loop, plan):
        assert torch.equal(loop(STEPS), expected)
    assert not torch.equal(loop(STEPS), expected)


def test_whole_steps_can_be_reused() -> None:
    """The head inherits: nothing else runs, the output is that of the last computed step."""
    loop = Loop(tiny_unet())
    noises: list[torch.Tensor] = []
    handle = loop.unet.register_forward_hook(
        lambda module, args, output: noises.append(output[0].clone())
    )
    with leansd.inherit(loop, Plan.every(2, cut="head", steps=4)) as run:
        loop(4)
    handle.remove()
    assert torch.equal(noises[1], noises[0])
    assert torch.equal(noises[3], noises[2])
    assert not torch.equal(noises[2], noises[0])
    report = run.report()
    assert (report.full_calls, report.inherited, report.idle) == (2, 2, 2 * 45)


def test_parts_count_in_the_prediction() -> None:
    loop = Loop(tiny_unet())
    with leansd.inherit(loop, Plan.full(2).inherit("*.sa", "*.ca", "*.ff", at=1)) as run:
        loop(2)
    assert 1.0 < run.report().predicted_speedup < 2.0

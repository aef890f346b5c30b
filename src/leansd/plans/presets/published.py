"""What other projects do, as plans: schedules of published methods, to use and to compare with.

Facts about each (what it skips, when) are public; nothing here is taken from their code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from leansd.errors import LeansdError
from leansd.plans import keysteps
from leansd.plans.anatomy import HEAD
from leansd.plans.plan import Plan
from leansd.plans.row import OWN, SAMPLE, How


def build_deepcache(*, steps: int, blocks: int, interval: int = 3, branch: int = 0) -> Plan:
    """DeepCache (arXiv 2312.00858), as its published helper does it."""
    return Plan.every(interval, cut=_find_branch(branch, blocks), steps=steps)


def build_deepcache_power(
    *,
    steps: int,
    blocks: int,
    interval: int = 5,
    branch: int = 0,
    centre: float | None = None,
    power: float = 1.4,
) -> Plan:
    """Key steps dense around a centre: what DeepCache's paper describes."""
    keysteps.check_interval(interval)
    keys = max(1, round(steps / interval))
    centre = 0.3 * steps if centre is None else centre
    chosen = keysteps.centred_power(steps, keys, centre, power)
    return Plan.between(chosen, cut=_find_branch(branch, blocks), steps=steps)


def build_deepcache_exact(
    *,
    steps: int,
    blocks: int,
    interval: int = 5,
    branch: int = 0,
    centre: int = 15,
    power: float = 1.4,
) -> Plan:
    """The same with the published arithmetic: a negative base to a fractional power is complex, and
    only its real part is used."""
    keysteps.check_interval(interval)
    keysteps.check_power(power)
    keys = list_complex_power_steps(steps, max(1, -(-steps // interval)), centre, power)
    return Plan.between(keys, cut=_find_branch(branch, blocks), steps=steps)


def build_encoder(*, steps: int, blocks: int, keys: Sequence[int] | None = None) -> Plan:
    """Faster-Diffusion (arXiv 2312.09608): between key steps the encoder and the mid block inherit.

    Its key steps for 50 steps, dense early and late, are scaled to any step count.
    """
    if keys is None:
        keys = [min(steps - 1, round(key * steps / 50)) for key in ENCODER_KEYS]
    chosen = keysteps.explicit(steps, keys)
    others = [step for step in range(steps) if step not in chosen]
    return Plan.full(steps).inherit("stem", "dn*", "mid", at=others)


def build_tgate(
    *, steps: int, blocks: int, gate: int | None = None, drop_guidance: bool = True
) -> Plan:
    """T-GATE (arXiv 2404.02747) with its two savings as separate axes.

    At the gate its package averages the cross-attention of both guidance halves; here the
    conditional half keeps its own.
    """
    gate = max(1, round(0.4 * steps)) if gate is None else gate
    if gate < 1:
        raise LeansdError(f"the gate must be at step 1 or later, not {gate}")
    gated = range(min(gate, steps), steps)
    plan = Plan.full(steps).inherit("*.ca", at=gated)
    return plan.guide("drop", at=gated) if drop_guidance else plan


def build_pab(
    *,
    steps: int,
    blocks: int,
    spatial: int = 2,
    cross: int = 3,
    start: int | None = None,
    stop: int | None = None,
) -> Plan:
    """Pyramid Attention Broadcast (arXiv 2408.12588) as diffusers does it.

    Inside a window of steps, self-attention is computed at every `spatial`-th step of the run and
    cross-attention at every `cross`-th.
    """
    start = max(1, round(0.15 * steps)) if start is None else start
    stop = round(0.9 * steps) if stop is None else stop
    window = range(max(1, start), min(stop, steps))
    plan = Plan.full(steps)
    for part, interval in (("*.sa", spatial), ("*.ca", cross)):
        computed = keysteps.uniform(steps, interval)
        plan = plan.inherit(part, at=[step for step in window if step not in computed])
    return plan


def build_guidance_cutoff(*, steps: int, blocks: int, share: float = 0.4) -> Plan:
    """What `SDCFGCutoffCallback` of diffusers does: the plain rival of T-GATE."""
    gate = max(1, _count(1 - share, steps))
    return Plan.full(steps).guide("drop", at=range(min(gate, steps), steps))


def build_spectrum(
    *,
    steps: int,
    blocks: int,
    window: float = 2,
    growth: float = 0.75,
    warm_up: int = 5,
    how: How = "chebyshev",
) -> Plan:
    """Spectrum (arXiv 2603.01623): what the last up block gives is forecast, the head computed.

    Of a denoiser that is known as a whole only, which has no blocks, the output is forecast.
    After a warm-up one step in `window` is computed, and the window grows with each of them. The
    defaults are the paper's for few computed steps, its warm-up that of its published code, whose
    later recommendation is `how="chebyshev-line"`.
    """
    if not (1 <= window < math.inf and 0 <= growth < math.inf and warm_up >= 1):
        raise LeansdError(
            f"window {window:g}, growth {growth:g}, warm-up {warm_up}: give a window and a warm-up "
            "of 1 or more and a growth of 0 or more"
        )
    keys = list(range(min(warm_up, steps)))
    step = len(keys) - 1 + int(window)
    while step < steps:
        keys.append(step)
        window += growth
        step += int(window)
    return Plan.between(keys, cut=f"up{blocks - 1}" if blocks else HEAD, steps=steps, how=how)


def build_easycache(
    *, steps: int, blocks: int, threshold: float = 0.05, warm_up: int | None = None
) -> Plan:
    """EasyCache (arXiv 2507.02860): whole steps add what the last computed one added to its input.

    The first tenth of the run and its last step are computed; between them each picture is as soon
    as the change predicted from its latents, added up, reaches the threshold. That the UNet is
    given more than latents (inpainting) does not matter: its output is a change of the latents.
    """
    warm_up = max(2, round(0.1 * steps)) if warm_up is None else warm_up
    if warm_up < 1:
        raise LeansdError(f"the warm-up must be 1 step or longer, not {warm_up}")
    plan = Plan.full(steps).inherit("head", at=range(warm_up, steps - 1), how="residual")
    return plan.guard(SAMPLE, threshold=threshold, measure="predicted")


def list_complex_power_steps(steps: int, keys: int, centre: int, power: float) -> keysteps.KeySteps:
    """Key steps around a centre by complex arithmetic, the power lowered until their count fits."""
    while power > 1:
        first = complex(-centre) ** (1 / power)
        last = complex(steps - centre) ** (1 / power)
        values = [first + (last - first) * index / keys for index in range(keys + 1)]
        offsets = sorted({int((value**power).real) for value in values})
        chosen = (0, *(centre + offset for offset in offsets[1:-1]))
        if len(chosen) == keys:
            return keysteps.explicit(steps, chosen)
        power -= 0.02
    raise LeansdError(f"no power gives {keys} key steps of {steps} around step {centre}")


def _find_branch(branch: int, blocks: int) -> str:
    """The cut of a DeepCache branch: `b // 3` blocks down and `b % 3` layers into that block."""
    depth, layer = divmod(branch, 3)
    if not blocks:
        raise LeansdError(
            f"branch {branch} is for UNets: of this denoiser only whole steps, {HEAD}, are "
            "inherited"
        )
    if not 0 <= branch < 3 * blocks:
        last = 3 * blocks - 1
        raise LeansdError(f"branch {branch} does not exist: {blocks} blocks have 0 to {last}")
    if layer < 2:
        return f"up{blocks - 1 - depth}.l{1 - layer}"
    return f"up{blocks - 2 - depth}" if depth < blocks - 1 else "mid"


ENCODER_KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35, 40)
"""Of a run of 50 steps."""


# -- plans that switch nets ------------------------------------------------------------------------
# Presets that switch between UNets: give them as `nets` to `leansd.inherit`.
#
# A compressed UNet draws the beginning of a picture as well as the original, which is why A-SDM and
# T-Stitch (arXiv 2402.14167) let it; OMS-DPM (arXiv 2306.08860) searches who draws what.

LIGHT = "light"
"""What presets call the compressed UNet."""


def build_light_early(*, steps: int, blocks: int, share: float = 0.5, net: str = LIGHT) -> Plan:
    return build_stitch(steps=steps, blocks=blocks, nets=(net,), shares=(share,))


def build_light_late(*, steps: int, blocks: int, share: float = 0.5, net: str = LIGHT) -> Plan:
    return Plan.full(steps).switch(net, at=range(steps - _count(share, steps), steps))


def build_stitch(
    *, steps: int, blocks: int, nets: Sequence[str] = (LIGHT,), shares: Sequence[float] = (0.4,)
) -> Plan:
    """Each net for its share of the steps, one after the other; then the pipeline's own."""
    if len(nets) != len(shares):
        raise LeansdError(f"stitch: {len(nets)} nets and {len(shares)} shares; give one for each")
    if sum(shares) > 1:
        raise LeansdError(f"stitch: shares of {sum(shares):g} in all; they are parts of 1")
    plan, begin = Plan.full(steps), 0.0
    for net, share in zip(nets, shares, strict=True):
        places = range(_count(begin, steps), _count(begin + share, steps))
        plan, begin = plan.switch(net, at=places), begin + share
    return plan


def build_tstitch_exact(*, steps: int, blocks: int, share: float = 0.4, net: str = LIGHT) -> Plan:
    """Its comparison of step over steps with the share lets the step at the share in as well."""
    return Plan.full(steps).switch(net, at=[i for i in range(steps) if i / steps <= share])


def build_turns(*, steps: int, blocks: int, names: Sequence[str] = (LIGHT, OWN)) -> Plan:
    """Names of nets in their order; another number of them than of steps is stretched over them."""
    if not names:
        raise LeansdError("turns: give the names of nets, one for each step")
    plan = Plan.full(steps)
    for step in range(steps):
        plan = plan.switch(names[step * len(names) // steps], at=step)
    return plan


def _count(share: float, steps: int) -> int:
    """How many steps a share is."""
    if not 0 <= share <= 1:
        raise LeansdError(f"a share of {share:g} of the steps: it lies between 0 and 1")
    return round(share * steps)

"""Plans and compilation together, on a GPU: eager, compiled, and on CUDA graphs.

    python benchmarks/gpu.py [--steps 30] [--rounds 10] [--latent 64]

A random UNet of SD 1.5's size in half precision, guided (batch of two); time does not depend on
the weights. Every case is one whole denoising loop, all take turns in each round, so that speed-ups
over the eager full run are paired. Records go to `benchmarks/results/gpu.jsonl`, of which
`benchmarks/tables.py` makes the table. Without a GPU it measures nothing and exits with 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from diffusers import DDIMScheduler, UNet2DConditionModel

import leansd
from leansd.anatomy.builtin import BUILTIN
from leansd.anatomy.inputs import make_inputs
from leansd.evaluation.records import Record, stamp, write_records
from leansd.evaluation.timing import compare_timings, time_cases
from leansd.plans import Plan, preset

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
FULL = "full"
PLANS = ("quality", "balanced", "fast", "turbo")
EAGER = "eager"
MODES: Mapping[str, Any] = {
    EAGER: False,
    "compiled": True,
    "CUDA graphs": {"mode": "reduce-overhead"},
}


class Loop:
    """A denoising loop with a UNet and a scheduler, which is what `leansd.inherit` asks for."""

    def __init__(self, unet: UNet2DConditionModel, steps: int, inputs: Mapping[str, Any]) -> None:
        self.unet = unet
        self.scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
        self.steps = steps
        self._inputs = {name: value for name, value in inputs.items() if name != "timestep"}

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """The latents [B, C, H, W] after all steps."""
        inputs = dict(self._inputs)
        latents = inputs.pop("sample")
        self.scheduler.set_timesteps(self.steps, device=latents.device)
        for t in self.scheduler.timesteps:
            noise = self.unet(latents, t, **inputs, return_dict=False)[0]
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents


def measure(
    unet: UNet2DConditionModel,
    device: str,
    *,
    subject: str,
    plans: Mapping[str, Plan | None],
    modes: Mapping[str, Any],
    steps: int,
    rounds: int,
    latent: int,
    seed: int = 1000,
) -> list[Record]:
    """Seconds and paired speed-up of every plan in every mode; the first case is the base.

    Args:
        plans: by name; None is no plan, which is compiled by a full one.
        modes: by name, what `leansd.inherit` takes as `compile`.
        latent: side of the latents, an eighth of the picture's.
    """
    dtype = next(unet.parameters()).dtype
    inputs = make_inputs(
        unet,
        size=(latent, latent),
        batch=2,
        device=device,
        dtype=dtype,
        generator=torch.Generator(device).manual_seed(seed),
    )
    loop = Loop(unet, steps, inputs)
    cases: dict[tuple[str, str], Callable[[int], Any]] = {
        (plan, mode): partial(_draw, loop, plans[plan], modes[mode])
        for plan in plans
        for mode in modes
    }
    named = {f"{plan}, {mode}": case for (plan, mode), case in cases.items()}
    # The first round compiles, the second records CUDA graphs.
    timings = time_cases(named, rounds=rounds, warmup=3, device=device)
    base = next(iter(timings.values()))
    shared: dict[str, Any] = {
        **stamp(device),
        "subject": subject,
        "seed": seed,
        "steps": steps,
        "batch": 2,
        "dtype": str(dtype).removeprefix("torch."),
        "width": 8 * latent,
        "height": 8 * latent,
        "rounds": rounds,
    }
    records: list[Record] = []
    for (plan, mode), timing in zip(cases, timings.values(), strict=True):
        chosen = plans[plan]
        fields = {**shared, "plan": plan, "mode": mode}
        fields["fingerprint"] = chosen.fingerprint if chosen is not None else ""
        ratio = compare_timings(base, timing)
        records += [
            Record(metric="seconds", value=timing.median, unit="s", **fields),
            Record(
                metric="speedup",
                value=ratio.median,
                unit="x",
                low=ratio.low,
                high=ratio.high,
                **fields,
            ),
        ]
    return records


def _draw(loop: Loop, plan: Plan | None, compile: Any, turn: int) -> None:
    with _attach(loop, plan, compile):
        loop()


def _attach(loop: Loop, plan: Plan | None, compile: Any) -> AbstractContextManager[Any]:
    if plan is None and not compile:
        return nullcontext()
    return leansd.inherit(loop, plan or Plan.full(loop.steps), compile=compile)


def main(steps: int = 30, rounds: int = 10, latent: int = 64, seed: int = 1000) -> None:
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured, no records written", file=sys.stderr)
        raise typer.Exit(2)
    torch.manual_seed(seed)
    with torch.device("cuda"):
        unet = UNet2DConditionModel(**BUILTIN["sd15"]).half().eval()
    records = measure(
        unet,
        "cuda",
        subject="sd15, random weights",
        plans={FULL: None} | {name: preset(name, steps) for name in PLANS},
        modes=MODES,
        steps=steps,
        rounds=rounds,
        latent=latent,
        seed=seed,
    )
    write_records(RESULTS, records)


if __name__ == "__main__":
    typer.run(main)

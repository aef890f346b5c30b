"""leansd on a GPU in ten minutes: is it right, and how fast is it.

    make gpu                                         SD 1.5's and SDXL's size, random weights
    python benchmarks/gpu.py --model PATH            and a model of yours besides
    python benchmarks/gpu.py --dry-run               the same on the CPU with tiny nets: seconds

First what must hold is checked (a full plan gives the same bits, a plan what it gives on the CPU,
half precision what whole precision gives, graphs what eager calls give, and no step waits for the
GPU), then loops are timed in turns: eager, compiled and on CUDA graphs. Random weights are enough
for both: neither bits nor times depend on what the weights are. Records go to
`benchmarks/results/gpu.jsonl`, of which `benchmarks/tables.py` makes the table; send that file in.
It holds no path and no picture. Without a GPU nothing is measured and the exit code is 2; where a
check failed it is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, UNet2DConditionModel

import leansd
from leansd.anatomy.builtin import BUILTIN
from leansd.anatomy.inputs import make_inputs, pick_size
from leansd.core.devices import seed_generator
from leansd.evaluation.records import Record, stamp, write_records
from leansd.evaluation.timing import compare_timings, time_cases
from leansd.plans import Plan, preset

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
SEND = "send the file in: open an issue on the project's page and attach it, failed checks as well"
FULL = "full"
PLANS = ("quality", "balanced", "fast", "turbo")
EAGER = "eager"
MODES: Mapping[str, Any] = {
    EAGER: False,
    "compiled": True,
    "CUDA graphs": {"mode": "reduce-overhead"},
}
DRY_MODES: Mapping[str, Any] = {EAGER: False, "compiled": {"backend": "eager"}}
TINY: Mapping[str, Any] = {
    "sample_size": 8,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
"""What makes a built-in configuration small enough for the CPU, whatever its blocks are."""
STEPS = 6
"""Of the runs that are checked."""
CLOSE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""The most that latents may be off over a run for their precision alone, over their own size."""


def make_unet(
    name: str, device: str, dtype: torch.dtype, *, is_tiny: bool = False
) -> UNet2DConditionModel:
    """A built-in configuration with random weights; a tiny one has its topology alone."""
    config = dict(BUILTIN[name])
    if is_tiny:
        widths = (32, 32, 64, 64)[: len(config["block_out_channels"])]
        config |= TINY | {"block_out_channels": widths, "attention_head_dim": 4}
        if "transformer_layers_per_block" in config:
            added = 6 * config["addition_time_embed_dim"] + 32
            config |= {"transformer_layers_per_block": 1}
            config |= {"projection_class_embeddings_input_dim": added}
    torch.manual_seed(0)
    # A tiny one has the same weights on every device.
    with torch.device("cpu" if is_tiny else device):
        unet: Any = UNet2DConditionModel(**config)
    return unet.to(device, dtype).eval()


class Loop:
    """A denoising loop with a UNet and a scheduler, which is what `leansd.inherit` asks for."""

    def __init__(self, unet: UNet2DConditionModel, steps: int, inputs: Mapping[str, Any]) -> None:
        self.unet = unet
        self.scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
        self.steps = steps
        self._inputs = {name: value for name, value in inputs.items() if name != "timestep"}

    @torch.no_grad()
    def __call__(self, within: Callable[[int], AbstractContextManager[Any]] = nullcontext) -> Any:
        """The latents [B, C, H, W] after all steps, each taken in a context of its own."""
        inputs = dict(self._inputs)
        latents = inputs.pop("sample")
        self.scheduler.set_timesteps(self.steps, device=latents.device)
        for step, t in enumerate(self.scheduler.timesteps):
            with within(step):
                noise = self.unet(latents, t, **inputs, return_dict=False)[0]
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents


def make_loop(unet: UNet2DConditionModel, steps: int, latent: int | None, seed: int) -> Loop:
    """A guided picture's loop on inputs that are the same on every device."""
    device, dtype = unet.device, unet.dtype
    inputs: Any = make_inputs(
        unet,
        size=pick_size(unet, latent),
        batch=2,
        device="cpu",
        dtype=torch.float32,
        generator=seed_generator(seed),
    )
    moved = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda each: each.to(device, dtype if each.is_floating_point() else None),
        inputs,
    )  # fmt: skip
    return Loop(unet, steps, moved)


# -- is it right -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """Something that must hold."""

    what: str
    holds: bool
    found: str = ""

    def __str__(self) -> str:
        return f"{'holds ' if self.holds else 'FAILED'}  {self.what}  {self.found}".rstrip()


@dataclass
class Checks:
    """What was checked of one net; a check that raises has failed, and the others go on."""

    subject: str
    tell: Callable[[str], None] = print
    done: list[Check] = field(default_factory=list[Check])

    def add(self, what: str, check: Callable[[], tuple[bool, str]]) -> None:
        """Do a check, and tell what came of it."""
        try:
            holds, found = check()
        except Exception as error:
            holds, found = False, f"{type(error).__name__}: {str(error).splitlines()[0]}"
        self.done.append(Check(f"{self.subject}: {what}", holds, found))
        self.tell(str(self.done[-1]))


def list_plans(unet: UNet2DConditionModel, steps: int) -> dict[str, Plan]:
    """One of every kind: features, whole steps and guidance."""
    last = len(unet.config.up_block_types) - 1
    features = Plan.every(2, cut=f"up{last}.l1", steps=steps, name="features")
    whole = Plan.between([0, 1, 3], cut="head", steps=steps, how="forecast", name="whole steps")
    guided = Plan.full(steps, name="guidance").guide("inherit", at=[2, 3])
    return {each.name: each for each in (features, whole, guided)}


def check_net(
    checks: Checks,
    make: Callable[[str, torch.dtype], UNet2DConditionModel],
    device: str,
    modes: Mapping[str, Any],
    dtypes: Sequence[torch.dtype],
    *,
    latent: int | None = None,
) -> None:
    """All checks of one net, which `make` makes on a device in a precision.

    Args:
        modes: by name, what `leansd.inherit` takes as `compile`; tried in the last precision.
    """

    def run(
        unet: Any, plan: Plan | None, compile: Any = False, within: Any = nullcontext
    ) -> torch.Tensor:
        loop = make_loop(unet, STEPS, latent, seed=1)
        with _attach(loop, plan, compile):
            return loop(within).float().cpu()

    whole: dict[str, torch.Tensor] = {}
    own = make("cpu", torch.float32)
    plans = list_plans(own, STEPS)
    truth = {name: run(own, plan) for name, plan in plans.items()}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        unet = make(device, dtype)
        plain = run(unet, None)
        full = Plan.full(STEPS)
        checks.add(
            f"{name}: a full plan gives the same bits", partial(_same, plain, run, unet, full)
        )
        for kind, plan in plans.items():
            given = partial(run, unet, plan)
            checks.add(
                f"{name}: {kind} as on the CPU", partial(_near, truth[kind], given, CLOSE[dtype])
            )
            whole[kind] = run(unet, plan)
            checks.add(f"{name}: {kind} twice alike", partial(_same, whole[kind], run, unet, plan))
            quiet = partial(run, unet, plan, False, _forbid_waiting)
            checks.add(f"{name}: {kind} waits for nothing", partial(_same, whole[kind], quiet))
            for mode, options in modes.items():
                if options is not False and dtype is dtypes[-1]:
                    given = partial(run, unet, plan, options)
                    what = f"{name}: {kind}, {mode}, as eager"
                    checks.add(what, partial(_near, whole[kind], given, CLOSE[dtype]))
        checks.add(f"{name}: after leaving the same bits", partial(_same, plain, run, unet, None))
        del unet
        _free(device)


def check_bits(checks: Checks, unet: UNet2DConditionModel, latent: int | None) -> None:
    """The one check of a net that is too large for the CPU."""
    loop = make_loop(unet, 3, latent, seed=1)

    def run(plan: Plan | None) -> torch.Tensor:
        with _attach(loop, plan, False):
            return loop()

    checks.add("a full plan gives the same bits", lambda: _same(run(None), run, Plan.full(3)))
    checks.add("the latents are numbers", lambda: (bool(run(None).isfinite().all()), ""))


def _same(
    expected: torch.Tensor, run: Callable[..., torch.Tensor], *given: Any
) -> tuple[bool, str]:
    return torch.equal(run(*given), expected), ""


def _near(expected: torch.Tensor, run: Callable[[], torch.Tensor], most: float) -> tuple[bool, str]:
    off = float((run() - expected).norm() / expected.norm())
    return off < most, f"off by {off:.1e}, at most {most:.0e}"


@contextmanager
def _forbid_waiting(step: int) -> Iterator[None]:
    """PyTorch raises where a UNet call waits for the GPU; the first reads the schedule."""
    if not torch.cuda.is_available() or step == 0:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _free(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


# -- how fast is it ----------------------------------------------------------------------------


def measure(
    unet: UNet2DConditionModel,
    device: str,
    *,
    subject: str,
    plans: Mapping[str, Plan | None],
    modes: Mapping[str, Any],
    steps: int,
    rounds: int,
    latent: int | None = None,
    seed: int = 1000,
) -> list[Record]:
    """Seconds and paired speed-up of every plan in every mode; the first case is the base.

    Args:
        plans: by name; None is no plan, which is compiled by a full one.
        modes: by name, what `leansd.inherit` takes as `compile`.
        latent: side of the latents, an eighth of the picture's; the net's own by default.
    """
    dtype, (height, width) = unet.dtype, pick_size(unet, latent)
    loop = make_loop(unet, steps, latent, seed)
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
        "width": 8 * width,
        "height": 8 * height,
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


@dataclass(frozen=True)
class Subject:
    """A net that is checked and timed."""

    name: str
    make: Callable[[str, torch.dtype], UNet2DConditionModel]
    is_small: bool = False
    """Whether it is small: checked against the CPU, and timed in a dry run alone."""


def list_subjects(model: str | None, *, is_tiny: bool) -> list[Subject]:
    """Both topologies in small, for the checks, then what is timed."""

    def make(name: str, tiny: bool) -> Callable[[str, torch.dtype], UNet2DConditionModel]:
        return lambda device, dtype: make_unet(name, device, dtype, is_tiny=tiny)

    def load(device: str, dtype: torch.dtype) -> UNet2DConditionModel:
        pipe: Any = leansd.load(str(model), device=device, dtype=dtype)
        return pipe.unet

    sizes = ("sd15", "sdxl")
    subjects = [Subject(f"tiny {name}", make(name, True), is_small=True) for name in sizes]
    if not is_tiny:
        subjects += [Subject(f"{name}, random weights", make(name, False)) for name in sizes]
    return subjects + ([Subject(Path(model).name, load)] if model is not None else [])


def record_checks(checks: Sequence[Check], device: str) -> list[Record]:
    """A record a check: 1 where it holds."""
    return [
        Record(
            **stamp(device), subject=each.what.partition(": ")[0], plan="", metric="check",
            value=float(each.holds), unit="", check=each.what, found=each.found,
        )
        for each in checks
    ]  # fmt: skip


def main(
    model: Annotated[
        str | None, typer.Option(help="A folder, file or hub id to take along.")
    ] = None,
    steps: int = 30,
    rounds: int = 5,
    latent: Annotated[
        int | None, typer.Option(help="Side of the latents; each net's own by default.")
    ] = None,
    seed: int = 1000,
    out: Path = RESULTS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="On the CPU, with tiny nets.")] = False,
) -> None:
    """Check, measure, and say what to do with the records."""
    if not dry_run and not torch.cuda.is_available():
        print("no GPU here: nothing measured, no records written", file=sys.stderr)
        raise typer.Exit(2)
    device, modes = ("cpu", DRY_MODES) if dry_run else ("cuda", MODES)
    # Whole precision is whole: the CPU knows nothing of TF32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    half = torch.bfloat16 if dry_run else torch.float16
    checks: list[Check] = []
    records: list[Record] = []
    subjects = list_subjects(model, is_tiny=dry_run)
    for subject in subjects:
        own = Checks(subject.name)
        try:
            if subject.is_small:
                check_net(own, subject.make, device, modes, (torch.float32, half), latent=latent)
            else:
                check_bits(own, subject.make(device, half), latent)
        except torch.OutOfMemoryError:
            print(f"{subject.name} does not fit here: not checked", file=sys.stderr)
        checks += own.done
        _free(device)
    records += record_checks(checks, device)
    write_records(out, records)
    chosen = PLANS[1:2] if dry_run else PLANS
    for subject in subjects:
        if subject.is_small and not dry_run:
            continue
        try:
            records += measure(
                subject.make(device, half),
                device,
                subject=subject.name,
                plans={FULL: None} | {name: preset(name, steps, sampler="ddim") for name in chosen},
                modes=modes,
                steps=steps,
                rounds=rounds,
                latent=latent,
                seed=seed,
            )
        except torch.OutOfMemoryError:
            print(f"{subject.name} does not fit here: left out", file=sys.stderr)
        write_records(out, records)
        _free(device)
    failed = [each for each in checks if not each.holds]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks hold; wrote {out}")
    print("a dry run says nothing about a GPU" if dry_run else SEND)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

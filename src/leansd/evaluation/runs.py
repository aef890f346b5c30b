"""Runs: many pipeline calls from fixed seeds, each to its last latents and its picture.

What measures or tunes plans runs a pipeline over and over; this is the one place that does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from leansd.core.devices import seed_generator
from leansd.drawing import fit_arguments, follow_steps
from leansd.errors import LeansdError
from leansd.evaluation.timing import check_count, wait_for
from leansd.plans.plan import Plan
from leansd.runtime import Attachment, inherit
from leansd.runtime.attachment import NO_NETS
from leansd.runtime.finite import NOT_FINITE

FULL = "full"
"""The name of the run that computes everything at every step."""

PipelineCall: TypeAlias = str | Mapping[str, Any]
"""A prompt, or arguments of the pipeline: `prompt_embeds`, `image`, `strength` and so on."""

OnStep: TypeAlias = Callable[[int, int, int], None]
"""Told after every step: steps done, steps of the run, pictures in the batch."""

Seeds: TypeAlias = int | Sequence[int]
"""The seed of the first of some calls, or a seed for each."""

# What `run_calls` gives the pipeline itself.
_OURS = (
    "callback_on_step_end",
    "callback",
    "generator",
    "num_images_per_prompt",
    "num_inference_steps",
    "output_type",
    "return_dict",
)


@dataclass(frozen=True)
class RunOutputs:
    """The ends of the runs, in the order of their calls; on the CPU.

    Attributes:
        latents: what the autoencoder decodes, [N, C, h, w], in the pipeline's own precision.
        pictures: [N, 3, H, W], float32 in 0..1.
        seconds: of every batch, the whole pipeline.
        attachment: of the plan, for its report; None without one.
    """

    latents: Tensor
    pictures: Tensor
    seconds: tuple[float, ...]
    attachment: Attachment | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def require_finite(self) -> RunOutputs:
        """Itself, where something can be measured against it: as the outputs of full runs.

        Raises:
            LeansdError: latents or pictures are NaN or Inf.
        """
        if self.latents.isfinite().all() and self.pictures.isfinite().all():
            return self
        raise LeansdError(explain_no_numbers(self.latents))


def explain_no_numbers(latents: Tensor) -> str:
    """What to say of a full run whose latents, or the pictures of them, are NaN or Inf."""
    precision = str(latents.dtype).removeprefix("torch.")
    where = "pictures" if latents.isfinite().all() else "latents"
    return (
        f"the {where} of the full run {NOT_FINITE} (NaN or Inf), so nothing can be held against "
        f"it: the model itself fails in {precision}; use whole weights, in float32"
    )


@dataclass(frozen=True)
class CallSet:
    """Pipeline calls that are drawn together; each gives one picture.

    Call `i` draws its noise from seed `seed + i`, or from `seed[i]`, on the CPU, whatever the
    batch: but for rounding, results do not depend on `batch`.

    Attributes:
        calls: prompts, or pipeline arguments.
        batch: how many run at once, see `parts`.
        settings: arguments that all calls share, such as `guidance_scale`.
    """

    calls: Sequence[PipelineCall]
    seed: Seeds = 0
    batch: int = 8
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)

    def __len__(self) -> int:
        return len(self.calls)

    @property
    def arguments(self) -> list[dict[str, Any]]:
        """Every call as arguments of its own, without those that all share; checked."""
        return expand_calls(self.calls, self.settings)

    @property
    def seeds(self) -> list[int]:
        """The seed of each call.

        Raises:
            LeansdError: seeds are given one by one, and not as many as calls.
        """
        if isinstance(self.seed, int):
            return list(range(self.seed, self.seed + len(self)))
        if len(self.seed) != len(self):
            raise LeansdError(
                f"{len(self.seed)} seeds for {len(self)} calls: give a seed for each, or the first"
            )
        return list(self.seed)

    @property
    def parts(self) -> list[range]:
        """The places of the calls that run together.

        Neighbours do, up to `batch`, that have the same arguments where every one is text or a
        tensor whose first dimension is 1; others run alone.
        """
        check_count(self.batch, "calls at once")
        parts: list[range] = []
        shape: Any = None
        for place, arguments in enumerate(self.arguments):
            last, shape = shape, _read_shape(arguments)
            if parts and shape is not None and shape == last and len(parts[-1]) < self.batch:
                parts[-1] = range(parts[-1].start, place + 1)
            else:
                parts.append(range(place, place + 1))
        return parts

    @property
    def prompts(self) -> list[str] | None:
        """The prompt of each call; None where some have none that can be read."""
        prompts = [call.get("prompt") for call in self.arguments]
        read = [prompt for prompt in prompts if isinstance(prompt, str)]
        return read if len(read) == len(prompts) else None

    def pick(self, places: Sequence[int], number: int = 0) -> CallSet:
        """Some of the calls as one batch, with the seeds of their `number`th set."""
        every = self.seeds
        seeds = [every[place] + number * len(self) for place in places]
        return CallSet([self.calls[place] for place in places], seeds, len(places), self.settings)


def run_calls(
    pipe: DiffusionPipeline,
    calls: CallSet,
    steps: int,
    plan: Plan | str | None = None,
    *,
    scheduler: Any | None = None,
    nets: Mapping[str, UNet2DConditionModel] = NO_NETS,
    on_step: OnStep | None = None,
) -> RunOutputs:
    """Run every call, with the plan or without.

    Args:
        scheduler: takes the place of the pipeline's own for this run.
        nets: UNets that the plan switches to.

    Raises:
        LeansdError: there are no calls, a call sets what is set here, or the results differ in
            size.
    """
    arguments, seeds = calls.arguments, calls.seeds
    latents: list[Tensor] = []
    pictures: list[Tensor] = []
    seconds: list[float] = []
    following = inherit(pipe, plan, nets=nets) if plan is not None else nullcontext()
    with sampled_by(pipe, scheduler), following as attachment:
        for places in calls.parts:
            wait_for(pipe.device)
            start = time.perf_counter()
            last, picture = _run_together(
                pipe,
                _join([arguments[place] for place in places]) | dict(calls.settings),
                steps,
                [seeds[place] for place in places],
                on_step,
            )
            seconds.append(time.perf_counter() - start)
            latents.append(last)
            pictures.append(picture)
    return RunOutputs(_stack(latents), _stack(pictures), tuple(seconds), attachment)


def expand_calls(
    calls: Sequence[PipelineCall], settings: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Every call as arguments of its own, checked; a prompt becomes `{"prompt": ...}`."""
    if not calls:
        raise LeansdError("no calls to run: give at least one prompt")
    expanded = [{"prompt": call} if isinstance(call, str) else dict(call) for call in calls]
    for each in (*expanded, settings or {}):
        for name in _OURS:
            if name in each:
                raise LeansdError(
                    f"a call cannot set {name}: steps and seed are given once for all calls, and "
                    "every call gives one picture"
                )
    return expanded


def _read_shape(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """What calls must have in common to be joined; None for one that cannot be."""
    shape: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, str):
            shape[name] = str
        elif isinstance(value, Tensor) and value.ndim and value.shape[0] == 1:
            shape[name] = value.shape, value.dtype, value.device
        else:
            return None
    return shape


def _join(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of one pipeline call that does the work of several; one stays as it is."""
    if len(calls) == 1:
        return dict(calls[0])
    values = {name: [call[name] for call in calls] for name in calls[0]}
    return {
        name: each if isinstance(each[0], str) else torch.cat(each) for name, each in values.items()
    }


def _run_together(
    pipe: Any,
    arguments: Mapping[str, Any],
    steps: int,
    seeds: Sequence[int],
    on_step: OnStep | None,
) -> tuple[Tensor, Tensor]:
    """One pipeline call; latents [n, C, h, w] and pictures [n, 3, H, W] for n seeds."""
    last: list[Tensor] = []

    def follow(step: int, total: int, latents: Tensor) -> None:
        last[:] = [latents]
        if on_step is not None:
            on_step(step, total, len(seeds))

    generators = [seed_generator(seed) for seed in seeds]
    pictures = pipe(
        **fit_arguments(pipe, arguments),
        num_inference_steps=steps,
        generator=generators if len(seeds) > 1 else generators[0],
        output_type="pt",
        **follow_steps(pipe, follow),
    ).images
    if not last:
        raise LeansdError(
            f"a {type(pipe).__name__} tells nobody of its steps, so its latents cannot be compared"
        )
    latents, pictures = last[0].cpu(), pictures.float().cpu()
    if len(latents) != len(seeds) or len(pictures) != len(seeds):
        raise LeansdError(
            f"{len(seeds)} calls gave {len(pictures)} pictures: a call gives one, so its tensors "
            "have a first dimension of 1"
        )
    return latents, pictures


@contextmanager
def sampled_by(pipe: DiffusionPipeline, scheduler: Any | None) -> Iterator[None]:
    """The pipeline with another scheduler, for a while."""
    own = pipe.scheduler
    pipe.scheduler = scheduler if scheduler is not None else own
    try:
        yield
    finally:
        pipe.scheduler = own


def _stack(parts: Sequence[Tensor]) -> Tensor:
    sizes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(sizes) > 1:
        raise LeansdError(f"the calls give results of several sizes: {sizes}; run each size apart")
    return torch.cat(list(parts))

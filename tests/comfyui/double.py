"""A double of what this project uses of ComfyUI: wrappers, guiders, conditionings, samplers' calls.

Written here from the protocol's description; a check against the engine itself is
`integrations/comfyui/check.py`.
"""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

OUTER, RUN, PREDICT = "outer_sample", "sampler_sample", "predict_noise"
CONDS, APPLY, MODEL = "calc_cond_batch", "apply_model", "diffusion_model"


class Executor:
    """Runs wrappers from the first on, and what they are around at last."""

    def __init__(self, original: Callable[..., Any], owner: Any, wrappers: Sequence[Any]) -> None:
        self.original, self.class_obj, self.wrappers = original, owner, tuple(wrappers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        rest = Executor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](rest, *args, **kwargs)


class EPS:
    """Noise of Stable Diffusion: 1000 sigmas, latents = picture + sigma * noise."""

    sigma_min, sigma_max = 0.03, 14.6

    def __init__(self) -> None:
        self.sigmas = torch.linspace(self.sigma_min**0.25, self.sigma_max**0.25, 1000) ** 4

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return (
            (self.sigmas.log() - sigma.log().reshape(-1, 1)).abs().argmin(dim=1).view(sigma.shape)
        )

    def calculate_input(self, sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x / (sigma.view(-1, 1, 1, 1) ** 2 + 1).sqrt()

    def calculate_denoised(
        self, sigma: torch.Tensor, output: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        return x - output * sigma.view(-1, 1, 1, 1)


class CONST(EPS):
    """Rectified flow: sigma from 0 to 1."""

    sigma_min, sigma_max = 0.001, 1.0

    def calculate_input(self, sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x


class V_PREDICTION(EPS):
    def calculate_denoised(
        self, sigma: torch.Tensor, output: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        level = sigma.view(-1, 1, 1, 1)
        size = (level**2 + 1).sqrt()
        return x / size**2 - output * level / size


class Denoiser:
    """A model that counts its calls, and answers to latents, noise and conditioning."""

    def __init__(self) -> None:
        self.calls = 0
        self.controlled = 0
        self.fails_at = -1
        self.dtype = torch.float32

    def __call__(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, y: Any = None,
        control: Any = None, transformer_options: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        self.calls += 1
        if self.calls == self.fails_at:
            raise torch.OutOfMemoryError
        share = timesteps.view(-1, 1, 1, 1).to(x) / 1000
        wave = torch.sin(x + share + context.view(-1, 1, 1, 1).to(x))
        if control is not None:
            self.controlled += 1
            wave = wave + 0.1 * control
        return x * share + 0.1 * wave * (1 - share / 2)


@dataclass
class Control:
    """A ControlNet that counts how often it runs."""

    runs: int = 0

    def get_control(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return torch.cos(x)


def cond(context: float, **options: Any) -> dict[str, Any]:
    return {"context": context, **options}


class Patcher:
    """A model with its options and wrappers, cloned by every node that adds to it."""

    def __init__(self, denoiser: Any = None, noise: Any = None) -> None:
        self.denoiser = denoiser or Denoiser()
        self.noise = noise or EPS()
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.attachments: dict[str, Any] = {}
        self.injections: dict[str, Any] = {}
        self.patches: dict[str, Any] = {}
        self.backup: dict[str, Any] = {}
        """What LoRAs have taken the place of, while the model is loaded."""
        self.object_patches_backup: dict[str, Any] = {}

    def clone(self) -> Patcher:
        other = Patcher(self.denoiser, self.noise)
        other.wrappers = {
            kind: {key: list(each) for key, each in keyed.items()}
            for kind, keyed in self.wrappers.items()
        }
        other.model_options = _copy(self.model_options)
        other.attachments = dict(self.attachments)
        other.injections = dict(self.injections)
        other.patches = dict(self.patches)
        # As the model itself, shared by all clones.
        other.backup, other.object_patches_backup = self.backup, self.object_patches_backup
        return other

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    @property
    def model(self) -> Any:
        return SimpleNamespace(diffusion_model=self.denoiser)

    def get_model_object(self, name: str) -> Any:
        return {"model_sampling": self.noise, "diffusion_model": self.denoiser}[name]

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)

    def list_wrappers(self, kind: str) -> list[Any]:
        return [each for keyed in self.wrappers.get(kind, {}).values() for each in keyed]


@dataclass
class Sampler:
    """A sampler object: a function and its options."""

    sampler_function: Any
    extra_options: dict[str, Any] = field(default_factory=dict[str, Any])

    def sample(
        self, model: Any, sigmas: torch.Tensor, extra_args: Any, callback: Any, noise: torch.Tensor,
        latent: torch.Tensor, mask: Any, disable: bool,
    ) -> torch.Tensor:  # fmt: skip
        return self.sampler_function(
            model, latent + noise * sigmas[0], sigmas, extra_args=extra_args, callback=callback,
            disable=disable, **self.extra_options,
        )  # fmt: skip


@dataclass
class Guider:
    """Classifier-free guidance, with all that a run goes through."""

    model_patcher: Patcher
    positive: Sequence[dict[str, Any]]
    negative: Sequence[dict[str, Any]]
    cfg: float = 4.0
    split: Callable[[int], bool] = lambda _: False
    """Whether the conditionings of a call run apart, as little memory wants it."""
    on_threads: bool = False
    """Whether each runs in a thread of its own, as on several GPUs."""
    diffusion_model: Any = None

    def sample(
        self, noise: torch.Tensor, sampler: Any, sigmas: torch.Tensor,
        latent: torch.Tensor | None = None, seed: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        latent = torch.zeros_like(noise) if latent is None else latent
        self.model_options = _copy(self.model_patcher.model_options)
        self.conds = {
            name: [{**each, "uuid": uuid.uuid4()} for each in given]
            for name, given in (("positive", self.positive), ("negative", self.negative))
        }
        self.calls = 0
        outer = Executor(self._sample, self, self.model_patcher.list_wrappers(OUTER))
        return outer(noise, latent, sampler, sigmas, None, None, True, seed)

    def _sample(
        self, noise: Any, latent: Any, sampler: Any, sigmas: Any, mask: Any, callback: Any,
        disable: bool, seed: int,
    ) -> torch.Tensor:  # fmt: skip
        options = {"model_options": _copy(self.model_options), "seed": seed}
        run = Executor(sampler.sample, sampler, self.model_patcher.list_wrappers(RUN))
        return run(self, sigmas, options, callback, noise, latent, mask, disable)

    @property
    def inner_model(self) -> Any:
        return self

    @property
    def model_sampling(self) -> Any:
        return self.model_patcher.noise

    def __call__(self, x: Any, sigma: Any, model_options: Any = None, seed: Any = None) -> Any:
        predict = Executor(self._predict, self, self.model_patcher.list_wrappers(PREDICT))
        return predict(x, sigma, model_options, seed)

    def _predict(self, x: Any, sigma: Any, model_options: Any, seed: Any) -> torch.Tensor:
        self.calls += 1
        conds = [self.conds["positive"], self.conds["negative"] if self.cfg != 1 else None]
        cond, rest = self.calculate(conds, x, sigma, model_options)
        denoised = rest + (cond - rest) * self.cfg
        for told in model_options.get("sampler_post_cfg_function", ()):
            denoised = told({"denoised": denoised, "uncond_denoised": rest})
        return denoised

    def calculate(self, conds: Any, x: Any, sigma: Any, model_options: Any) -> list[torch.Tensor]:
        run = Executor(self._calculate, None, self.model_patcher.list_wrappers(CONDS))
        return run(self, conds, x, sigma, model_options)

    def _calculate(
        self, model: Any, conds: Any, x: Any, sigma: Any, model_options: Any
    ) -> list[torch.Tensor]:
        todo = [
            (one, place)
            for place, each in enumerate(conds)
            for one in each or ()
            if one.get("timestep_start", 1e9) >= sigma[0] > one.get("timestep_end", -1.0)
        ]
        groups: list[list[Any]] = []
        for one in todo:
            fits = [
                group for group in groups
                if group[0][0].get("control") is one[0].get("control")
                and not self.split(self.calls)
            ]  # fmt: skip
            fits[0].append(one) if fits else groups.append([one])
        sums = [torch.zeros_like(x) for _ in conds]
        counts = [torch.full_like(x, 1e-37) for _ in conds]
        lock = threading.Lock()

        def run(group: Sequence[Any]) -> None:
            for (one, place), rows in zip(
                group, self._apply(group, x, sigma, model_options), strict=True
            ):
                with lock:
                    sums[place] += rows * one.get("mask", 1.0)
                    counts[place] += one.get("mask", 1.0)

        if self.on_threads:
            run_all([lambda group=group: run(group) for group in groups])
        else:
            for group in groups:
                run(group)
        return [total / count for total, count in zip(sums, counts, strict=True)]

    def _apply(self, group: Sequence[Any], x: Any, sigma: Any, model_options: Any) -> Any:
        count = len(group)
        given, many = torch.cat([x] * count), torch.cat([sigma] * count)
        options = {
            **model_options["transformer_options"],
            "cond_or_uncond": [place for _, place in group],
            "uuids": [one["uuid"] for one, _ in group],
            "sigmas": sigma,
        }
        control = group[0][0].get("control")
        control = None if control is None else control.get_control(given)
        context = torch.tensor([one["context"] for one, _ in group]).repeat_interleave(len(x))
        apply = Executor(self._denoise, self, self.model_patcher.list_wrappers(APPLY))
        return apply(given, many, None, context, control, options).chunk(count)

    def _denoise(
        self, x: Any, sigma: Any, concat: Any, context: Any, control: Any, options: Any
    ) -> torch.Tensor:
        noise, denoiser = self.model_patcher.noise, self.model_patcher.denoiser
        run = Executor(denoiser, None, self.model_patcher.list_wrappers(MODEL))
        scaled = noise.calculate_input(sigma, x).to(denoiser.dtype)
        output = run(scaled, noise.timestep(sigma).float(), context, None, control, options)
        return noise.calculate_denoised(sigma, output.float(), x)


def run_all(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks in threads, all at once; the first failure is raised here."""
    failures: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if failures:
        raise failures[0]


def _copy(options: Any) -> Any:
    if isinstance(options, dict):
        return {key: _copy(each) for key, each in options.items()}
    return list(options) if isinstance(options, list) else options


# -- samplers, by what they call -------------------------------------------------------------------


def lay_out(steps: int, most: float = 14.6, least: float = 0.03) -> torch.Tensor:
    """Sigmas of a run, with the 0 at its end."""
    return torch.cat([torch.linspace(most**0.25, least**0.25, steps) ** 4, torch.zeros(1)])


def sample_euler(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, callback: Any = None,
    disable: bool = False,
) -> torch.Tensor:  # fmt: skip
    ones = x.new_ones(len(x))
    for step, (now, then) in enumerate(itertools.pairwise(sigmas)):
        denoised = model(x, now * ones, **extra_args)
        x = x + (x - denoised) / now * (then - now)
        if callback is not None:
            callback({"i": step, "denoised": denoised, "x": x})
    return x


def sample_heun(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, callback: Any = None,
    disable: bool = False,
) -> torch.Tensor:  # fmt: skip
    ones = x.new_ones(len(x))
    for now, then in itertools.pairwise(sigmas):
        slope = (x - model(x, now * ones, **extra_args)) / now
        if then > 0:
            ahead = x + slope * (then - now)
            slope = (slope + (ahead - model(ahead, then * ones, **extra_args)) / then) / 2
        x = x + slope * (then - now)
    return x


def sample_thirds(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, callback: Any = None,
    disable: bool = False,
) -> torch.Tensor:  # fmt: skip
    ones = x.new_ones(len(x))
    for now, then in itertools.pairwise(sigmas):
        places = [now + share * (then - now) for share in ((0, 1 / 3, 2 / 3) if then > 0 else (0,))]
        for here, there in itertools.pairwise([*places, then]):
            x = x + (x - model(x, here * ones, **extra_args)) / here * (there - here)
    return x


def sample_adaptive(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, callback: Any = None,
    disable: bool = False,
) -> torch.Tensor:  # fmt: skip
    sigma, ones = sigmas[0], x.new_ones(len(x))
    while sigma > sigmas[-2]:
        denoised = model(x, sigma * ones, **extra_args)
        then = sigma / (1.5 + denoised.abs().mean())
        x, sigma = x + (x - denoised) / sigma * (then - sigma), then
    return x


def sample_stubborn(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **options: Any) -> Any:
    """Looks at more of the model than a stand-in has."""
    model.inner_model.inner_model.diffusion_model  # noqa: B018
    return sample_euler(model, x, sigmas, **options)


def sample_ancestral(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, callback: Any = None,
    disable: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Noise of its own, from the run's seed."""
    generator, ones = torch.Generator().manual_seed(extra_args["seed"]), x.new_ones(len(x))
    for now, then in itertools.pairwise(sigmas):
        down = then * 0.8
        x = x + (x - model(x, now * ones, **extra_args)) / now * (down - now)
        x = x + torch.randn(x.shape, generator=generator).to(x) * (then**2 - down**2).sqrt()
    return x


def sample_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, callback: Any = None,
    disable: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Asks for the unconditional part beside the guided one, and steps along that."""
    kept: list[torch.Tensor] = []

    def keep(told: Any) -> torch.Tensor:
        kept[:] = [told["uncond_denoised"]]
        return told["denoised"]

    options = {**extra_args["model_options"], "sampler_post_cfg_function": [keep]}
    extra_args, ones = {**extra_args, "model_options": options}, x.new_ones(len(x))
    for now, then in itertools.pairwise(sigmas):
        denoised = model(x, now * ones, **extra_args)
        x = denoised + (x - kept[0]) / now * then
    return x


def sample_crooked(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **options: Any) -> Any:
    """Not linear in what the model gives."""
    x = sample_euler(model, x, sigmas, **options)
    return x + 0.1 * x**2

"""A plan on a model of ComfyUI: the wrappers that play it, and what a run reports.

Only the names of ComfyUI's wrappers and the keys of its options are known here; nothing is imported
from it, so that all of this runs against a double.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from leansd.core import Player
from leansd.core.devices import Stopwatch, start_stopwatch
from leansd.plans.anatomy import WHOLE
from leansd.runtime.hooks import ForwardHooks

from .blocks import explain_unsound, is_compiled, list_patches
from .choosing import PlanChoice, choose_plan, describe_run

KEY = "leansd"
"""Of the wrappers, and of the run among the options."""
LOG = logging.getLogger("leansd")


@dataclass
class RunReport:
    """What a run did under a plan."""

    plan: str
    sampler: str
    steps: int
    calls: int = 0
    """Calls of the sampler."""
    computed: int = 0
    """Of these, those that ran the model."""
    partial: int = 0
    """Of these, those that ran a part of it."""
    seconds: float = 0.0
    """In the calls of the sampler."""
    whole_seconds: float = 0.0
    """In those that ran all of the model."""
    notes: tuple[str, ...] = ()
    forced: Mapping[str, int] = field(default_factory=dict[str, int])
    full: str = ""
    """Why everything was computed, in words; empty where the plan was followed."""

    @property
    def expected(self) -> float:
        """The speed-up that the calls say, a part of the model counted as all of it."""
        return self.calls / self.computed if self.computed else 1.0

    @property
    def whole(self) -> int:
        """Calls that ran all of the model."""
        return self.computed - self.partial

    @property
    def measured(self) -> float:
        """What the run would have taken if every call had run the model, over what it took."""
        if not (self.whole and self.seconds):
            return 1.0
        return self.whole_seconds / self.whole * self.calls / self.seconds

    @property
    def gain(self) -> float:
        """The speed-up by calls; by the clock where calls ran a part of the model."""
        return self.measured if self.partial else self.expected

    def __str__(self) -> str:
        part = f" ({self.partial} in part)" if self.partial else ""
        calls = "" if self.partial else f", {self.expected:.2f}x by calls"
        lines = [
            f"plan {self.plan}, sampler {self.sampler}, {self.steps} steps: the model ran "
            f"{self.computed} of {self.calls} times{part}, {self.calls - self.computed} forecast",
            f"speed-up of sampling: {self.measured:.2f}x measured{calls}",
        ]
        if self.full:
            lines.append(f"everything was computed, because {self.full}")
        lines += [f"computed {count} times because {why}" for why, count in self.forced.items()]
        lines += self.notes
        return "\n".join(lines)


class ControlMissing(Exception):
    """A call that was to be forecast is computed after all, and its ControlNets have not run."""


class NotOneTensor(Exception):
    """A model's output is something else than a tensor."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Run:
    """One run of a sampler: lies among the options of that run alone, and goes with it."""

    def __init__(self, choice: PlanChoice, guider: Any, sampler: Any, sigmas: torch.Tensor) -> None:
        described = describe_run(guider, sampler, [float(each) for each in sigmas.tolist()])
        chosen = choose_plan(choice, described)
        self.report = RunReport(
            chosen.name, described.sampler, len(described.sigmas) - 1, notes=chosen.notes
        )
        blocks = chosen.blocks
        reasons = (
            _explain_conditionings(guider),
            explain_unsound(guider) if blocks is not None else "",
            chosen.reason,
        )
        self.report.full = next(filter(None, reasons), "")
        self.player: Player | None = None
        self._hooks: ForwardHooks | None = None
        if chosen.plan is not None and chosen.schedule is not None and not self.report.full:
            anatomy = WHOLE if blocks is None else blocks.anatomy
            self.player = Player(
                chosen.plan, chosen.schedule, anatomy, writable=_writes_between(guider)
            )
            self.report.full = self.player.reason
            if blocks is not None and not self.report.full:
                # For the run alone: an injection would stay on the model, and load it again.
                self._hooks = ForwardHooks(blocks.modules, self.run_unit)
        self.call = -1
        """Number of the sampler's call that is being answered."""
        self.spares_control = False
        """Whether the ControlNets of this call were left out."""
        self.is_compiled = is_compiled(guider)
        """Whether nothing of Python may stand between a model and its graph."""
        self._times: list[Stopwatch] = []

    def take_call(self, x: torch.Tensor, predict: Callable[[], Any]) -> Any:
        """Count a call of the sampler, and time it without waiting for the device."""
        self.call += 1
        stop = start_stopwatch(x.device)
        try:
            return predict()
        except BaseException:
            # Half of it may be known: whatever comes next starts over.
            self.start_over()
            raise
        finally:
            self._times.append(stop())

    def start_over(self) -> None:
        """Forget what was kept: the next call is computed."""
        if self.player is not None:
            self.player.clear()

    def run_model(
        self,
        x: Any,
        options: Mapping[str, Any],
        compute: Callable[[], Any],
        sigma: torch.Tensor | None = None,
    ) -> Any:
        """The model's output [conds * B, C, ...] for one batch of conditionings.

        Args:
            sigma: [conds * B], where the output is what the model makes of it: denoised latents.
        """
        keys = _list_keys(options)
        if self.player is None or self.call < 0 or not isinstance(x, torch.Tensor) or not keys:
            return compute()

        def run() -> torch.Tensor:
            if self.spares_control:
                raise ControlMissing
            output = compute()
            if not isinstance(output, torch.Tensor):
                raise NotOneTensor(output)
            return output

        try:
            if sigma is not None:
                return self.player.play_denoised(self.call, x, sigma, run, keys)
            return self.player.play(self.call, x, run, keys)
        except NotOneTensor as found:
            return found.output

    def run_unit(self, at: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a unit of the model's inside gives."""
        batch = self.player.batch if self.player is not None else None
        if batch is None:
            return forward(*args, **kwargs)
        return batch.run_unit(at, forward, *args, **kwargs)

    def can_spare_control(self, conds: Sequence[Any], x: torch.Tensor) -> bool:
        """Whether no conditioning of this call will run the model, and some have a ControlNet."""
        if self.player is None or self.call < 0:
            return False
        every = [(one, place) for place, each in enumerate(conds) for one in each or ()]
        if not any(one.get("control") is not None for one, _ in every):
            return False
        return self.player.spares(
            self.call, x.device, [_make_key(one.get("uuid"), place) for one, place in every]
        )

    def close(self) -> RunReport:
        """Keep nothing; gives the report."""
        report, player = self.report, self.player
        if self._hooks is not None:
            self._hooks.release()
        report.calls = self.call + 1
        computed, partial = set(range(report.calls)), set[int]()
        if player is not None:
            computed, partial = player.stats.computed, player.stats.partial
            report.forced = dict(player.stats.forced)
            player.clear()
        seconds = [each() for each in self._times]
        report.computed, report.partial = len(computed), len(partial)
        report.seconds = sum(seconds)
        report.whole_seconds = sum(seconds[call] for call in computed - partial)
        return report


class PlanOnModel:
    """A plan as wrappers on a model."""

    def __init__(self, choice: PlanChoice) -> None:
        self.choice = choice
        self.last: RunReport | None = None
        """Of the last run, also of one that was interrupted."""

    def attach(self, model: Any) -> Any:
        """A clone of a model whose runs follow the plan; another plan on it is taken off."""
        clone = model.clone()
        for kind, wrapper in (
            ("outer_sample", self.wrap_run),
            ("predict_noise", wrap_call),
            ("calc_cond_batch", wrap_conditionings),
            ("apply_model", wrap_graph),
            ("diffusion_model", wrap_model),
        ):
            clone.remove_wrappers_with_key(kind, KEY)
            clone.add_wrapper_with_key(kind, KEY, wrapper)
        clone.set_attachments(KEY, self)
        return clone

    def wrap_run(
        self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Around a run: its options are its own, and so what lies in them goes with it."""
        guider = executor.class_obj
        options = guider.model_options.setdefault("transformer_options", {})
        run = options[KEY] = Run(self.choice, guider, sampler, sigmas)
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            options.pop(KEY, None)
            self.last = run.close()
            LOG.info("%s", self.last)


def wrap_call(executor: Any, x: Any, timestep: Any, model_options: Any, *args: Any) -> Any:
    """Around a call of the sampler, however many calls of the model it makes."""
    run = _find_run(model_options.get("transformer_options"))
    predict = lambda: executor(x, timestep, model_options, *args)  # noqa: E731
    return predict() if run is None else run.take_call(x, predict)


def wrap_conditionings(
    executor: Any, model: Any, conds: Any, x: Any, timestep: Any, model_options: Any
) -> Any:
    """Around all conditionings of a call: where none runs the model, ControlNets need not run."""
    run = _find_run(model_options.get("transformer_options"))
    if run is not None and run.can_spare_control(conds, x):
        bare = [each and [{**one, "control": None} for one in each] for each in conds]
        run.spares_control = True
        try:
            return executor(model, bare, x, timestep, model_options)
        except ControlMissing:
            run.start_over()
        finally:
            run.spares_control = False
    return executor(model, conds, x, timestep, model_options)


def wrap_graph(executor: Any, x: Any, sigma: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the model and what turns its output to denoised latents, where it is compiled.

    What lies around the model itself would be traced with it, and traced again for every plan.
    """
    options = _find_options(args, kwargs)
    run = _find_run(options)
    if run is None or not run.is_compiled:
        return executor(x, sigma, *args, **kwargs)
    bare = {name: each for name, each in options.items() if name != KEY}
    args = tuple(bare if each is options else each for each in args)
    kwargs = {name: bare if each is options else each for name, each in kwargs.items()}

    def compute() -> Any:
        return executor(x, sigma, *args, **kwargs)

    return run.run_model(x, options, compute, sigma)


def wrap_model(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the model itself, for one batch of conditionings."""
    options = _find_options(args, kwargs)
    run = _find_run(options)
    if run is None:
        return executor(x, *args, **kwargs)

    def compute() -> Any:
        # The model takes what ControlNets add off its lists, and it may have to run once more.
        given = {name: _copy_control(each) for name, each in kwargs.items()}
        return executor(x, *map(_copy_control, args), **given)

    return run.run_model(x, options, compute)


def _copy_control(given: Any) -> Any:
    """What ControlNets give, in lists of its own; anything else as it is."""
    if not isinstance(given, dict) or not all(isinstance(each, list) for each in given.values()):
        return given
    return {name: list(each) for name, each in given.items()}


def _find_run(options: Mapping[str, Any] | None) -> Run | None:
    return (options or {}).get(KEY)


def _find_options(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer options among a model's arguments, wherever it takes them."""
    given = [kwargs.get("transformer_options"), *args]
    return next((each for each in given if isinstance(each, dict) and "uuids" in each), {})


def _list_keys(options: Mapping[str, Any]) -> list[Hashable]:
    """An identity for each conditioning of a batch."""
    places = options.get("cond_or_uncond", ())
    return [_make_key(*each) for each in zip(options.get("uuids", ()), places, strict=False)]


def _make_key(uuid: Hashable, place: int) -> Hashable:
    """Conditionings that were made to match one of the other list have its uuid."""
    return uuid, place


def _writes_between(guider: Any) -> bool:
    """Whether something may write to what the model's units give: ControlNets, or a patch."""
    every = [one for each in getattr(guider, "conds", {}).values() for one in each]
    return bool(list_patches(guider)) or any(one.get("control") is not None for one in every)


def _explain_conditionings(guider: Any) -> str:
    """Why the conditionings of a run want everything computed, in words; empty where none do."""
    every = [one for each in getattr(guider, "conds", {}).values() for one in each]
    if any(one.get("hooks") is not None for one in every):
        return "a conditioning changes the model's weights (hooks)"
    if guider.model_options.get("context_handler") is not None:
        return "the run is cut into context windows"
    return ""

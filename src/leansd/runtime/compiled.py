"""Compiled UNet calls: `torch.compile` with one whole graph for each structure of a plan's calls.

What is compiled is the engine's own way of running a call. While it is traced, units find their
call in a slot that only the tracer sees, and this call holds tensors that came in as arguments: a
graph reads no clock, no thread and no cache. PyTorch's guards watch the UNet's modules, so a LoRA
or another attention processor makes a new graph and never a stale result.
"""

from __future__ import annotations

import textwrap
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch._dynamo.exc import TorchDynamoException

from leansd.core.outputs import (
    FeatureCache,
    Weight,
    find_method,
    list_correction,
    list_weights,
)
from leansd.errors import LeansdError
from leansd.plans.compile import Structure, list_structures
from leansd.plans.liveness import Call, Kept
from leansd.plans.methods import METHODS, Method
from leansd.runtime.arguments import OutputShapes, Shape, UNetArguments
from leansd.runtime.call import CacheBranch, UNetCall, UNetStep

OPTIONS = ("backend", "mode", "options", "dynamic")
"""What of `torch.compile` may be chosen; `fullgraph` is always on."""

GRAPHED_MODES = ("reduce-overhead", "max-autotune")
"""Modes of `torch.compile` that run on CUDA graphs."""


def read_options(choice: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    """The options of `torch.compile` that `compile=choice` asks for; None for no compilation.

    Raises:
        LeansdError: an option is not one that may be chosen, or two exclude each other.
    """
    if isinstance(choice, bool):
        return {} if choice else None
    unknown = [name for name in choice if name not in OPTIONS]
    if unknown:
        raise LeansdError(
            f"compile: unknown option {unknown[0]!r}; it takes True or {', '.join(OPTIONS)}, as in "
            'compile={"mode": "reduce-overhead"}'
        )
    if choice.get("mode") is not None and choice.get("options") is not None:
        raise LeansdError("compile: give either mode or options; torch.compile takes one of them")
    return dict(choice)


def freeze(options: Any) -> Hashable:
    """Options as a key."""
    if isinstance(options, Mapping):
        return frozenset((name, freeze(value)) for name, value in options.items())
    return options


def uses_cuda_graphs(options: Mapping[str, Any]) -> bool:
    """Whether outputs of a compiled call lie in memory that the next call overwrites."""
    if options.get("backend") == "cudagraphs" or options.get("mode") in GRAPHED_MODES:
        return True
    return bool((options.get("options") or {}).get("triton.cudagraphs"))


class TraceSlot:
    """Where units find their call while it is traced; at any other time it is empty."""

    def __init__(self) -> None:
        self.step: UNetStep | None = None


class TracedCall(UNetCall):
    """A call that reads nothing but its arguments, for the tracer."""

    def __init__(
        self,
        structure: Structure,
        given: Sequence[torch.Tensor],
        weights: torch.Tensor | None,
        shapes: dict[str, Shape],
        latents: torch.Tensor,
    ) -> None:
        branch = CacheBranch()
        branch.shapes[structure.call.net] = shapes
        super().__init__(branch, structure.call, None, latents, records=False)
        # Costs nothing: what nobody reads, a compiler leaves out.
        self.writable = True
        sources = structure.sources
        for kept, tensor in zip((kept for each in sources for kept in each), given, strict=True):
            branch.cache.put(kept, tensor)
        self._weights: dict[tuple[Kept, ...], list[torch.Tensor]] = {}
        left = [] if weights is None else list(weights.unbind())
        for method, each in _list_weighed(structure.call, sources):
            # A correction weighs the output itself, too, and that of a picture the input.
            count = len(each) + (method is None) * (1 + (each[0].what == "denoised"))
            self._weights[each], left = left[:count], left[count:]

    def weigh(
        self, method: Method, sources: Sequence[Kept]
    ) -> tuple[list[torch.Tensor], list[Weight]]:
        tensors = [self.branch.cache.read(kept) for kept in sources]
        return tensors, [*self._weights.get(tuple(sources), ())]

    def weigh_correction(self, sources: Sequence[Kept]) -> Sequence[Weight]:
        return self._weights[tuple(sources)]

    def denoise(self, output: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """The output itself: a graph knows no noise levels, and who calls it goes on from here."""
        return output.clone()


RunLanes = Callable[[UNetStep, UNetArguments, Callable[..., Any]], Any]
"""The engine's way of running a call with the UNet's own forward, its units following the step."""


class CompiledCalls:
    """The compiled calls of one UNet under one choice of `torch.compile`'s options."""

    def __init__(
        self, run_lanes: RunLanes, shapes: OutputShapes, options: Mapping[str, Any]
    ) -> None:
        self._run_lanes, self._shapes, self._options = run_lanes, shapes, options
        self._clones = uses_cuda_graphs(options)
        self._runs: dict[Structure, Callable[..., Any]] = {}
        self._list_structures = lru_cache(maxsize=64)(list_structures)
        self._lock = threading.Lock()
        self._broken: set[Structure] = set()
        """What cannot be compiled, and runs eagerly."""

    def __len__(self) -> int:
        """How many structures were compiled."""
        return len(self._runs)

    def suit(self, step: UNetStep, sample: torch.Tensor) -> bool:
        """Whether this call with a sample [B, C, H, W] is compiled; the others run eagerly."""
        pattern = step.call.pattern
        made = (*pattern.inherited.values(), *pattern.parts.values())
        bounded = all(METHODS[how].is_bounded for how in made)
        if not (step.compiles and bounded and self._shapes.suit(sample)):
            return False
        ((own, _),) = step.split(sample)
        return self._find_structure(own) not in self._broken

    def run(self, step: UNetStep, arguments: UNetArguments, forward: Callable[..., Any]) -> Any:
        """What the engine's `run_lanes` gives and keeps, by a graph.

        A call that fails is run eagerly. Where that fails, too, the fault is the caller's. Where it
        does not, and PyTorch says that the call cannot be compiled, its structure is not tried
        again; all others are.
        """
        ((own, _),) = step.split(arguments.sample)
        try:
            noise = self._run_graph(own, arguments, forward)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            output = self._run_lanes(step, arguments, forward)
            if isinstance(error, TorchDynamoException):
                self._broken.add(self._find_structure(own))
            warnings.warn(
                # The beginning: PyTorch explains at length.
                textwrap.shorten(
                    "a UNet call of this pattern runs eagerly, since its graph failed: "
                    f"{type(error).__name__}: {error}",
                    width=360,
                    placeholder=" ...",
                ),
                stacklevel=2,
            )
            return output
        return UNet2DConditionOutput(sample=noise) if arguments.in_dataclass else (noise,)

    def _find_structure(self, step: UNetCall) -> Structure:
        program = step.branch.program
        assert program is not None
        return self._list_structures(program)[step.call.index - program.start]

    def _run_graph(
        self, step: UNetCall, arguments: UNetArguments, forward: Callable[..., Any]
    ) -> torch.Tensor:
        """The UNet's output for the whole batch; what the call keeps goes into the cache."""
        call, cache, sample = step.call, step.branch.cache, arguments.sample
        if step.records:
            step.shapes.update(self._shapes.make_shapes(sample))
        structure = self._find_structure(step)
        sources = structure.list_sources(call)
        named = {name: each for name, each in arguments.named.items() if name != "return_dict"}
        inputs = (
            {**named, "timestep": _make_tensor(arguments.timestep, sample.device)},
            _gather(cache, sources),
            _weigh(structure, sources, step, sample),
        )
        if self._clones:
            torch.compiler.cudagraph_mark_step_begin()
        noise, made = self._find_run(structure)(forward, *inputs)
        keeps = {kept for keeps in call.keeps.values() for kept in keeps}
        for kept, tensor in zip(structure.list_keeps(call), made, strict=True):
            if kept not in keeps:
                continue
            if kept.what == "denoised":
                tensor = step.denoise(tensor, step.pick(step.latents, kept.lane))
            cache.put(kept, tensor.clone() if self._clones else tensor)
        return noise.clone() if self._clones else noise

    def _find_run(self, structure: Structure) -> Callable[..., Any]:
        with self._lock:
            if structure not in self._runs:
                run = write_run(structure, self._shapes, self._run_lanes)
                self._runs[structure] = torch.compile(run, fullgraph=True, **self._options)
            return self._runs[structure]


def write_run(
    structure: Structure, output_shapes: OutputShapes, run_lanes: RunLanes
) -> Callable[..., Any]:
    """The function of one structure, which gives the UNet's output and what it keeps."""

    def run(
        forward: Callable[..., Any],
        named: dict[str, Any],
        given: Sequence[torch.Tensor],
        weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        sample = named["sample"]
        shapes, latents = output_shapes.make_shapes(sample), output_shapes.pick_latents(sample)
        step = TracedCall(structure, given, weights, shapes, latents)
        output = run_lanes(step, UNetArguments({**named, "return_dict": False}), forward)
        keeps = structure.call.keeps.values()
        return output[0], [step.branch.cache.read(kept) for each in keeps for kept in each]

    # Graphs are cached, and their number is limited, by code object: one for each structure.
    run.__code__ = run.__code__.replace(co_name="run_structure")
    return run


def _make_tensor(timestep: Any, device: torch.device) -> torch.Tensor:
    """A time step as the UNet would make it of a number, which would be part of the graph."""
    if isinstance(timestep, torch.Tensor):
        return timestep
    dtype = torch.float64 if isinstance(timestep, float) else torch.int64
    return torch.tensor(timestep, dtype=dtype).to(device, non_blocking=True)


def _gather(cache: FeatureCache, sources: Sequence[Sequence[Kept]]) -> list[torch.Tensor]:
    """The kept tensors; one that stands in for another is copied, for graphs tell those apart."""
    gathered: list[torch.Tensor] = []
    for each in sources:
        for place, kept in enumerate(each):
            tensor = cache.read(kept)
            gathered.append(tensor.clone() if kept in each[:place] else tensor)
    return gathered


def _list_weighed(
    call: Call, sources: Sequence[tuple[Kept, ...]]
) -> Iterator[tuple[Method | None, tuple[Kept, ...]]]:
    """Sources that go together and have weights, and what is made of them: None for a correction.

    What is a copy of one output needs none.
    """
    made = [find_method(call, at) for at, lanes in call.sources.items() for _ in lanes]
    for method, each in zip([*made, *(None for _ in call.corrects)], sources, strict=True):
        if method is None or len(each) > 1 or not method.is_exact:
            yield method, each


def _weigh(
    structure: Structure,
    sources: Sequence[tuple[Kept, ...]],
    step: UNetCall,
    sample: torch.Tensor,
) -> torch.Tensor | None:
    """The weights of all sources that need some, in the order of `_list_weighed`, [weights]."""
    assert step.schedule is not None
    weights: list[float] = []
    for method, each in _list_weighed(structure.call, sources):
        real = tuple(dict.fromkeys(each))  # one that stands in for others counts once
        rest = (0.0,) * (len(each) - len(real))
        if method is None:
            lead, *known = list_correction(step.call, real, step.schedule)
            weights += [lead, *known[: len(real)], *rest, *known[len(real) :]]
        else:
            weights += [*list_weights(method, real, step.call.index, step.schedule), *rest]
    dtype = torch.promote_types(sample.dtype, torch.float32)
    # Made on the GPU, the copy would wait for all that it has to do.
    made = torch.tensor(weights, dtype=dtype).to(sample.device, non_blocking=True)
    return made if weights else None

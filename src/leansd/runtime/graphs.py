"""Compiled UNet calls: `torch.compile` with one whole graph for each structure of a plan's calls.

What is compiled is the engine's own way of running a call. While it is traced, units find their
pass in a slot that only the tracer sees, and this pass holds tensors that came in as arguments: a
graph reads no clock, no thread and no store. PyTorch's guards watch the UNet's modules, so a LoRA
or another attention processor makes a new graph and never a stale result.
"""

from __future__ import annotations

import inspect
import textwrap
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from leansd.errors import LeansdError
from leansd.plans.liveness import Call, Kept
from leansd.plans.row import How
from leansd.plans.structures import Structure, list_structures
from leansd.runtime.outlines import Outlines
from leansd.runtime.passes import Branch, Pass, Step
from leansd.runtime.store import RECALLS, Shape, Store, combine, weigh_correction, weigh_sources

if TYPE_CHECKING:
    from leansd.runtime.engine import Engine

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


class Slot:
    """Where units find their pass while a call is traced; at any other time it is empty."""

    def __init__(self) -> None:
        self.step: Step | None = None


POLYNOMIALS: frozenset[How] = frozenset({"reuse", "residual", "forecast", "forecast2"})
"""Ways of inheriting that a graph knows: through a fixed number of outputs."""


class TracedPass(Pass):
    """A pass that reads nothing but its arguments, for the tracer."""

    def __init__(
        self,
        structure: Structure,
        given: Sequence[torch.Tensor],
        weights: torch.Tensor | None,
        shapes: dict[str, Shape],
        latents: torch.Tensor,
    ) -> None:
        branch = Branch()
        branch.shapes[structure.call.net] = shapes
        super().__init__(branch, structure.call, None, latents, records=False)
        # Costs nothing: what nobody reads, a compiler leaves out.
        self.writable = True
        sources = structure.sources
        for kept, tensor in zip((kept for each in sources for kept in each), given, strict=True):
            branch.store.put(kept, tensor)
        self._weights: dict[tuple[Kept, ...], list[torch.Tensor]] = {}
        left = [] if weights is None else list(weights.unbind())
        for each, count in _count_weights(structure.call, sources):
            self._weights[each], left = left[:count], left[count:]

    def recall(
        self, how: How, sources: Sequence[Kept], given: torch.Tensor | None = None
    ) -> torch.Tensor:
        store = self.branch.store
        if how == "residual":
            return RECALLS[how](store, sources, 0, None, given)
        tensors = [store.read(kept) for kept in sources]
        if len(tensors) == 1:
            return tensors[0].clone()
        weights = self._weights[tuple(sources)]
        if len(tensors) == 2:
            return _lerp(tensors[1], tensors[0], weights[0])
        return combine(tensors[::-1], weights[::-1])

    def move_on(self, noise: torch.Tensor, sources: Sequence[Kept]) -> torch.Tensor:
        tensors = [self.branch.store.read(kept) for kept in sources]
        return combine([noise, *tensors], self._weights[tuple(sources)])


def _lerp(before: torch.Tensor, latest: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In the precision that lerp gives to a weight that is a number, so that the bits agree."""
    line = torch.lerp(before.to(weight.dtype), latest.to(weight.dtype), weight)
    return line.to(latest.dtype)


class Graphs:
    """The compiled calls of one engine under one choice of `torch.compile`'s options."""

    def __init__(self, engine: Engine, options: Mapping[str, Any]) -> None:
        self._engine = engine
        self._options = options
        self._outlines = engine.outlines
        self._clones = uses_cuda_graphs(options)
        self._runs: dict[Structure, Callable[..., Any]] = {}
        self._list_structures = lru_cache(maxsize=64)(list_structures)
        self._lock = threading.Lock()
        self._broken = False

    def __len__(self) -> int:
        """How many structures were compiled."""
        return len(self._runs)

    def take(self, step: Pass, sample: torch.Tensor) -> bool:
        """Whether this call with a sample [B, C, H, W] is compiled; the others run eagerly."""
        stands_alone = step.apart is None and not step.skips_unet
        pattern = step.call.pattern
        known = POLYNOMIALS.issuperset((*pattern.inherited.values(), *pattern.parts.values()))
        return stands_alone and known and not self._broken and self._outlines.suit(sample)

    def run(self, step: Pass, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `Engine.run_lanes` gives and keeps, by a graph."""
        arguments = inspect.signature(forward).bind(*args, **kwargs).arguments
        return_dict = arguments.pop("return_dict", True)
        try:
            noise = self._run_graph(step, forward, arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._broken = True
            warnings.warn(
                f"the UNet runs eagerly, since it cannot be compiled: {_name_cause(error)}",
                stacklevel=2,
            )
            return self._engine.run_lanes(step, forward, *args, **kwargs)
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    def _run_graph(
        self, step: Pass, forward: Callable[..., Any], arguments: dict[str, Any]
    ) -> torch.Tensor:
        """The UNet's output for the whole batch; what the call keeps goes into the store."""
        program, call, store = step.branch.program, step.call, step.branch.store
        assert program is not None
        sample = arguments["sample"]
        if step.records:
            step.shapes.update(self._outlines.make_shapes(sample))
        structure = self._list_structures(program)[call.index - program.start]
        sources = structure.list_sources(call)
        inputs = (
            {**arguments, "timestep": _make_tensor(arguments["timestep"], sample.device)},
            _gather(store, sources),
            _weigh(sources, step, sample),
        )
        if self._clones:
            torch.compiler.cudagraph_mark_step_begin()
        noise, made = self._find_run(structure)(self._engine, forward, *inputs)
        keeps = {kept for keeps in call.keeps.values() for kept in keeps}
        for kept, tensor in zip(structure.list_keeps(call), made, strict=True):
            if kept in keeps:
                store.put(kept, tensor.clone() if self._clones else tensor)
        return noise.clone() if self._clones else noise

    def _find_run(self, structure: Structure) -> Callable[..., Any]:
        with self._lock:
            if structure not in self._runs:
                run = write_run(structure, self._outlines)
                self._runs[structure] = torch.compile(run, fullgraph=True, **self._options)
            return self._runs[structure]


def write_run(structure: Structure, outlines: Outlines) -> Callable[..., Any]:
    """The function of one structure, which gives the UNet's output and what it keeps."""

    def run(
        engine: Engine,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        given: Sequence[torch.Tensor],
        weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        sample = arguments["sample"]
        shapes = outlines.make_shapes(sample)
        step = TracedPass(structure, given, weights, shapes, engine.pick_latents(sample))
        output = engine.run_lanes(step, forward, **arguments, return_dict=False)
        keeps = structure.call.keeps.values()
        return output[0], [step.branch.store.read(kept) for each in keeps for kept in each]

    # Graphs are cached, and their number is limited, by code object: one for each structure.
    run.__code__ = run.__code__.replace(co_name="run_structure")
    return run


def _make_tensor(timestep: Any, device: torch.device) -> torch.Tensor:
    """A time step as the UNet would make it of a number, which would be part of the graph."""
    if isinstance(timestep, torch.Tensor):
        return timestep
    dtype = torch.float64 if isinstance(timestep, float) else torch.int64
    return torch.tensor(timestep, dtype=dtype, device=device)


def _gather(store: Store, sources: Sequence[Sequence[Kept]]) -> list[torch.Tensor]:
    """The kept tensors; one that stands in for another is copied, for graphs tell those apart."""
    gathered: list[torch.Tensor] = []
    for each in sources:
        for place, kept in enumerate(each):
            tensor = store.read(kept)
            gathered.append(tensor.clone() if kept in each[:place] else tensor)
    return gathered


def _count_weights(
    call: Call, sources: Sequence[tuple[Kept, ...]]
) -> Iterator[tuple[tuple[Kept, ...], int]]:
    """Sources that go together, and how many weights they have: a correction's one more.

    What is made from one output needs none.
    """
    made = len(sources) - len(call.corrects)
    yield from ((each, len(each)) for each in sources[:made] if len(each) > 1)
    yield from ((each, len(each) + 1) for each in sources[made:])


def _weigh(
    sources: Sequence[tuple[Kept, ...]], step: Pass, sample: torch.Tensor
) -> torch.Tensor | None:
    """The weights of all sources that need some, as `_count_weights` counts them, [weights]."""
    assert step.course is not None
    call, log_snr = step.call, step.course.log_snr
    weights: list[float] = []
    for each, count in _count_weights(call, sources):
        if count == len(each):
            known = weigh_sources(each, call.index, log_snr)
            weights += [known.get(kept, 0.0) for kept in each]
        else:
            lead, known = weigh_correction(call.correct, each, call.index, log_snr)
            # One output that fills several places counts once.
            weights += [lead, *(known.pop(kept, 0.0) for kept in each)]
    dtype = torch.promote_types(sample.dtype, torch.float32)
    return torch.tensor(weights, dtype=dtype, device=sample.device) if weights else None


def _name_cause(error: Exception) -> str:
    """The beginning of what went wrong, which PyTorch explains at length."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", width=300, placeholder=" ...")

"""From the engine's way of running a call to an ONNX graph of it.

PyTorch's tracer is used, not its newer exporter: what it makes serves every batch, size and number
of tokens from one trace, in a tenth of the time, with every PyTorch that this package supports.
Weights stay out of the graph; all graphs of a UNet share one file of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy.inputs import make_inputs
from leansd.errors import LeansdError
from leansd.exporting.graphs import Graph, name_feature
from leansd.runtime.compiled import write_run
from leansd.runtime.engine import Engine, list_followers

NOISE = "noise"
"""The name of what the UNet gives."""
OPSET = 18
ROOT = "unet."
"""Before the name of every weight while it is traced."""

AXES = {
    "sample": {0: "batch", 2: "height", 3: "width"},
    "timestep": {},
    "encoder_hidden_states": {0: "batch", 1: "tokens"},
    "text_embeds": {0: "batch"},
    "time_ids": {0: "batch"},
}
"""The inputs that every graph may have, and their dimensions that are free."""
ADDED = ("text_embeds", "time_ids")
"""Those that SDXL's UNet takes as `added_cond_kwargs`."""


class GraphSection(torch.nn.Module):
    """One graph of a UNet as a module of tensors in and out, run by the engine."""

    def __init__(
        self, engine: Engine, forward: Callable[..., Any], graph: Graph, names: Sequence[str]
    ) -> None:
        super().__init__()
        self.unet = engine.unet
        self.graph = graph
        self.names = tuple(names)
        """The UNet's own inputs, in order."""
        self._forward = forward
        self._run = write_run(graph.structure, engine.shapes, engine.run_lanes, engine.pick_latents)

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.names, *map(name_feature, self.graph.given))

    @property
    def outputs(self) -> tuple[str, ...]:
        return (NOISE, *map(name_feature, self.graph.kept))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(self.names, tensors, strict=False))
        given = _sort(self.graph, tensors[len(self.names) :])
        noise, made = self._run(self._forward, nest(named), given, None)
        return (noise, *made)


def _sort(graph: Graph, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The given tensors in the order that the graph's structure takes them."""
    named = dict(zip(graph.given, tensors, strict=True))
    return [named[kept.unit, kept.what] for each in graph.structure.sources for kept in each]


def nest(named: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Inputs of a graph as arguments of the UNet."""
    arguments: dict[str, Any] = {name: each for name, each in named.items() if name not in ADDED}
    added = {name: each for name, each in named.items() if name in ADDED}
    return arguments | ({"added_cond_kwargs": added} if added else {})


def draw_inputs(
    unet: UNet2DConditionModel, *, batch: int, size: tuple[int, int], tokens: int = 77
) -> dict[str, torch.Tensor]:
    """Random inputs of a UNet by the names that graphs have for them."""
    generator = torch.Generator().manual_seed(0)
    drawn = make_inputs(unet, size=size, tokens=tokens, batch=batch, generator=generator)
    drawn |= drawn.pop("added_cond_kwargs", {})
    # Whole numbers up to a million are exact in float32, and some samplers' are not whole.
    drawn["timestep"] = drawn["timestep"].float()
    device = unet.device
    return {name: each.to(device) for name, each in drawn.items()}


@contextmanager
def open_sections(
    unet: UNet2DConditionModel, graphs: Sequence[Graph]
) -> Generator[tuple[GraphSection, ...]]:
    """The graphs as modules, while the engine is hooked into the UNet.

    Raises:
        LeansdError: the UNet follows a plan at the moment.
    """
    attached = list_followers(unet)
    if attached:
        raise LeansdError(
            f"the UNet follows plan {attached[0].source.name}: leave that `with` block, or call "
            "leansd.release_, and give the plan to export"
        )
    names = tuple(draw_inputs(unet, batch=1, size=(8, 8), tokens=1))
    training, forward = unet.training, unet.forward
    engine = Engine(unet)
    try:
        unet.eval()
        with torch.no_grad():
            yield tuple(GraphSection(engine, forward, graph, names) for graph in graphs)
    finally:
        engine.release()
        unet.train(training)


def trace(section: GraphSection, inputs: Sequence[torch.Tensor], path: Path) -> None:
    """Write the section as an ONNX file whose weights are inputs, named as in its UNet.

    Raises:
        LeansdError: something in the UNet has no counterpart in ONNX.
    """
    named = dict(zip(section.outputs, section(*inputs), strict=True))
    named |= dict(zip(section.inputs, inputs, strict=True))
    free = {name: AXES[name] if name in AXES else _free(name, each) for name, each in named.items()}
    with warnings.catch_warnings():
        # What is a number to Python is a constant to the tracer; a check at other sizes follows.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                section,
                tuple(inputs),
                path,
                dynamo=False,
                export_params=False,
                input_names=list(section.inputs),
                output_names=list(section.outputs),
                dynamic_axes=free,
                opset_version=OPSET,
                # Folded constants would be weights that no UNet has; ONNX Runtime folds them.
                do_constant_folding=False,
            )
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise LeansdError(f"the UNet cannot be written as ONNX: {reason}") from error


def _free(name: str, tensor: torch.Tensor) -> dict[int, str]:
    """The free dimensions of a feature: an image [B, C, H, W] or its pixels in a row [B, N, C]."""
    if tensor.ndim == 4:
        return {0: "batch", 2: f"height of {name}", 3: f"width of {name}"}
    return {0: "batch", 1: f"pixels of {name}"}

"""The graphs of an export: which ones a plan needs, tracing and running them, and their table.

There is one for each pattern of a plan's calls that enters the UNet. A graph takes what its
inherited units are to give and gives what later calls inherit. Of what that is made (forecasts,
guidance lanes, corrections) it knows nothing: all of it is arithmetic on few tensors, and the
runtime does it outside. Forecasts, step counts and guidance therefore share graphs, and a graph is
told by the tensors that it is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from pydantic import BaseModel, ConfigDict, ValidationError

from leansd.anatomy.inputs import make_inputs
from leansd.core.devices import seed_generator
from leansd.errors import LeansdError, read_cause
from leansd.files import check_folder
from leansd.plans.anatomy import HEAD, Anatomy
from leansd.plans.compile import Structure
from leansd.plans.liveness import Call, Kept, Pattern, find_pattern
from leansd.plans.methods import METHODS, What
from leansd.plans.plan import Plan
from leansd.plans.row import How
from leansd.runtime.compiled import write_run
from leansd.runtime.engine import Engine, list_followers

# -- the folder of an export -----------------------------------------------------------------------

TABLE = "export.json"
PLAN = "plan.json"
MODEL = "unet.onnx"
WEIGHTS = "unet.onnx.data"
VERSION = 1


class GraphEntry(BaseModel):
    """One graph: its file, and the features that go in and out, by their names in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    given: tuple[str, ...]
    kept: tuple[str, ...]


class ExportTable(BaseModel):
    """`export.json`. A change that an older reader would misunderstand raises `version`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["leansd-onnx"] = "leansd-onnx"
    version: int = VERSION
    leansd: str
    difference: float
    """The largest difference from PyTorch that was seen, see `onnx.compare`."""
    graphs: tuple[GraphEntry, ...]
    """The first computes everything."""


def name_file(place: int) -> str:
    """The file of the graph at a place of the table: `unet.onnx`, `unet-1.onnx` and so on."""
    return MODEL if place == 0 else f"unet-{place}.onnx"


def read_table(folder: Path) -> ExportTable:
    """Read and check the table of an export.

    Raises:
        LeansdError: there is none, it is damaged, from a newer version, or a file is missing.
    """
    path = folder / TABLE
    try:
        table = ExportTable.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError:
        raise LeansdError(
            f"no ONNX export in {folder}: give a folder that leansd export --to onnx has written"
        ) from None
    except (UnicodeDecodeError, ValidationError):
        raise LeansdError(f"{path} is damaged: export the UNet again") from None
    if table.version > VERSION:
        raise LeansdError(
            f"{path} has format {table.version}, this leansd reads up to {VERSION}; upgrade leansd"
        )
    for name in (WEIGHTS, *(entry.file for entry in table.graphs)):
        if not (folder / name).is_file():
            raise LeansdError(f"{folder} is incomplete: it has no {name}; export the UNet again")
    return table


def check_out(folder: Path, *, replaces: str | None = None) -> Path:
    """Say now whether `folder` can be written: it is new, empty, or holds the file `replaces`.

    Raises:
        LeansdError: it holds something else, or cannot be written to.
    """
    check_folder(folder)
    if not folder.is_dir() or (replaces is not None and (folder / replaces).is_file()):
        return folder
    held = sorted(path.name for path in folder.iterdir())
    if held:
        raise LeansdError(
            f"{folder} already holds {held[0]}: choose another output folder, or empty this one"
        )
    return folder


# -- graphs ----------------------------------------------------------------------------------------

Feature = tuple[str, What]
"""What crosses the border of a graph: a unit's output, or what it adds to its input."""


@dataclass(frozen=True)
class Graph:
    """One pattern of UNet calls as a function of tensors."""

    given: tuple[Feature, ...]
    """What comes in besides the UNet's own arguments."""
    kept: tuple[Feature, ...]
    """What comes out besides the UNet's own output."""
    pattern: Pattern = field(compare=False)

    @property
    def structure(self) -> Structure:
        """The call that this graph is, for the engine to run."""
        made: dict[str, tuple[tuple[Kept, ...], ...]] = {
            at: ((Kept(at, -1, what),),) for at, what in self.given
        }
        keeps: dict[str, tuple[Kept, ...]] = {}
        for at, what in self.kept:
            keeps[at] = (*keeps.get(at, ()), Kept(at, 0, what))
        hows: dict[str, How] = {
            at: "residual" if what == "change" else "reuse" for at, what in self.given
        }
        pattern = Pattern(
            self.pattern.computed,
            {at: hows[at] for at in self.pattern.inherited},
            self.pattern.idle,
            {at: hows[at] for at in self.pattern.parts},
            self.pattern.active,
        )
        call = Call(0, pattern, ("all",), "compute", made, keeps, frozenset())
        return Structure((self.given, self.kept), call)


def list_graphs(anatomy: Anatomy, plan: Plan | None = None) -> tuple[Graph, ...]:
    """The graph that computes everything, then the others in the order a run comes to them.

    Every graph gives all that any call of the plan reads of what it computes, so that runs that
    start late, start over or make several calls a step find in it what they need.

    Raises:
        LeansdError: the plan names what this UNet has not, decides as it runs, or has gates.
    """
    full = find_pattern(anatomy, {})
    if plan is None:
        return (Graph((), (), full),)
    if plan.drift is not None:
        raise LeansdError(
            f"plan {plan.name} decides as it runs what each picture inherits (probe "
            f"{plan.drift.probe}), which a graph cannot: export a plan without a drift"
        )
    gated = next((at for gates in plan.resolve_gates(anatomy) for at in gates), None)
    if gated is not None:
        raise LeansdError(
            f"plan {plan.name} gates {gated} from step to step, which exported graphs cannot: "
            "operate on the net instead (replace by gri), or export a plan without gates"
        )
    patterns = [find_pattern(anatomy, inherits) for inherits in plan.resolve(anatomy)]
    entering = [pattern for pattern in (full, *patterns) if HEAD not in pattern.inherited]
    # The UNet's own output is kept outside, and no graph is given it.
    read = {each for pattern in entering for each in list_given(pattern)}
    graphs = [
        Graph(list_given(each), _order(one for one in read if one[0] in each.active), each)
        for each in entering
    ]
    return tuple(dict.fromkeys(graphs))


def list_given(pattern: Pattern) -> tuple[Feature, ...]:
    """What a call with this pattern has to be given."""
    made = {**pattern.inherited, **pattern.parts}
    return _order((at, METHODS[how].of) for at, how in made.items())


def name_feature(feature: Feature) -> str:
    """The name of a graph's input or output: an address, `mid.l0.attn` or `mid.l0.attn.change`."""
    at, what = feature
    return at if what == "output" else f"{at}.{what}"


def _order(features: Iterable[Feature]) -> tuple[Feature, ...]:
    return tuple(sorted(features))


# -- tracing ---------------------------------------------------------------------------------------
# From the engine's way of running a call to an ONNX graph of it.
#
# PyTorch's tracer is used, not its newer exporter: what it makes serves every batch, size and
# number of tokens from one trace, in a tenth of the time, with every PyTorch that this package
# supports. Weights stay out of the graph; all graphs of a UNet share one file of them.

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
"""The inputs that SDXL's UNet takes as `added_cond_kwargs`."""


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
        self._run = write_run(graph.structure, engine.shapes, engine.run_lanes)

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.names, *map(name_feature, self.graph.given))

    @property
    def outputs(self) -> tuple[str, ...]:
        return (NOISE, *map(name_feature, self.graph.kept))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(self.names, tensors, strict=False))
        features = dict(zip(self.graph.given, tensors[len(self.names) :], strict=True))
        sources = self.graph.structure.sources
        given = [features[kept.unit, kept.what] for each in sources for kept in each]
        noise, made = self._run(self._forward, nest(named), given, None)
        return (noise, *made)


def nest(named: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Inputs of a graph as arguments of the UNet."""
    arguments: dict[str, Any] = {name: each for name, each in named.items() if name not in ADDED}
    added = {name: each for name, each in named.items() if name in ADDED}
    return arguments | ({"added_cond_kwargs": added} if added else {})


def draw_inputs(
    unet: UNet2DConditionModel, *, batch: int, size: tuple[int, int], tokens: int = 77
) -> dict[str, torch.Tensor]:
    """Random inputs of a UNet by the names that graphs have for them."""
    generator = seed_generator(0)
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
            raise LeansdError(f"the UNet cannot be written as ONNX: {read_cause(error)}") from error


def _free(name: str, tensor: torch.Tensor) -> dict[int, str]:
    """The free dimensions of a feature: an image [B, C, H, W] or its pixels in a row [B, N, C]."""
    if tensor.ndim == 4:
        return {0: "batch", 2: f"height of {name}", 3: f"width of {name}"}
    return {0: "batch", 1: f"pixels of {name}"}


# -- running ---------------------------------------------------------------------------------------

PACKAGES = ("onnx", "onnxruntime")


def require_packages() -> None:
    """Raises:
    LeansdError: a package that ONNX needs is not installed.
    """
    for name in PACKAGES:
        if find_spec(name) is None:
            raise LeansdError(f"ONNX needs the package {name}: pip install 'leansd[onnx]'")


class Session:
    """One ONNX file, ready to run."""

    def __init__(self, path: Path, providers: Sequence[str] | None = None) -> None:
        import onnxruntime

        known = onnxruntime.get_available_providers()
        unknown = [name for name in providers or () if name not in known]
        if unknown:
            raise LeansdError(f"ONNX Runtime has no {unknown[0]} here; it has {', '.join(known)}")
        self._path = path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised as well
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=list(providers or known)
            )
        except Exception as error:  # ONNX Runtime's own classes share no base but this
            raise LeansdError(f"ONNX Runtime cannot open {path}: {read_cause(error)}") from error
        self.inputs = tuple(each.name for each in self._session.get_inputs())
        self.outputs = tuple(each.name for each in self._session.get_outputs())

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Sequence[str]) -> list[torch.Tensor]:
        """The outputs of these names; inputs that the graph does not have are passed over."""
        feeds: dict[str, Any] = {
            name: inputs[name].detach().to("cpu", torch.float32).contiguous().numpy()
            for name in self.inputs
        }
        try:
            made = self._session.run(list(outputs), feeds)
        except Exception as error:
            raise LeansdError(
                f"ONNX Runtime cannot run {self._path}: {read_cause(error)}"
            ) from error
        device = inputs["sample"].device
        return [torch.from_numpy(each).to(device) for each in made]

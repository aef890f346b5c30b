"""A UNet, or all that a plan makes of it, as files for ONNX Runtime: written, checked, and run.

The weights are in one file beside the graphs, which may be larger than ONNX's 2 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy.reading import read_anatomy
from leansd.cards import Card, write_card
from leansd.core.devices import start_stopwatch
from leansd.errors import LeansdError
from leansd.exporting.graphs import (
    ADDED,
    AXES,
    NOISE,
    PLAN,
    ROOT,
    TABLE,
    WEIGHTS,
    ExportTable,
    GraphEntry,
    GraphSection,
    Session,
    draw_inputs,
    list_given,
    list_graphs,
    name_feature,
    name_file,
    open_sections,
    read_table,
    require_packages,
    trace,
)
from leansd.files import writing
from leansd.loading import load_outline
from leansd.plans.anatomy import HEAD
from leansd.plans.liveness import GUIDANCE, Kept
from leansd.plans.plan import Plan
from leansd.runtime.arguments import UNetArguments
from leansd.runtime.call import UNetCall
from leansd.runtime.guidance import run_step, wrap_output
from leansd.runtime.report import Report
from leansd.runtime.run import Follower
from leansd.version import __version__

OnExport: TypeAlias = Callable[[str, int, int], None]
"""`(what is being done, stages done, stages in all)`."""

TRACED = (2, (11, 13))
"""Batch and size of the latents that graphs are traced at: no level of the UNet has equal sides,
and none halves evenly, so that nothing is taken for a constant that is none."""
CHECKED = ((1, (16, 24)), (3, (10, 15)))
"""Batches and sizes that every graph is checked at."""
TOLERANCE = 1e-3
"""The largest difference that is let through, in units of the tensor's largest value if above 1."""
ALIGNMENT = 64
"""Bytes: weights start at multiples of it, as mapped memory likes."""


def write_onnx(
    unet: UNet2DConditionModel,
    folder: Path,
    plan: Plan | None,
    card: Card,
    tell: OnExport,
) -> float:
    """Write `unet` and the graphs that `plan` needs into `folder`; gives the largest difference.

    Raises:
        LeansdError: a package is missing, the UNet or the plan cannot be written as ONNX, or ONNX
            Runtime gives something else than PyTorch.
    """
    require_packages()
    _check(unet)
    graphs = list_graphs(read_anatomy(unet), plan)
    with writing(folder) as draft, open_sections(unet, graphs) as sections:
        draft.mkdir()
        _write_graphs(draft, sections, tell)
        difference = _check_graphs(draft, sections, tell)
        entries = tuple(
            GraphEntry(
                file=name_file(place),
                given=tuple(map(name_feature, graph.given)),
                kept=tuple(map(name_feature, graph.kept)),
            )
            for place, graph in enumerate(graphs)
        )
        table = ExportTable(leansd=__version__, difference=difference, graphs=entries)
        (draft / TABLE).write_text(table.model_dump_json(indent=1) + "\n", encoding="utf-8")
        unet.save_config(draft)
        if plan is not None:
            plan.save(draft / PLAN)
        write_card(draft, card, unet)
    return difference


def _check(unet: UNet2DConditionModel) -> None:
    """Refuse what the graphs' inputs cannot say."""
    config: Any = unet.config
    conditions = {
        "class_embed_type": config.class_embed_type,
        "num_class_embeds": config.num_class_embeds,
        "time_cond_proj_dim": config.time_cond_proj_dim,
        "encoder_hid_dim_type": config.encoder_hid_dim_type,
    }
    for name, value in conditions.items():
        if value is not None:
            raise LeansdError(f"the UNet has {name} {value!r}, which export to ONNX does not know")
    if config.addition_embed_type not in (None, "text_time"):
        raise LeansdError(
            f"the UNet has addition_embed_type {config.addition_embed_type!r}; export to ONNX "
            "knows SDXL's text_time only"
        )
    if unet.dtype != torch.float32:
        raise LeansdError(f"the UNet is in {unet.dtype}: export it in float32 (unet.float())")


def _write_graphs(folder: Path, sections: Sequence[GraphSection], tell: OnExport) -> None:
    stages = 1 + 2 * len(sections)
    tell("writing the weights", 0, stages)
    weights = {ROOT + name: each for name, each in sections[0].unet.state_dict().items()}
    places = write_weights(folder / WEIGHTS, weights)
    inputs = _draw_all(sections[0], *TRACED)
    for place, section in enumerate(sections):
        tell(f"tracing {name_file(place)}", 1 + place, stages)
        path = folder / name_file(place)
        trace(section, [inputs[name] for name in section.inputs], path)
        bind_weights(path, weights, places)


def _check_graphs(folder: Path, sections: Sequence[GraphSection], tell: OnExport) -> float:
    """The largest difference between ONNX Runtime and PyTorch in all graphs."""
    every = [_draw_all(sections[0], *at) for at in CHECKED]
    worst, count = 0.0, len(sections)
    for place, section in enumerate(sections):
        tell(f"checking {name_file(place)}", 1 + count + place, 1 + 2 * count)
        session = Session(folder / name_file(place), ["CPUExecutionProvider"])
        worst = max(worst, *(compare(section, session, inputs) for inputs in every))
    return worst


def _draw_all(full: GraphSection, batch: int, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Random inputs of the UNet, and features like those that the full graph makes of them.

    They have the other sign, so that a graph that made them itself would be seen.
    """
    inputs = draw_inputs(full.unet, batch=batch, size=size)
    made = full(*(inputs[name] for name in full.inputs))
    return inputs | {name: -each for name, each in zip(full.outputs, made, strict=True)}


def compare(section: GraphSection, session: Session, inputs: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between the two on these inputs.

    Raises:
        LeansdError: it is above `TOLERANCE`; the message names the output.
    """
    wanted = section(*(inputs[name] for name in section.inputs))
    found = session.run(inputs, section.outputs)
    worst = 0.0
    for name, ours, theirs in zip(section.outputs, wanted, found, strict=True):
        if ours.shape != theirs.shape:
            raise LeansdError(
                f"ONNX Runtime gives {name} the shape {tuple(theirs.shape)}, PyTorch "
                f"{tuple(ours.shape)}, at latents {tuple(inputs['sample'].shape)}"
            )
        difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1))
        if not difference <= TOLERANCE:
            raise LeansdError(
                f"ONNX Runtime and PyTorch differ by {difference:.1e} in {name}, at latents "
                f"{tuple(inputs['sample'].shape)}; at most {TOLERANCE:g} is let through"
            )
        worst = max(worst, difference)
    return worst


class WeightRange(NamedTuple):
    """Where a tensor lies in the file of weights, in bytes."""

    offset: int
    length: int


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, WeightRange]:
    """Write tensors one after the other; says where each lies."""
    places: dict[str, WeightRange] = {}
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            file.write(bytes(-file.tell() % ALIGNMENT))
            data = tensor.detach().cpu().contiguous().numpy()
            places[name] = WeightRange(file.tell(), data.nbytes)
            file.write(data.data)
    return places


def bind_weights(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    places: Mapping[str, WeightRange],
) -> None:
    """Make constants, found in the file of weights, of those inputs that are weights."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    used = {name for node in graph.node for name in node.input}
    inputs = list(graph.input)
    del graph.input[:]
    for each in inputs:
        if each.name not in tensors:
            graph.input.append(each)
        elif each.name in used:
            constant = graph.initializer.add()
            constant.CopyFrom(_describe(each.name, tensors[each.name], places[each.name]))
    path.write_bytes(model.SerializeToString())


def _describe(name: str, tensor: torch.Tensor, place: WeightRange) -> Any:
    import onnx

    described = onnx.TensorProto(
        name=name,
        dims=tensor.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(tensor.detach().cpu().numpy().dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in {"location": WEIGHTS, **place._asdict()}.items():
        described.external_data.add(key=key, value=str(value))
    return described


# -- running ---------------------------------------------------------------------------------------


def load_onnx(
    folder: str | Path, pipe: Any | None = None, *, providers: Sequence[str] | None = None
) -> OnnxUNet:
    """An exported UNet, to be put in a pipeline: `pipe.unet = leansd.load_onnx(folder, pipe)`.

    Args:
        folder: what `leansd.export(..., to="onnx")` wrote.
        pipe: the pipeline that will call it, whose scheduler lays out the runs; without one, a run
            starts where the time step rises.
        providers: execution providers of ONNX Runtime; all it has by default.

    Raises:
        LeansdError: the folder holds no export, or ONNX Runtime is missing or cannot open it.
    """
    require_packages()
    home = Path(folder).expanduser()
    table = read_table(home)
    plan = Plan.load(home / PLAN) if (home / PLAN).is_file() else None
    sessions = {entry.given: Session(home / entry.file, providers) for entry in table.graphs}
    return OnnxUNet(load_outline(home), sessions, plan, pipe)


class OnnxUNet:
    """A UNet run by ONNX Runtime, called as pipelines call a `UNet2DConditionModel`."""

    def __init__(
        self,
        outline: UNet2DConditionModel,
        sessions: Mapping[tuple[str, ...], Session],
        plan: Plan | None = None,
        pipe: Any | None = None,
    ) -> None:
        self.config = outline.config
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.plan = plan
        width = outline.config.get("projection_class_embeddings_input_dim")
        # SDXL's pipelines ask the module itself for the width of their added conditions.
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
        self._sessions = sessions
        self._follower = Follower(outline, pipe, plan) if plan is not None else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The UNet's output for `sample` [B, C, H, W], as its own forward returns it.

        Raises:
            LeansdError: an argument is given that the graphs do not take, such as the residuals of
                a ControlNet, or the plan is for another number of steps.
        """
        follower, arguments = self._follower, _bind(*args, **kwargs)
        step = follower.start_call(arguments) if follower is not None else None
        if follower is None or step is None:
            return self._run_whole(arguments)
        ((own, _),) = step.split(arguments.sample)
        stop = start_stopwatch(arguments.sample.device)
        try:
            output = run_step(step, arguments, partial(self._run_graph, own))
        except BaseException:
            follower.abort()
            raise
        follower.end_call(step, output[0], stop())
        return output

    def report(self) -> Report:
        """What the last run did, kept and gained.

        Raises:
            LeansdError: it was exported without a plan, or nothing has run yet.
        """
        if self._follower is None:
            raise LeansdError("exported without a plan: every call computes everything")
        return self._follower.report()

    def _reset_stateful_cache(self) -> None:
        """What pipelines call at the end of a call: keep nothing."""
        if self._follower is not None and self._follower.pipe is not None:
            self._follower.end_run()

    def _run_whole(self, arguments: UNetArguments) -> Any:
        (noise,) = self._sessions[()].run(_flatten(arguments.named), [NOISE])
        return wrap_output(noise.to(arguments.sample.dtype), arguments)

    def _run_graph(self, step: UNetCall, *args: Any, **kwargs: Any) -> Any:
        """What the UNet's forward returns in this call; what the call keeps goes to the cache."""
        arguments = UNetArguments.bind(args, kwargs)
        given = {
            name_feature(each): step.fill_lanes(each[0]) for each in list_given(step.call.pattern)
        }
        keeps = [kept for at in step.call.keeps if at != GUIDANCE for kept in step.list_keeps(at)]
        inside = dict.fromkeys(_name(kept) for kept in keeps if kept.unit != HEAD)
        session = self._sessions[tuple(given)]
        noise, *made = session.run(_flatten(arguments.named) | given, [NOISE, *inside])
        noise = noise.to(arguments.sample.dtype)
        features = dict(zip(inside, made, strict=True))
        for kept in keeps:
            if kept.unit == HEAD:  # the UNet's own output is no feature of the graph
                rows = (step.pick(each, kept.lane) for each in (noise, step.latents))
                step.keep_output(kept, *rows)
            else:
                step.store.put(kept, step.pick(features[_name(kept)], kept.lane).clone())
        return wrap_output(noise, arguments)


def _name(kept: Kept) -> str:
    return name_feature((kept.unit, kept.what))


def _bind(*args: Any, **kwargs: Any) -> UNetArguments:
    """The arguments of a call, without those that are None.

    Raises:
        LeansdError: one is given that no graph takes.
    """
    given = UNetArguments.bind(args, kwargs).named
    arguments = {name: each for name, each in given.items() if each is not None}
    added = arguments.get("added_cond_kwargs") or {}
    known = (*AXES, "added_cond_kwargs", "return_dict")
    refused = [name for name, each in arguments.items() if name not in known and each != {}]
    refused += [name for name, each in added.items() if name not in ADDED and each is not None]
    if refused:
        raise LeansdError(
            f"an exported UNet takes no {refused[0]}: use the pipeline with its own UNet for that"
        )
    return UNetArguments({name: arguments[name] for name in known if name in arguments})


def _flatten(arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Arguments of the UNet as inputs of a graph.

    Raises:
        LeansdError: the time steps of a batch differ.
    """
    times = torch.as_tensor(arguments["timestep"], dtype=torch.float32).flatten()
    if (times != times[0]).any():
        raise LeansdError("an exported UNet takes one time step for the whole batch")
    return {
        "sample": arguments["sample"],
        "timestep": times[0],
        "encoder_hidden_states": arguments["encoder_hidden_states"],
        **(arguments.get("added_cond_kwargs") or {}),
    }

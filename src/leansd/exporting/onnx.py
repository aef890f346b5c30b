"""A UNet, or all that a plan makes of it, as files for ONNX Runtime, checked against PyTorch.

The weights are in one file beside the graphs, which may be larger than ONNX's 2 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from diffusers import UNet2DConditionModel

from leansd.anatomy.reading import read_anatomy
from leansd.errors import LeansdError
from leansd.exporting.folder import (
    PLAN,
    TABLE,
    WEIGHTS,
    ExportTable,
    GraphEntry,
    name_file,
)
from leansd.exporting.graphs import (
    ROOT,
    Graph,
    GraphSection,
    Session,
    draw_inputs,
    list_graphs,
    name_feature,
    open_sections,
    require_packages,
    trace,
)
from leansd.files import writing
from leansd.plans.plan import Plan
from leansd.version import __version__

OnExport: TypeAlias = Callable[[str, int, int], None]
"""`(what is being done, stages done, stages in all)`."""

TRACED = (2, (11, 13))
"""Batch and size of the latents that graphs are traced at: no level of the UNet has equal sides,
and none halves evenly, so that nothing is taken for a constant that is none."""
CHECKED = ((1, (16, 24)), (3, (10, 15)))
"""Those that every graph is checked at."""
TOLERANCE = 1e-3
"""The largest difference that is let through, in units of the tensor's largest value if above 1."""
ALIGNMENT = 64
"""Bytes: weights start at multiples of it, as mapped memory likes."""


def write_onnx(
    unet: UNet2DConditionModel,
    folder: Path,
    plan: Plan | None,
    tell: OnExport,
    describe: Callable[[Path, UNet2DConditionModel], object] = lambda folder, unet: None,
) -> float:
    """Write `unet` and the graphs that `plan` needs into `folder`; gives the largest difference.

    Args:
        describe: writes what else belongs into the folder.

    Raises:
        LeansdError: a package is missing, the UNet or the plan cannot be written as ONNX, or ONNX
            Runtime gives something else than PyTorch.
    """
    require_packages()
    _check(unet)
    graphs = list_graphs(read_anatomy(unet), plan)
    with writing(folder) as draft, open_sections(unet, graphs) as sections:
        draft.mkdir()
        job = _Job(draft, sections, tell)
        job.write()
        difference = job.check()
        entries = tuple(_make_entry(place, graph) for place, graph in enumerate(graphs))
        table = ExportTable(leansd=__version__, difference=difference, graphs=entries)
        (draft / TABLE).write_text(table.model_dump_json(indent=1) + "\n", encoding="utf-8")
        unet.save_config(draft)
        if plan is not None:
            plan.save(draft / PLAN)
        describe(draft, unet)
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


def _make_entry(place: int, graph: Graph) -> GraphEntry:
    given, kept = ([name_feature(each) for each in some] for some in (graph.given, graph.kept))
    return GraphEntry(file=name_file(place), given=tuple(given), kept=tuple(kept))


@dataclass
class _Job:
    """Writing and checking some graphs of one UNet."""

    folder: Path
    sections: Sequence[GraphSection]
    """The first computes everything, and so gives what the others are given."""
    tell: OnExport
    done: int = 0

    def write(self) -> None:
        self._begin("writing the weights")
        unet = self.sections[0].unet
        weights = {ROOT + name: each for name, each in unet.state_dict().items()}
        places = write_weights(self.folder / WEIGHTS, weights)
        inputs = self._draw(*TRACED)
        for place, section in enumerate(self.sections):
            self._begin(f"tracing {name_file(place)}")
            path = self.folder / name_file(place)
            trace(section, [inputs[name] for name in section.inputs], path)
            bind_weights(path, weights, places, WEIGHTS)

    def check(self) -> float:
        """The largest difference between ONNX Runtime and PyTorch in all graphs."""
        every = [self._draw(*at) for at in CHECKED]
        worst = 0.0
        for place, section in enumerate(self.sections):
            self._begin(f"checking {name_file(place)}")
            session = Session(self.folder / name_file(place), ["CPUExecutionProvider"])
            worst = max(worst, *(compare(section, session, inputs) for inputs in every))
        return worst

    def _draw(self, batch: int, size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Random inputs of the UNet, and features like those that it makes of them.

        They have the other sign, so that a graph that made them itself would be seen.
        """
        full = self.sections[0]
        inputs = draw_inputs(full.unet, batch=batch, size=size)
        made = full(*(inputs[name] for name in full.inputs))
        return inputs | {name: -each for name, each in zip(full.outputs, made, strict=True)}

    def _begin(self, stage: str) -> None:
        self.tell(stage, self.done, 1 + 2 * len(self.sections))
        self.done += 1


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
    location: str,
) -> None:
    """Make constants, found in the file `location`, of those inputs that are weights."""
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
            constant.CopyFrom(_describe(each.name, tensors[each.name], places[each.name], location))
    path.write_bytes(model.SerializeToString())


def _describe(name: str, tensor: torch.Tensor, place: WeightRange, location: str) -> Any:
    import onnx

    described = onnx.TensorProto(
        name=name,
        dims=tensor.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(tensor.detach().cpu().numpy().dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in {"location": location, **place._asdict()}.items():
        described.external_data.add(key=key, value=str(value))
    return described

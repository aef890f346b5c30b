"""ONNX files with their weights in one file beside them, which may be larger than ONNX's 2 GB."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch

ALIGNMENT = 64
"""Bytes: weights start at multiples of it, as mapped memory likes."""


class Place(NamedTuple):
    """Where a tensor lies in the file of weights, in bytes."""

    offset: int
    length: int


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Place]:
    """Write tensors one after the other; says where each lies."""
    places: dict[str, Place] = {}
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            file.write(bytes(-file.tell() % ALIGNMENT))
            data = tensor.detach().cpu().contiguous().numpy()
            places[name] = Place(file.tell(), data.nbytes)
            file.write(data.data)
    return places


def bind_weights(
    path: Path, tensors: Mapping[str, torch.Tensor], places: Mapping[str, Place], location: str
) -> None:
    """Make constants, found in the file `location`, of those inputs that are weights."""
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


def _describe(name: str, tensor: torch.Tensor, place: Place, location: str) -> Any:
    described = onnx.TensorProto(
        name=name,
        dims=tensor.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(tensor.detach().cpu().numpy().dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in {"location": location, **place._asdict()}.items():
        described.external_data.add(key=key, value=str(value))
    return described

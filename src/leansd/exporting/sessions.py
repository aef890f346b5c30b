"""ONNX Runtime: opening graphs and running them on torch tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from leansd.errors import LeansdError

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
            raise LeansdError(f"ONNX Runtime cannot open {path}: {_first(error)}") from error
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
            raise LeansdError(f"ONNX Runtime cannot run {self._path}: {_first(error)}") from error
        device = inputs["sample"].device
        return [torch.from_numpy(each).to(device) for each in made]


def _first(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

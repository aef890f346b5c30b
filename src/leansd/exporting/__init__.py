"""Nets as files that run elsewhere: in stock diffusers, or in ONNX Runtime with their plan."""

from leansd.exporting.exporter import Exported, export
from leansd.exporting.onnx import OnnxUNet, load_onnx

__all__ = ["Exported", "OnnxUNet", "export", "load_onnx"]

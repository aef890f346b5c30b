"""A double of what the nodes' classes use of ComfyUI's API: kinds of inputs, schemas, outputs."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfyui.double import Guider

OPTIONS = {
    "tooltip", "optional", "default", "options", "min", "max", "step", "control_after_generate",
    "display_name",
}  # fmt: skip


def make_kind(name: str) -> Any:
    """A kind of value, whose inputs and outputs are plain data."""

    def make(*given: Any, **options: Any) -> SimpleNamespace:
        assert options.keys() <= OPTIONS, options
        assert len(given) < 2
        return SimpleNamespace(kind=name, id=given[0] if given else "", options=options)

    return SimpleNamespace(name=name, Input=make, Output=make)


class Schema(SimpleNamespace):
    def __init__(
        self, *, node_id: str, display_name: str, category: str, description: str, inputs: Any,
        outputs: Any, is_output_node: bool = False, not_idempotent: bool = False, hidden: Any = (),
    ) -> None:  # fmt: skip
        super().__init__(**{k: v for k, v in locals().items() if k not in ("self", "__class__")})


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class ComfyNode:
    hidden: Any = None

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        return cls.define_schema()  # type: ignore[attr-defined]


KINDS = ("Model", "Conditioning", "Sampler", "Sigmas", "Latent", "Float", "Int", "Combo", "String",
         "Image", "Vae", "Clip")  # fmt: skip


class ProgressBar:
    """Keeps how far the last one came."""

    shown: list[int] = []  # noqa: RUF012 - as ComfyUI's, of everybody's

    def __init__(self, total: int) -> None:
        assert total == 1000
        self.shown.clear()

    def update_absolute(self, value: int) -> None:
        self.shown.append(value)


def sample_custom(
    model: Any, noise: Any, cfg: float, sampler: Any, sigmas: Any, positive: Any, negative: Any,
    latent: Any, *, noise_mask: Any, callback: Any, disable_pbar: bool, seed: int,
) -> torch.Tensor:  # fmt: skip
    return Guider(model, positive, negative, cfg).sample(noise, sampler, sigmas, latent, seed)


def prepare_noise(latent: torch.Tensor, seed: int, places: Any) -> torch.Tensor:
    return torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))


class Server:
    """ComfyUI's server, which keeps what is shown on the nodes of the page."""

    def __init__(self) -> None:
        self.shown: dict[str, str] = {}

    def send_progress_text(self, text: str, node_id: str) -> None:
        self.shown[node_id] = text


def put_modules(patch: pytest.MonkeyPatch, user: Path) -> None:
    """Let ComfyUI's modules be there for an import, with a user's folder."""
    server = Server()
    io = SimpleNamespace(
        Hidden=SimpleNamespace(unique_id="UNIQUE_ID"),
        Schema=Schema, NodeOutput=NodeOutput, ComfyNode=ComfyNode, Custom=make_kind,
        **{name: make_kind(name) for name in KINDS},
    )  # fmt: skip
    there: dict[str, dict[str, Any]] = {
        "folder_paths": {"get_user_directory": lambda: str(user)},
        "comfy_api": {},
        "comfy_api.latest": {
            "ComfyExtension": type("ComfyExtension", (), {}),
            "io": io,
            "ui": SimpleNamespace(PreviewText=lambda text: text),
        },
        "comfy": {},
        "comfy.latent_formats": {"LatentFormat": object},
        "comfy.ldm": {},
        "comfy.ldm.modules": {},
        "comfy.ldm.modules.attention": {"CrossAttention": object},
        "comfy.model_base": {},
        "comfy.model_management": {"throw_exception_if_processing_interrupted": lambda: None},
        "comfy.model_patcher": {},
        "comfy.supported_models": {"SD15": object},
        "comfy.sample": {
            "fix_empty_latent_channels": lambda model, latent: latent,
            "prepare_noise": prepare_noise,
            "sample_custom": sample_custom,
        },
        "comfy.utils": {"PROGRESS_BAR_ENABLED": False, "ProgressBar": ProgressBar},
        "latent_preview": {"prepare_callback": lambda model, steps: None},
        "server": {"PromptServer": SimpleNamespace(instance=server)},
    }
    for name, holds in there.items():
        module = types.ModuleType(name)
        vars(module).update(holds)
        patch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)

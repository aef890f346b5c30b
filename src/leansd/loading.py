"""Opening a model: the embedded one, a folder, a single file or a hub id.

Only safetensors are read, so nothing a stranger wrote is ever unpickled.
"""

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from logging.handlers import MemoryHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from leansd.emoji.location import EMBEDDED, model_folder, net_folder
from leansd.errors import LeansdError, read_cause
from leansd.model_files import INDEX, check_file, describe_folder, find_snapshot, read_folder
from leansd.runtime.context import find_transformer
from leansd.runtime.samplers import name_sampler
from leansd.surgery.checkpoints import (
    build_outline,
    find_variant,
    open_delta,
    open_unet,
    share_weights,
)

NETS = {"emoji-light": "light", "emoji-lean": "lean"}
"""The embedded model's further UNets for `load_unet`, and the folders in it that they lie in."""
FORMS = (
    f"give {EMBEDDED!r}, a folder in the diffusers layout, a .safetensors file, "
    "or a hub id such as owner/name"
)

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny
AUTOENCODERS: dict[str, type[Autoencoder]] = {
    each.__name__: each for each in (AutoencoderKL, AutoencoderTiny)
}

# What the loaders raise for a model that is missing, unreachable, incomplete or damaged.
_FAILURES = (OSError, ValueError, SafetensorError, KeyError, RuntimeError)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A weight that only an SDXL checkpoint in the original layout has.
_SDXL_KEY = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"


def load(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> DiffusionPipeline:
    """Open a text-to-image pipeline, ready to use.

    Args:
        model: `emoji` (embedded), a folder, a `.safetensors` file or a hub id.
        device: by default the GPU where there is one.
        dtype: by default float16 on a GPU and float32 elsewhere.

    Raises:
        LeansdError: there is no such model or device, it cannot be read, holds anything but
            safetensors, or has neither a `UNet2DConditionModel` nor a transformer.
    """
    device = find_device(device)
    dtype = dtype or find_dtype(device)
    where = locate(model)
    if isinstance(where, str):
        pipe = _load_from_hub(where, dtype)
    elif where.is_dir():
        pipe = _load_folder(where, dtype, quiet=str(model) == EMBEDDED)
    else:
        pipe = _load_file(where, dtype)
    if find_transformer(pipe) is None:
        _require_unet(pipe, model)
    if str(model) == EMBEDDED:
        pipe.set_progress_bar_config(disable=True)
    if pipe.dtype != dtype:  # releases of diffusers before `dtype=` pass it over
        pipe.to(dtype)
    return pipe.to(device)


def load_with_unet(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> DiffusionPipeline:
    """As `load`, for what works on UNets: a transformer as the denoiser is refused."""
    pipe = load(model, device=device, dtype=dtype)
    _require_unet(pipe, model)
    return pipe


def has_transformer(model: str | Path) -> bool:
    """Whether a transformer denoises in a model, by its index alone."""
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            file = (find_snapshot(path) or path) / INDEX
        elif isinstance(model, str) and _HUB_ID.fullmatch(model):
            file = Path(hf_hub_download(model, INDEX))
        else:
            return False
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever opens it says what is wrong
        return False
    return "transformer" in told and "unet" not in told


def load_outline(model: str | Path) -> UNet2DConditionModel:
    """The UNet of a model on the meta device: its whole shape, read from its config alone.

    Args:
        model: what `load` opens, or the folder of a UNet by itself.
    """
    require_name(model)
    if str(model) in NETS:
        model = net_folder(NETS[str(model)])
    if is_unet_folder(model):
        return _build_outline(Path(model).expanduser() / "config.json", model)
    where = locate(model)
    if isinstance(where, Path) and where.is_file():
        # A single file has no config to read, so it is opened whole.
        return load(where, device="cpu").unet.to("meta")
    name = "unet/config.json"
    try:
        file = where / name if isinstance(where, Path) else Path(hf_hub_download(where, name))
    except (OSError, ValueError) as error:
        raise LeansdError(_explain(where, error)) from error
    return _build_outline(file, where)


def read_sampler(model: str | Path) -> str:
    """The short name of a model's sampler, from its config alone; empty where nothing says it.

    A UNet's folder and a single file have none.
    """
    name = "scheduler/scheduler_config.json"
    try:
        where = locate(model)
        file = Path(where) / name if isinstance(where, Path) else Path(hf_hub_download(where, name))
        config = json.loads(file.read_text(encoding="utf-8"))
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    except (OSError, ValueError, KeyError, AttributeError):
        return ""
    return name_sampler(SimpleNamespace(scheduler=scheduler))  # pyright: ignore[reportArgumentType]


def is_unet_folder(model: str | Path) -> bool:
    """Whether it is the folder of a UNet by itself, without the rest of a model."""
    folder = Path(model).expanduser()
    return (folder / "config.json").is_file() and not (folder / INDEX).is_file()


def _build_outline(file: Path, model: str | Path) -> UNet2DConditionModel:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LeansdError(_explain(model, error)) from error
    return build_outline(config, f"the UNet of {model}")


def load_unet(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    beside: UNet2DConditionModel | None = None,
) -> UNet2DConditionModel:
    """Open a UNet by itself, plain or operated, as `save_pretrained` wrote it.

    Args:
        folder: that of a UNet, or of a whole model, whose `unet` is taken; `emoji-light` and
            `emoji-lean` for the embedded model's light UNets.
        device: by default the GPU where there is one.
        dtype: by default float16 on a GPU and float32 elsewhere.
        beside: a UNet to stand beside, on its device and in its precision; what the two have in
            common is held once. For nets that take turns, not for training.

    Raises:
        LeansdError: there is none, or its config does not describe its weights; the message names
            the address; or it is to stand beside a UNet of another device or precision than is
            asked for. Weights are only read when they fit.
    """
    if beside is not None:
        _check_beside(beside, device, dtype)
        unet = load_unet(folder, device="cpu", dtype=beside.dtype)
        share_weights(unet, beside)
        return unet
    device = find_device(device)
    dtype = dtype or find_dtype(device)
    require_name(folder)
    if str(folder) in (EMBEDDED, *NETS):
        with silent_loading():
            own: Any = open_unet(model_folder() / "unet", dtype)
        if str(folder) != EMBEDDED:
            own = open_delta(net_folder(NETS[str(folder)]), own)
        return own.to(device)
    home = Path(folder).expanduser()
    home = find_snapshot(home) or home
    if (home / INDEX).is_file():
        home = home / "unet"
    try:
        with silent_loading(), _held_back_logs():
            unet: Any = open_unet(home, dtype)
            return unet.to(device)
    except _FAILURES as error:
        if isinstance(error, LeansdError):
            raise
        raise LeansdError(f"cannot open the UNet in {home}: {read_cause(error)}") from error


def _check_beside(
    beside: UNet2DConditionModel, device: str | torch.device | None, dtype: torch.dtype | None
) -> None:
    """Refuse to stand beside a UNet that is elsewhere, or otherwise, than is asked for."""
    asked = None if device is None else find_device(device)
    there = beside.device
    is_there = asked is None or (
        asked.type == there.type and (asked.index is None or asked.index == there.index)
    )
    if not is_there or dtype not in (None, beside.dtype):
        raise LeansdError(
            f"the UNet that it is to stand beside is on {there} in {beside.dtype}, and what the "
            "two have in common is held once: leave device and dtype out, or open it without beside"
        )


def load_vae(folder: str | Path, *, dtype: torch.dtype | None = None) -> Autoencoder:
    """Open a trained autoencoder to put in a pipeline's place of its own (see `set_vae`).

    Args:
        folder: that of an `AutoencoderKL` or `AutoencoderTiny` in the diffusers layout, or of a
            whole model, whose `vae` is taken.
    """
    home = Path(folder).expanduser()
    if (home / INDEX).is_file():
        home = home / "vae"
    file = home / "config.json"
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("_class_name", "model")
    except (OSError, ValueError) as error:
        raise LeansdError(
            f"no autoencoder in {folder}: give a folder with config.json and safetensors "
            f"weights of an {' or '.join(AUTOENCODERS)}"
        ) from error
    if name not in AUTOENCODERS:
        raise LeansdError(f"{folder} holds a {name}, not an {' or '.join(AUTOENCODERS)}")
    found = find_variant(home, what=f"the autoencoder in {folder}")
    try:
        with silent_loading(), _held_back_logs():
            vae: Any = AUTOENCODERS[name].from_pretrained(
                home,
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=dtype,
                variant=None if None in found else found[0],
            )
    except _FAILURES as error:
        raise LeansdError(
            f"cannot open the autoencoder in {folder}: {read_cause(error)}"
        ) from error
    return vae.eval()


def set_vae(pipe: DiffusionPipeline, vae: Autoencoder) -> None:
    """Let a pipeline encode and decode with another autoencoder.

    Raises:
        LeansdError: it is for latents of another kind.
    """
    check_vae(pipe, vae)
    given: Any = vae  # its `to` is wrapped in a way that type checkers do not read
    pipe.register_modules(vae=given.to(device=pipe.device, dtype=pipe.dtype))


def check_vae(pipe: DiffusionPipeline, vae: Autoencoder) -> None:
    """Refuse an autoencoder that is for latents of another kind than the pipeline's."""
    ours, theirs = _describe_latents(pipe.vae), _describe_latents(vae)
    if ours != theirs:
        raise LeansdError(
            f"this autoencoder decodes {theirs[0]} channels to {theirs[1]} times the side, the "
            f"model's own {ours[0]} channels to {ours[1]} times; give one of the model's family"
        )


def _describe_latents(vae: Autoencoder) -> tuple[int, int]:
    """Channels, and pixels per latent pixel a side."""
    config: Any = vae.config
    return config.latent_channels, 2 ** (len(config.block_out_channels) - 1)


def as_image_to_image(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The image-to-image pipeline that shares every part of a text-to-image pipeline."""
    try:
        other = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        name = type(pipe).__name__
        raise LeansdError(f"{name} has no image-to-image form; leave --init out") from error
    other.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return other


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device that is meant, if it is there; by default the GPU where there is one.

    Raises:
        LeansdError: it is not there, or not known; the message says what this machine has.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None:
        return torch.device(next(name for name, present in has.items() if present))
    there = ", ".join(name for name, present in has.items() if present)
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise LeansdError(f"no device {device!r}: this machine has {there}") from error
    if found.type not in (*has, "meta"):
        module: Any = getattr(torch, found.type, None)  # xpu, npu and whatever else PyTorch has
        has[found.type] = module is not None and module.is_available()
    if not has.get(found.type, True):
        why = ""
        if found.type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
            why = "; the PyTorch that is installed is built for the CPU alone"
        raise LeansdError(f"no device {str(device)!r} here: this machine has {there}{why}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise LeansdError(f"no device {str(device)!r} here: this machine has {count} GPU(s)")
    return found


def find_dtype(device: torch.device) -> torch.dtype:
    """The precision that models are opened in where none is asked for."""
    return torch.float16 if device.type == "cuda" else torch.float32


def locate(model: str | Path) -> Path | str:
    """Where a model is: a folder or file on this machine, or else the hub id it must be."""
    require_name(model)
    text = str(model)
    if text == EMBEDDED:
        return model_folder()
    path = Path(text).expanduser()
    path = path.parent if path.name == INDEX and path.is_file() else path
    if text and path.is_dir():
        path = find_snapshot(path) or path
        if not (path / INDEX).is_file():
            what = describe_folder(path)
            raise LeansdError(what or f"{path} is not a model: it has no {INDEX}; {FORMS}")
        return path
    if path.is_file():
        if path.suffix != ".safetensors":
            raise LeansdError(
                f"{path} is not a .safetensors file: other formats may run code when they are "
                "opened, so convert it first"
            )
        return path
    if isinstance(model, str) and _HUB_ID.fullmatch(text):
        return text
    raise LeansdError(f"no model {text!r}: {FORMS}")


def require_name(model: object) -> None:
    """Refuse what is no name and no place, as a model that is open already.

    Raises:
        LeansdError: it is.
    """
    if not isinstance(model, str | os.PathLike):
        raise LeansdError(
            "a model is opened by its name, its folder or its file; this is a "
            + type(model).__name__
        )


@contextmanager
def silent_loading() -> Iterator[None]:
    """No progress bars of diffusers and transformers while a model is opened."""
    theirs = (diffusers.utils.logging, transformers_logging)
    shown = [library for library in theirs if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _load_folder(folder: Path, dtype: torch.dtype, *, quiet: bool) -> DiffusionPipeline:
    contents = read_folder(folder)
    options: dict[str, Any] = dict.fromkeys(contents.absent)
    if has_transformer(folder):
        # Text encoders that were left out, which diffusers wants to be told.
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        options |= {name: None for name, entry in index.items() if entry == [None, None]}
    if "safety_checker" in contents.absent:
        options["requires_safety_checker"] = False
    if contents.variant is not None:
        options["variant"] = contents.variant
    try:
        with _held_back_logs(drop=quiet), silent_loading() if quiet else nullcontext():
            pipe = _open(folder, dtype, local_files_only=True, **options)
    except _FAILURES as error:
        raise LeansdError(_explain(folder, error)) from error
    if contents.absent:
        names = " and ".join(contents.absent)
        warnings.warn(f"{folder} names {names} and has none: opened without", stacklevel=3)
    return pipe


@contextmanager
def _held_back_logs(*, drop: bool = False) -> Iterator[None]:
    """Hold back what diffusers and transformers log, until all is well or for good.

    Where opening fails, our sentence is all that is said. The embedded model's remarks are dropped:
    diffusers remarks on a small autoencoder that is as it should be.
    """
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    own = {logger: logger.handlers for logger in loggers}
    held: list[MemoryHandler] = []
    for logger, handlers in own.items():
        holding = [MemoryHandler(sys.maxsize, sys.maxsize, each) for each in handlers]
        logger.handlers = [*holding]
        held += holding
    try:
        yield
    except BaseException:
        drop = True
        raise
    finally:
        for logger, handlers in own.items():
            logger.handlers = handlers
        for each in held:
            if drop:
                each.buffer.clear()
            each.close()


def _load_from_hub(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    try:
        # Says why not, before anything large is fetched.
        index = Path(hf_hub_download(name, INDEX))
        if not constants.HF_HUB_OFFLINE:
            with _held_back_logs():
                return _open_either(name, dtype)
    except _FAILURES as error:
        raise LeansdError(_explain(name, error)) from error
    return _load_folder(index.parent, dtype, quiet=False)


def _open_either(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    """A model of the hub by its plain weights, or where it has none in half precision by those."""
    try:
        return _open(name, dtype)
    except (OSError, ValueError):
        try:
            return _open(name, dtype, variant="fp16")
        except _FAILURES:
            pass
        raise


def _load_file(file: Path, dtype: torch.dtype) -> DiffusionPipeline:
    keys = check_file(file)
    kind = StableDiffusionXLPipeline if _SDXL_KEY in keys else StableDiffusionPipeline
    try:
        with _held_back_logs():
            return kind.from_single_file(str(file), dtype=dtype)
    except _FAILURES as error:
        raise LeansdError(
            f"cannot open {file}: {read_cause(error)}; a single file holds weights alone, its "
            f"configuration and tokenizer come from the hub, so where there is no network fetch "
            "them once before, or give a folder in the diffusers layout"
        ) from error


def _open(model: str | Path, dtype: torch.dtype, **options: Any) -> DiffusionPipeline:
    return AutoPipelineForText2Image.from_pretrained(
        model, dtype=dtype, use_safetensors=True, **options
    )


def _explain(model: str | Path, error: Exception) -> str:
    if isinstance(model, Path) and model.exists():
        return f"cannot open the model in {model}: {read_cause(error)}"
    if constants.HF_HUB_OFFLINE:
        return (
            f"model {model} is not on this machine and HF_HUB_OFFLINE keeps the hub out of reach: "
            "unset it, or give a folder that holds the model"
        )
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError | ConnectionError):
        return f"model {model} is not on this machine and the hub cannot be reached: {FORMS}"
    if isinstance(error, HfHubHTTPError):
        return f"no model {model} on the hub, or no access to it: {read_cause(error)}"
    return f"cannot open model {model}: {read_cause(error)}"


def _require_unet(pipe: DiffusionPipeline, model: str | Path) -> None:
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        raise LeansdError(
            f"{model} is a {type(pipe).__name__} without a UNet2DConditionModel: "
            "Stable Diffusion 1.x, 2.x and SDXL have one"
        )

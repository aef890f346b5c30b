"""What a UNet costs: multiply-accumulates by unit, attention's matrix products included.

Published figures for Stable Diffusion often leave those out (thop-style counts: 338.6 G for SD 1.5,
where 401.6 G are computed).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from io import BytesIO
from itertools import chain
from pickle import Pickler
from typing import Any

import torch
from accelerate.hooks import ModelHook, remove_hook_from_module
from diffusers import UNet2DConditionModel
from diffusers.models import embeddings
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from leansd.anatomy.inputs import PATCHES, TOKENS, make_inputs, pick_size
from leansd.anatomy.reading import find_unet, read_anatomy
from leansd.errors import LeansdError
from leansd.plans.anatomy import Anatomy

WITHOUT_PRODUCTS = {F.group_norm, F.layer_norm, F.silu, F.gelu}
"""Of the same shape as what they are given."""
MOST_KNOWN = 16
_KNOWN: dict[Hashable, dict[str, int]] = {}
"""Counts of the last structures: a run's report asks for the same one again and again."""


@dataclass(frozen=True)
class Ledger:
    """Multiply-accumulates of one forward on one sample."""

    by_path: Mapping[str, int]
    """By module path in the UNet, every level of it; `""` is the whole."""
    size: tuple[int, int]
    """Latent (height, width)."""
    tokens: int

    @property
    def total(self) -> int:
        return self.by_path[""]

    def __getitem__(self, path: str) -> int:
        return self.by_path.get(path, 0)


def dissect(
    unet: UNet2DConditionModel,
    *,
    latent: int | tuple[int, int] | None = None,
    tokens: int = TOKENS,
    name: str = "UNet",
) -> Anatomy:
    """Read a UNet into an anatomy, with the cost of every unit.

    A UNet that can be read but not counted has an anatomy too: its MACs are 0, and `uncounted` says
    why.

    Args:
        latent: height (and width) in latent pixels; by default the UNet's own sample size.
        tokens: length of the text condition.
        name: what the anatomy calls the UNet where it is printed.

    Raises:
        LeansdError: it is no `UNet2DConditionModel`, or a block is built in a way not known here.
    """
    anatomy = read_anatomy(unet, name=name)
    try:
        ledger = count_macs(unet, latent=latent, tokens=tokens)
    except LeansdError as error:
        return replace(anatomy, uncounted=str(error))
    units = tuple(replace(unit, macs=ledger[unit.path]) for unit in anatomy)
    parts = tuple(replace(part, macs=ledger[part.path]) for part in anatomy.parts)
    counted = replace(anatomy, units=units, parts=parts, macs=ledger.total)
    return replace(counted, size=ledger.size, tokens=tokens)


def count_macs(
    unet: UNet2DConditionModel,
    *,
    latent: int | tuple[int, int] | None = None,
    tokens: int = TOKENS,
) -> Ledger:
    """Run the UNet's shapes on the meta device and count every matrix product and convolution.

    Counted are multiply-accumulates of one forward on one sample, attention's products included.
    They depend on shapes alone, so all is counted in single precision, whatever the UNet's is.

    Args:
        latent: height (and width) in latent pixels; by default the UNet's own sample size.
        tokens: length of the text condition.

    Raises:
        LeansdError: a module of it cannot run on shapes alone; the message names the cause.
    """
    unet = find_unet(unet)
    size = pick_size(unet, latent)
    try:
        skeleton = copy_skeleton(unet, dtype=torch.float32)
        inputs = make_inputs(skeleton, size=size, tokens=tokens, device="meta", dtype=torch.float32)
        _give_clip_embeds(skeleton)
        structure = _write_down(skeleton)
        key = (structure, size, tokens) if structure is not None else None
        counts = _KNOWN.get(key) or _count(skeleton, inputs)
    except Exception as error:  # any module of the user's may be in it
        first = (str(error) or "no reason given").strip().splitlines()[0]
        raise LeansdError(f"not counted, because {type(error).__name__}: {first}") from error
    if key is not None:
        _KNOWN[key] = counts
        while len(_KNOWN) > MOST_KNOWN:
            del _KNOWN[next(iter(_KNOWN))]
    return Ledger(counts, size, tokens)


def _count(skeleton: UNet2DConditionModel, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Multiply-accumulates by module path, of a call on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _ProductsOnly():
        skeleton(**inputs)
    counts: dict[str, int] = {}
    for path, by_operator in counter.get_flop_counts().items():
        # The counter prefixes the class name; "Global" is its own name for the whole.
        inner = "" if path == "Global" else path.partition(".")[2]
        if inner or path == "Global":
            counts[inner] = sum(by_operator.values()) // 2
    return counts


class _ProductsOnly(TorchFunctionMode):
    """Leaves out functions without a product to count, which take long on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in WITHOUT_PRODUCTS and args else func(*args, **(kwargs or {}))


def _write_down(skeleton: UNet2DConditionModel) -> Hashable | None:
    """All that a count follows from; None where something in it cannot be written, as a closure."""
    content = BytesIO()
    pickler = Pickler(content)
    pickler.fast = True  # every value in full, so that equal structures are equal bytes
    try:
        pickler.dump(skeleton)
    except Exception:
        return None
    code = {(type(module), type(module).forward) for module in skeleton.modules()}
    return sha256(content.getvalue()).digest(), frozenset(code)


def copy_skeleton(
    unet: UNet2DConditionModel, *, dtype: torch.dtype | None = None
) -> UNet2DConditionModel:
    """A copy of `unet` on the meta device that takes no memory, its structure as it is now.

    Hooks and patched forwards stay behind; a quantised layer becomes the plain one of its shape.

    Args:
        dtype: of all floating-point tensors; by default each keeps its own.
    """
    # deepcopy takes what the memo holds for an object, so no weight is ever copied.
    memo: dict[int, Any] = {}
    for tensor in chain(unet.parameters(), unet.buffers()):
        memo[id(tensor)] = _to_meta(tensor, dtype)
    precision = dtype or unet.dtype
    for module in unet.modules():
        plain = _find_plain(module, precision)
        if plain is not None:
            memo[id(module)] = plain
        # A dozen of these a module, mostly empty, would be most of what is copied.
        for name, own in vars(module).items():
            if isinstance(own, OrderedDict) and name.endswith("hooks"):
                memo[id(own)] = OrderedDict()
        # Offloading keeps the weights in hooks, and would look for them when the copy runs.
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            memo[id(hook)] = ModelHook()
        # Those of diffusers (group offloading, layerwise casting) may hold streams.
        hooks = getattr(module, "_diffusers_hook", None)
        if hooks is not None:
            memo[id(hooks)] = None
    with _MetaCopies(dtype):
        skeleton = copy.deepcopy(unet, memo)
    remove_hook_from_module(skeleton, recurse=True)
    for module in skeleton.modules():
        module.__dict__.pop("forward", None)
    return skeleton


class _MetaCopies(TorchFunctionMode):
    """Copies tensors that are no parameters to the meta device; those with a gradient too."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            memo[id(tensor)] = made = _to_meta(tensor, self.dtype)
            return made
        return func(*args, **(kwargs or {}))


def _to_meta(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if not tensor.dtype.is_floating_point:
        dtype = None
    # By shape, since a quantised tensor may not know how to move.
    meta = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(meta, requires_grad=False)
    return meta


def _find_plain(module: Any, dtype: torch.dtype) -> nn.Module | None:
    """The linear layer or convolution that a quantised one stands for; None for any other."""
    if hasattr(module, "base_layer"):  # an adapter's, around a layer that is asked by itself
        return None
    if type(module).__module__.partition(".")[0] in ("leansd", "diffusers"):
        return None
    kind = type(module)
    bias = getattr(module, "bias", None) is not None
    if isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features"):
        if kind.forward is nn.Linear.forward:
            return None
        return nn.Linear(
            module.in_features, module.out_features, bias=bias, device="meta", dtype=dtype
        )
    if hasattr(module, "kernel_size") and hasattr(module, "out_channels"):
        if kind.forward is nn.Conv2d.forward or len(module.kernel_size) != 2:
            return None
        return nn.Conv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            bias=bias,
            device="meta",
            dtype=dtype,
        )
    return None


def _give_clip_embeds(skeleton: UNet2DConditionModel) -> None:
    """Images for FaceID-Plus adapters, which take them as an attribute."""
    for module in skeleton.modules():
        if isinstance(module, embeddings.IPAdapterFaceIDPlusImageProjection):
            projection: Any = module
            width = projection.proj_in.in_features
            projection.clip_embeds = torch.empty(1, 1, PATCHES, width, device="meta")

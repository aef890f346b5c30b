"""What a UNet costs: multiply-accumulates by unit, attention's matrix products included.

Published figures for Stable Diffusion often leave those out (thop-style counts: 338.6 G for SD 1.5,
where 401.6 G are computed).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from leansd.anatomy.inputs import PATCHES, TOKENS, make_inputs, pick_size
from leansd.anatomy.reading import find_unet, read_anatomy
from leansd.errors import LeansdError
from leansd.plans.anatomy import Anatomy

WITHOUT_PRODUCTS = {F.group_norm, F.layer_norm, F.silu, F.gelu}
"""Functions whose output has the shape of their input, and no matrix product."""
ELEMENTWISE = {torch.Tensor.add, torch.Tensor.mul, torch.Tensor.div}
"""Functions of two operands: their output has the shape of the larger one."""
ATOMS = {int, float, str, bool, type(None)}
CONTAINERS = {dict, set, list, OrderedDict}
MOST_KNOWN = 16
_KNOWN: dict[Hashable, dict[str, int]] = {}
"""Counts of the last structures: a run's report asks for the same one again and again."""


@dataclass(frozen=True)
class Ledger:
    """Multiply-accumulates of one forward on one sample."""

    by_path: Mapping[str, int]
    """MACs by module path in the UNet, every level of it; `""` is the whole."""
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
    tally = _Tally(skeleton)
    with torch.no_grad(), _Operators(tally), _Functions(tally):
        skeleton(**inputs)
    return tally.counts


class _Tally:
    """Counts for every module that is at work."""

    def __init__(self, skeleton: nn.Module) -> None:
        self.counts: dict[str, int] = {"": 0}
        self.at_work: list[str] = []
        for path, module in skeleton.named_modules():
            module.register_forward_pre_hook(partial(self._begin, path))
            module.register_forward_hook(self._end)

    def _begin(self, path: str, *_: Any) -> None:
        self.at_work.append(path)

    def _end(self, *_: Any) -> None:
        self.at_work.pop()

    def add(self, macs: int) -> None:
        for path in self.at_work:
            self.counts[path] = self.counts.get(path, 0) + macs


class _Operators(TorchDispatchMode):
    """Counts whatever operators a function comes to, by PyTorch's own formulas."""

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.tally.add(count(*args, **(kwargs or {}), out_val=made) // 2)
        return made


class _Functions(TorchFunctionMode):
    """Counts by shapes what would take long on the meta device, and leaves out what has no product.

    Whatever does not fit goes on to PyTorch, which says so.
    """

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and (func in WITHOUT_PRODUCTS or (func in ELEMENTWISE and _keeps_shape(*args))):
            return args[0]
        if func is F.linear and len(args) > 1 and args[0].shape[-1] == args[1].shape[-1]:
            self.tally.add(args[0].numel() * args[1].shape[0])
            return args[0].new_empty(*args[0].shape[:-1], args[1].shape[0])
        if func is F.scaled_dot_product_attention and len(args) > 2 and _fit(*args[:3]):
            query, key, value = args[:3]
            self.tally.add(query.numel() * key.shape[2] + value.numel() * query.shape[2])
            return query.new_empty(*query.shape[:3], value.shape[3])
        return func(*args, **(kwargs or {}))


def _keeps_shape(one: Any, other: Any = None, *_: Any) -> bool:
    if not torch.is_tensor(one) or not one.is_floating_point():
        return False
    return isinstance(other, int | float) or getattr(other, "shape", None) == one.shape


def _fit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether [B, H, T, C] attend to [B, H, S, C] as they are."""
    alike = query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    return alike and query.shape[3] == key.shape[3] and key.shape[2] == value.shape[2]


def _write_down(skeleton: UNet2DConditionModel) -> Hashable | None:
    """All that a count follows from; None where something in it cannot be written, as a closure."""
    content = BytesIO()
    pickler = Pickler(content)
    pickler.fast = True  # every value in full, so that equal structures are equal bytes
    pickler.dispatch_table = {
        nn.Parameter: _reduce_tensor,
        torch.Tensor: _reduce_tensor,
    } | dict.fromkeys(_list_simple_kinds(skeleton), _reduce_module)
    try:
        pickler.dump(skeleton)
    except Exception:
        return None
    code = {(type(module), type(module).forward) for module in skeleton.modules()}
    return sha256(content.getvalue()).digest(), frozenset(code)


def _reduce_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple, ((tuple(tensor.shape), tensor.dtype),)


def _reduce_module(module: nn.Module) -> tuple[Any, ...]:
    return type, (module.__class__,), vars(module)


COPYING = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


def _list_simple_kinds(unet: nn.Module) -> set[type]:
    """The modules' classes that have no way of their own to be copied."""
    return {
        kind
        for kind in {type(module) for module in unet.modules()}
        if not any(
            name in vars(base)
            for base in kind.__mro__
            if base not in (nn.Module, object)
            for name in COPYING
        )
    }


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
    simple = _list_simple_kinds(unet)
    copies: list[tuple[nn.Module, nn.Module]] = []
    for module in unet.modules():
        plain = _find_plain(module, precision)
        if plain is not None:
            memo[id(module)] = plain
        elif type(module) in simple:
            copies.append((module, nn.Module.__new__(type(module))))
            memo[id(module)] = copies[-1][1]
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
        for module, made in copies:
            vars(made).update({k: _copy(own, memo) for k, own in module.__getstate__().items()})
        skeleton = copy.deepcopy(unet, memo)
    remove_hook_from_module(skeleton, recurse=True)
    for module in skeleton.modules():
        module.__dict__.pop("forward", None)
    return skeleton


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """As deepcopy, which takes its time over the dozens of plain values that a module has."""
    kind = type(value)
    if kind in ATOMS:
        return value
    if kind in CONTAINERS and not value:
        return kind()
    return copy.deepcopy(value, memo)


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

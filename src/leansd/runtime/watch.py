"""What a call of a denoiser depends on besides the latents, and who looks into it.

A run goes on inheriting only while text states, added conditions, weights, adapters and attention
processors stay as they were. They are told apart by identity and by PyTorch's version counters, so
no value is read and no device waited for, unless a condition comes as another tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from leansd.plans.anatomy import HEAD, Anatomy
from leansd.plans.liveness import Call
from leansd.runtime.arguments import UNetArguments
from leansd.runtime.finite import is_real
from leansd.surgery.parts.gri import FULL, GRIAttnProcessor

STEPWISE = frozenset({
    "sample", "timestep", "return_dict", "down_block_additional_residuals",
    "mid_block_additional_residual", "down_intrablock_additional_residuals",
})  # fmt: skip
"""Arguments that are new at every step: the latents, and what is computed from them."""
KNOWN_PROCESSORS = ("diffusers.models.", "leansd.")
"""Where attention processors come from that keep nothing and mix no rows of a batch."""
GATED = (*FULL, GRIAttnProcessor)
"""Processors of full attention and of GRI."""


class Conditions:
    """The arguments of a call that are the same throughout a run."""

    def __init__(self, named: Mapping[str, Any]) -> None:
        self._named: dict[str, tuple[list[Any], list[int], Any]] = {}
        for name, each in named.items():
            if name not in STEPWISE:
                # Held, so that no other tensor gets the same memory meanwhile.
                leaves, spec = tree_flatten(each)
                self._named[name] = leaves, [read_version(leaf) for leaf in leaves], spec

    def find_change(self, before: Conditions) -> str:
        """The name of an argument that differs from `before`; empty if there is none."""
        for name in {**before._named, **self._named}:
            now, then = self._named.get(name), before._named.get(name)
            if now is None or then is None or now[2] != then[2]:
                return name
            if not all(map(_are_same, then[0], then[1], now[0], now[1])):
                return name
        return ""


def read_version(value: Any) -> int:
    if not isinstance(value, torch.Tensor) or value.is_inference():
        return 0
    return value._version


def _are_same(one: Any, one_version: int, other: Any, other_version: int) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one is other or (type(one) is type(other) and bool(one == other))
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if read_version(one) != one_version or read_version(other) != other_version:
        return False
    if _locate(one) == _locate(other):
        return one_version == other_version
    # A loop that makes its conditions anew at every step waits here for its device, each time;
    # to compute all of the step because of an equal copy would take longer.
    return is_real(one) and is_real(other) and torch.equal(one, other)


def _locate(tensor: torch.Tensor) -> tuple[object, ...]:
    """Where in memory a tensor lies, the same for two views of the same numbers."""
    if tensor.layout != torch.strided:
        return (id(tensor),)
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride()


_count_changes = attrgetter("_version")


OTHER_NET = "weights, adapters or attention processors changed"


class NetState:
    """A state of a net's weights, adapters and processors; equal only to itself."""


class NetWatch:
    """Notices when what a net computes changes: weights, adapters, their scales, processors."""

    def __init__(self, net: nn.Module, anatomy: Anatomy) -> None:
        self._net = net
        self._units = {unit.path: unit.at for unit in anatomy.units}
        self._homes = {unit.path: unit.at for unit in anatomy.parts} | self._units
        self._state = NetState()
        self._look()

    def read(self) -> NetState:
        """The present state: the same object as before if nothing has changed."""
        if not self._is_unchanged():
            self._look()
            self._state = NetState()
        return self._state

    def _look(self) -> None:
        """Note everything as it is now."""
        modules = list(self._net.modules())
        self._children = [each._modules for each in modules if each._modules]
        self._modules = list(_list_values(self._children))
        self._owners = [each._parameters for each in modules if each._parameters]
        self._slots = list(_list_values(self._owners))
        self._parameters = self._list_parameters()
        self._versions = [read_version(each) for each in self._parameters]
        # Those that count their changes, and how many each had: this is read at every call.
        self._counted = [each for each in self._parameters if not each.is_inference()]
        self._counts = list(map(_count_changes, self._counted))
        adapters = (each for each in modules if isinstance(vars(each).get("scaling"), dict))
        self._adapters: list[Any] = list(adapters)
        self._attentions: list[Any] = [each for each in modules if hasattr(each, "processor")]
        self._settings = self._list_settings()
        self._observers: list[Mapping[int, Any]] = []
        """Hooks on the modules inside, of those that were put there."""
        self._observed: list[tuple[str, ...]] = []
        """What has to be computed for each of them to see what it would see in a full call."""
        for path, hooks in list_hooks(self._net):
            self._observers.append(hooks)
            self._observed.append(self._find_needed(path))

    def _find_needed(self, path: str) -> tuple[str, ...]:
        """What is computed where the module at `path` gives what it gives in a full call."""
        above = path
        while above:
            if above in self._homes:
                return (self._homes[above],)
            above = above.rpartition(".")[0]
        inside = (at for home, at in self._units.items() if home.startswith(f"{path}."))
        return tuple(inside) or (HEAD,)

    def _is_unchanged(self) -> bool:
        modules = list(_list_values(self._children))
        if len(modules) != len(self._modules) or not all(map(is_, modules, self._modules)):
            return False
        slots = list(_list_values(self._owners))
        same = len(slots) == len(self._slots) and all(map(is_, slots, self._slots))
        if not same or list(map(_count_changes, self._counted)) != self._counts:
            # Offloading puts other placeholders in their place at every call.
            parameters = self._list_parameters()
            if len(parameters) != len(self._parameters):
                return False
            versions = map(read_version, parameters)
            rows = zip(self._parameters, self._versions, parameters, versions, strict=True)
            if not all(_are_one(*row) for row in rows):
                return False
        return self._list_settings() == self._settings

    def _list_parameters(self) -> list[nn.Parameter]:
        return [each for each in _list_values(self._owners) if each is not None]

    def _list_settings(self) -> list[object]:
        """Numbers and objects that are no weights."""
        settings: list[object] = []
        for each in self._attentions:
            processor = each.processor
            # Between these a plan itself may go to and fro and inherit (`Plan.attend`).
            kind = None if type(processor) in GATED else processor
            settings += [kind, repr(getattr(processor, "scale", None))]
        for each in self._adapters:
            # A scale that a call has set and taken back differs from itself by rounding.
            scaling = {name: f"{scale:.6g}" for name, scale in each.scaling.items()}
            settings += [scaling, list(each.active_adapters), each.disable_adapters]
            settings.append(tuple(each.merged_adapters))
        blocks: Any = getattr(self._net, "up_blocks", ())
        for block in blocks:
            settings.append([getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")])
        return settings

    @property
    def unknown_processor(self) -> str:
        """The kind of an attention processor of which nothing is known; empty if there is none.

        It may keep what it sees for its pipeline (SAG, attend-and-excite), or mix the rows of a
        batch (StyleAligned).
        """
        for each in self._attentions:
            kind = type(each.processor)
            if not kind.__module__.startswith(KNOWN_PROCESSORS):
                return kind.__name__
        return ""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        return self._parameters

    @property
    def is_hooked(self) -> bool:
        """Whether others have hooked what lies inside."""
        return any(self._observers) and any(map(is_hooked, self._observers))

    def find_observed(self, call: Call) -> str:
        """What others have hooked and a call does not run for all rows; empty if there is none."""
        if not any(self._observers):
            return ""
        for hooks, needed in zip(self._observers, self._observed, strict=True):
            if is_hooked(hooks):
                for at in needed:
                    if call.is_half or at not in call.pattern.active:
                        return at
        return ""


@dataclass(frozen=True, eq=False)
class CallSignature:
    """All that has to stay as it was for a call to go on from the one before."""

    batch: tuple[object, ...]
    """Shape, type and device of the sample, and whether the pipeline guides."""
    conditions: Conditions
    states: tuple[NetState, ...]
    """States of the UNets that the plan runs."""
    guidance: float | None = None
    """The guidance scale, where the plan drops guidance: elsewhere the pipeline applies it."""

    def find_change(self, before: CallSignature) -> str:
        """What differs from `before`, in words; empty if nothing does."""
        if self.guidance != before.guidance:
            return "the guidance scale changed"
        if self.batch != before.batch:
            return "the batch changed"
        if self.states != before.states:
            return OTHER_NET
        name = self.conditions.find_change(before.conditions)
        return f"{name} changed" if name else ""


def _list_values(tables: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(each.values() for each in tables)


def list_hooks(net: nn.Module) -> Iterator[tuple[str, Mapping[int, Any]]]:
    """The path of every module inside, and where its hooks stand, also those still to come."""
    for path, module in net.named_modules():
        if path:
            yield path, module._forward_hooks
            yield path, module._forward_pre_hooks


def is_hooked(hooks: Mapping[int, Any]) -> bool:
    """Whether anybody looks; hooks of PyTorch's own make weights (pruning, weight norm)."""
    modules = (str(getattr(each, "__module__", "")) for each in hooks.values())
    return not all(module.startswith("torch.") for module in modules)


def _are_one(before: Any, before_version: int, now: Any, now_version: int) -> bool:
    if before.is_meta and now.is_meta:
        return True
    return before is now and before_version == now_version


def wants_gradients(arguments: UNetArguments, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the caller will differentiate a UNet call."""
    if not torch.is_grad_enabled():
        return False
    leaves, _ = tree_flatten(dict(arguments.named))
    given = any(isinstance(each, torch.Tensor) and each.requires_grad for each in leaves)
    return given or any(each.requires_grad for each in parameters)

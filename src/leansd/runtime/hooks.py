"""Hooks: functions put around methods of an instance, and taken off again exactly.

The one way in: nothing else in this package patches an object. An attribute of an instance is
replaced, so classes, state_dict keys and PyTorch's own hooks stay as they are. What is put there is
a `functools.partial` over the bound method, which `copy.deepcopy` rebinds to the copy; copies and
pickled objects are cut off from the function and do what they did before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import ModelMixin
from torch import nn

Forward = Callable[..., Any]
Around = Callable[..., Any]
"""`around(name, method, *args, **kwargs)` returns what the method shall return."""

PLAIN, HOOKED = "forward", "_old_forward"
"""Where a module keeps its forward, and where it does while accelerate has hooked it."""
COMPILED = "_compiled_call_impl"
"""Where a module keeps what its `compile` has made; its forward lies within the graph."""
REGISTRY = "_diffusers_hook"
"""Where a module keeps diffusers' hooks: group offloading, layerwise casting, caches."""
ENDED = "_reset_stateful_cache"
"""What diffusers' pipelines call at the end of a call on every component that has it."""


class HookLink:
    """Leads from a patched method to the function around it; cut in copies and after release."""

    __slots__ = ("around", "name", "was_set")

    def __init__(self, name: str, around: Around | None, *, was_set: bool = False) -> None:
        self.name = name
        self.around = around
        self.was_set = was_set
        """Whether the instance had a method of its own before."""

    def __deepcopy__(self, memo: dict[int, Any]) -> HookLink:
        return HookLink(self.name, None, was_set=self.was_set)

    def __reduce__(self) -> tuple[type[HookLink], tuple[str, None]]:
        return HookLink, (self.name, None)


def call_around(link: HookLink, method: Forward, *args: Any, **kwargs: Any) -> Any:
    """What a patched method does."""
    around = link.around  # read once: another thread may cut the link meanwhile
    if around is None:
        return method(*args, **kwargs)
    return around(link.name, method, *args, **kwargs)


def exchange_forward(forward: Forward, own: Forward) -> Forward:
    """`forward` of a module with `own` in the place of the module's own, below all hooks.

    For one call: nothing is put on the module.
    """
    if isinstance(forward, functools.partial) and forward.func is call_around:
        link, before = forward.args
        return functools.partial(call_around, link, exchange_forward(before, own))
    return own


@dataclass(frozen=True, slots=True)
class PatchedMethod:
    """One method of one instance with a function around it."""

    owner: Any
    link: HookLink
    patched: Forward
    before: Forward
    slots: tuple[str, ...]
    """The attributes that may hold it; others move a forward to a second place."""

    @property
    def is_in_place(self) -> bool:
        """Whether the instance still runs it, below whatever others have put around it since.

        Only what certainly leads to the instance's own method without it counts as taken off.
        """
        holds = vars(self.owner)
        if any(holds.get(slot) is self.patched for slot in self.slots):
            return True
        starts = [holds.get(self.slots[0]), *(getattr(*each) for each in _list_links(self.owner))]
        return any(self._lies_below(each) for each in starts)

    def _lies_below(self, runs: Any) -> bool:
        while runs is not None and runs is not self.patched:
            if getattr(runs, "__self__", None) is self.owner:
                return False
            below = getattr(runs, "__wrapped__", None)
            if below is None:
                return True  # somebody's function of which nothing is known
            runs = below
        return runs is not None

    def release(self) -> None:
        """Put back what was there, wherever others have moved it. A second release does nothing."""
        self.link.around = None
        holds = vars(self.owner)
        # Below may lie hooks that were released before this one, and could not be taken off then.
        before, was_set = _find_live(self.before, self.link.was_set)
        for slot in self.slots:
            if holds.get(slot) is not self.patched:
                continue
            if slot == self.slots[0] and not was_set:
                delattr(self.owner, slot)
            else:
                setattr(self.owner, slot, before)
        for link, name in _list_links(self.owner):
            if getattr(link, name) is self.patched:
                setattr(link, name, before)

    @property
    def is_plain(self) -> bool:
        """Whether the released instance runs what it did before it was patched."""
        runs = getattr(*_find_place(self.owner, self.slots))
        return runs == self.before and self.link.was_set == (self.slots[0] in vars(self.owner))

    def resume(self, around: Around) -> None:
        """Put the released function there once more."""
        self.link.around = around
        setattr(*_find_place(self.owner, self.slots), self.patched)


def patch_method(
    owner: Any,
    name: str,
    around: Around,
    *,
    slots: tuple[str, ...] = (),
    label: str = "",
    otherwise: Forward | None = None,
) -> PatchedMethod:
    """Put `around` around the method `name` of an instance, until it is released.

    Args:
        slots: attributes that may hold the method, its own name first.
        label: what `around` is told as the name; the method's own by default.
        otherwise: stands for the method of an instance that has none.
    """
    slots = slots or (name,)
    link = HookLink(label or name, around, was_set=slots[0] in vars(owner))
    place = _find_place(owner, slots)
    before = getattr(*place) if otherwise is None else getattr(*place, otherwise)
    patched = functools.partial(call_around, link, before)
    functools.update_wrapper(patched, before)
    setattr(*place, patched)
    return PatchedMethod(owner, link, patched, before, slots)


def _find_place(owner: Any, slots: tuple[str, ...]) -> tuple[Any, str]:
    """What holds the method, and by which attribute.

    It lies within accelerate's offload hooks, which come and go every call. Diffusers' hooks put
    back what they have found when they go, and with it take off whatever came later; a whole net
    is hooked within them. Its blocks are hooked outside: one that is skipped need not be loaded.
    """
    slot = next((slot for slot in slots[1:] if slot in vars(owner)), None)
    if slot is None and slots[0] == PLAIN and isinstance(owner, ModelMixin):
        for link, name in _list_links(owner):
            if getattr(link, name) is not None:
                return link, name
    return owner, slot or slots[0]


def _list_links(owner: Any) -> list[tuple[Any, str]]:
    """Where diffusers' hooks on a module keep what they are around, the innermost first."""
    links = getattr(vars(owner).get(REGISTRY), "_fn_refs", ())
    return [(link, name) for link in links for name in ("original_forward", "forward")]


def _find_live(method: Forward, was_set: bool) -> tuple[Forward, bool]:
    """What a method comes down to below hooks that were released, and whether that was set."""
    while isinstance(method, functools.partial) and method.func is call_around:
        link, below = method.args
        if link.around is not None:
            break
        method, was_set = below, link.was_set
    return method, was_set


class ForwardHooks:
    """`around` put around the forward of `modules`, until `release` or the end of the `with`."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        around: Around,
        slots: tuple[str, ...] = (PLAIN, HOOKED),
    ) -> None:
        """Args:
        slots: attributes that may hold the forward, its own name first.
        """
        self._around, self._slots = around, slots
        self._patched: dict[str, PatchedMethod] = {}
        self._released: dict[str, PatchedMethod] = {}
        self._held: list[tuple[dict[str, Any], PatchedMethod]] = []
        """The patched methods, with the attributes of their modules."""
        self.renew(modules)

    def renew(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook what stands in the place of modules now; those that are hooked stay as they are."""
        for name, module in modules.items():
            old = self._patched.get(name)
            if old is not None and old.owner is module and old.is_in_place:
                continue
            if old is not None:
                old.release()
            self._patched[name] = patch_method(
                module, self._slots[0], self._around, slots=self._slots, label=name
            )
        self._note()

    def _note(self) -> None:
        self._held = [(vars(each.owner), each) for each in self._patched.values()]

    @property
    def is_whole(self) -> bool:
        """Whether all is still hooked: others, taking off their own hooks, may take off these."""
        # A look at every module in every UNet call: all but a few are seen at once.
        own = self._slots[0]
        lost = [each for holds, each in self._held if holds.get(own) is not each.patched]
        return all(each.is_in_place for each in lost)

    def release(self) -> None:
        """Put back what was there. A second release does nothing."""
        while self._patched:
            name, each = self._patched.popitem()
            each.release()
            self._released[name] = each
        self._note()

    def resume(self, modules: Mapping[str, nn.Module]) -> bool:
        """Hook once more what was released, with the same functions: compiled graphs know them.

        Returns False, and does nothing, where it would not be `modules` or what one of them runs
        has changed since.
        """
        released = self._released
        if {name: each.owner for name, each in released.items()} != dict(modules):
            return False
        if not all(each.is_plain for each in released.values()):
            return False
        while released:
            name, each = released.popitem()
            each.resume(self._around)
            self._patched[name] = each
        self._note()
        return True

    def __enter__(self) -> ForwardHooks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def hook_pipeline_end(module: nn.Module, on_end: Callable[[], None]) -> PatchedMethod:
    """`on_end` called whenever a pipeline call ends that has `module` among its components."""

    def around(_: str, before: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        before(*args, **kwargs)
        on_end()

    return patch_method(module, ENDED, around, otherwise=_do_nothing)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """What a module without a method of its own does at the end of a pipeline's call."""

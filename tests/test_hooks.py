"""Hooks come off in any order, nest on anything, and are no part of a copy or a pickled module."""

import copy
import io
import pickle
from itertools import permutations
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

import leansd
from leansd.plans import Plan
from leansd.runtime.hooks import ForwardHooks, PatchedMethod, patch_method
from leansd.tuning.host import tap
from test_inheritance import Loop
from tiny import tiny_scheduler, tiny_unet


def put(module: nn.Module, names: str) -> list[PatchedMethod]:
    def around(name: str, forward: Any, *args: Any) -> Any:
        called.append(name)
        return forward(*args)

    called: list[str] = []
    module.called = called  # type: ignore[assignment]
    return [patch_method(module, "forward", around, label=name) for name in names]


@pytest.mark.parametrize("order", permutations(range(3)))
@pytest.mark.parametrize("was_set", [False, True])
def test_hooks_released_in_any_order_leave_what_was_there(
    order: tuple[int, ...], was_set: bool
) -> None:
    module = nn.Linear(2, 2)
    if was_set:
        module.forward = module.forward  # type: ignore[method-assign]
    before = vars(module).get("forward")
    hooks = put(module, "abc")
    left = list("abc")
    for place in order:
        module(torch.ones(2))
        assert module.called == left[::-1]
        module.called.clear()  # type: ignore[operator]
        hooks[place].release()
        left.remove("abc"[place])
    module(torch.ones(2))
    assert not module.called
    assert vars(module).get("forward") == before


class Net(ModelMixin, ConfigMixin):
    """A whole net, as diffusers knows them, with one part."""

    config_name = "config.json"

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(2, 2)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.part(given)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_hooks_of_diffusers_that_go_take_none_of_these_with_them(first: bool, count: int) -> None:
    """As those of group offloading do that learn the order of layers in the first call."""
    net, called = Net(), list[str]()
    modules = {"net": net, "part": net.part}
    names = "abc"[:count]

    def around(name: str, forward: Any, *args: Any) -> Any:
        called.append(name)
        return forward(*args)

    def register() -> None:
        for module in modules.values():
            for name in names:
                HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), name)

    def call() -> list[str]:
        called.clear()
        net(torch.ones(2))
        return list(called)

    if first:
        register()
    hooks = ForwardHooks(modules, around)
    if not first:
        register()
    assert hooks.is_whole
    assert call() == ["net", "part"]
    for name in reversed(names):
        net._diffusers_hook.remove_hook(name)
        # A whole net stays hooked, so what was lost of its parts can be hooked again.
        assert call()[0] == "net"
        hooks.renew(modules)
        assert hooks.is_whole
        assert call() == ["net", "part"]
    hooks.release()
    assert call() == []


def test_a_function_of_somebody_else_is_left_where_it_is() -> None:
    """Nothing is known of what it calls, so nothing is taken for lost."""
    module = nn.Linear(2, 2)
    hooks = ForwardHooks({"one": module}, lambda name, forward, *args: forward(*args))
    ours = module.forward
    module.forward = lambda given: ours(given)  # type: ignore[method-assign]
    theirs = module.forward
    assert hooks.is_whole
    hooks.renew({"one": module})
    assert module.forward is theirs


def test_other_hooks_over_an_attached_unet_may_go_last() -> None:
    loop = Loop(tiny_unet())
    expected = loop()
    run = leansd.inherit_(loop, Plan.every(2, cut="mid", steps=4))
    over = ForwardHooks({"unet": loop.unet}, lambda name, forward, *a, **k: forward(*a, **k))
    run.release()
    over.release()
    assert not any("forward" in vars(module) for module in loop.unet.modules())
    assert torch.equal(loop(), expected)


def test_taps_on_a_schedulers_step_nest() -> None:
    loop = Loop(tiny_unet(), tiny_scheduler())
    with tap(loop.scheduler) as outer:
        with tap(loop.scheduler) as inner:
            loop(3)
        loop(2)
    assert [len(run) for run in inner] == [3]
    assert [len(run) for run in outer] == [3, 2]
    assert "step" not in vars(loop.scheduler)


@pytest.mark.parametrize("dump", ["pickle", "save"])
def test_an_attached_unet_can_be_pickled(dump: str) -> None:
    loop = Loop(tiny_unet())
    expected = loop()
    with leansd.inherit(loop, Plan.every(2, cut="mid", steps=4), compile={"backend": "eager"}):
        file = io.BytesIO()
        if dump == "pickle":
            pickle.dump(loop.unet, file)
        else:
            torch.save(loop.unet, file)
        file.seek(0)
        double = pickle.load(file) if dump == "pickle" else torch.load(file, weights_only=False)
        for unet in (double, copy.deepcopy(loop.unet)):
            assert torch.equal(Loop(unet)(), expected)

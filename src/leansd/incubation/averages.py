"""Moving averages of the parameters that train, by name.

By name, since a list of parameters says nothing once the net is another one: averages zipped to a
pruned net's parameters have been a documented way to save nonsense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from leansd.errors import LeansdError


def pick_decay(decay: float, updates: int) -> float:
    """The decay after so many updates: short runs forget where they began."""
    return min(decay, (1 + updates) / (10 + updates))


class Average:
    """An exponential moving average of the trained parameters of a net."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors = {name: p.detach().clone() for name, p in _list_trained(net).items()}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Move towards the net's present parameters."""
        self.updates += 1
        share = 1 - pick_decay(self.decay, self.updates)
        trained = _list_trained(net)
        torch._foreach_lerp_(
            list(self.tensors.values()), [trained[name].detach() for name in self.tensors], share
        )

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """The net with averaged parameters, within."""
        trained = _list_trained(net)
        own = {name: trained[name].detach().clone() for name in self.tensors}
        _copy_into(trained, self.tensors)
        try:
            yield
        finally:
            _copy_into(trained, own)

    def settle(self, net: nn.Module) -> None:
        """Give the net the averaged parameters, for good."""
        _copy_into(_list_trained(net), self.tensors)

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Go on from saved averages.

        Raises:
            LeansdError: they are those of another net.
        """
        if tensors.keys() != self.tensors.keys():
            odd = sorted(tensors.keys() ^ self.tensors.keys())
            raise LeansdError(f"saved averages are another net's: {odd[0]} is in one of them only")
        _copy_into(self.tensors, tensors)
        self.updates = updates


def _list_trained(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


@torch.no_grad()
def _copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    for name, tensor in sources.items():
        targets[name].copy_(tensor)

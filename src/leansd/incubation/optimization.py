"""What is done with gradients: optimizer, learning rate, averages of what trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from leansd.errors import LeansdError
from leansd.incubation.recipe import SCHEDULES, Stage, TrainerSettings


def build_optimizer(
    settings: TrainerSettings, parameters: Iterable[nn.Parameter], rate: float
) -> torch.optim.Optimizer:
    """The optimizer that a recipe names.

    Raises:
        LeansdError: it needs what is not installed.
    """
    kind = torch.optim.AdamW
    if settings.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit as kind  # type: ignore[import-not-found]
        except ImportError as error:
            raise LeansdError(
                "optimizer adamw8bit needs bitsandbytes and a CUDA device: install it, or take "
                "adamw"
            ) from error
    return kind(list(parameters), lr=rate, betas=settings.betas, weight_decay=settings.weight_decay)


def find_rate(stage: Stage, step: int) -> float:
    """The learning rate of a step: up in a line at first, then by the stage's schedule.

    A function of the step alone: schedulers have a state, which a checkpoint would have to keep.
    """
    warmup = min(1.0, (step + 1) / (stage.warmup + 1))
    return stage.learning_rate * (warmup * SCHEDULES[stage.decay](step / stage.steps))


def list_trained(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: each for name, each in net.named_parameters() if each.requires_grad}


class Ema:
    """An exponential moving average of what trains of a net, by name.

    diffusers' `EMAModel` zips a list of averages to parameters by place and torch's `AveragedModel`
    copies all that is frozen; the one says nothing once the net is another, the other is twice it.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors = {name: each.detach().clone() for name, each in list_trained(net).items()}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Move towards the net's present parameters; short runs forget where they began."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        trained = list_trained(net)
        present = [trained[name].detach() for name in self.tensors]
        torch._foreach_lerp_(list(self.tensors.values()), present, 1 - decay)

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """The net with averaged parameters, within."""
        trained = list_trained(net)
        own = {name: trained[name].detach().clone() for name in self.tensors}
        self.copy_to(net)
        try:
            yield
        finally:
            _copy(own, trained)

    def copy_to(self, net: nn.Module) -> None:
        """Give the net the averaged parameters, for good."""
        _copy(self.tensors, list_trained(net))

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Go on from saved averages.

        Raises:
            LeansdError: they are those of another net.
        """
        if tensors.keys() != self.tensors.keys():
            odd = sorted(tensors.keys() ^ self.tensors.keys())
            raise LeansdError(f"saved averages are another net's: {odd[0]} is in one of them only")
        _copy(tensors, self.tensors)
        self.updates = updates


@torch.no_grad()
def _copy(sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    for name, tensor in sources.items():
        targets[name].copy_(tensor)


def read_peak(device: torch.device) -> dict[str, float]:
    """The most that tensors took on a GPU since this was last asked, in GiB; nothing elsewhere."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak_gib": peak / 2**30}

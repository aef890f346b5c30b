"""A second process that shares the weights and takes its part of every batch.

On small nets two single-threaded processes beat two threads: they meet once a step instead of
once an operation, and a busy neighbour on one core does not stall the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

Batch = tuple[torch.Tensor, ...]


def backpropagate(net: torch.nn.Module, batch: Batch, total: int) -> torch.Tensor:
    """Add the gradients of a part of `total` pictures; return its squared errors, (count,).

    The batch is what the net is called with, in its order, then what it should answer
    (count, 4, h, w) and a weight (count,).
    """
    *inputs, target, weight = batch
    named = net(*inputs, return_dict=False)[0]
    errors = (named - target).square().flatten(1).mean(1)
    ((weight * errors).sum() / total).backward()
    return errors.detach().cpu()


class Sidecar:
    """Computes gradients of the shared `net` in another process."""

    def __init__(self, net: torch.nn.Module, threads: int) -> None:
        context = torch.multiprocessing.get_context("spawn")
        net.share_memory()
        self._gradients = [torch.zeros_like(p).share_memory_() for p in net.parameters()]
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, net, self._gradients, threads), daemon=True
        )
        self._process.start()
        other.close()
        self._batch: Batch = ()

    def send(self, batch: Batch, total: int) -> None:
        """Start on a batch that is a part of `total` pictures."""
        if not self._batch or self._batch[0].shape != batch[0].shape:
            self._batch = tuple(part.clone().share_memory_() for part in batch)
            self._connection.send((self._batch, total))
            return
        for kept, part in zip(self._batch, batch, strict=True):
            kept.copy_(part)
        self._connection.send(((), total))

    def collect(self, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
        """Wait, add the gradients to those of `parameters` and return the errors (count,)."""
        errors = torch.tensor(self._connection.recv())
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad.add_(gradient)
        return errors

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()


def _serve(
    connection: Connection,
    net: torch.nn.Module,
    gradients: list[torch.Tensor],
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        parameter.grad = gradient
    batch: Batch = ()
    while True:
        try:
            fresh, total = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        batch = fresh or batch
        for gradient in gradients:
            gradient.zero_()
        connection.send(backpropagate(net, batch, total).tolist())

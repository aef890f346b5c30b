"""Precision and recall of a set: how much of it lies among the reference, and the reverse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from leansd.errors import LeansdError

NEIGHBOURS = 3
PART = 1024  # rows of distances that are in memory at a time


def measure_radii(
    features: Tensor, neighbours: int = NEIGHBOURS, on_rows: Callable[[int], None] = lambda n: None
) -> Tensor:
    """The squared distance of every picture [n, d] to its k-th nearest neighbour, [n].

    Raises:
        LeansdError: there are too few pictures to have so many.
    """
    if len(features) <= neighbours:
        raise LeansdError(
            f"precision and recall need more than {neighbours} pictures in either set, not "
            f"{len(features)}"
        )
    radii: list[Tensor] = []
    for begin in range(0, len(features), PART):
        distances = square_distances(features[begin : begin + PART], features)
        # A picture is no neighbour of its own; equal ones are each other's.
        rows = torch.arange(len(distances))
        distances[rows, rows + begin] = torch.inf
        radii.append(distances.kthvalue(neighbours, dim=1).values)
        on_rows(len(distances))
    return torch.cat(radii)


def measure_precision_and_recall(
    features: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """The share of pictures [n, d] on the reference's manifold [m, d], and the reverse.

    A manifold is the balls around a set's pictures that reach to their k-th nearest neighbour in
    the set: Kynkäänniemi et al., arXiv 1904.06991.
    """
    # About the middle, or rounding would be that of numbers far from 0.
    middle = reference.double().mean(0)
    ours, theirs = features.double() - middle, reference.double() - middle
    our_radii, their_radii = measure_radii(ours, neighbours), measure_radii(theirs, neighbours)
    true = torch.zeros(len(ours), dtype=torch.bool)
    covered = torch.zeros(len(theirs), dtype=torch.bool)
    for begin in range(0, len(ours), PART):
        distances = square_distances(ours[begin : begin + PART], theirs)
        true[begin : begin + PART] = (distances <= their_radii).any(1)
        covered |= (distances <= our_radii[begin : begin + PART, None]).any(0)
    return float(true.double().mean()), float(covered.double().mean())


def square_distances(one: Tensor, two: Tensor) -> Tensor:
    """Of every row of [n, d] to every row of [m, d], [n, m]."""
    sizes = one.square().sum(1)[:, None] + two.square().sum(1)
    return (sizes - 2 * one @ two.T).clamp_min_(0)

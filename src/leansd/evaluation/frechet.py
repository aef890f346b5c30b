"""Sets as Gaussians in a space of features, from running sums, and how far they are apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from leansd.errors import LeansdError


@dataclass(frozen=True)
class Gaussian:
    """A set's mean [d] and covariance [d, d] in double precision.

    Attributes:
        count: pictures that it was made from; 0 where nobody says.
    """

    count: int
    mean: Tensor
    covariance: Tensor


def measure_gaussian(features: Tensor) -> Gaussian:
    """The Gaussian of features [n, d]."""
    some = features.double()
    mean = some.mean(0)
    centred = some - mean
    return Gaussian(len(some), mean, centred.T @ centred / max(1, len(some) - 1))


def merge_gaussians(one: Gaussian, two: Gaussian) -> Gaussian:
    """The Gaussian of two sets together, as if they had been one.

    Scatters about the common mean (Chan, Golub and LeVeque 1983): nothing large is taken away from
    something large, so it does not matter how a set was cut.
    """
    count = one.count + two.count
    shift = two.mean - one.mean
    scatter = one.covariance * (one.count - 1) + two.covariance * (two.count - 1)
    scatter += torch.outer(shift, shift) * (one.count * two.count / count)
    mean = one.mean + shift * (two.count / count)
    return Gaussian(count, mean, scatter / max(1, count - 1))


def fold_gaussian(parts: Iterable[Tensor]) -> Gaussian:
    """The Gaussian of a set that comes in parts [n, d], one in memory at a time."""
    return reduce(merge_gaussians, (measure_gaussian(part) for part in parts if len(part)))


def frechet_distance(one: Gaussian, two: Gaussian) -> float:
    """The Fréchet distance of two Gaussians, as FID has it (Heusel et al., arXiv 1706.08500).

    With few pictures it is too large by an amount that depends on how many there are, so compare
    distances between sets of the same sizes only.

    Raises:
        LeansdError: they are of different features, or one is of a single picture.
    """
    if 1 in (one.count, two.count):
        raise LeansdError("a Fréchet distance needs at least 2 pictures in either set")
    if one.mean.shape != two.mean.shape:
        raise LeansdError(
            f"features of width {len(one.mean)} cannot be compared with statistics of width "
            f"{len(two.mean)}: they were made by another network"
        )
    shift = (one.mean - two.mean).square().sum()
    # The trace of the root of AB is that of the root of a'Ba where aa' = A, which is symmetric:
    # its eigenvalues are real, and rounding cannot make them complex.
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp_min(0).sqrt()
    overlap = torch.linalg.eigvalsh(root.T @ two.covariance @ root).clamp_min(0).sqrt().sum()
    distance = shift + one.covariance.trace() + two.covariance.trace() - 2 * overlap
    return max(0.0, float(distance))

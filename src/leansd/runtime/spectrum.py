"""Spectrum's forecast (Han et al., arXiv 2603.01623): ridge regression on Chebyshev polynomials.

What a unit gave in the calls that computed it is fitted, value by value, by a polynomial over time,
and the fit is read at the call that is not computed. The forecast is linear in the outputs, so all
there is to know are the weights of the outputs, the same for every value.

From the paper and its published configuration: the polynomials T0 to T4, the ridge of 0.1, time as
the number of the call, mapped to -1 at the first and to 1 after the last, and that every computed
output counts. Chosen here: the regression is solved in double precision and never rounded.
"""

from __future__ import annotations

from functools import lru_cache

import torch

DEGREE = 4
RIDGE = 0.1


@lru_cache(maxsize=1024)
def weigh_chebyshev(
    call: int, places: tuple[int, ...], calls: int, degree: int = DEGREE, ridge: float = RIDGE
) -> tuple[float, ...]:
    """The weights, at `call`, of what was computed at `places` in a run of so many `calls`.

    With the basis at the places X [n, degree + 1] and at the call x [degree + 1], the fit of
    outputs y [n] is c = (X'X + ridge I)^-1 X'y, and the forecast x'c.
    """
    design = _list_polynomials(places, calls, degree)
    target = _list_polynomials((call,), calls, degree)[0]
    penalty = ridge * torch.eye(degree + 1, dtype=torch.float64)
    weights = design @ (design.T @ design + penalty).inverse() @ target
    return tuple(map(float, weights))


def _list_polynomials(places: tuple[int, ...], calls: int, degree: int) -> torch.Tensor:
    """T0 to T[degree] at calls, [n, degree + 1]; T[k](cos a) = cos(k a)."""
    times = torch.tensor(places, dtype=torch.float64) * 2 / calls - 1
    return torch.cos(torch.arange(degree + 1) * torch.arccos(times)[:, None])

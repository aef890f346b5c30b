"""The ways to inherit, in one table: how an output that is not computed is made from kept ones.

Every way is a weighted sum of outputs computed before. `METHODS` holds all that plans, the runtime,
compiled calls, tuning, drawings and the page know of them, so a new way is one entry.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

ALL = sys.maxsize
"""A depth: every output computed so far in the run."""

What = Literal["output", "change", "denoised", "difference"]
"""What is kept of a call for later ones: a unit's output, what it added to its input, the denoised
picture that input and output of the whole denoiser show, or conditional minus unconditional output.
"""

Axis = Literal["log_snr", "call"]
"""Along what outputs are placed: log(signal power / noise power), or the number of the call."""

Weights = Callable[[float, Sequence[float], int], tuple[float, ...]]
"""`(now, then, calls)` -> a weight for each source: the place of the output that is made, those of
its sources, latest first, and how many calls the run has."""


def keep(now: float, then: Sequence[float], calls: int) -> tuple[float, ...]:
    """The latest source alone."""
    return (1.0, *(0.0 for _ in then[1:]))


def lagrange(now: float, then: Sequence[float], calls: int = 0) -> tuple[float, ...]:
    """The polynomial through the sources, read at `now`.

    Of sources at one and the same place only the latest counts.
    """
    counts = [place not in then[:index] for index, place in enumerate(then)]
    points = [place for place, counts_here in zip(then, counts, strict=True) if counts_here]
    points.reverse()  # earliest first, which decides how the products are rounded
    return tuple(
        weigh(now, place, points) if counts_here else 0.0
        for place, counts_here in zip(then, counts, strict=True)
    )


def weigh(now: float, here: float, points: Sequence[float]) -> float:
    """Lagrange's weight at `now` of what lies `here`, one of all `points`."""
    return math.prod((now - point) / (here - point) for point in points if point != here)


DEGREE = 4
RIDGE = 0.1


def chebyshev(now: float, then: Sequence[float], calls: int) -> tuple[float, ...]:
    """Spectrum's forecast (arXiv 2603.01623): ridge regression on Chebyshev polynomials.

    Outputs y [n] at the places `then` are fitted, value by value, by a polynomial over time, and
    the fit is read at `now`. With the basis at the places X [n, 5] and at the call x [5], the fit
    is c = (X'X + ridge I)^-1 X'y and the forecast x'c, which is linear in y.

    From the paper and its published configuration: the polynomials T0 to T4, the ridge of 0.1, time
    as the number of the call, mapped to -1 at the first and to 1 after the last, and that every
    computed output counts. Chosen here: the regression is solved in double precision.
    """
    return _solve_ridge(now, tuple(then), calls)


@lru_cache(maxsize=1024)
def _solve_ridge(now: float, then: tuple[float, ...], calls: int) -> tuple[float, ...]:
    design = [_list_polynomials(place, calls) for place in then]
    size = DEGREE + 1
    # (X'X + ridge I | x), solved by elimination: the matrix is positive definite, so no pivots.
    target = _list_polynomials(now, calls)
    rows = [
        [sum(row[i] * row[j] for row in design) + RIDGE * (i == j) for j in range(size)]
        + [target[i]]
        for i in range(size)
    ]
    for i in range(size):
        for j in range(i + 1, size):
            ratio = rows[j][i] / rows[i][i]
            rows[j] = [below - ratio * above for below, above in zip(rows[j], rows[i], strict=True)]
    solved = [0.0] * size
    for i in reversed(range(size)):
        rest = sum(rows[i][j] * solved[j] for j in range(i + 1, size))
        solved[i] = (rows[i][size] - rest) / rows[i][i]
    return tuple(sum(a * b for a, b in zip(row, solved, strict=True)) for row in design)


def _list_polynomials(place: float, calls: int) -> list[float]:
    """T0 to T4 at a call; T[k](cos a) = cos(k a)."""
    angle = math.acos(place * 2 / calls - 1)
    return [math.cos(degree * angle) for degree in range(DEGREE + 1)]


def chebyshev_line(now: float, then: Sequence[float], calls: int) -> tuple[float, ...]:
    """The mean of Spectrum's forecast and of the line through the last two outputs."""
    line = [*lagrange(now, then[:2]), *(0.0 for _ in then[2:])]
    fit = chebyshev(now, then, calls)
    return tuple((one + other) / 2 for one, other in zip(fit, line, strict=True))


@dataclass(frozen=True)
class Method:
    """One way to inherit."""

    summary: str
    """What it gives, for lists and pages."""
    depth: int
    """How many computed outputs it draws on, at most."""
    weights: Weights
    mark: str
    """The character of a cell in a text grid."""
    label: str
    """In legends."""
    colour: str
    """The colour of a cell in a picture, on white."""
    dark: str
    """On a dark page."""
    axis: Axis = "log_snr"
    of: What = "output"
    """What is kept; but for an output, the output is made of that and of the present input."""
    is_exact: bool = True
    """Whether the weights add up to 1, as where a curve goes through the outputs."""

    @property
    def takes_input(self) -> bool:
        """Whether the present input goes into what it gives."""
        return self.of != "output"

    @property
    def is_bounded(self) -> bool:
        """Whether it draws on a fixed number of outputs, so that one graph serves all calls."""
        return self.depth < ALL


METHODS: dict[str, Method] = {
    "reuse": Method(
        "the output that it gave when it was last computed",
        1, keep, "=", "reused", "#f0a431", "#e0a03c",
    ),
    "residual": Method(
        "its present input plus what it added to its input when it was last computed",
        1, keep, "+", "residual", "#a566e0", "#b182e8", of="change",
    ),
    "denoised": Method(
        "the denoised picture that it saw when last computed; the rest of its input is noise",
        1, keep, "*", "denoised", "#6b7a1f", "#a3b13a", of="denoised",
    ),
    "forecast": Method(
        "the line through its last two computed outputs, over log-SNR",
        2, lagrange, "~", "forecast", "#2fae7f", "#3fbf8f",
    ),
    "forecast2": Method(
        "the parabola through its last three computed outputs, over log-SNR",
        3, lagrange, "^", "parabola", "#12796b", "#2a9d8c",
    ),
    "chebyshev": Method(
        "Spectrum's ridge regression on Chebyshev polynomials through all computed outputs",
        ALL, chebyshev, "%", "Chebyshev", "#c2306f", "#e0609a", axis="call", is_exact=False,
    ),
    "chebyshev-line": Method(
        "the mean of Spectrum's forecast and of the line through its last two computed outputs",
        ALL, chebyshev_line, "&", "Chebyshev, line", "#8f2a63", "#b34d86",
        axis="call", is_exact=False,
    ),
}  # fmt: skip
"""Ways by the word that plans have for them."""


class Correction(NamedTuple):
    """How far a computed output of the UNet is moved on, to make good what was inherited before.

    Multiples of what a forecast of it would have been wrong by.
    """

    line: float = 0.0
    """Weight of the forecast by the line through the last two outputs computed before."""
    last: float = 0.0
    """Weight of the last output computed before, as it was."""

    @property
    def lead(self) -> float:
        """The weight of the computed output itself."""
        return 1 + self.line + self.last

    def weights(self, now: float, then: Sequence[float]) -> tuple[float, ...]:
        """The weights of the outputs before, by their log-SNR, latest first."""
        first, *others = (-self.line * weight for weight in lagrange(now, then))
        return (first - self.last, *others)

    @property
    def numbers(self) -> tuple[float, ...]:
        return tuple(self)

    def describe(self) -> list[object]:
        """Plain values for fingerprints; nothing where it does nothing."""
        return list(self) if any(self) else []

    def encode(self) -> object:
        """The values in plan files."""
        return [float(each) for each in self]


class Mix(NamedTuple):
    """What the sampler gets instead of a computed output, made of all that is known by then.

    That is `start` x_T + sum of `guided` e + `difference` (c - u), over the outputs computed so
    far, earliest first and this one last. x_T is what the UNet was given at the run's first step, u
    and c are the unconditional and the conditional output, and e is what guidance makes of them.

    Any such row steers the latents before the next key step anywhere in the span of these, so a
    plan with a mix at each is a linear multistep solver of its own, as those of Non-Stationary
    Solvers (BNS, arXiv 2403.01329) and S4S (arXiv 2502.17423), which do not tell the lanes apart.
    """

    start: float = 0.0
    guided: tuple[float, ...] = (1.0,)
    difference: tuple[float, ...] = ()
    """Weights of differences, as many as of `guided`; none in a plan for runs without guidance."""

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.start, *self.guided, *self.difference)

    def describe(self) -> list[object]:
        """Plain values for fingerprints."""
        return [[self.start, list(self.guided), list(self.difference)]]

    def encode(self) -> object:
        """The values in plan files."""
        told: dict[str, object] = {"start": float(self.start)}
        told["guided"] = [float(each) for each in self.guided]
        if self.difference:
            told["difference"] = [float(each) for each in self.difference]
        return told


NO_CORRECTION = Correction()

GUIDANCE_METHODS: dict[str, str] = {"inherit": "reuse", "forecast": "forecast"}
"""How the difference of the guidance lanes is made where a plan leaves a lane out."""

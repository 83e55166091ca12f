"""A power law with a limit, fitted to an accuracy that rises with compute."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Values = Sequence[float] | np.ndarray

EXPONENTS = np.geomspace(0.01, 10.0, 2_000)
"""Exponents that are tried, 0.35% apart. Below them the law cannot be told from a logarithm within a few decades, above
them from a step."""


class PowerLaw(NamedTuple):
    """P(C) = scale / C^exponent + limit; a law that rises has a scale below 0."""

    scale: float
    exponent: float
    limit: float
    r2: float
    """1 - squared residuals / squared deviations from the mean."""

    def at(self, compute: float) -> float:
        return self.scale / compute**self.exponent + self.limit


def fit_power_law(compute: Values, accuracy: Values) -> PowerLaw:
    """Least squares of P(C) = A / C^alpha + P*.  Reinforcement Pre-Training, arXiv:2506.08007, at Figure 4.

    Given alpha the law is a straight line in C^-alpha: A and P* are known, and alpha alone is searched for. ValueError
    for fewer than four points (three numbers fit three points), for compute that is not above 0, and for an accuracy
    that never changes, as R² is not defined there.
    """
    c, p = np.asarray(compute, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    if c.shape != p.shape or c.ndim != 1 or c.size < 4:
        raise ValueError(
            f"expected as many accuracies as amounts of compute, at least 4; got {p.size}, {c.size}"
        )
    if not (c > 0).all() or not np.isfinite([c, p]).all():
        raise ValueError(f"expected compute above 0 and finite accuracies; got {list(c)}, {list(p)}")
    deviation = p - p.mean()
    total = float(deviation @ deviation)
    if np.ptp(p) == 0 or np.ptp(c) == 0:
        raise ValueError("accuracy or compute is the same at every point, so there is no law to fit")
    unit = float(np.exp(np.log(c).mean()))  # of compute, so that no power is tiny
    x_AC = (c / unit) ** -EXPONENTS[:, None]
    x_AC -= (mean_A := x_AC.mean(1))[:, None]
    slope_A = x_AC @ deviation / (x_AC**2).sum(1)
    residual_A = ((deviation - slope_A[:, None] * x_AC) ** 2).sum(1)
    best = int(residual_A.argmin())
    exponent, slope = float(EXPONENTS[best]), float(slope_A[best])
    limit = float(p.mean() - slope * mean_A[best])
    return PowerLaw(slope * unit**exponent, exponent, limit, 1 - float(residual_A[best]) / total)

"""Bootstrap intervals of mean differences: seeded, so that the same pairs give the same interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 4000
"""Number of resamples of an interval."""

LEVEL = 0.95
"""Share of resamples inside an interval."""

MAX_UNITS = 2000
"""Number of units that are resampled: of more pairs, random groups of equal size, whose means spread as much."""

_AT_ONCE = 500


@dataclass(frozen=True)
class Interval:
    """Mean difference of pairs, with the percentile interval of its bootstrap.

    Attributes:
        count: Number of pairs.
        mean_a: Mean of A.
        mean_b: Mean of B.
        difference: Mean of B - A.
        low: Lower end of the interval of the difference.
        high: Upper end of it.
    """

    count: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float


def interval(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], seed: int = 0) -> Interval:
    """Return the mean difference of pairs and its interval.

    Args:
        a: Values of A, shape (n,), n > 0.
        b: Values of B, shape (n,).
        seed: Seed of the resamples.
    """
    differences = b - a
    rng = np.random.default_rng(seed)
    units = _units(differences, rng)
    means = np.concatenate(
        [units[rng.integers(0, len(units), (_AT_ONCE, len(units)))].mean(axis=1) for _ in range(RESAMPLES // _AT_ONCE)]
    )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(len(a), float(a.mean()), float(b.mean()), float(differences.mean()), float(low), float(high))


def _units(values: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return the values, or the means of MAX_UNITS random groups of them, which leave out less than one per group."""
    if len(values) <= MAX_UNITS:
        return values
    size = len(values) // MAX_UNITS
    groups: npt.NDArray[np.float64] = rng.permutation(values)[: size * MAX_UNITS].reshape(MAX_UNITS, size).mean(axis=1)
    return groups

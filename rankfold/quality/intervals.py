"""Shares with intervals that are honest at 0 and 1, and differences of two models on the same items."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from rankfold.errors import InputError

Z = 1.96
"""Standard normal quantile of a two-sided interval of 95 %."""


class Share(NamedTuple):
    """A share of something with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    observations: int
    """Independent observations behind it."""

    @property
    def error(self) -> float:
        """A quarter of the interval's width or so: its standard error."""
        return (self.high - self.low) / (2 * Z)


class Difference(NamedTuple):
    """How far two means over the same items lie apart."""

    value: float
    error: float
    """Standard error over the items."""


def share(values: Sequence[float | int]) -> Share:
    """The mean of values in [0, 1] with the interval of Wilson (1927).

    For values between 0 and 1 it is too wide, never too narrow: nothing in [0, 1] varies more than zeros and ones.

    Raises:
        ValueError: If there are no values.

    >>> [round(x, 3) for x in share([0.0] * 100)[:3]]
    [0.0, 0.0, 0.037]
    """
    if not values:
        raise InputError("A share needs at least one observation, but got none.")
    count = len(values)
    mean = math.fsum(values) / count
    middle = mean + Z**2 / (2 * count)
    spread = Z * math.sqrt(mean * (1 - mean) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    low, high = max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
    # Rounding must not put the mean outside of its own interval.
    return Share(mean, min(low, mean), max(high, mean), count)


def paired_difference(values: Sequence[float | int], others: Sequence[float | int]) -> Difference:
    """Mean of `values` less that of `others`, item by item.

    >>> paired_difference([1, 1, 0, 1], [1, 0, 0, 0])
    Difference(value=0.5, error=0.28867513459481287)
    """
    differences = [float(a) - float(b) for a, b in zip(values, others, strict=True)]
    spread = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return Difference(statistics.fmean(differences), spread)


def paired_shares(values: Sequence[int | float], others: Sequence[int | float]) -> Share:
    """Share of items on which only `values` is right less that on which only `others` is, with its 95 % interval.

    The interval is that of Agresti and Min (2005): half an item is added to each cell of the table of pairs, so that
    no item on which two models differ does not pretend that none would.

    Args:
        values: 1 for each item that is right, otherwise 0.
        others: The same items of another model.

    Raises:
        ValueError: If there are no items.

    >>> [round(x, 4) for x in paired_shares([1] * 98, [1] * 98)[:3]]
    [0.0, -0.0196, 0.0196]
    """
    if not values:
        raise InputError("A paired difference needs at least one item, but got none.")
    better = sum(a > b for a, b in zip(values, others, strict=True))
    worse = sum(a < b for a, b in zip(values, others, strict=True))
    count = len(values) + 2
    middle = (better - worse) / count
    error = math.sqrt(better + worse + 1 - (better - worse) ** 2 / count) / count
    value = (better - worse) / len(values)
    low, high = max(-1.0, middle - Z * error), min(1.0, middle + Z * error)
    return Share(value, min(low, value), max(high, value), len(values))


def mcnemar(values: Sequence[float | int], others: Sequence[float | int]) -> float:
    """Probability of so uneven a split where two answers differ, if neither model were better (McNemar 1947, exact).

    >>> mcnemar([1, 1, 1, 1, 0], [0, 0, 0, 0, 0])
    0.125
    """
    better = sum(a > b for a, b in zip(values, others, strict=True))
    worse = sum(a < b for a, b in zip(values, others, strict=True))
    different = better + worse
    tail = sum(math.comb(different, k) for k in range(min(better, worse) + 1))
    # Whole numbers to the end: 2^n is no float for a thousand answers.
    return float(min(Fraction(1), Fraction(2 * tail, 2**different)))

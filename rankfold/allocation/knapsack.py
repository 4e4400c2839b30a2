"""One budget for the whole model: the ranks with the smallest sum of predicted losses, and how far from the bound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rankfold.allocation.ranks import BudgetError, dense_option, groups, option_at, round_rank
from rankfold.plan import DENSE, Option
from rankfold.sites import Site

FLOOR = 1 / 64
"""Least share of its full rank that a site keeps, so that a wrong prediction destroys none."""

CANDIDATES = 256
"""Ranks that are tried at each site: of a matrix of full rank 4096 every sixteenth."""

Price = Callable[[Option], float]
"""What an option costs in the unit of the budget."""


class Choice(NamedTuple):
    """The chosen options, and what no choice within the budget can fall below."""

    options: tuple[Option, ...]
    bound: float
    """Lower bound of the sum of predicted losses, from the linear relaxation."""


def knapsack(
    sites: Sequence[Site],
    form: str,
    *,
    budget: float,
    losses: Mapping[str, Sequence[float]],
    price: Price,
    multiple: int = 1,
    adds_bias: bool = False,
) -> Choice:
    """Minimum predicted loss within one budget, each site choosing among its ranks and staying dense.

    A multiple-choice knapsack. The lower convex hull of every site's (price, loss) pairs is walked in the order of
    falling gain per price (Sinha and Zoltners 1979), which solves the linear relaxation exactly; what is left of
    the budget is spent greedily on whatever still fits. The relaxation's value is the bound.

    Args:
        sites: Sites to decide on; the slices of one stack of experts get one rank.
        form: The form of the factorized sites.
        budget: What all options together may cost, in the unit of `price`.
        losses: Predicted loss of each site at every rank from 0 to full; sites without an entry stay dense.
        price: Parameters, bytes or seconds of an option.
        multiple: Ranks are multiples of this, or below it.
        adds_bias: Whether the method gives a bias to sites that have none.

    Raises:
        ValueError: If even the smallest allowed ranks cost more than the budget.
    """
    # Of a stack of experts those without a prediction stay dense, and are priced so.
    parts = [[s for s in group if (s.name in losses) == known] for group in groups(sites) for known in (True, False)]
    ladders = [_ladder(part, form, losses, price, multiple, adds_bias) for part in parts if part]
    least = float(sum(ladder.prices[0] for ladder in ladders))
    if least > budget:
        raise BudgetError(
            f"The budget must allow at least {_plain(least)}, the price of the smallest rank of every site "
            f"({FLOOR:.1%} of its full rank), but is {_plain(float(budget))}. Raise it, or choose fewer sites."
        )
    chosen, spent, bound = _climb(ladders, budget)
    _fill(ladders, chosen, budget - spent)
    return Choice(tuple(ladder.option(index) for ladder, index in zip(ladders, chosen, strict=True)), max(bound, 0.0))


def _plain(price: float) -> str:
    """A price for people: parameters and bytes in whole numbers, seconds with their digits."""
    return f"{price:,.0f}" if price >= 100 else f"{price:.4g}"


class _Ladder(NamedTuple):
    """The undominated choices of one group: prices rise, losses fall."""

    prices: np.ndarray
    losses: np.ndarray
    ranks: list[int | None]
    option_at: Callable[[int | None], Option]

    def option(self, index: int) -> Option:
        return replace(self.option_at(self.ranks[index]), loss=float(self.losses[index]))


def _ladder(
    group: Sequence[Site],
    form: str,
    losses: Mapping[str, Sequence[float]],
    price: Price,
    multiple: int,
    adds_bias: bool,
) -> _Ladder:
    full = min(group[0].out_features, group[0].in_features)
    known = [losses[site.name] for site in group if site.name in losses]

    def option_of(rank: int | None) -> Option:
        if rank is None:
            return dense_option(group, "" if known else "no calibration token reached it, or no gradient")
        return option_at(form, group, rank, adds_bias)

    least = min(max(1, math.ceil(FLOOR * full)), full)
    tried = range(least, full, max(1, full // CANDIDATES))
    ranks = sorted({round_rank(rank, multiple) for rank in tried}) if known else []
    total = np.sum([np.asarray(values, dtype=float) for values in known], axis=0) if known else np.zeros(full + 1)
    options = [(option_of(rank), rank, float(total[rank])) for rank in ranks]
    pairs: list[tuple[float, float, int | None]] = [
        (price(option), loss, rank) for option, rank, loss in options if option.form != DENSE
    ]
    pairs.append((price(option_of(None)), 0.0, None))
    kept: list[tuple[float, float, int | None]] = []
    for cost, loss, rank in sorted(pairs, key=lambda pair: pair[:2]):
        if not kept or loss < kept[-1][1]:
            kept.append((cost, loss, rank))
    return _Ladder(
        np.array([p for p, _, _ in kept]), np.array([v for _, v, _ in kept]), [r for _, _, r in kept], option_of
    )


def _hull(ladder: _Ladder) -> list[int]:
    """Indices of the choices on the lower convex hull."""
    hull: list[int] = []
    prices, losses = ladder.prices.tolist(), ladder.losses.tolist()
    for index, (price, loss) in enumerate(zip(prices, losses, strict=True)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (losses[a] - losses[b]) * (price - prices[b]) > (losses[b] - loss) * (prices[b] - prices[a]):
                break
            hull.pop()
        hull.append(index)
    return hull


def _climb(ladders: Sequence[_Ladder], budget: float) -> tuple[list[int], float, float]:
    """Climb the hulls in the order of falling gain per price: the choices, what they cost, and the bound."""

    def steps() -> Iterator[tuple[float, int, int, int]]:
        for number, ladder in enumerate(ladders):
            hull = _hull(ladder)
            for low, high in itertools.pairwise(hull):
                gain = ladder.losses[low] - ladder.losses[high]
                yield -gain / (ladder.prices[high] - ladder.prices[low]), number, low, high

    chosen = [0] * len(ladders)
    spent = float(sum(ladder.prices[0] for ladder in ladders))
    loss = float(sum(ladder.losses[0] for ladder in ladders))
    bound: float | None = None
    for slope, number, low, high in sorted(steps()):
        cost = float(ladders[number].prices[high] - ladders[number].prices[low])
        if spent + cost > budget and bound is None:
            bound = loss + slope * (budget - spent)
        if spent + cost <= budget and chosen[number] == low:
            chosen[number], spent = high, spent + cost
            loss += slope * cost
    return chosen, spent, loss if bound is None else bound


def _fill(ladders: Sequence[_Ladder], chosen: list[int], left: float) -> None:
    """Spend the rest on the best gain per price that still fits, on the hull or off it."""
    while True:
        best: tuple[float, int, int] | None = None
        for number, ladder in enumerate(ladders):
            extra = ladder.prices - ladder.prices[chosen[number]]
            fits = np.flatnonzero((extra > 0) & (extra <= left))
            if not len(fits):
                continue
            rates = (ladder.losses[chosen[number]] - ladder.losses[fits]) / extra[fits]
            if best is None or float(rates.max()) > best[0]:
                best = float(rates.max()), number, int(fits[rates.argmax()])
        if best is None or best[0] <= 0:
            return
        _, number, index = best
        left -= float(ladders[number].prices[index] - ladders[number].prices[chosen[number]])
        chosen[number] = index

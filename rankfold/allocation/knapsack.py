"""One budget for the whole model: the ranks with the smallest sum of predicted losses, and how far from the bound."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rankfold.allocation.options import Allowance, BudgetError, Choice, Price, SiteOptions, allowed

FLOOR = 1 / 64
"""Least share of its full rank that a site keeps, so that a wrong prediction destroys none."""

CANDIDATES = 256
"""Ranks that are tried at each site: of a matrix of full rank 4096 every sixteenth."""


def knapsack(sites: Sequence[SiteOptions], allowance: Allowance) -> Choice:
    """Minimum predicted loss within one budget, each site choosing among its ranks and staying dense.

    A multiple-choice knapsack. The lower convex hull of every site's (price, loss) pairs is walked in the order of
    falling gain per price (Sinha and Zoltners 1979), which solves the linear relaxation exactly; what is left of
    the budget is spent greedily on whatever still fits. The relaxation's value is the bound.

    Args:
        sites: What each site can become, with predicted losses.
        allowance: What all of them together may cost.

    Raises:
        ValueError: If even the smallest allowed ranks cost more than the budget.
    """
    ladders = [_ladder(options, allowance.price) for options in sites]
    budget = allowance.limit(sites)
    least = float(sum(ladder.prices[0] for ladder in ladders))
    if least > budget:
        raise BudgetError(
            f"The budget must allow at least {_plain(least)}, the cost of the smallest option at every site (a rank is "
            f"at least {FLOOR:.1%} of the full one), but is {_plain(budget)}. Raise it, or choose fewer sites."
        )
    chosen, spent, bound = _climb(ladders, budget)
    _fill(ladders, chosen, budget - spent)
    options = (site.option(ladder.positions[index]) for site, ladder, index in zip(sites, ladders, chosen, strict=True))
    return Choice(tuple(options), max(bound, 0.0))


def _plain(price: float) -> str:
    """A price for people: parameters and bytes in whole numbers, seconds with their digits."""
    return f"{price:,.0f}" if price >= 100 else f"{price:.4g}"


class _Ladder(NamedTuple):
    """The undominated options of one site: prices rise, losses fall."""

    prices: np.ndarray
    losses: np.ndarray
    positions: list[int]


def _ladder(options: SiteOptions, price: str | Price) -> _Ladder:
    assert options.losses is not None, "a knapsack compares predicted losses"
    dense = len(options.shares) - 1
    step = max(1, options.full_rank // CANDIDATES)
    tried = allowed(options, FLOOR)[:-1]
    if options.by_rank:
        # Every so many ranks, as many as are listed where a multiple thins them out already.
        ranks = np.rint(options.shares[tried] * options.full_rank).astype(int)
        first = ranks[0] if len(ranks) else 0
        tried = tried[np.unique((ranks - first) // step, return_index=True)[1]]
    positions = [*tried.tolist(), dense]
    offered = replace(
        options,
        shares=options.shares[positions],
        parameters=options.parameters[positions],
        bytes=options.bytes[positions],
        make=lambda index: options.make(positions[index]),
    )
    prices, losses = offered.prices(price), options.losses[positions]
    kept: list[int] = []
    for index in np.lexsort((losses, prices)).tolist():
        if not kept or losses[index] < losses[kept[-1]]:
            kept.append(index)
    return _Ladder(prices[kept], losses[kept], [positions[index] for index in kept])


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

"""A few numbers that stand for a point of the design space, and the points from which a search starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankfold.exploration.space import DesignSpace, Losses, Point

Array = NDArray[np.float64]

KEEPS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Budgets of the knapsack's plans from which a search starts."""

SPARED = 2
"""First blocks that the paper's rule spares."""

HALVINGS = 40
"""Halvings of the interval in which the price of a parameter is searched."""


class Policy(NamedTuple):
    """How much to keep, and where predicted losses are believed to be too low (above 0) or too high."""

    keep: float
    """Fraction of the sites' parameters."""
    kinds: Mapping[str, float]
    """Powers of two by which losses of a kind of tensor are multiplied."""
    slope: float = 0.0
    """The same from the first block (less) to the last (more)."""
    bend: float = 0.0
    """The same for the ends (more) against the middle."""


class Prices(NamedTuple):
    """What every site loses and costs with each choice; the first column is the dense site."""

    losses: Array
    """(sites, 1 + choices), in nats per token; infinite where a choice is not allowed."""
    costs: Array
    """The same in parameters."""


def prices(space: DesignSpace, losses: Losses) -> Prices:
    """The tables of a space; a site without a predicted loss stays dense."""
    shape = (len(space.sites), 1 + len(space.choices))
    table, costs = np.full(shape, np.inf), np.zeros(shape)
    for position, site in enumerate(space.sites):
        table[position, 0], costs[position, :] = 0.0, site.parameters
        for number in space.allowed[position]:
            option = space.option(site, number, losses)
            if option.loss is not None:
                costs[position, number], table[position, number] = option.parameters, option.loss
    return Prices(table, costs)


def point_of(space: DesignSpace, table: Prices, policy: Policy) -> Point:
    """The point with the smallest weighted loss at the price of a parameter that meets the budget.

    For one price every site's best choice is known at once (Lagrangian relaxation);
    blocks that must lie apart are then chosen by dynamic programming, and tied choices in turns until nothing changes.
    """
    last = max(len(space.blocks) - 1, 1)
    depth = {block: 2 * number / last - 1 for number, block in enumerate(space.blocks)}
    powers = [
        policy.kinds.get(site.kind, 0.0)
        + policy.slope * depth[str(site.block)]
        + policy.bend * (depth[str(site.block)] ** 2 - 1 / 3)
        for site in space.sites
    ]
    weighted = np.where(np.isinf(table.losses), np.inf, table.losses * np.exp2(powers)[:, None])
    budget = policy.keep * table.costs[:, 0].sum()
    low, high = 1e-12, 1e3
    best = project(space, high * (table.costs[:, :1] - table.costs) - weighted)
    for _ in range(HALVINGS):
        price = float(np.sqrt(low * high))
        point = project(space, price * (table.costs[:, :1] - table.costs) - weighted)
        if table.costs[np.arange(len(point)), point].sum() <= budget:
            high, best = price, point
        else:
            low = price
    return best


def project(space: DesignSpace, gains: Array) -> Point:
    """The allowed point with the largest sum of gains.

    Args:
        space: The design space.
        gains: What each choice gains at each site, (sites, 1 + choices); 0 in the first column.
    """
    if space.tied:
        candidates = [_tied(space, gains[:, number], number) for number in range(1, gains.shape[1])]
        return max(candidates, key=lambda found: found[1])[0]
    if not space.one_choice:
        return _free(space, gains.argmax(1), gains)[0]
    each = []
    for number in range(1, gains.shape[1]):
        usable = np.array([number in allowed for allowed in space.allowed])
        each.append(_free(space, np.where(usable & (gains[:, number] > 0), number, 0), gains))
    return max(each, key=lambda found: found[1])[0]


def starting_points(space: DesignSpace, table: Prices) -> Iterator[tuple[str, Point, Policy | None]]:
    """Where a search starts: the dense model, the knapsack's plans, and blocks spread out as the paper advises.

    Yields:
        A name, the point, and the policy that stands for it, where there is one.
    """
    yield "dense", (0,) * len(space.sites), None
    for keep in KEEPS:
        policy = Policy(keep, dict.fromkeys(space.kinds, 0.0))
        yield f"knapsack, keep {keep:g}", point_of(space, table, policy), policy
    smallest = min(range(len(space.choices)), key=lambda number: space.choices[number].rank) + 1
    first = max(space.skip_first, min(SPARED, len(space.blocks) - 1))
    last = len(space.blocks) - 1 - space.skip_last
    for count in (1, 2, 3, 4, 6, 8):
        spread = np.unique(np.linspace(first, last, count + 2)[1:-1].round().astype(int))
        if last - first < count or len(spread) < count:
            continue
        point = space.tied_point(spread.tolist(), space.kinds, smallest)
        if space.holds(point):
            yield f"paper's rule, {count} blocks", point, None


def _free(space: DesignSpace, numbers: NDArray[np.int64], gains: Array) -> tuple[Point, float]:
    """Every site at its number, in the best allowed subset of blocks."""
    found = gains[np.arange(len(numbers)), numbers]
    totals = [float(found[list(members)].sum()) for members in space.members]
    chosen, total = _best_blocks(space, totals)
    point = np.zeros(len(numbers), dtype=int)
    for block in chosen:
        members = list(space.members[block])
        point[members] = numbers[members]
    return tuple(point.tolist()), total


def _tied(space: DesignSpace, gains: Array, number: int) -> tuple[Point, float]:
    """One choice: subsets of kinds and of blocks improved in turns."""
    finite = np.where(np.isfinite(gains), gains, 0.0)
    table = np.array([[finite[position] for position in members] for members in space.members])
    kinds = table.sum(0) > 0
    blocks: list[int] = []
    total = 0.0
    for _ in range(len(space.kinds) + 1):
        blocks, total = _best_blocks(space, (table * kinds).sum(1).tolist())
        better = table[blocks].sum(0) > 0
        if (better == kinds).all():
            break
        kinds = better
    names = [space.sites[position].kind for position in space.members[0]]
    chosen = [name for name, on in zip(names, kinds, strict=True) if on]
    return space.tied_point(blocks if chosen else [], chosen, number), total


def _best_blocks(space: DesignSpace, gains: Sequence[float]) -> tuple[list[int], float]:
    """The allowed subset of blocks with the largest sum of gains."""
    totals = [0.0]
    for block, gain in enumerate(gains):
        usable = space.skip_first <= block < len(gains) - space.skip_last and gain > 0
        before = totals[max(block + 1 - space.distance, 0)]
        totals.append(max(totals[-1], gain + before) if usable else totals[-1])
    chosen, block = [], len(gains)
    while block > 0:
        if totals[block] == totals[block - 1]:
            block -= 1
        else:
            chosen.append(block - 1)
            block = max(block - space.distance, 0)
    return chosen[::-1], totals[-1]

"""Every site gets the same fraction of its full rank; where that does not pay it stays dense (LoRD's aspect ratios)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankfold.allocation.options import Allowance, BudgetError, Choice, SiteOptions, least
from rankfold.allocation.ranks import round_rank


def parity(sites: Sequence[SiteOptions], allowance: Allowance) -> Choice:
    """One option for each site: a common fraction of the full rank, as large as the budget of all sites allows.

    A matrix of aspect ratio `a = min / max` must lose `a / (1 + a)` of its rank before a factorization is smaller
    than the matrix: half for a square one, a fifth at 1 : 4 (Kaushal et al. 2023, arXiv:2309.14021;
    docs/mathematics.md, eq. 7). So wide matrices are factorized first and square ones stay dense longest.

    Args:
        sites: What each site can become.
        allowance: What all of them together may keep.

    Raises:
        ValueError: If even rank 1 everywhere needs more than the budget.
    """
    prices = [options.prices(allowance.price) for options in sites]
    limit = allowance.limit(sites)

    def positions(fraction: float) -> list[int]:
        return [_position(options, fraction) for options in sites]

    def cost(fraction: float) -> float:
        chosen = positions(fraction)
        return float(sum(column[position] for column, position in zip(prices, chosen, strict=True)))

    low, high = 0.0, 1.0
    if cost(high) <= limit:
        low = high
    elif cost(low) > limit:
        total = sum(options.parameters[-1] for options in sites)
        raise BudgetError(
            f"Keeping {allowance.keep:g} of {total:.0f} parameters leaves no room for rank 1 everywhere, which needs "
            f"{least(sites, allowance.price):.0f}. Raise `keep`, or choose fewer `sites`."
        )
    else:
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    chosen = zip(sites, positions(low), strict=True)
    return Choice(tuple(options.option(position, _note(options, position, low)) for options, position in chosen))


def _asked(options: SiteOptions, fraction: float) -> int:
    """The rank at a fraction of the full rank, lowered to a multiple."""
    return round_rank(max(1, int(fraction * options.full_rank)), options.multiple)


def _position(options: SiteOptions, fraction: float) -> int:
    """Of the rank at a fraction of the full rank; dense where that is past the break-even rank."""
    dense, rank = len(options.shares) - 1, _asked(options, fraction)
    if rank > options.break_even:
        return dense
    return int(np.searchsorted(options.shares[:dense], rank / options.full_rank - 1e-12))


def _note(options: SiteOptions, position: int, fraction: float) -> str:
    if position < len(options.shares) - 1 or options.break_even == 0:
        return ""
    rank, largest = _asked(options, fraction), options.break_even
    return f"rank {rank} would store more than the dense matrix (break-even rank {largest})"

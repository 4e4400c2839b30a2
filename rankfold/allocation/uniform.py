"""Every site keeps the same fraction of what it costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankfold.allocation.options import Allowance, BudgetError, Choice, SiteOptions


def uniform(sites: Sequence[SiteOptions], allowance: Allowance) -> Choice:
    """The largest option of each site within the same fraction of its dense one, biases and cores counted.

    Args:
        sites: What each site can become.
        allowance: The fraction to keep.

    Returns:
        Options in the order of the sites; one whose matrix is too small for the budget stays dense, with a note.

    Raises:
        ValueError: If that holds for all of them.
    """
    chosen = []
    too_small = 0
    for options in sites:
        prices = options.prices(allowance.price)
        dense = len(prices) - 1
        fits = np.flatnonzero(prices <= allowance.keep * prices[-1])
        if len(fits):
            note = "all parameters are kept" if fits[-1] == dense else ""
            chosen.append(options.option(int(fits[-1]), note))
            continue
        too_small += 1
        chosen.append(options.option(dense, "too small for any rank within this budget"))
    if too_small == len(sites):
        first = sites[0]
        raise BudgetError(
            f"{first.name}: keeping {allowance.keep:g} of {first.parameters[-1]:.0f} parameters leaves no room for "
            f"rank 1 of a matrix of shape {first.shape}. Raise `keep`, or choose other `sites`."
        )
    return Choice(tuple(chosen))

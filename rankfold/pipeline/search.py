"""The smallest model within a limit on the loss, found by trying."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from rankfold.allocation import BudgetError
from rankfold.errors import InputError
from rankfold.plan import Plan

STEPS = 6
"""Tries at most."""

SPENT = 0.9
"""Share of the limit from which on a try is near enough: each costs as much as a compression."""

LARGEST = 63 / 64
"""Share that is tried at most."""

POWER = 1.5
"""Power of the removed share with which the loss rises, until two tries say it better."""

AIM = 0.97
"""Share of the limit that is aimed at between two measured tries: a little above it would be a try in vain."""


def smallest_within(
    limit: float,
    attempt: Callable[[float, str], Plan],
    rise: Callable[[], float],
    restore: Callable[[], None],
    fewest: float = 0.0,
) -> tuple[Plan, float]:
    """The smallest share whose loss rises by no more than a limit, or nearly; its plan is carried out at the end.

    What earlier tries measured says where to try next (`_between`); a try that comes near the limit ends the search.

    Args:
        limit: Rise of the loss, in nats per token.
        attempt: Compresses the model to a share, in place; the second argument is the title of the try.
        rise: Measures how far the loss of the compressed model lies above the dense one's.
        restore: Puts the dense layers back.
        fewest: The share from which on is searched; above 0 shares are halved as factors, since bits are few or many by
            factors, parameters by differences.

    Returns:
        The plan, and the rise that was measured.

    Raises:
        ValueError: If no share keeps within the limit.
    """
    low, high = _End(fewest), _End(1.0)
    best: float | None = None
    # Tries along the line between two measured ends, and whether they kept within the limit. Two in a row on the same
    # side show that the line says little: the interval is halved from then on.
    along: list[bool] = []
    # Why no size can be had, until one was.
    unmet = ""
    some_were_measured = False
    for number in range(1, STEPS + 1):
        halve = any(one == other for one, other in pairwise(along))
        measured_ends = low.rise is not None and high.rise is not None
        share = _between(low, high, limit, bits=fewest > 0, halve=halve)
        if number == STEPS and best is None:
            share = LARGEST
        try:
            plan = attempt(share, f"try {number} of at most {STEPS}, keep {share:.3f}: ")
        except BudgetError as error:
            restore()
            low, unmet = _End(share), str(error)
            continue
        measured = rise()
        some_were_measured = True
        if measured <= limit:
            high, best = _End(share, measured), share
            if measured >= SPENT * limit or number == STEPS:
                return plan, measured
        else:
            low = _End(share, measured)
        if measured_ends:
            along.append(measured <= limit)
        restore()
        if low.share >= LARGEST:
            break
    if not some_were_measured:
        raise InputError(f"No size that was tried can be had, up to {low.share:.3f} of the sites: {unmet}")
    if best is None:
        raise InputError(
            f"No compression keeps the loss increase within {limit:g} nats per token: removing "
            f"{1 - low.share:.3f} of the sites already costs more. Raise `max_loss_increase`, or recover "
            "afterwards (rankfold recover)."
        )
    return attempt(best, f"keep {best:.3f}: "), rise()


class _End(NamedTuple):
    """One end of the interval in which the share lies, and what was measured there."""

    share: float
    rise: float | None = None


def _between(low: _End, high: _End, limit: float, bits: bool, halve: bool) -> float:
    """Where to try next: where the logarithm of the rise, taken for a straight line, meets that of what is aimed at.

    Over bits it is one over the share, where a bit less quadruples the rise; over ranks over the logarithm of what is
    removed, of which the rise is a power. With two measured ends the line goes through both, unless `halve` says that
    it has not helped. Never near an end, so that the interval shrinks.
    """
    middle = math.sqrt(low.share * high.share) if bits else (low.share + high.share) / 2
    ends = [end for end in (low, high) if end.rise is not None and 0 < end.rise < math.inf and 0 < end.share < 1]
    if not ends or (halve and len(ends) > 1):
        return middle
    points = [(end.share if bits else math.log(1 - end.share), math.log(end.rise or 0.0)) for end in ends]
    (x, y), (other_x, other_y) = points[0], points[-1]
    slope = (other_y - y) / (other_x - x) if len(ends) > 1 else -16 * math.log(4) if bits else POWER
    place = x + (math.log(AIM * limit) - y) / slope
    wanted = place if bits else 1 - math.exp(place)
    if high.rise is None:
        # The usual steepness may promise too much, and no share is known yet that keeps within the limit.
        wanted = max(wanted, middle)
    # What one try alone says is not followed as far.
    apart = (0.05 if len(ends) > 1 else 0.25) * (high.share - low.share)
    return min(max(wanted, low.share + apart), high.share - apart, LARGEST)

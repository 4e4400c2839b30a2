"""The smallest model within a limit on the loss, found by trying."""

from __future__ import annotations

import math
from collections.abc import Callable

from rankfold.allocation import BudgetError
from rankfold.errors import InputError
from rankfold.plan import Plan

STEPS = 6
"""Halvings of the interval in which the share that is kept is searched."""


def smallest_within(
    limit: float,
    attempt: Callable[[float, str], Plan],
    rise: Callable[[], float],
    restore: Callable[[], None],
    fewest: float = 0.0,
) -> tuple[Plan, float]:
    """The smallest share whose loss rises by no more than a limit, by bisection; its plan is carried out at the end.

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
    low, high = fewest, 1.0
    best: float | None = None
    measured = 0.0
    tried: float | None = None
    plan: Plan | None = None
    for number in range(1, STEPS + 1):
        middle = math.sqrt(low * high) if fewest else (low + high) / 2
        try:
            plan, tried = attempt(middle, f"try {number} of {STEPS}, keep {middle:.3f}: "), middle
            measured = rise()
        except BudgetError:
            restore()
            low = middle
            continue
        if measured <= limit:
            high, best = middle, middle
        else:
            low = middle
        if number < STEPS or measured > limit:
            restore()
            plan = None
    if best is None:
        raise InputError(
            f"No compression keeps the loss increase within {limit:g} nats per token: removing {high - low:.3f} of the "
            "sites already costs more. Raise `max_loss_increase`, or recover afterwards (rankfold recover)."
        )
    if plan is None or tried != best:
        plan = attempt(best, f"keep {best:.3f}: ")
        measured = rise()
    return plan, measured

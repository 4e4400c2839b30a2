"""A budget becomes a plan: which sites are factorized, into which form, to which rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rankfold.allocation.knapsack import Choice, Price, knapsack
from rankfold.allocation.parity import parity
from rankfold.allocation.ranks import BudgetError, break_even_rank, dense_option, rank_within
from rankfold.allocation.uniform import uniform
from rankfold.errors import InputError
from rankfold.factorization import METHODS
from rankfold.plan import DENSE, Plan
from rankfold.sites import Site

ALLOCATIONS: dict[str, Callable[..., Any]] = {"uniform": uniform, "parity": parity, "knapsack": knapsack}
"""The values of `rankfold compress --allocation`."""

PRICES: dict[str, Price] = {
    "parameters": lambda option: option.parameters,
    "bytes": lambda option: option.bytes,
}
"""Units of a budget; predicted seconds come from a price of the caller's."""


def allocate(  # noqa: PLR0913
    sites: Sequence[Site],
    *,
    keep: float | None = None,
    rank: int | None = None,
    method: str = "whitened",
    allocation: str = "uniform",
    form: str | None = None,
    multiple: int = 1,
    losses: Mapping[str, Sequence[float]] | None = None,
    price: str | Price = "parameters",
    seed: int = 0,
) -> Plan:
    """Choose an option for every site.

    Args:
        sites: The sites to decide on, usually `find_sites(model).select()`.
        keep: Fraction of what the dense sites cost to keep, in (0, 1]: of their parameters, biases and cores
            counted, or of the unit that `price` names.
        rank: An explicit rank for all sites, instead of `keep`.
        method: A key of `rankfold.factorization.METHODS`.
        allocation: A key of `ALLOCATIONS`.
        form: `low_rank`, `tucker` or `pivoted`; without it the method's own.
        multiple: Ranks are lowered to a multiple of this.
        losses: Predicted loss of every site at each rank from 0 to full (`rankfold.compression.predicted_losses`),
            which `knapsack` needs.
        price: For `knapsack`: `parameters`, `bytes`, or a function that prices an option, for example in seconds.
        seed: Seed of everything random that made the plan's data.

    Raises:
        ValueError: If the budget is not one of `keep` and `rank`, is out of range or cannot be met, if a name is
            unknown, or if there are no sites.
    """
    for name, value, known in (("method", method, METHODS), ("allocation", allocation, ALLOCATIONS)):
        if value not in known:
            raise InputError(f"The {name} must be one of {sorted(known)}, but got {value!r}.")
    if (keep is None) == (rank is None):
        raise InputError(f"Exactly one of keep and rank must be given, but got keep={keep} and rank={rank}.")
    if keep is not None and not 0 < keep <= 1:
        raise InputError(f"keep is the fraction of parameters kept and must lie in (0, 1], but got {keep:g}.")
    if multiple < 1:
        raise InputError(f"Ranks can be lowered to a multiple of 1 or more, but got {multiple}.")
    if not sites:
        raise InputError("There must be at least one site to decide on, but the model has none that were chosen.")
    chosen = METHODS[method]
    form = _form(method, form)
    shared: dict[str, Any] = {"multiple": multiple, "adds_bias": chosen.adds_bias}
    bound = None
    if allocation == "knapsack":
        options, bound = _knapsack(sites, form, keep, losses, price, shared)
    else:
        options = ALLOCATIONS[allocation](sites, form, keep=keep, rank=rank, **shared)
    return Plan(
        options=tuple(option if option.form == DENSE else replace(option, method=method) for option in options),
        method=method,
        allocation=allocation,
        keep=keep,
        rank=rank,
        bound=bound,
        seed=seed,
    )


def _form(method: str, form: str | None) -> str:
    own = METHODS[method].form
    allowed = ("tucker",) if own == "tucker" else ("low_rank", "pivoted")
    if form is not None and form not in allowed:
        raise InputError(f"The method {method} can be stored as {' or '.join(allowed)}, but got the form {form!r}.")
    return form or own


def _knapsack(
    sites: Sequence[Site],
    form: str,
    keep: float | None,
    losses: Mapping[str, Sequence[float]] | None,
    price: str | Price,
    shared: Mapping[str, Any],
) -> Choice:
    if keep is None:
        raise InputError("The knapsack shares out a budget: pass keep instead of a rank.")
    if losses is None:
        raise InputError("The knapsack needs predicted losses: pass those of rankfold.compression.predicted_losses.")
    if isinstance(price, str) and price not in PRICES:
        raise InputError(f"A budget is counted in {' or '.join(PRICES)}, or by a function, but got {price!r}.")
    pricing = PRICES[price] if isinstance(price, str) else price
    dense = sum(pricing(dense_option([site])) for site in sites)
    return knapsack(sites, form, budget=keep * dense, losses=losses, price=pricing, **shared)


__all__ = [
    "ALLOCATIONS",
    "PRICES",
    "BudgetError",
    "Choice",
    "Price",
    "allocate",
    "break_even_rank",
    "knapsack",
    "rank_within",
]

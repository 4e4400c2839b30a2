"""A budget becomes a plan: which sites are factorized, into which form, to which rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from rankfold.allocation.knapsack import knapsack
from rankfold.allocation.options import (
    PRICES,
    Allowance,
    BudgetError,
    Choice,
    Price,
    SiteOptions,
    at_rank,
    site_options,
)
from rankfold.allocation.parity import parity
from rankfold.allocation.ranks import break_even_rank, dense_option, factorized_option, option_at, rank_within
from rankfold.allocation.uniform import uniform
from rankfold.allocation.widths import (
    FACTOR_BITS,
    MULTIPLE,
    WAYS,
    WidthLosses,
    check_ways,
    uniform_widths,
    width_options,
)
from rankfold.calibration import Statistics
from rankfold.errors import InputError
from rankfold.factorization import METHODS
from rankfold.modules import FORMS, forms_for
from rankfold.plan import DENSE, Plan
from rankfold.registry import Registry
from rankfold.sites import Site


class Allocation(NamedTuple):
    """A way to share out a budget."""

    choose: Callable[[Sequence[SiteOptions], Allowance], Choice]
    """Maps what each site can become, and what all may cost, to one option per site, in order."""
    needs_losses: bool = False
    """Whether it compares predicted losses."""


ALLOCATIONS: Registry[Allocation] = Registry(
    "rankfold.allocations",
    {
        "uniform": Allocation(uniform),
        "parity": Allocation(parity),
        "knapsack": Allocation(knapsack, needs_losses=True),
    },
)
"""The values of `rankfold compress --allocation`."""


def allocate(  # noqa: PLR0913
    sites: Sequence[Site],
    statistics: Statistics | None = None,
    *,
    keep: float | None = None,
    rank: int | None = None,
    method: str | None = None,
    allocation: str | None = None,
    form: str | None = None,
    multiple: int | None = None,
    losses: Mapping[str, Sequence[float]] | Mapping[str, WidthLosses] | None = None,
    allow: Sequence[str] | None = None,
    price: str | Price | None = None,
    seed: int = 0,
) -> Plan:
    """Choose an option for every site.

    Args:
        sites: The sites to decide on, usually `find_sites(model).select()`.
        statistics: What `calibrate` measured: predicted losses are taken from it.
        keep: Fraction of what the dense sites cost to keep, in (0, 1]: of their parameters, biases and cores
            counted, or of the unit that `price` names.
        rank: An explicit rank for all sites, instead of `keep`.
        method: A key of `rankfold.factorization.METHODS`; by default `kfac` if the statistics have gradients,
            otherwise `whitened`.
        allocation: A key of `ALLOCATIONS`; by default `knapsack` if losses are known, otherwise `uniform`.
        form: A key of `rankfold.modules.FORMS`; by default the method's own.
        multiple: Ranks are rounded down to a multiple of this; by default a knapsack over ranks alone chooses
            among multiples of about a 32nd of the full rank, one over bits too among those of 8, others among all.
        losses: Predicted loss of every site at each rank from 0 to full, in place of those of the statistics; or in
            each width too (`rankfold.quantization.width_losses`), for a budget over bits and ranks.
        allow: With such losses, what the budget may be spent on: `rank`, `bits` or both, as by default.
        price: `parameters`, `bytes`, or a function that prices an option, for example in seconds; by default bytes
            where bits are chosen, else parameters.
        seed: Random seed with which the plan's data was made.

    Raises:
        ValueError: If the budget is not one of `keep` and `rank`, is out of range or cannot be met, if a name is
            unknown, or if there are no sites.
    """
    measured = statistics is not None and statistics.have_gradients
    method = method or ("kfac" if measured or _widths(losses) else "whitened")
    allocation = allocation or ("knapsack" if (measured or losses is not None) and rank is None else "uniform")
    widths = _widths(losses)
    price = price or ("parameters" if widths is None else "bytes")
    _check(sites, keep, rank, method, allocation, multiple, price)
    if widths is not None:
        return _shared(
            sites, widths, Allowance(keep or 0.0, price), method, allocation, allow or WAYS, multiple or 1, seed
        )
    curves: Mapping[str, Any] | None = losses
    entry, chosen = ALLOCATIONS[allocation], METHODS[method]
    form = form_for(method, form)
    bound = None
    if rank is not None:
        if entry.needs_losses:
            raise InputError(f"The allocation {allocation} distributes a budget: pass `keep` instead of a `rank`.")
        options = at_rank(sites, form, rank, multiple=multiple or 1, adds_bias=chosen.adds_bias)
    else:
        assert keep is not None, "one of keep and rank is given"
        if entry.needs_losses and curves is None:
            if statistics is None:
                raise InputError(
                    f"The allocation {allocation} needs predicted losses: pass the statistics from calibrate(...), or "
                    "your own losses=."
                )
            curves = statistics.losses(method)
        offered = site_options(
            sites, form, curves if entry.needs_losses else None, multiple=multiple, adds_bias=chosen.adds_bias
        )
        options, bound = entry.choose(offered, Allowance(keep, price))
    return Plan(
        options=tuple(option if option.form == DENSE else replace(option, method=method) for option in options),
        method=method,
        allocation=allocation,
        keep=keep,
        rank=rank,
        bound=bound,
        seed=seed,
    )


def _widths(losses: Mapping[str, Any] | None) -> Mapping[str, WidthLosses] | None:
    """Predicted losses in every width, where that is what was given."""
    given = losses is not None and any(isinstance(part, WidthLosses) for part in losses.values())
    return losses if given else None


def _shared(  # noqa: PLR0913, PLR0917
    sites: Sequence[Site],
    losses: Mapping[str, WidthLosses],
    allowance: Allowance,
    method: str,
    allocation: str,
    allow: Sequence[str],
    multiple: int,
    seed: int,
) -> Plan:
    """One budget over bits and ranks."""
    if not allowance.keep or not ALLOCATIONS[allocation].needs_losses:
        raise InputError(
            "A budget over bits and ranks is shared out by predicted losses: pass `keep`, or bytes, and the "
            f"allocation knapsack, not {allocation}."
        )
    ways = check_ways(allow)
    choose = ALLOCATIONS[allocation].choose
    options, bound = choose(width_options(sites, losses, ways=ways, multiple=multiple), allowance)
    if len(ways) > 1:
        # What is greedy may do worse with more to choose from, by a hair.
        with suppress(BudgetError):
            fewer, _ = choose(width_options(sites, losses, ways=["bits"], multiple=multiple), allowance)
            options = min(options, fewer, key=lambda chosen: sum(option.loss or 0.0 for option in chosen))
    return Plan(
        options=tuple(replace(option, method=method) if option.changes else option for option in options),
        method=method,
        allocation=allocation,
        keep=allowance.keep,
        bound=bound,
        seed=seed,
    )


def _check(
    sites: Sequence[Site],
    keep: float | None,
    rank: int | None,
    method: str,
    allocation: str,
    multiple: int | None,
    price: str | Price,
) -> None:
    for name, value, known in (("method", method, METHODS), ("allocation", allocation, ALLOCATIONS)):
        if value not in known:
            raise InputError(f"The {name} must be one of {sorted(known)}, but got {value!r}.")
    if (keep is None) == (rank is None):
        raise InputError(f"Exactly one of keep and rank must be given, but got keep={keep} and rank={rank}.")
    if keep is not None and not 0 < keep <= 1:
        raise InputError(f"keep is the fraction of parameters kept and must lie in (0, 1], but got {keep:g}.")
    if multiple is not None and multiple < 1:
        raise InputError(f"Ranks can be lowered to a multiple of 1 or more, but got {multiple}.")
    if isinstance(price, str) and price not in PRICES:
        raise InputError(f"A budget is counted in {' or '.join(PRICES)}, or by a function, but got {price!r}.")
    if not sites:
        raise InputError("There must be at least one site to decide on, but none of the model's were chosen.")


def form_for(method: str, form: str | None) -> str:
    """The form of a method's sites: its own, or another one that can be made from its factors.

    Raises:
        ValueError: If the form is unknown or cannot be made from them.
    """
    own = METHODS[method].form
    allowed = forms_for(FORMS[own].takes)
    if form is not None and form not in allowed:
        raise InputError(f"The method {method} can be stored as {' or '.join(allowed)}, but got the form {form!r}.")
    return form or own


__all__ = [
    "ALLOCATIONS",
    "FACTOR_BITS",
    "MULTIPLE",
    "PRICES",
    "WAYS",
    "Allocation",
    "Allowance",
    "BudgetError",
    "Choice",
    "Price",
    "SiteOptions",
    "WidthLosses",
    "allocate",
    "break_even_rank",
    "check_ways",
    "dense_option",
    "factorized_option",
    "form_for",
    "knapsack",
    "option_at",
    "rank_within",
    "site_options",
    "uniform_widths",
    "width_options",
]

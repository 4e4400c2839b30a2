"""What each site could become, as columns of numbers: an allocation chooses among them and knows nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankfold.allocation.ranks import break_even_rank, dense_option, groups, option_at, round_rank, usual_multiple
from rankfold.errors import InputError
from rankfold.modules import form_at, stored_bytes, stored_parameters
from rankfold.plan import Option
from rankfold.sites import Site

Array = NDArray[np.float64]

Price = Callable[[Option], float]
"""What an option costs in the unit of a budget."""

PRICES = ("parameters", "bytes")
"""Units of a budget that options know themselves; others come as a `Price`, for example in predicted seconds."""


class BudgetError(InputError):
    """A budget below what the smallest allowed ranks need."""


@dataclass(frozen=True)
class SiteOptions:
    """The options of one site, or of sites that get one rank together: by rising rank, the dense one last."""

    name: str
    """The first site, for messages."""
    shares: Array
    """Rank as a share of the full rank; 1 for the dense option."""
    parameters: Array
    bytes: Array
    losses: Array | None
    """Predicted rise of the loss in nats per token; `None` where it was not predicted."""
    make: Callable[[int], Option]
    """The option at a position."""
    full_rank: int
    shape: tuple[int, int]
    break_even: int = 0
    """Largest rank at which the form is smaller than the matrix; 0 where there is only the dense option."""
    multiple: int = 1
    """Ranks are multiples of this, or below it."""
    by_rank: bool = True
    """Whether rank is all that options differ in, so that neighbouring ones stand for each other."""

    def dense_price(self, price: str | Price) -> float:
        """What staying dense costs."""
        return float(getattr(self, price)[-1]) if isinstance(price, str) else price(self.make(len(self.shares) - 1))

    def prices(self, price: str | Price) -> Array:
        """What every option costs."""
        if isinstance(price, str):
            column: Array = getattr(self, price)
            return column
        return np.array([price(self.make(position)) for position in range(len(self.shares))])

    def option(self, position: int, note: str = "") -> Option:
        """The option at a position, with its predicted loss."""
        made = self.make(position)
        loss = made.loss if self.losses is None else float(self.losses[position])
        return replace(made, loss=loss, note=note or made.note)


class Allowance(NamedTuple):
    """What all options together may cost."""

    keep: float
    """As a fraction of what the dense options cost."""
    price: str | Price = "parameters"

    def limit(self, sites: Sequence[SiteOptions]) -> float:
        """The budget in the unit of the price."""
        return self.keep * sum(options.dense_price(self.price) for options in sites)


class Choice(NamedTuple):
    """The chosen options, and what no choice within the budget can fall below."""

    options: tuple[Option, ...]
    bound: float | None = None
    """Lower bound of the sum of predicted losses, where the allocation knows one."""


def site_options(
    sites: Sequence[Site],
    form: str,
    losses: Mapping[str, Sequence[float]] | None = None,
    *,
    multiple: int | None = None,
    adds_bias: bool = False,
) -> list[SiteOptions]:
    """Every rank of every site at which a form stores less than the matrix, and staying dense.

    Args:
        sites: Sites to decide on; the slices of one stack of experts get one rank.
        form: The form of factorized sites.
        losses: Predicted loss of each site at every rank from 0 to full. Where given, sites without an entry can
            only stay dense.
        multiple: Ranks are multiples of this, or below it; by default every rank is offered, or where losses are
            compared multiples that leave few shapes (`usual_multiple`).
        adds_bias: Whether the method gives a bias to sites that have none.
    """
    result = []
    for group in groups(sites):
        known = [site for site in group if losses is None or site.name in losses]
        # Of a stack of experts those without a prediction stay dense, and are priced so.
        unknown = [site for site in group if site not in known]
        result += [_of_group(known, form, losses, multiple, adds_bias)] if known else []
        result += [_only_dense(unknown)] if unknown else []
    return result


def _of_group(
    group: Sequence[Site],
    form: str,
    losses: Mapping[str, Sequence[float]] | None,
    multiple: int | None,
    adds_bias: bool,
) -> SiteOptions:
    site, count = group[0], len(group)
    full = min(site.out_features, site.in_features)
    multiple = multiple or (1 if losses is None else usual_multiple(full))
    bias = site.bias or adds_bias
    shape = (site.out_features, site.in_features)
    ranks, parameters, stored = _columns(form, shape, bias, site.bytes_per_parameter, multiple, site.bias)
    dense = dense_option(group)

    def make(position: int) -> Option:
        return dense if position == len(ranks) else option_at(form, group, ranks[position], adds_bias)

    total: Array | None = None
    if losses is not None:
        curve = np.sum([np.asarray(losses[site.name], dtype=float) for site in group], axis=0)
        total = np.array([*curve[list(ranks)], 0.0])
    return SiteOptions(
        site.name,
        np.array([*(rank / full for rank in ranks), 1.0]),
        np.array([*(count * n for n in parameters), dense.parameters], dtype=float),
        np.array([*(count * n for n in stored), dense.bytes], dtype=float),
        total,
        make,
        full,
        shape,
        break_even_rank(form, site, bias),
        multiple,
    )


def _only_dense(group: Sequence[Site]) -> SiteOptions:
    dense = dense_option(group, "no calibration token reached it, or no gradient")
    site = group[0]
    shape = (site.out_features, site.in_features)
    return SiteOptions(
        site.name,
        np.array([1.0]),
        np.array([float(dense.parameters)]),
        np.array([float(dense.bytes)]),
        np.array([0.0]),
        lambda position: dense,
        min(shape),
        shape,
    )


@lru_cache(maxsize=1024)
def _columns(
    form: str, shape: tuple[int, int], bias: bool, size: int, multiple: int, has_bias: bool
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Ranks that store less than the matrix, their parameters and their bytes."""
    last = break_even_rank(form, Site("", *shape, has_bias, size, None, "", ""), bias)
    ranks = tuple(rank for rank in range(1, last + 1) if round_rank(rank, multiple) == rank)
    at = form_at(form).at
    parameters = tuple(stored_parameters(form, *shape, at(rank), bias) for rank in ranks)
    return ranks, parameters, tuple(stored_bytes(form, shape, at(rank), bias, size) for rank in ranks)


def at_rank(
    sites: Sequence[Site], form: str, rank: int, *, multiple: int = 1, adds_bias: bool = False
) -> tuple[Option, ...]:
    """One rank for all sites; those above their break-even rank stay dense, with a note.

    Raises:
        ValueError: If the rank is past a site's limit.
    """
    return tuple(option_at(form, group, round_rank(rank, multiple), adds_bias) for group in groups(sites))


def least(sites: Sequence[SiteOptions], price: str | Price, floor: float = 0.0) -> float:
    """What the smallest allowed options of all sites cost together."""
    return float(sum(options.prices(price)[lowest(options, floor)] for options in sites))


def lowest(options: SiteOptions, floor: float) -> int:
    """Position of the first option whose rank is at least a share of the full rank, where options differ in rank."""
    return int(allowed(options, floor)[0])


def allowed(options: SiteOptions, floor: float) -> NDArray[np.intp]:
    """Positions of the options whose rank is at least a share of the full rank."""
    rank = min(max(1, math.ceil(floor * options.full_rank)), options.full_rank)
    return np.flatnonzero(options.shares >= rank / options.full_rank - 1e-12)

"""Every site keeps the same fraction of its parameters, or gets the same rank."""

from __future__ import annotations

from collections.abc import Sequence

from rankfold.allocation.ranks import BudgetError, dense_option, groups, option_at, rank_within, round_rank
from rankfold.plan import DENSE, Option
from rankfold.sites import Site


def uniform(
    sites: Sequence[Site], form: str, *, keep: float | None, rank: int | None, multiple: int, adds_bias: bool
) -> tuple[Option, ...]:
    """One option for each site, none storing more than `keep` of its parameters.

    Args:
        sites: Sites to decide on.
        form: The form of the factorized sites.
        keep: Fraction of each site's parameters to keep, biases and cores counted.
        rank: The rank of all sites, instead of `keep`.
        multiple: Ranks are lowered to a multiple of this.
        adds_bias: Whether the method gives a bias to sites that have none.

    Returns:
        Options in the order of the sites; one whose matrix is too small for the budget stays dense, with a note.

    Raises:
        ValueError: If that holds for all of them, or `rank` is past a site's limit.
    """
    options: list[Option] = []
    problem: BudgetError | None = None
    for group in groups(sites):
        try:
            options.append(_option(group, form, keep, rank, multiple, adds_bias))
        except BudgetError as error:
            problem = problem or error
            options.append(dense_option(group, "too small for any rank within this budget"))
    if problem is not None and all(option.form == DENSE for option in options):
        raise problem
    return tuple(options)


def _option(
    group: list[Site], form: str, keep: float | None, rank: int | None, multiple: int, adds_bias: bool
) -> Option:
    site = group[0]
    if rank is None:
        assert keep is not None
        if keep == 1:
            return dense_option(group, "all parameters are kept")
        rank = rank_within(form, site, int(keep * site.parameters), site.bias or adds_bias)
        if rank < 1:
            raise BudgetError(
                f"{site.name}: keeping {keep:g} of {site.parameters} parameters leaves no room for rank 1 of a "
                f"matrix of shape ({site.out_features}, {site.in_features}). Raise --keep, or choose other --sites."
            )
    return option_at(form, group, round_rank(rank, multiple), adds_bias)

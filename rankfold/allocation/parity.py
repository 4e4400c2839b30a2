"""Every site gets the same fraction of its full rank; where that does not pay it stays dense (LoRD's aspect ratios)."""

from __future__ import annotations

from collections.abc import Sequence

from rankfold.allocation.ranks import BudgetError, groups, option_at, round_rank
from rankfold.plan import Option
from rankfold.sites import Site


def parity(
    sites: Sequence[Site], form: str, *, keep: float | None, rank: int | None, multiple: int, adds_bias: bool
) -> tuple[Option, ...]:
    """One option for each site: a common fraction of the full rank, as large as the budget of all sites allows.

    A matrix of aspect ratio `a = min / max` must lose `a / (1 + a)` of its rank before a factorization is smaller
    than the matrix: half for a square one, a fifth at 1 : 4 (Kaushal et al. 2023, arXiv:2309.14021;
    docs/mathematics.md, eq. 7). So wide matrices are factorized first and square ones stay dense longest.

    Args:
        sites: Sites to decide on.
        form: The form of the factorized sites.
        keep: Fraction of the parameters of all sites together to keep.
        rank: The rank of all sites, instead of `keep`; sites above their break-even rank stay dense.
        multiple: Ranks are lowered to a multiple of this.
        adds_bias: Whether the method gives a bias to sites that have none.

    Raises:
        ValueError: If even rank 1 everywhere needs more than the budget, or `rank` is past a site's limit.
    """
    if rank is not None:
        return tuple(option_at(form, group, round_rank(rank, multiple), adds_bias) for group in groups(sites))
    assert keep is not None
    budget = keep * sum(site.parameters for site in sites)

    def options_at(fraction: float) -> tuple[Option, ...]:
        return tuple(
            option_at(form, group, round_rank(max(1, int(fraction * _full_rank(group))), multiple), adds_bias)
            for group in groups(sites)
        )

    if _stored(options_at(1.0)) <= budget:
        return options_at(1.0)
    low, high = 0.0, 1.0
    if _stored(options_at(low)) > budget:
        raise BudgetError(
            f"Keeping {keep:g} of {sum(site.parameters for site in sites)} parameters leaves no room for rank 1 "
            f"everywhere, which needs {_stored(options_at(low))}. Raise --keep, or choose fewer sites."
        )
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _stored(options_at(middle)) <= budget else (low, middle)
    return options_at(low)


def _full_rank(group: Sequence[Site]) -> int:
    return min(group[0].out_features, group[0].in_features)


def _stored(options: Sequence[Option]) -> int:
    return sum(option.parameters for option in options)

"""A budget becomes a plan: which sites are factorized, into which form, to which rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rankfold.allocation.parity import parity
from rankfold.allocation.ranks import break_even_rank, rank_within
from rankfold.allocation.uniform import uniform
from rankfold.factorization import METHODS
from rankfold.plan import DENSE, Option, Plan
from rankfold.sites import Site

ALLOCATIONS: dict[str, Callable[..., tuple[Option, ...]]] = {"uniform": uniform, "parity": parity}
"""The values of `rankfold compress --allocation`."""


def allocate(
    sites: Sequence[Site],
    *,
    keep: float | None = None,
    rank: int | None = None,
    method: str = "whitened",
    allocation: str = "uniform",
    multiple: int = 1,
    seed: int = 0,
) -> Plan:
    """Choose an option for every site.

    Args:
        sites: The sites to decide on, usually `find_sites(model).select()`.
        keep: Fraction of the sites' parameters to keep, in (0, 1], biases and cores counted.
        rank: An explicit rank for all sites, instead of `keep`.
        method: A key of `rankfold.factorization.METHODS`.
        allocation: A key of `ALLOCATIONS`.
        multiple: Ranks are lowered to a multiple of this.
        seed: Seed of everything random that made the plan's data.

    Raises:
        ValueError: If the budget is not one of `keep` and `rank`, is out of range or cannot be met, if a name is
            unknown, or if there are no sites.
    """
    for name, value, known in (("method", method, METHODS), ("allocation", allocation, ALLOCATIONS)):
        if value not in known:
            raise ValueError(f"The {name} must be one of {sorted(known)}, but got {value!r}.")
    if (keep is None) == (rank is None):
        raise ValueError(f"Exactly one of keep and rank must be given, but got keep={keep} and rank={rank}.")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"keep is the fraction of parameters kept and must lie in (0, 1], but got {keep:g}.")
    if multiple < 1:
        raise ValueError(f"Ranks can be lowered to a multiple of 1 or more, but got {multiple}.")
    if not sites:
        raise ValueError("There must be at least one site to decide on, but the model has none that were chosen.")
    chosen = METHODS[method]
    options = ALLOCATIONS[allocation](
        sites, chosen.form, keep=keep, rank=rank, multiple=multiple, adds_bias=chosen.adds_bias
    )
    return Plan(
        options=tuple(option if option.form == DENSE else replace(option, method=method) for option in options),
        method=method,
        allocation=allocation,
        keep=keep,
        rank=rank,
        seed=seed,
    )


__all__ = ["ALLOCATIONS", "allocate", "break_even_rank", "rank_within"]

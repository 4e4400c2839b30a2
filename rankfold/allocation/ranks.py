"""What a rank costs: the largest rank within a budget, and the rank at which a form stops paying."""

from __future__ import annotations

from collections.abc import Sequence

from rankfold.errors import InputError
from rankfold.modules import form_at, largest_rank, stored_bytes, stored_parameters
from rankfold.plan import Option
from rankfold.sites import Site

STEPS = 32
"""At least so many ranks are told apart."""

FEW_RANKS = 192
"""Below this full rank a matrix keeps all of them."""


def rank_within(form: str, site: Site, budget: int, bias: bool) -> int:
    """Largest rank whose form needs at most `budget` numbers, bias included; 0 where none does.

    >>> site = Site("up", 100, 50, False, 4, None, "up", "up")
    >>> rank_within("low_rank", site, budget=1600, bias=True), rank_within("tucker", site, budget=1600, bias=True)
    (10, 9)
    """
    return largest_rank(form, site.out_features, site.in_features, budget - site.out_features * bias)


def break_even_rank(form: str, site: Site, bias: bool) -> int:
    """Largest rank at which the form is smaller than the dense layer (docs/mathematics.md, eq. 7).

    >>> break_even_rank("low_rank", Site("q", 64, 64, False, 4, None, "q", "q"), bias=False)
    31
    """
    return rank_within(form, site, site.parameters - 1, bias)


def dense_option(group: Sequence[Site], note: str = "") -> Option:
    """The option to leave sites as they are."""
    parameters = sum(site.parameters for site in group)
    return Option(
        sites=tuple(site.name for site in group),
        bias=group[0].bias,
        parameters=parameters,
        bytes=parameters * group[0].bytes_per_parameter,
        note=note,
    )


def option_at(form: str, group: Sequence[Site], rank: int, bias: bool) -> Option:
    """The option to give every site of a group this rank; dense, with a note, where that would store more.

    Raises:
        ValueError: If the rank is below 1 or above `min(out, in)`.
    """
    site = group[0]
    limit = min(site.out_features, site.in_features)
    if not 1 <= rank <= limit:
        raise InputError(
            f"{site.name}: rank must lie between 1 and min(out, in) = {limit}, but got {rank} for a matrix of shape "
            f"({site.out_features}, {site.in_features}). Give another rank, or `keep` to let the allocation choose it."
        )
    bias = site.bias or bias
    break_even = break_even_rank(form, site, bias)
    if rank > break_even:
        return dense_option(group, f"rank {rank} would store more than the dense matrix (break-even rank {break_even})")
    return factorized_option(form, group, rank, bias)


def factorized_option(form: str, group: Sequence[Site], rank: int, bias: bool) -> Option:
    """The option to give every site of a group this rank, whether that pays or not."""
    site = group[0]
    ranks, shape = form_at(form).at(rank), (site.out_features, site.in_features)
    return Option(
        sites=tuple(site.name for site in group),
        form=form,
        ranks=ranks,
        bias=bias,
        parameters=stored_parameters(form, *shape, ranks, bias) * len(group),
        bytes=stored_bytes(form, shape, ranks, bias, site.bytes_per_parameter) * len(group),
    )


def round_rank(rank: int, multiple: int) -> int:
    """The rank lowered to a multiple, as fast kernels like it; a rank below one multiple stays as it is.

    >>> round_rank(100, 64), round_rank(50, 64)
    (64, 50)
    """
    return rank - rank % multiple if rank >= multiple else rank


def usual_multiple(full_rank: int) -> int:
    """The multiple of ranks of a matrix where losses are compared: the power of two at a 32nd of its full rank.

    Libraries compile a kernel for every shape that they meet. Ranks that all differ make a hundred shapes or more, each
    of which costs time in the first pass over so many tokens, and memory (docs/log.md); steps this fine cost the plan
    nothing that can be measured. Narrow matrices keep every rank.

    >>> usual_multiple(576), usual_multiple(4096), usual_multiple(128)
    (16, 128, 1)
    """
    return 1 if full_rank < FEW_RANKS else 2 ** (full_rank // STEPS).bit_length() // 2


def groups(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites that get one rank together: the slices of one stack of experts, and every other site alone."""
    result: dict[str, list[Site]] = {}
    for site in sites:
        stack = site.name.rpartition(".")[0] if site.kind.endswith(".*") else site.name
        result.setdefault(stack, []).append(site)
    return list(result.values())

"""The design space of low-rank decomposition: layers x tensors x ranks x forms, counted, enumerated and sampled."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from rankfold.allocation import break_even_rank
from rankfold.allocation.ranks import dense_option, option_at
from rankfold.errors import InputError
from rankfold.factorization import METHODS
from rankfold.plan import DENSE, Option, Plan
from rankfold.sites import Site

Point = tuple[int, ...]
"""For every site of a space 0 (dense), or the number of its choice."""

Losses = Mapping[str, Mapping[str, Sequence[float]]]
"""By method and site, predicted loss at each rank from 0 to full."""


class Choice(NamedTuple):
    """What a site can become, besides staying dense."""

    method: str
    """A key of `rankfold.factorization.METHODS`."""
    form: str
    rank: int | float
    """A rank; below 1 a share of the full rank."""

    def rank_of(self, site: Site) -> int:
        """The rank of this site."""
        full = min(site.out_features, site.in_features)
        return int(self.rank) if self.rank >= 1 else max(1, round(self.rank * full))

    def __str__(self) -> str:
        rank = f"rank {self.rank:g}" if self.rank >= 1 else f"{self.rank:.3g} of the full rank"
        return f"{self.method}, {self.form}, {rank}"


def choices(methods: Sequence[str], ranks: Sequence[int | float], form: str | None = None) -> tuple[Choice, ...]:
    """Every method with every rank, in the method's own form or a given one.

    Raises:
        ValueError: If a method is unknown or a rank not above 0.

    >>> [str(choice) for choice in choices(["svd"], [8, 0.5])]
    ['svd, low_rank, rank 8', 'svd, low_rank, 0.5 of the full rank']
    """
    for method in methods:
        if method not in METHODS:
            raise InputError(f"A method must be one of {', '.join(METHODS)}, but got {method!r}.")
    for rank in ranks:
        if not (0 < rank < 1 or (rank >= 1 and rank == int(rank))):
            raise InputError(f"A rank is a whole number, or a share of the full rank in (0, 1), but got {rank:g}.")
    return tuple(Choice(method, form or METHODS[method].form, rank) for method in methods for rank in ranks)


@dataclass(frozen=True, kw_only=True)
class DesignSpace:
    """All ways to decompose a model that some rules allow (arXiv:2405.06626, section 3, and without its restriction).

    >>> sites = [Site(f"{b}.{k}", 64, 64, False, 4, str(b), k, k) for b in range(3) for k in "qk"]
    >>> space = DesignSpace(sites=tuple(sites), choices=choices(["svd"], [1]))
    >>> space.size, DesignSpace(sites=space.sites, choices=space.choices, tied=True).combinations
    (64, 32)
    """

    sites: tuple[Site, ...]
    """What may be decomposed, all of it in blocks."""
    choices: tuple[Choice, ...]
    tied: bool = False
    """The paper's restriction: one subset of kinds for all decomposed blocks, and one choice."""
    one_choice: bool = False
    """One choice for all decomposed sites, whichever they are."""
    skip_first: int = 0
    """First blocks that stay dense."""
    skip_last: int = 0
    distance: int = 1
    """Least distance between decomposed blocks; 1 allows neighbours."""

    def __post_init__(self) -> None:
        """Refuse a space that means nothing.

        Raises:
            ValueError: If there is nothing to choose from, a site lies outside of the blocks, or blocks are unlike
                where choices are tied.
        """
        if not self.sites or not self.choices:
            raise InputError("A design space needs at least one site and one choice of method and rank.")
        if self.skip_first < 0 or self.skip_last < 0 or self.distance < 1:
            raise InputError(
                f"Blocks to skip must be 0 or more, distances 1 or more, but got {self.skip_first}, {self.skip_last} "
                f"and {self.distance}."
            )
        outside = [site.name for site in self.sites if site.block is None]
        if outside:
            raise InputError(f"{outside[0]}: a design space covers blocks, and this site is in none. Leave it out.")
        if self.skip_first + self.skip_last >= len(self.blocks):
            raise InputError(
                f"Of {len(self.blocks)} blocks {self.skip_first} + {self.skip_last} are skipped, and none is left."
            )
        if self.tied and any(set(self._kinds_of(block)) != set(self.kinds) for block in self.blocks):
            raise InputError(
                "Tied choices need blocks with the same tensor kinds, unlike this model's: do not tie them."
            )

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Paths of the blocks, in the order of the model."""
        return tuple(dict.fromkeys(str(site.block) for site in self.sites))

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of tensors."""
        return tuple(dict.fromkeys(site.kind for site in self.sites))

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the sites of every block."""
        return tuple(
            tuple(position for position, site in enumerate(self.sites) if site.block == block) for block in self.blocks
        )

    @cached_property
    def allowed(self) -> tuple[tuple[int, ...], ...]:
        """For every site the choices (from 1) that store less than it does, no rank of a form and method twice."""
        result = []
        for site in self.sites:
            found: dict[tuple[str, str, int], int] = {}
            for number, choice in enumerate(self.choices, 1):
                rank = choice.rank_of(site)
                if rank <= break_even_rank(choice.form, site, site.bias or METHODS[choice.method].adds_bias):
                    found.setdefault((choice.method, choice.form, rank), number)
            result.append(tuple(found.values()))
        return tuple(result)

    @property
    def combinations(self) -> int:
        """Ways to choose as the paper counts them: subsets of blocks x subsets of kinds x choices, empty ones too.

        Without `tied` it is the size. Llama-2-7B with one rank: 2^32 x 2^7.
        """
        if not self.tied:
            return self.size
        return self._subsets([1] * len(self.blocks))[-1] * (1 << len(self.kinds)) * len(self.choices)

    @property
    def size(self) -> int:
        """Points, the dense model once among them."""
        if self.tied:
            subsets = self._subsets([1] * len(self.blocks))[-1]
            return 1 + (subsets - 1) * ((1 << len(self.kinds)) - 1) * len(self.choices)
        if self.one_choice:
            return 1 + sum(self._subsets(self._ways(number))[-1] - 1 for number in range(1, len(self.choices) + 1))
        return self._subsets(self._ways())[-1]

    def __iter__(self) -> Iterator[Point]:
        """Every point once, the dense model first."""
        yield (0,) * len(self.sites)
        for chosen in self._block_subsets():
            if not chosen:
                continue
            if self.tied:
                subsets = itertools.product((False, True), repeat=len(self.kinds))
                for mask, number in itertools.product(subsets, range(1, len(self.choices) + 1)):
                    if any(mask):
                        yield self.tied_point(chosen, [k for k, on in zip(self.kinds, mask, strict=True) if on], number)
                continue
            for only in range(1, len(self.choices) + 1) if self.one_choice else (None,):
                parts = [self._block_points(block, only) for block in chosen]
                for combination in itertools.product(*parts):
                    yield self._joined(chosen, combination)

    def sample(self, rng: random.Random) -> Point:
        """A point, each as likely as any other."""
        if self.tied:
            if rng.randrange(self.size) == 0:
                return (0,) * len(self.sites)
            chosen = self._sample_blocks(rng, [1] * len(self.blocks), some=True)
            mask = rng.randrange(1, 1 << len(self.kinds))
            kinds = [kind for bit, kind in enumerate(self.kinds) if mask >> bit & 1]
            return self.tied_point(chosen, kinds, rng.randrange(1, len(self.choices) + 1))
        number: int | None = None
        if self.one_choice:
            sizes = [self._subsets(self._ways(n))[-1] - 1 for n in range(1, len(self.choices) + 1)]
            drawn = rng.randrange(1 + sum(sizes))
            if drawn == 0:
                return (0,) * len(self.sites)
            number = next(n for n, total in enumerate(itertools.accumulate(sizes), 1) if drawn <= total)
        chosen = self._sample_blocks(rng, self._ways(number), some=number is not None)
        parts = []
        for block in chosen:
            options = self._options(block, number)
            while not any(part := tuple(rng.choice(values) for values in options)):
                pass
            parts.append(part)
        return self._joined(chosen, parts)

    def tied_point(self, blocks: Sequence[int], kinds: Sequence[str], number: int) -> Point:
        """The point at which these kinds of these blocks, given by position, have one choice."""
        point = [0] * len(self.sites)
        for block in blocks:
            for position in self.members[block]:
                point[position] = number if self.sites[position].kind in kinds else 0
        return tuple(point)

    def holds(self, point: Point) -> bool:
        """Whether the rules allow a point."""
        if len(point) != len(self.sites) or not all(0 <= number <= len(self.choices) for number in point):
            return False
        active = [n for n, members in enumerate(self.members) if any(point[position] for position in members)]
        first, last = self.skip_first, len(self.blocks) - self.skip_last
        if any(not first <= block < last for block in active):
            return False
        if any(b - a < self.distance for a, b in itertools.pairwise(active)):
            return False
        numbers = set(point) - {0}
        if self.tied:
            kinds = [{self.sites[p].kind for p in self.members[block] if point[p]} for block in active]
            return len(numbers) <= 1 and all(chosen == kinds[0] for chosen in kinds)
        free = all(number in (0, *self.allowed[position]) for position, number in enumerate(point))
        return free and (not self.one_choice or len(numbers) <= 1)

    def plan(self, point: Point, losses: Losses | None = None) -> Plan:
        """What a point makes of every site, with parameters, bytes and, from `losses`, predicted loss.

        A choice that would store more than the dense matrix leaves it dense, with a note.

        Args:
            point: A point of this space.
            losses: By method, predicted loss of every site at each rank (`rankfold.compression.predicted_losses`).

        Raises:
            ValueError: If the rules of the space do not allow the point.
        """
        if not self.holds(point):
            raise InputError("The rules of the design space do not allow this point.")
        options = tuple(self.option(site, number, losses) for site, number in zip(self.sites, point, strict=True))
        methods = {option.method for option in options if option.form != DENSE}
        return Plan(options=options, method=methods.pop() if len(methods) == 1 else "", allocation="explore")

    def option(self, site: Site, number: int, losses: Losses | None = None) -> Option:
        """What a number makes of a site; dense, with a note, where it would store more."""
        if number == 0:
            return replace(dense_option([site]), loss=None if losses is None else 0.0)
        choice = self.choices[number - 1]
        rank = choice.rank_of(site)
        option = option_at(choice.form, [site], rank, METHODS[choice.method].adds_bias)
        if losses is not None and site.name in losses[choice.method]:
            option = replace(option, loss=losses[choice.method][site.name][rank] if option.form != DENSE else 0.0)
        return option if option.form == DENSE else replace(option, method=choice.method)

    def _kinds_of(self, block: str) -> Iterator[str]:
        return (site.kind for site in self.sites if site.block == block)

    def _options(self, block: int, number: int | None) -> list[tuple[int, ...]]:
        """What every site of a block can be, with any choice or one."""
        return [(0, *(c for c in self.allowed[position] if number in (None, c))) for position in self.members[block]]

    def _ways(self, number: int | None = None) -> list[int]:
        """In how many ways each block can be decomposed, with any choice or one."""
        return [
            math.prod(len(options) for options in self._options(block, number)) - 1 for block in range(len(self.blocks))
        ]

    def _subsets(self, ways: Sequence[int]) -> list[int]:
        """Weighted number of allowed subsets of the first 0, 1, ... blocks, each block in so many ways."""
        totals = [1]
        for block, count in enumerate(ways):
            usable = self.skip_first <= block < len(ways) - self.skip_last
            before = totals[max(block + 1 - self.distance, 0)]
            totals.append(totals[-1] + (count * before if usable else 0))
        return totals

    def _block_subsets(self, block: int = 0) -> Iterator[tuple[int, ...]]:
        """Allowed subsets of the blocks from one on."""
        last = len(self.blocks) - self.skip_last
        block = max(block, self.skip_first)
        yield ()
        for first in range(block, last):
            for rest in self._block_subsets(first + self.distance):
                yield (first, *rest)

    def _sample_blocks(self, rng: random.Random, ways: Sequence[int], some: bool) -> list[int]:
        """A subset of blocks in proportion to its ways, an empty one only if allowed."""
        totals = self._subsets(ways)
        while True:
            chosen, block = [], len(ways)
            while block > 0:
                if rng.randrange(totals[block]) < totals[block - 1]:
                    block -= 1
                else:
                    chosen.append(block - 1)
                    block = max(block - self.distance, 0)
            if chosen or not some:
                return chosen[::-1]

    def _block_points(self, block: int, number: int | None) -> list[tuple[int, ...]]:
        return [point for point in itertools.product(*self._options(block, number)) if any(point)]

    def _joined(self, blocks: Sequence[int], parts: Sequence[tuple[int, ...]]) -> Point:
        point = [0] * len(self.sites)
        for block, part in zip(blocks, parts, strict=True):
            for position, number in zip(self.members[block], part, strict=True):
                point[position] = number
        return tuple(point)


def multiplications(plan: Plan, sites: Sequence[Site]) -> int:
    """Multiplications of a token with all planned sites: every stored number that is no bias, once."""
    rows = {site.name: site.out_features for site in sites}
    return sum(
        option.parameters - (sum(rows[name] for name in option.sites) if option.bias else 0) for option in plan.options
    )

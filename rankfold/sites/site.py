"""What a site is: one factorizable weight, its place in the model, and what is fused into it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rankfold.errors import InputError


@dataclass(frozen=True)
class Part:
    """One of the projections that are fused into one matrix: the same rows of every group of rows."""

    name: str
    offset: int
    """First row within a group."""
    size: int
    """Rows within a group."""
    period: int
    """Rows of a group; all rows when the parts simply follow each other."""

    def rows(self, out_features: int) -> list[int]:
        """Row indices of the part in the fused matrix."""
        starts = range(self.offset, out_features, self.period)
        return [row for start in starts for row in range(start, start + self.size)]


@dataclass(frozen=True)
class Site:
    """One factorizable weight."""

    name: str
    """Module path, or path of a 3-D parameter and the index of a slice."""
    out_features: int
    in_features: int
    bias: bool
    bytes_per_parameter: int
    block: str | None
    """Path of the block that holds it; `None` outside the blocks (heads, poolers, input projections)."""
    kind: str
    """Path within the block, indices as `*`: the tensor kind that all blocks have in common."""
    reads: str
    """Name of the first site that reads the same input; its own name if none shares it."""
    parts: tuple[Part, ...] = ()
    """What is fused into the matrix, where that is known."""
    calls: int = 1
    """How often one forward pass calls the layer: more than once where blocks share their weights."""
    reads_text: bool = True
    """Whether what the layer reads depends on text; layers that process images or audio do not."""

    @property
    def parameters(self) -> int:
        """Numbers of the dense layer, its bias included."""
        return self.out_features * self.in_features + self.out_features * self.bias


@dataclass(frozen=True)
class Skipped:
    """A matrix of the model that is not a site."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, repr=False)
class Sites(Sequence[Site]):
    """The sites of a model in the order in which it holds them, and what was left out."""

    all: tuple[Site, ...]
    skipped: tuple[Skipped, ...] = ()

    def __repr__(self) -> str:
        """A line for each kind of site: its shape, and how many there are; then what is left out, by reason."""
        total = sum(site.parameters for site in self.all)
        lines = [f"{len(self)} sites, {total:,} parameters"]
        kinds: dict[tuple[str, int, int], int] = {}
        for site in self.all:
            key = (site.kind, site.out_features, site.in_features)
            kinds[key] = kinds.get(key, 0) + 1
        lines += [f"  {kind:<32} {count:>4} x {out} x {into}" for (kind, out, into), count in kinds.items()]
        reasons: dict[str, int] = {}
        for skipped in self.skipped:
            reasons[skipped.reason] = reasons.get(skipped.reason, 0) + 1
        lines += [f"  left out: {count} x {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)

    def __len__(self) -> int:
        """Number of sites."""
        return len(self.all)

    def __iter__(self) -> Iterator[Site]:
        """Site after site."""
        return iter(self.all)

    def __getitem__(self, index: Any) -> Any:
        """A site by position or by name."""
        if isinstance(index, str):
            return next(site for site in self.all if site.name == index)
        return self.all[index]

    def select(self, patterns: Sequence[str] = ()) -> Sites:
        """The sites that match any pattern; without patterns those inside the blocks that read text.

        A pattern is a shell pattern for the whole name, the end of a name (`mlp.c_proj`), or a kind.

        Raises:
            ValueError: If a pattern matches nothing.
        """
        if not patterns:
            chosen = [site for site in self.all if site.block and site.reads_text]
            outside = [
                Skipped(site.name, (site.out_features, site.in_features), _OUTSIDE if site.reads_text else _NO_TEXT)
                for site in self.all
                if not (site.block and site.reads_text)
            ]
            return Sites(tuple(chosen), (*self.skipped, *outside))
        for pattern in patterns:
            if not any(_matches(site, pattern) for site in self.all):
                kinds = sorted({site.kind for site in self.all})
                raise InputError(f"No site matches the pattern {pattern!r}. Kinds of sites in this model: {kinds}.")
        chosen = [site for site in self.all if any(_matches(site, pattern) for pattern in patterns)]
        names = {site.name for site in chosen}
        rest = [
            Skipped(s.name, (s.out_features, s.in_features), "not asked for") for s in self.all if s.name not in names
        ]
        return Sites(tuple(chosen), (*self.skipped, *rest))


_NO_TEXT = "reads images or sound, not text: name it with a pattern to include it, with a method that needs no data"
_OUTSIDE = "outside the blocks: name it with a pattern to include it"


def _matches(site: Site, pattern: str) -> bool:
    return fnmatch.fnmatchcase(site.name, pattern) or site.kind == pattern or site.name.endswith(f".{pattern}")

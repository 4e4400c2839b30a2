"""What each site is before anything is done: shape, break-even rank, share of the model, and its spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rankfold.allocation import break_even_rank
from rankfold.circumstances import Circumstances
from rankfold.cost import parameter_count
from rankfold.factorization.factors import check_finite
from rankfold.modules import linear_at
from rankfold.precision import widened
from rankfold.progress import Step, no_step
from rankfold.record import Record
from rankfold.sites import Site

DRAWN = 48
"""Singular values that a record holds."""


@dataclass(frozen=True)
class Inspection:
    """One site and what can be said of it without data."""

    site: Site
    break_even: int
    """Largest rank at which two factors are smaller than the matrix."""
    share: float
    """Share of the model's parameters."""
    spectrum: tuple[float, ...]
    """Singular values, largest first; empty for a model without weights."""

    @property
    def aspect(self) -> float:
        """Smaller side over larger side, in (0, 1]."""
        sides = (self.site.out_features, self.site.in_features)
        return min(sides) / max(sides)

    def energy(self, rank: int) -> float | None:
        """Share of the squared Frobenius norm within the first `rank` singular values."""
        squares = [value**2 for value in self.spectrum]
        total = sum(squares)
        return sum(squares[:rank]) / total if total else None

    def _thinned(self) -> list[float]:
        """Some of the singular values, evenly, relative to the largest: enough to draw them."""
        if not self.spectrum or not self.spectrum[0]:
            return []
        last = len(self.spectrum) - 1
        places = sorted({round(step * last / (DRAWN - 1)) for step in range(DRAWN)})
        return [float(f"{self.spectrum[place] / self.spectrum[0]:.4g}") for place in places]

    def record(self, here: Circumstances) -> Record:
        """The inspection as a record."""
        full = min(self.site.out_features, self.site.in_features)
        energies = {
            f"energy_at_rank_{rank}": self.energy(rank) for rank in (full // 8, full // 4, full // 2, self.break_even)
        }
        context: dict[str, Any] = {
            "shape": [self.site.out_features, self.site.in_features],
            "kind": self.site.kind,
            "block": self.site.block,
            "parts": [part.name for part in self.site.parts],
            "aspect_ratio": self.aspect,
            "share_of_model": self.share,
            "spectrum": self._thinned(),
            **energies,
        }
        return here.record(self.site.name, "break_even_rank", self.break_even, **context)


@torch.no_grad()
def inspect_sites(model: Any, sites: Sequence[Site], on_step: Step = no_step) -> list[Inspection]:
    """Look at every site; spectra come from the float64 eigenvalues of the smaller Gram matrix.

    Raises:
        ValueError: If a weight is not finite.
    """
    total = parameter_count(model)
    result = []
    for site in sites:
        weight = linear_at(model, site.name).weight.detach()
        try:
            spectrum = () if weight.is_meta else _spectrum(weight)
        except ValueError as error:
            error.args = (f"{site.name}: {error}",)
            raise
        share = site.parameters / total
        result.append(Inspection(site, break_even_rank("low_rank", site, site.bias), share, spectrum))
        on_step()
    return result


def _spectrum(weight: torch.Tensor) -> tuple[float, ...]:
    check_finite(weight)
    W = widened(weight)
    gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
    return tuple(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0).tolist())

"""What was measured of a model's sites, and the loss that it predicts for every rank of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rankfold.errors import InputError
from rankfold.factorization import METHODS, SiteMoments, predicted_loss
from rankfold.modules import linear_at, matrix_of
from rankfold.sites import Site

STEPS = 64
"""Ranks at which a method without `ordered` is tried for its predicted losses; between them they are interpolated."""


class Statistics(Mapping[str, SiteMoments]):
    """Moments by site name, with the model whose weights they belong to."""

    def __init__(self, model: Any, sites: Sequence[Site], moments: Mapping[str, SiteMoments]) -> None:
        """What `calibrate` measured, which may lie on a shelf; the model is looked at when losses are asked for."""
        self._model, self._sites, self._moments = model, sites, moments
        self._losses: dict[str, dict[str, list[float]]] = {}
        self.kept: dict[str, Any] = {}
        """What rooms above derive of each site, by its name, so that it is derived once."""

    def __getitem__(self, name: str) -> SiteMoments:
        """The moments of a site."""
        return self._moments[name]

    def __iter__(self) -> Iterator[str]:
        """Names of the sites."""
        return iter(self._moments)

    def __len__(self) -> int:
        """Number of sites."""
        return len(self._moments)

    def __repr__(self) -> str:
        """How much was measured."""
        vectors = max((m.vectors for s in self._moments.values() for m in s[:2] if m is not None), default=0)
        gradients = "with" if self.have_gradients else "without"
        return f"Statistics of {len(self)} sites, {vectors:,} tokens, {gradients} gradients"

    @property
    def have_gradients(self) -> bool:
        """Whether a loss was backpropagated, so that losses can be predicted."""
        return any(moments.gradients is not None for moments in self._moments.values())

    def losses(self, method: str = "kfac") -> dict[str, list[float]]:
        """Predicted rise of the loss for every site at each rank from 0 to full; computed once for each method.

        Raises:
            ValueError: If no gradients were measured.
        """
        if method not in self._losses:
            self._losses[method] = predicted_losses(self._model, self._sites, self, method)
        return self._losses[method]


def is_reached(moments: SiteMoments, gradients: bool = False) -> bool:
    """Whether anything is known of a site: tokens passed it and, where that is asked, a gradient came back."""
    measured = moments.inputs or moments.outputs
    if measured is None or not measured.vectors:
        return False
    return not gradients or (moments.gradients is not None and bool(moments.gradients.second.any()))


@torch.no_grad()
def predicted_losses(
    model: Any, sites: Sequence[Site], statistics: Mapping[str, SiteMoments], method: str = "kfac"
) -> dict[str, list[float]]:
    """Predicted rise of the loss, in nats per token, for every site at each rank from 0 to full.

    A method that is `ordered` knows all ranks at once; of others those between a few are interpolated. Sites that no
    calibration token reached are left out.

    Raises:
        ValueError: If the statistics lack moments of gradients, or a weight is not finite.
    """
    losses = {}
    for site in sites:
        moments = statistics[site.name]
        if moments.inputs is None or moments.gradients is None:
            raise InputError(
                f"{site.name}: predicted losses need moments of gradients. Calibrate for a method that measures them: "
                "calibrate(model, sites, batches, method='kfac')."
            )
        if is_reached(moments, gradients=True):
            losses[site.name] = _losses_of(linear_at(model, site.name), moments, method)
    return losses


def _losses_of(linear: Any, moments: SiteMoments, method: str) -> list[float]:
    entry = METHODS[method]
    W, b = matrix_of(linear)
    if entry.ordered is not None:
        return entry.ordered(W, b, moments).losses.tolist()  # type: ignore[no-any-return]
    full = min(W.shape)
    ranks = sorted({round(step * full / STEPS) for step in range(1, STEPS + 1)} - {0} | {full})
    values = [predicted_loss(W, torch.zeros_like(W), moments, entry.adds_bias)]
    for rank in ranks:
        factors = entry.factorize(W, b, moments, rank)
        values.append(predicted_loss(W, factors.product(), moments, entry.adds_bias) if rank < full else 0.0)
    return np.interp(range(full + 1), [0, *ranks], values).tolist()  # type: ignore[no-any-return]

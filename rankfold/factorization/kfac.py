"""Two-sided weighting: errors count by the inputs' moment and by that of the loss's gradient at the outputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rankfold.errors import InputError
from rankfold.factorization.factors import Factors, Moments, SiteMoments, check_finite, check_rank, weighed

FLOOR = 1e-8
"""Least share of the mean eigenvalue that is added to a moment before it is inverted."""


class Ordered(NamedTuple):
    """A factorization whose first `r` columns are the optimum of rank `r`: one decomposition serves every rank."""

    up: Float[Tensor, "out full"]
    down: Float[Tensor, "full in"]
    reader: Float[Tensor, "full out"] | None
    """Projects a weight onto the columns of `up`: `reader @ W` is `down`. `None` where the gradients' moment was only
    measured as `W^T G W`, which does not tell."""
    losses: Float[Tensor, " full_plus_one"]
    """Predicted rise of the loss at every rank from 0 to full, in nats per token; 0 at the full rank."""
    mean: Float[Tensor, " in"] | None
    """Mean input, where the layer has a bias that keeps the mean output."""
    shrinkage: float
    """How far the inverted moment was drawn towards a multiple of the identity, 0 to 1."""

    def truncate(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        rank: int,
        correction: Tensor | None = None,
    ) -> Factors:
        """The factors of one rank.

        Args:
            weight: The matrix that was factorized.
            bias: Its bias.
            rank: Columns to keep.
            correction: Added to the weight before it is projected (`rankfold.compression.drift`).

        Raises:
            ValueError: If `rank` is not between 1 and `min(out, in)`, or there is no `reader` for a correction.
        """
        check_rank(rank, min(weight.shape))
        up, down = self.up[:, :rank], self.down[:rank]
        target = weight.to(up.dtype)
        if correction is not None:
            if self.reader is None:
                raise InputError(
                    "Drift is corrected by factors from whole moments, but these were worked out from products alone: "
                    "measure again with the same `drift`, on a shelf of its own."
                )
            down = down + self.reader[:rank] @ correction
            target = target + correction
        if bias is not None and self.mean is not None:
            mean = self.mean.to(up.dtype)
            lost = target @ mean - up @ (down @ mean)
            bias = (bias.to(lost.dtype) + lost).to(bias.dtype)
        dtype = weight.dtype
        return Factors(up.to(dtype), down.to(dtype), None, bias, float(self.losses[rank]))


def kfac(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, moments: SiteMoments, rank: int
) -> Factors:
    """The rank-`rank` matrix with the smallest predicted rise of the loss.

    Args:
        weight: The matrix to factorize.
        bias: Bias of the layer; where it has one, it keeps the mean output.
        moments: Moments of the inputs and of the loss's gradient at the outputs.
        rank: Rank of the result.

    Returns:
        Factors whose `error` is the predicted rise in nats per token (Martens and Grosse 2015, arXiv:1503.05671;
        docs/mathematics.md, eq. 8).

    Raises:
        ValueError: If `rank` is not between 1 and `min(out, in)`, an entry is not finite, or there are no gradients.
    """
    check_rank(rank, min(weight.shape))
    return ordered_kfac(weight, bias, moments).truncate(weight, bias, rank)


def ordered_kfac(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, moments: SiteMoments) -> Ordered:
    """The optimum of every rank at once: the singular value decomposition of `G^(1/2) W S^(1/2)`, mapped back.

    Only the moment of the smaller side is taken apart; the other one enters as a product with `W`, so it may be
    singular, and the product may be all that was measured: `W S W^T` as the moment of the outputs, `W^T G W` as that of
    the gradients at the inputs. The smaller one is drawn towards the identity as far as its sampling error asks for
    (`shrunk`).

    Raises:
        ValueError: If an entry is not finite, or there are no moments of inputs and gradients.
    """
    check_finite(weight)
    if moments.inputs is None or moments.gradients is None:
        raise InputError(
            "This method needs moments of the inputs and of the loss's gradients: pass a loss to calibrate(...)."
        )
    W = weight.double()
    centred = bias is not None
    inputs = moments.inputs.centred() if centred and moments.inputs.second.ndim == 2 else moments.inputs
    S, G = inputs.second.to(W.device), moments.gradients.second.to(W.device)
    reader: Tensor | None = None
    if W.shape[0] <= W.shape[1]:
        if G.ndim == 1:
            raise InputError(
                f"Of gradients at {len(G):,} outputs only the diagonal of the moment is measured, which serves a "
                f"matrix with more rows than columns, but this one has the shape {tuple(W.shape)}. Leave it out of "
                "`sites`."
            )
        seen = W @ S @ W.T if S.ndim == 2 else moments.output_moments(W, bias, centred)[0]
        drawn, shrinkage = shrunk(moments.gradients, W.device)
        L, inverse = _root_and_inverse(drawn)
        squares, U = _descending(L.T @ seen @ L)
        up, reader = inverse.T @ U, (L @ U).T
        down = reader @ W
        # Exact for what was measured: the shrunk moment chooses the directions, the measured ones say what they cost.
        errors = _errors(up.T @ G @ up, reader @ seen @ reader.T)
    else:
        weighted: Tensor | None = None
        if moments.input_gradients is None:
            weighted = weighed(G, W)
            seen = W.T @ weighted
        else:
            seen = moments.input_gradients.second.to(W.device)
        drawn, shrinkage = shrunk(inputs, W.device)
        R, inverse = _root_and_inverse(drawn)
        squares, V = _descending(R.T @ seen @ R)
        columns = R @ V
        up, down = W @ columns, V.T @ inverse
        errors = _errors(columns.T @ seen @ columns, down @ S @ down.T)
        if weighted is not None:
            # Directions that the loss does not see have no reader: nothing is projected onto them.
            tiny = torch.finfo(squares.dtype).tiny
            safe = squares > FLOOR * squares[:1].clamp(min=tiny)
            reader = torch.where(safe, 1 / squares.clamp(min=tiny), 0.0)[:, None] * (weighted @ columns).T
    mean = moments.inputs.mean.to(W.device) if centred else None
    return Ordered(up, down, reader, 0.5 * moments.share * errors, mean, shrinkage)


def _errors(A: Float[Tensor, "full full"], B: Float[Tensor, "full full"]) -> Float[Tensor, " full_plus_one"]:
    """`tr(G D S D^T)` for the error `D` of every rank, from the last one backwards, never rising with the rank.

    Args:
        A: `up^T G up`.
        B: `down S down^T`.
    """
    # D = sum of the dropped terms, so the error at rank r is the sum of A * B over rows and columns from r on.
    corner = (A * B).flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    errors = torch.cat([corner, corner.new_zeros(1)]).clamp(min=0)
    return errors.flip(0).cummax(0).values.flip(0)


def predicted_loss(
    weight: Float[Tensor, "out in"], other: Float[Tensor, "out in"], moments: SiteMoments, centred: bool = False
) -> float:
    """Predicted rise of the loss in nats per token when one matrix takes another's place, in whatever form.

    `1/2 tr(G D S D^T)` with `D` the difference (docs/mathematics.md, eq. 8); with `centred`, a bias keeps the mean.
    """
    assert moments.inputs is not None, "predicted losses need moments of the inputs"
    assert moments.gradients is not None, "predicted losses need moments of the gradients"
    D = other.double() - weight.double()
    S = moments.inputs.covariance if centred else moments.inputs.second
    return 0.5 * moments.share * float((weighed(moments.gradients.second.to(D.device), D) * (D @ S.to(D.device))).sum())


def shrunk(moments: Moments, device: torch.device) -> tuple[Float[Tensor, "size size"], float]:
    """A moment that can be inverted, drawn towards a multiple of the identity, and how far.

    Ledoit and Wolf (2004) estimate the best share as the sampling variance of the moment, from fourth moments,
    over its distance from the identity. The square of that share is taken: measured from 64 to 65,536 vectors, it
    helps as theirs does where vectors are few, and does no harm where they are many (docs/log.md). A moment of
    nothing but zeros becomes the identity, which weighs all directions alike.
    """
    S = moments.second.to(device)
    scale = float(S.diagonal().mean())
    if scale <= 0:
        return torch.eye(len(S), dtype=S.dtype, device=device), 1.0
    square = float(S.square().sum())
    distance = square - len(S) * scale**2
    sampling = max(moments.fourth - square, 0.0) / max(moments.vectors, 1)
    share = min(1.0, sampling / distance) if distance > FLOOR * square else FLOOR
    share = max(share**2, FLOOR)
    identity = torch.eye(len(S), dtype=S.dtype, device=device)
    return (1 - share) * S + share * scale * identity, share


def _root_and_inverse(S: Float[Tensor, "size size"]) -> tuple[Float[Tensor, "size size"], Float[Tensor, "size size"]]:
    """`L` with `L L^T = S` and its inverse: Cholesky, or the eigen-decomposition where rounding lost definiteness."""
    L, info = torch.linalg.cholesky_ex(S)
    if int(info) == 0:
        identity = torch.eye(len(S), dtype=S.dtype, device=S.device)
        return L, torch.linalg.solve_triangular(L, identity, upper=False)
    eigenvalues, V = torch.linalg.eigh(S)
    root = eigenvalues.clamp(min=FLOOR * float(S.diagonal().mean())).sqrt()
    return V * root, (V / root).T


def _descending(K: Float[Tensor, "size size"]) -> tuple[Float[Tensor, " size"], Float[Tensor, "size size"]]:
    """Eigenvalues of a symmetric matrix, largest first and never negative, and their vectors."""
    eigenvalues, vectors = torch.linalg.eigh((K + K.T) / 2)
    return eigenvalues.flip(0).clamp(min=0), vectors.flip(1)

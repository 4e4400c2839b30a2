"""A low-rank product written in fewer numbers: some of its rows as they are, the others as combinations of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

GROWTH = 1.2
"""Largest coefficient that is left: it bounds how far an error of a pivot row reaches into the others."""


BLOCK = 32
"""Columns that are rounded before all later ones are corrected."""


class Pivoted(NamedTuple):
    """A matrix of rank `r` as `r` of its rows and the coefficients of the others in them."""

    pivots: Int[Tensor, " rank"]
    """Indices of the rows that stand for themselves, ascending."""
    rows: Float[Tensor, "rank in"]
    coefficients: Float[Tensor, "rest rank"]
    """The other rows, in ascending order, in terms of `rows`; no entry larger than `GROWTH`."""

    def product(self) -> Float[Tensor, "out in"]:
        """The matrix, its rows in their own order."""
        full = self.rows.new_empty(len(self.rows) + len(self.coefficients), self.rows.shape[1])
        full[self.pivots] = self.rows
        full[other_rows(self.pivots, len(full))] = self.coefficients @ self.rows
        return full


def pivoted(up: Float[Tensor, "out rank"], down: Float[Tensor, "rank in"], dtype: torch.dtype | None = None) -> Pivoted:
    """Write a product in pivoted form: `r (m + n) - r^2` numbers instead of `r (m + n)`, the same matrix.

    Rows are chosen by LU with partial pivoting of an orthonormal basis of the column space, then exchanged until
    no coefficient is larger than `GROWTH`: every exchange multiplies the volume of the chosen rows, so this ends
    (Goreinov et al. 2010, "How to find a good submatrix"). The basis, not the product, is pivoted, so that the
    bound holds however ill-conditioned the product is (Zhao et al. 2025, PIFA; docs/mathematics.md, eq. 9).
    In a 16-bit dtype rounding errors of the rows would add up in all others, so each is compensated by the numbers
    that are rounded after it, as in GPTQ (Frantar et al. 2022, arXiv:2210.17323).

    Args:
        up: Left factor.
        down: Right factor.
        dtype: Dtype of the result; without it that of `up`.
    """
    dtype, device = dtype or up.dtype, up.device
    U, D = up.double(), down.double()
    Q, R = torch.linalg.qr(U)
    rank = U.shape[1]
    L, exchanges = torch.linalg.lu_factor(Q)
    order = _order(exchanges, len(U)).to(device)
    C = torch.linalg.solve_triangular(L[:rank], L[rank:], upper=False, left=False, unitriangular=True)
    order, C = _exchange(order, C)
    pivots, pivot_order = order[:rank].sort()
    rest, rest_order = order[rank:].sort()
    C = C[rest_order][:, pivot_order]
    W = Q @ (R @ D)
    rows = W[pivots]
    if torch.finfo(dtype).eps > 1e-4:
        identity = torch.eye(rank, dtype=C.dtype, device=device)
        rows = _rounded(rows.T, identity + C.T @ C, dtype).T
        C = _rounded(_least_squares(rows, W[rest]), rows @ rows.T, dtype)
    return Pivoted(pivots, rows.to(dtype), C.to(dtype))


def _least_squares(rows: Float[Tensor, "rank in"], others: Float[Tensor, "rest in"]) -> Float[Tensor, "rest rank"]:
    """The coefficients of other rows in the rounded ones."""
    H = _damped(rows @ rows.T)
    solution: Tensor = torch.linalg.solve(H, rows @ others.T).T
    return solution


def _rounded(matrix: Float[Tensor, "a b"], H: Float[Tensor, "b b"], dtype: torch.dtype) -> Float[Tensor, "a b"]:
    """Columns rounded one after the other, the later ones making good the error `tr(E H E^T)` of the earlier."""
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(_damped(H))), upper=True)
    # Columns lie as rows, and those beyond a block learn of its errors in one product.
    left = matrix.T.clone(memory_format=torch.contiguous_format)
    for start in range(0, len(left), BLOCK):
        here = left[start : start + BLOCK]
        own = upper[start : start + BLOCK, start : start + BLOCK]
        errors = torch.empty_like(here)
        for j in range(len(here)):
            rounded = here[j].to(dtype).to(here.dtype)
            errors[j] = (here[j] - rounded) / own[j, j]
            here[j + 1 :] -= torch.outer(own[j, j + 1 :], errors[j])
            here[j] = rounded
        left[start + BLOCK :] -= upper[start : start + BLOCK, start + BLOCK :].T @ errors
    return left.T


def _damped(H: Float[Tensor, "b b"]) -> Float[Tensor, "b b"]:
    scale = float(H.diagonal().mean())
    return H + (1e-12 * scale if scale > 0 else 1.0) * torch.eye(len(H), dtype=H.dtype, device=H.device)


def _order(exchanges: Int[Tensor, " rank"], rows: int) -> Int[Tensor, " rows"]:
    """The order of rows after LAPACK's exchanges, each of a row with a later one; counted from 1."""
    order = list(range(rows))
    for first, second in enumerate(exchanges.tolist()):
        order[first], order[second - 1] = order[second - 1], order[first]
    return torch.tensor(order)


def _exchange(
    order: Int[Tensor, " out"], C: Float[Tensor, "rest rank"]
) -> tuple[Int[Tensor, " out"], Float[Tensor, "rest rank"]]:
    """Exchange pivot rows with others while a coefficient is larger than `GROWTH`."""
    rank = C.shape[1]
    if not C.numel():
        return order, C
    for _ in range(20 * rank):
        place = int(C.abs().argmax())
        i, j = divmod(place, rank)
        if abs(float(C[i, j])) <= GROWTH:
            break
        order[[j, rank + i]] = order[[rank + i, j]]
        # Row i enters for pivot j: the others' coefficients follow by a rank-one change.
        row = C[i].clone()
        row[j] -= 1
        pivot = C[i, j].clone()
        column = C[:, j].clone()
        C -= torch.outer(column / pivot, row)
        # The row that leaves takes the place of row i.
        row[j] += 1
        leaving = -row / pivot
        leaving[j] = 1 / pivot
        C[i] = leaving
    return order, C


def other_rows(pivots: Int[Tensor, " rank"], out_features: int) -> Int[Tensor, " rest"]:
    """Indices of the rows that are no pivots, ascending."""
    chosen = torch.zeros(out_features, dtype=torch.bool, device=pivots.device)
    chosen[pivots] = True
    return (~chosen).nonzero().squeeze(1)

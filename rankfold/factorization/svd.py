"""Truncated singular value decompositions of one matrix: exact, through the smaller Gram matrix, randomized."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rankfold.factorization.factors import Factors, check_finite, check_rank


def truncated_svd(weight: Float[Tensor, "out in"], rank: int) -> Factors:
    """Best rank-`rank` approximation of a matrix in the Frobenius norm.

    The singular values are shared evenly between the factors. The left singular vectors come from the float64
    eigen-decomposition of the smaller Gram matrix: squaring costs half the digits, and float64 has twice those
    of float32, so that nothing is lost for weights stored in float32 or less; float64 weights take the SVD itself.

    Args:
        weight: The matrix to factorize.
        rank: Number of singular triplets kept.

    Returns:
        Factors in the dtype of `weight`; their error is the tail of the spectrum (Eckart and Young 1936;
        docs/mathematics.md, eq. 2).

    Raises:
        ValueError: If `rank` is not between 1 and `min(out, in)`, or an entry is not finite.

    >>> factors = truncated_svd(torch.eye(3), rank=2)
    >>> factors.up.shape, factors.down.shape, round(factors.error, 6)
    (torch.Size([3, 2]), torch.Size([2, 3]), 1.0)
    """
    check_rank(rank, min(weight.shape))
    check_finite(weight)
    if weight.dtype == torch.float64:
        U, sigma, Vh = torch.linalg.svd(weight, full_matrices=False)
        error = float(sigma[rank:].square().sum())
        up, down = U[:, :rank], Vh[:rank]
        root = sigma[:rank].sqrt()
        return Factors(up * root, root[:, None] * down, None, None, error)
    W = weight.double()
    if W.shape[0] > W.shape[1]:
        flipped = truncated_svd_of_wide(W.T, rank)
        up, down, error = flipped.down.T, flipped.up.T, flipped.error
    else:
        up, down, _, _, error = truncated_svd_of_wide(W, rank)
    return Factors(up.to(weight.dtype), down.to(weight.dtype), None, None, error)


def truncated_svd_of_wide(W: Float[Tensor, "out in"], rank: int) -> Factors:
    """Truncated SVD through the eigenvectors of `W W^T`, for float64 matrices with no more rows than columns."""
    eigenvalues, vectors = torch.linalg.eigh(W @ W.T)
    U = vectors[:, -rank:].flip(1)
    root = eigenvalues[-rank:].flip(0).clamp(min=0).pow(0.25)
    # U^T W equals sigma V^T; rows of a vanishing sigma hold only rounding and must not be divided by it.
    inverse = torch.where(root > torch.finfo(W.dtype).eps * root.max(), 1 / root, 0.0)
    down = inverse[:, None] * (U.T @ W)
    error = float(eigenvalues[:-rank].clamp(min=0).sum())
    return Factors(U * root, down, None, None, error)


def randomized_svd(
    weight: Float[Tensor, "out in"], rank: int, *, oversampling: int = 10, power_iterations: int = 2, seed: int = 0
) -> Factors:
    """Nearly best rank-`rank` approximation, for matrices too large for an exact decomposition.

    Args:
        weight: The matrix to factorize.
        rank: Number of singular triplets kept.
        oversampling: Additional random directions, `p` below.
        power_iterations: Multiplications with `W W^T` that sharpen the spectrum.
        seed: Seed of the random directions.

    Returns:
        Factors whose `error` is exact for this result. Without power iterations the projection onto the
        `rank + p` directions has an expected squared error of at most `1 + rank / (p - 1)` times the tail of
        the spectrum (Halko, Martinsson and Tropp 2011, theorem 10.5); power iterations only lower it, and the
        truncation to `rank` adds at most the tail once more (docs/mathematics.md, eq. 3).

    Raises:
        ValueError: If `rank` is not between 1 and `min(out, in)`, or an entry is not finite.
    """
    check_rank(rank, min(weight.shape))
    check_finite(weight)
    W = weight.double()
    generator = torch.Generator().manual_seed(seed)
    directions = min(rank + oversampling, *W.shape)
    Q = W @ torch.randn(W.shape[1], directions, dtype=W.dtype, generator=generator).to(W.device)
    Q = torch.linalg.qr(Q).Q
    for _ in range(power_iterations):
        Q = torch.linalg.qr(W.T @ Q).Q
        Q = torch.linalg.qr(W @ Q).Q
    U, sigma, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    root = sigma[:rank].sqrt()
    up, down = (Q @ U[:, :rank]) * root, root[:, None] * Vh[:rank]
    error = float(W.square().sum() - sigma[:rank].square().sum())
    return Factors(up.to(weight.dtype), down.to(weight.dtype), None, None, max(error, 0.0))

"""Factorizations that keep a layer's outputs on real inputs: LoRD's feature mimicking, and the input-whitened SVD."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rankfold.factorization.factors import Factors, SiteMoments, check_finite, check_rank


def feature_mimicking(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, moments: SiteMoments, rank: int
) -> Factors:
    """The rank-`rank` layer with the smallest mean squared error of its outputs, its bias free.

    `V_r`, the leading eigenvectors of the outputs' covariance, give `W' = V_r V_r^T W` and
    `b' = V_r V_r^T b + (I - V_r V_r^T) E[y]` (docs/mathematics.md, eq. 5).

    Args:
        weight: The matrix to factorize.
        bias: Bias of the layer, if it has one; the result always has one.
        moments: Moments of the inputs or of the outputs.
        rank: Number of eigenvectors kept.

    Returns:
        `up = V_r`, `down = V_r^T W`, the bias, and as error the sum of the dropped eigenvalues
        (Kaushal et al. 2023, arXiv:2309.14021; Yu and Wu 2023).

    Raises:
        ValueError: If `rank` is not between 1 and `min(out, in)`, or an entry is not finite.
    """
    V, error, mean = _leading_output_directions(weight, bias, moments, rank, centred=True)
    W = weight.double()
    b = torch.zeros_like(mean) if bias is None else bias.double()
    new_bias = mean + V @ (V.T @ (b - mean))
    dtype = weight.dtype
    return Factors(V.to(dtype), (V.T @ W).to(dtype), None, new_bias.to(dtype), error)


def whitened_svd(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, moments: SiteMoments, rank: int
) -> Factors:
    """The rank-`rank` matrix with the smallest mean squared error of `W x`, the bias left as it is.

    The optimum is the truncated SVD of `W S^(1/2)` mapped back, which is the projection of `W` onto that
    SVD's left singular vectors: nothing is inverted, so a singular `S` does no harm (docs/mathematics.md, eq. 6).

    Args:
        weight: The matrix to factorize.
        bias: Bias of the layer, returned unchanged.
        moments: Moments of the inputs or of the outputs.
        rank: Number of directions kept.

    Returns:
        Factors with the sum of the dropped eigenvalues of `W S W^T` as error (SVD-LLM, arXiv:2403.07378).

    Raises:
        ValueError: If `rank` is not between 1 and `min(out, in)`, or an entry is not finite.
    """
    U, error, _ = _leading_output_directions(weight, bias, moments, rank, centred=False)
    dtype = weight.dtype
    return Factors(U.to(dtype), (U.T @ weight.double()).to(dtype), None, bias, error)


def _leading_output_directions(
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    moments: SiteMoments,
    rank: int,
    centred: bool,
) -> tuple[Float[Tensor, "out rank"], float, Float[Tensor, " out"]]:
    """Orthonormal leading eigenvectors of `W S W^T`, the sum of the other eigenvalues, and the mean output."""
    check_rank(rank, min(weight.shape))
    check_finite(weight)
    W = weight.double()
    if moments.inputs is not None and W.shape[1] < W.shape[0]:
        S = (moments.inputs.covariance if centred else moments.inputs.second).to(W.device)
        A = W @ _square_root(S)
        eigenvalues, vectors = torch.linalg.eigh(A.T @ A)
        # QR instead of a division by the singular values: exact in span, and safe where they vanish.
        directions = torch.linalg.qr(A @ vectors[:, -rank:].flip(1)).Q
        b = 0.0 if bias is None else bias.double()
        mean = W @ moments.inputs.mean.to(W.device) + b
    else:
        second, mean = moments.output_moments(weight, bias, centred)
        eigenvalues, vectors = torch.linalg.eigh(second)
        directions = vectors[:, -rank:].flip(1)
    return directions, float(eigenvalues[:-rank].clamp(min=0).sum()), mean


def _square_root(S: Float[Tensor, "size size"]) -> Float[Tensor, "size size"]:
    """Any `L` with `L L^T = S`: Cholesky where it exists, otherwise from the eigen-decomposition."""
    L, info = torch.linalg.cholesky_ex(S)
    if int(info) != 0:
        eigenvalues, vectors = torch.linalg.eigh(S)
        L = vectors * eigenvalues.clamp(min=0).sqrt()
    root: Tensor = L
    return root

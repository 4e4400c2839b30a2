"""Tucker decomposition of one matrix and of a stack of matrices: HOSVD, then HOOI to convergence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rankfold.factorization.factors import Factors, check_finite, check_rank
from rankfold.factorization.svd import truncated_svd


class StackFactors(NamedTuple):
    """A stack of matrices as a core and one factor per mode."""

    core: Float[Tensor, "rank_stack rank_out rank_in"]
    stack: Float[Tensor, "stack rank_stack"]
    up: Float[Tensor, "out rank_out"]
    down: Float[Tensor, "in rank_in"]
    error: float
    """Squared Frobenius error over the whole stack."""

    def product(self) -> Float[Tensor, "stack out in"]:
        """The stack that the factors stand for."""
        return torch.einsum("abc,ka,ob,ic->koi", self.core, self.stack, self.up, self.down)


def tucker_matrix(weight: Float[Tensor, "out in"], rank: int) -> Factors:
    """Tucker decomposition of one matrix at equal ranks in both modes, its core kept apart.

    For one matrix the decomposition reaches exactly the error of the truncated SVD, with `rank ** 2` more
    numbers: the core is diagonal up to a rotation (docs/mathematics.md, eq. 4).

    Args:
        weight: The matrix to factorize.
        rank: Rank of both modes.

    Returns:
        Orthonormal `up` and `down` and the core between them (Moar et al. 2024, arXiv:2405.06626).

    Raises:
        ValueError: If `rank` is not between 1 and `min(out, in)`, or an entry is not finite.

    >>> factors = tucker_matrix(torch.eye(3), rank=2)
    >>> factors.core.shape
    torch.Size([2, 2])
    """
    svd = truncated_svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), rank)
    up, down = torch.linalg.qr(svd.up.double()).Q, torch.linalg.qr(svd.down.double().T).Q.T
    core = up.T @ weight.double() @ down.T
    dtype = weight.dtype
    return Factors(up.to(dtype), down.to(dtype), core.to(dtype), None, svd.error)


def fold_core(factors: Factors) -> Factors:
    """The same matrix in two factors: the core is multiplied into the larger one, whose products it saves."""
    if factors.core is None:
        return factors
    if len(factors.up) >= factors.down.shape[1]:
        return factors._replace(up=factors.up @ factors.core, core=None)
    return factors._replace(down=factors.core @ factors.down, core=None)


def tucker_stack(
    stack: Float[Tensor, "stack out in"],
    ranks: tuple[int, int, int],
    *,
    tolerance: float = 1e-8,
    max_iterations: int = 200,
) -> StackFactors:
    """Tucker decomposition of a stack of matrices: heads, experts, or neighbouring layers.

    Starts from the truncated higher-order SVD, whose squared error is at most three times the optimum's
    (De Lathauwer et al. 2000a), and improves one mode after the other by higher-order orthogonal iteration
    (De Lathauwer et al. 2000b), which never increases the error (docs/mathematics.md, eq. 4).

    Args:
        stack: Matrices of one shape.
        ranks: Rank of the stacking, output and input mode.
        tolerance: Stops when an iteration lowers the error by less than this share of the squared norm.
        max_iterations: Stops after this many iterations in any case.

    Raises:
        ValueError: If a rank is not between 1 and the size of its mode, or an entry is not finite.
    """
    for rank, size in zip(ranks, stack.shape, strict=True):
        check_rank(rank, size)
    check_finite(stack)
    T = stack.double()
    factors: list[Tensor | None] = [_leading_vectors(_unfold(T, mode), rank) for mode, rank in enumerate(ranks)]
    norm = float(T.square().sum())
    error = norm - float(_project(T, factors).square().sum())
    for _ in range(max_iterations):
        for mode, rank in enumerate(ranks):
            others = [None if other == mode else factor for other, factor in enumerate(factors)]
            factors[mode] = _leading_vectors(_unfold(_project(T, others), mode), rank)
        previous, error = error, norm - float(_project(T, factors).square().sum())
        if previous - error <= tolerance * norm:
            break
    core = _project(T, factors)
    dtype = stack.dtype
    stacking, up, down = (factor.to(dtype) for factor in factors if factor is not None)
    return StackFactors(core.to(dtype), stacking, up, down, max(error, 0.0))


def _unfold(T: Float[Tensor, "a b c"], mode: int) -> Float[Tensor, "size rest"]:
    """The tensor as a matrix whose rows run over one mode."""
    return T.movedim(mode, 0).flatten(1)


def _project(T: Float[Tensor, "a b c"], factors: list[Tensor | None]) -> Float[Tensor, "ra rb rc"]:
    """Each mode multiplied by the transpose of its factor; `None` leaves a mode alone."""
    for mode, factor in enumerate(factors):
        if factor is not None:
            T = torch.tensordot(factor.T, T, dims=([1], [mode])).movedim(0, mode)
    return T


def _leading_vectors(matrix: Float[Tensor, "rows columns"], rank: int) -> Float[Tensor, "rows rank"]:
    """Left singular vectors of the largest singular values, in float64."""
    if matrix.shape[0] > matrix.shape[1]:
        vectors: Tensor = torch.linalg.svd(matrix, full_matrices=False).U
        return vectors[:, :rank]
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
    return vectors[:, -rank:].flip(1)

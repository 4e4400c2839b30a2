"""Tucker decompositions against the SVD and against a naive higher-order SVD."""

from __future__ import annotations

import pytest
import torch

from rankfold.factorization import fold_core, truncated_svd, tucker_matrix, tucker_stack
from rankfold.factorization.tucker import _project


@pytest.mark.parametrize("shape", [(12, 12), (20, 9), (9, 20)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_a_matrix_loses_what_the_svd_loses(shape: tuple[int, int], rank: int) -> None:
    W = torch.randn(shape)
    tucker, svd = tucker_matrix(W, rank), truncated_svd(W, rank)
    torch.testing.assert_close(tucker.product(), svd.product(), rtol=1e-4, atol=1e-5)
    assert tucker.error == pytest.approx(svd.error, abs=1e-6)


@pytest.mark.parametrize("shape", [(20, 9), (9, 20)])
def test_folding_the_core_keeps_the_matrix(shape: tuple[int, int]) -> None:
    factors = tucker_matrix(torch.randn(shape), 4)
    folded = fold_core(factors)
    assert folded.core is None
    torch.testing.assert_close(folded.product(), factors.product())
    assert fold_core(folded) is folded


def test_factors_are_orthonormal() -> None:
    factors = tucker_matrix(torch.randn(20, 9), 4)
    torch.testing.assert_close(factors.up.T @ factors.up, torch.eye(4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(factors.down @ factors.down.T, torch.eye(4), rtol=1e-5, atol=1e-5)


def stack() -> torch.Tensor:
    return torch.randn(6, 10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_a_stack_at_full_rank_is_exact() -> None:
    factors = tucker_stack(stack(), (6, 10, 8))
    torch.testing.assert_close(factors.product(), stack())
    assert factors.error == pytest.approx(0, abs=1e-9)


def test_the_error_of_a_stack_is_the_one_claimed() -> None:
    factors = tucker_stack(stack(), (3, 5, 4))
    assert factors.error == pytest.approx(float((stack() - factors.product()).square().sum()), rel=1e-9)


def test_iteration_improves_on_the_higher_order_svd() -> None:
    T, ranks = stack(), (3, 5, 4)
    naive = []
    for mode, rank in enumerate(ranks):
        naive.append(torch.linalg.svd(T.movedim(mode, 0).reshape(T.shape[mode], -1)).U[:, :rank])
    hosvd = float(T.square().sum() - _project(T, list(naive)).square().sum())
    hooi = tucker_stack(T, ranks).error
    assert hooi < hosvd
    assert tucker_stack(T, ranks, max_iterations=0).error == pytest.approx(hosvd, rel=1e-9)


def test_a_stack_of_low_multilinear_rank_is_recovered() -> None:
    core = torch.randn(2, 3, 2, dtype=torch.float64)
    A, B, C = (torch.randn(size, rank, dtype=torch.float64) for size, rank in ((6, 2), (10, 3), (8, 2)))
    T = torch.einsum("abc,ka,ob,ic->koi", core, A, B, C)
    torch.testing.assert_close(tucker_stack(T, (2, 3, 2)).product(), T)


def test_ranks_past_a_mode_are_an_error() -> None:
    with pytest.raises(ValueError, match="but got 7"):
        tucker_stack(stack(), (7, 5, 4))

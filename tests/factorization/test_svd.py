"""Singular value decompositions against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.factorization import randomized_svd, truncated_svd


def naive(W: torch.Tensor, rank: int) -> torch.Tensor:
    U, s, Vh = torch.linalg.svd(W.double())
    return U[:, :rank] @ torch.diag(s[:rank]) @ Vh[:rank]


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_it_is_the_naive_truncation(out: int, columns: int, rank: int, seed: int) -> None:
    rank = min(rank, out, columns)
    W = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    factors = truncated_svd(W, rank)
    torch.testing.assert_close(factors.product().double(), naive(W, rank), rtol=1e-4, atol=1e-4)


def test_error_is_the_tail_of_the_spectrum() -> None:
    W = torch.randn(30, 20)
    tail = torch.linalg.svdvals(W.double())[7:].square().sum()
    assert truncated_svd(W, 7).error == pytest.approx(float(tail), rel=1e-6)
    assert truncated_svd(W.double(), 7).error == pytest.approx(float(tail), rel=1e-10)


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (32, 32)])
def test_an_ill_conditioned_float32_matrix_loses_nothing_to_the_gram_matrix(shape: tuple[int, int]) -> None:
    """Singular values over seven decades: as accurate as an SVD in float32 itself."""
    size = min(shape)
    U, V = (torch.linalg.qr(torch.randn(side, size, dtype=torch.float64)).Q for side in shape)
    W = (U * torch.logspace(0, -7, size, dtype=torch.float64)) @ V.T
    ours = truncated_svd(W.float(), size).product().double()
    Uf, sf, Vf = torch.linalg.svd(W.float(), full_matrices=False)
    theirs = ((Uf * sf) @ Vf).double()
    assert (ours - W).norm() <= 2 * (theirs - W).norm() + 1e-7


def test_factors_share_the_scale() -> None:
    factors = truncated_svd(torch.randn(16, 24), 5)
    torch.testing.assert_close(factors.up.norm(dim=0), factors.down.norm(dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("power_iterations", [0, 1, 2])
def test_the_randomized_error_is_exact_and_within_its_bound(power_iterations: int) -> None:
    U, V = (torch.linalg.qr(torch.randn(side, 60, dtype=torch.float64)).Q for side in (90, 60))
    W = (U * torch.linspace(1, 0.01, 60, dtype=torch.float64) ** 2) @ V.T
    rank, oversampling = 10, 10
    tail = float(torch.linalg.svdvals(W)[rank:].square().sum())
    errors = []
    for seed in range(20):
        factors = randomized_svd(W, rank, oversampling=oversampling, power_iterations=power_iterations, seed=seed)
        assert factors.error == pytest.approx(float((W - factors.product()).square().sum()), rel=1e-6)
        errors.append(factors.error)
    assert tail * (1 - 1e-9) <= min(errors)
    assert sum(errors) / len(errors) <= (2 + rank / (oversampling - 1)) * tail

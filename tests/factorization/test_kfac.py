"""Two-sided weighting: the optimum, the prediction, what nearly singular moments do, and the pivoted form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankfold.factorization import Moments, SiteMoments, kfac, ordered_kfac, pivoted, predicted_loss, shrunk
from rankfold.factorization.pivoted import GROWTH
from rankfold.modules import factorized_module


def moments_of(vectors: Tensor) -> Moments:
    fourth = float(vectors.square().sum(1).square().mean())
    return Moments(len(vectors), vectors.mean(0), vectors.T @ vectors / len(vectors), fourth)


def site(out: int, inside: int, vectors: int = 5000, seed: int = 0) -> tuple[Tensor, SiteMoments]:
    """A weight, and moments of inputs and gradients whose power falls over three decades."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> Tensor:
        scales = torch.logspace(0, -1.5, size, dtype=torch.float64)
        rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        return (torch.randn(vectors, size, generator=generator, dtype=torch.float64) * scales) @ rotation

    W = torch.randn(out, inside, generator=generator, dtype=torch.float64)
    return W, SiteMoments(inputs=moments_of(draw(inside)), gradients=moments_of(draw(out)))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_it_is_the_svd_between_the_square_roots(shape: tuple[int, int]) -> None:
    W, moments = site(*shape)
    assert moments.inputs is not None
    assert moments.gradients is not None

    def root(S: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(S)
        return vectors @ torch.diag(values.sqrt()) @ vectors.T, vectors @ torch.diag(values.rsqrt()) @ vectors.T

    (G, G_inverse), (S, S_inverse) = root(moments.gradients.second), root(moments.inputs.second)
    U, sigma, Vh = torch.linalg.svd(G @ W @ S)
    for rank in (1, 5, 11):
        naive = G_inverse @ (U[:, :rank] * sigma[:rank]) @ Vh[:rank] @ S_inverse
        factors = kfac(W, None, moments, rank)
        torch.testing.assert_close(factors.product(), naive, rtol=1e-3, atol=1e-3)
        assert factors.error == pytest.approx(0.5 * float(sigma[rank:].square().sum()), rel=1e-3)
        assert factors.error == pytest.approx(predicted_loss(W, factors.product(), moments), rel=1e-6)


def test_every_prefix_of_the_order_is_the_factorization_of_its_rank() -> None:
    W, moments = site(20, 12)
    ordered = ordered_kfac(W, None, moments)
    assert ordered.losses[-1] == 0
    assert bool((ordered.losses.diff() <= 0).all())
    for rank in (1, 4, 12):
        torch.testing.assert_close(ordered.truncate(W, None, rank).product(), kfac(W, None, moments, rank).product())


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_correction_moves_the_projected_weight(shape: tuple[int, int]) -> None:
    W, moments = site(*shape)
    correction = 0.1 * torch.randn(shape, dtype=torch.float64)
    ordered = ordered_kfac(W, None, moments)
    whole = ordered.truncate(W, None, 12, correction).product()
    torch.testing.assert_close(whole, W + correction)
    # At a lower rank it is the projection of the corrected weight: linear in the correction.
    base, moved = (ordered.truncate(W, None, 5, part).product() for part in (None, correction))
    twice = ordered.truncate(W, None, 5, 2 * correction).product()
    torch.testing.assert_close(twice - base, 2 * (moved - base))


def test_shrinkage_vanishes_with_the_number_of_vectors() -> None:
    _, few = site(12, 20, vectors=30)
    _, many = site(12, 20, vectors=30_000)
    assert few.inputs is not None
    assert many.inputs is not None
    assert shrunk(few.inputs, torch.device("cpu"))[1] > 100 * shrunk(many.inputs, torch.device("cpu"))[1]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("kind", ["zero inputs", "zero gradients", "constant", "fewer vectors than dimensions"])
def test_degenerate_moments_give_finite_factors(shape: tuple[int, int], kind: str) -> None:
    W, moments = site(*shape, vectors=5)
    out, inside = shape
    if kind == "zero inputs":
        moments = moments._replace(inputs=moments_of(torch.zeros(5, inside, dtype=torch.float64)))
    elif kind == "zero gradients":
        moments = moments._replace(gradients=moments_of(torch.zeros(5, out, dtype=torch.float64)))
    elif kind == "constant":
        ones = [torch.ones(5, size, dtype=torch.float64) for size in (inside, out)]
        moments = SiteMoments(inputs=moments_of(ones[0]), gradients=moments_of(ones[1]))
    for dtype in (torch.float64, torch.float32):
        factors = kfac(W.to(dtype), None, moments, 5)
        assert bool(torch.isfinite(factors.product()).all())
        assert factors.error >= 0
        assert factors.product().norm() < 100 * W.norm()


def test_gradients_are_asked_for() -> None:
    W, moments = site(12, 20)
    with pytest.raises(ValueError, match=r"pass a loss to calibrate"):
        kfac(W, None, moments._replace(gradients=None), 3)


def product(out: int, inside: int, rank: int, decades: float) -> tuple[Tensor, Tensor]:
    """Factors of a matrix whose singular values fall over some decades."""
    U = torch.linalg.qr(torch.randn(out, rank, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(inside, rank, dtype=torch.float64)).Q
    root = torch.logspace(0, -decades / 2, rank, dtype=torch.float64)
    return U * root, root[:, None] * V.T


@pytest.mark.parametrize(("out", "inside", "rank"), [(24, 16, 5), (16, 24, 16), (64, 64, 40), (1, 6, 1), (9, 3, 3)])
@pytest.mark.parametrize("decades", [0.0, 4.0, 12.0])
def test_the_pivoted_form_is_the_same_matrix_with_bounded_coefficients(
    out: int, inside: int, rank: int, decades: float
) -> None:
    up, down = product(out, inside, rank, decades)
    parts = pivoted(up, down)
    torch.testing.assert_close(parts.product(), up @ down, rtol=1e-9, atol=1e-12)
    assert len(set(parts.pivots.tolist())) == rank
    assert parts.coefficients.numel() == 0 or float(parts.coefficients.abs().max()) <= GROWTH + 1e-9
    numbers = parts.rows.numel() + parts.coefficients.numel()
    assert numbers == rank * (out + inside) - rank**2 <= out * inside


def test_growth_stays_bounded_where_elimination_alone_would_grow() -> None:
    """Wilkinson's matrix: partial pivoting doubles an entry at every step."""
    n = 24
    wilkinson = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64).tril(-1)
    wilkinson[:, -1] = 1
    up = torch.cat([wilkinson, 1e-3 * torch.ones(8, n, dtype=torch.float64)])
    parts = pivoted(up, torch.randn(n, 30, dtype=torch.float64))
    assert float(parts.coefficients.abs().max()) <= GROWTH + 1e-9


@pytest.mark.parametrize(("out", "inside", "rank"), [(64, 64, 30), (172, 64, 50), (64, 172, 60), (256, 256, 100)])
@pytest.mark.parametrize("decades", [0.0, 3.0, 7.0])
def test_in_bfloat16_the_error_is_at_most_twice_that_of_two_factors(
    out: int, inside: int, rank: int, decades: float
) -> None:
    torch.manual_seed(out + rank)
    up, down = product(out, inside, rank, decades)
    exact = up @ down
    two = up.bfloat16().double() @ down.bfloat16().double()
    parts = pivoted(up, down, torch.bfloat16)
    pivot = parts._replace(rows=parts.rows.double(), coefficients=parts.coefficients.double()).product()
    assert float((pivot - exact).norm()) <= 2 * float((two - exact).norm())


def test_a_zero_matrix_has_a_pivoted_form() -> None:
    parts = pivoted(torch.zeros(6, 2), torch.zeros(2, 4), torch.bfloat16)
    assert float(parts.product().abs().max()) == 0


@pytest.mark.parametrize("bias", [True, False])
def test_the_pivoted_layer_gives_what_two_factors_give(bias: bool) -> None:
    W, moments = site(20, 12)
    b = torch.randn(20, dtype=torch.float64) if bias else None
    factors = kfac(W, b, moments, 7)
    x = torch.randn(5, 12, dtype=torch.float64)
    two, pivot = factorized_module(factors), factorized_module(factors, "pivoted")
    torch.testing.assert_close(pivot(x), two(x))
    if bias:
        torch.testing.assert_close(pivot.bias, two.bias)
    assert sum(p.numel() for p in two.parameters()) - sum(p.numel() for p in pivot.parameters()) == 7**2


def test_the_diagonal_of_the_gradients_moment_may_be_all_that_is_known() -> None:
    W, moments = site(24, 10)
    assert moments.gradients is not None
    diagonal = moments.gradients.second.diagonal()
    whole = moments._replace(gradients=moments.gradients._replace(second=torch.diag(diagonal)))
    alone = moments._replace(gradients=moments.gradients._replace(second=diagonal))
    expected, found = ordered_kfac(W, None, whole), ordered_kfac(W, None, alone)
    torch.testing.assert_close(found.losses, expected.losses)
    torch.testing.assert_close(found.up[:, :4] @ found.down[:4], expected.up[:, :4] @ expected.down[:4])
    torch.testing.assert_close(found.reader, expected.reader)
    other = torch.zeros_like(W)
    assert predicted_loss(W, other, alone) == pytest.approx(predicted_loss(W, other, whole))


def test_a_diagonal_serves_more_rows_than_columns() -> None:
    W, moments = site(10, 24)
    assert moments.gradients is not None
    alone = moments._replace(gradients=moments.gradients._replace(second=moments.gradients.second.diagonal()))
    with pytest.raises(ValueError, match=r"serves a matrix with more rows than columns, but .* shape \(10, 24\)"):
        ordered_kfac(W, None, alone)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(10, 24), (24, 10)])
def test_the_wider_sides_moment_may_be_known_as_its_product_with_the_weight(shape: tuple[int, int], bias: bool) -> None:
    W, moments = site(*shape)
    assert moments.inputs is not None
    assert moments.gradients is not None
    S, G = moments.inputs.second, moments.gradients.second
    b = torch.linspace(-1, 1, len(W), dtype=W.dtype) if bias else None
    shift = torch.zeros(len(W), dtype=W.dtype) if b is None else b
    mean = W @ moments.inputs.mean
    # Of W x + b.
    second = W @ S @ W.T + torch.outer(mean, shift) + torch.outer(shift, mean) + torch.outer(shift, shift)
    if shape[0] < shape[1]:
        narrow = moments._replace(
            inputs=moments.inputs._replace(second=S.diagonal()), outputs=Moments(5000, mean + shift, second)
        )
    else:
        narrow = moments._replace(
            gradients=moments.gradients._replace(second=G.diagonal()),
            input_gradients=Moments(5000, torch.zeros_like(W[0]), W.T @ G @ W),
        )
    expected, found = ordered_kfac(W, b, moments), ordered_kfac(W, b, narrow)
    torch.testing.assert_close(found.losses, expected.losses)
    assert found.shrinkage == expected.shrinkage
    assert (found.reader is None) == (shape[0] > shape[1])
    for rank in (3, 10):
        one, other = expected.truncate(W, b, rank), found.truncate(W, b, rank)
        torch.testing.assert_close(other.product(), one.product())
        assert (one.bias is None) == (b is None)
        if one.bias is not None:
            torch.testing.assert_close(other.bias, one.bias)
